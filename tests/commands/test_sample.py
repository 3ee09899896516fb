"""Samples of a file's prompts: what each row gets, after a kill too, and what reads it next."""

import json

import numpy as np
import pytest
import torch
import transformers

import rmjax
from helpers import forked
from helpers.hf_models import NAMES, save_hf
from helpers.models import tiny_llama
from rmjax.choose import choose_file
from rmjax.data.choosing import Choice
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.generation.completions import SamplingSettings
from rmjax.generation.policy import Policy, load_policy
from rmjax.sample import sample
from rmjax.score import score

CONTEXT = 192
TEMPLATE = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "look_up"}}]
SETTINGS = SamplingSettings(n=2, max_tokens=8, seed=5)


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(directory, **options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    decoder = tiny_llama(max_position_embeddings=CONTEXT)
    return str(save_hf(directory, decoder, tokenizer=tokenizer, **options))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("causal"), causal=True)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("reward"), names=NAMES[:2])


ROWS = [
    {"prompt": "Why?", "id": "a"},
    {"prompt": "And?", "system": "Be brief.", "tools": TOOLS, "id": "b"},
    {"messages": turns("hi", "hello", "how?", "well"), "id": "c"},
    {"prompt": "p", "chosen": "x", "rejected": "y", "scores": [1], "id": "d"},
    {"prompt": "long" * 100, "id": "e"},
    {"prompt": "q" * (CONTEXT - 8), "id": "f"},
]


def test_a_row_gets_the_samples_of_its_prompt_and_number(model, tmp_path):
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", ROWS)
    lines = sample(model, source, str(out), SETTINGS, log_probabilities=True)
    found = read(out)
    assert [row["id"] for row in found] == [*"abcdef"]
    assert not {"messages", "chosen", "rejected", "scores"} & {k for row in found for k in row}
    assert [len(row["responses"]) for row in found] == [2, 2, 2, 2, 0, 2]
    told = {"role": "system", "content": "Be brief."}
    asked = [turns("Why?"), [told, *turns("And?")], turns("hi", "hello", "how?"), turns("p")]
    assert [row["prompt"] for row in found[:4]] == asked

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    tokens = [
        np.asarray(tokenizer.apply_chat_template(row["prompt"], tools=row.get("tools"), **options))
        for row in found
    ]
    assert "look_up" in tokenizer.decode(tokens[1])
    fitting = [0, 1, 2, 3, 5]
    # One call with the prompts in another order.
    expected = load_policy(model)(
        [tokens[i] for i in fitting[::-1]], SETTINGS, [i + 1 for i in fitting[::-1]]
    )
    for i, completions in zip(fitting[::-1], expected):
        assert found[i]["token_ids"] == [c.tokens.tolist() for c in completions]
        assert found[i]["responses"] == [c.text for c in completions]
        assert found[i]["ended"] == [c.ended for c in completions]
        for one, completion in zip(found[i]["log_probabilities"], completions):
            np.testing.assert_allclose(one, completion.log_probabilities, atol=1e-5)
    assert max(map(len, found[5]["token_ids"])) <= CONTEXT - len(tokens[5]) < 8

    said = "\n".join(lines)
    assert "6 rows" in said and "10 responses" in said
    assert f"1 prompts have no response: they fill the model's context of {CONTEXT}" in said
    assert "1 prompts leave less room than 8 tokens" in said
    assert "columns left out" in said
    assert "chosen (1), messages (1), rejected (1), scores (1)" in said


def test_a_killed_one_is_continued_to_the_same_bytes(model, tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.generation.sample_file._AT_ONCE", 6)  # three rows
    rows = [{"prompt": "q" * (5 * i), "number": i} for i in range(1, 9)]
    source = write(tmp_path / "in.jsonl", rows)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    sample(model, source, str(whole), SETTINGS, log_probabilities=True)
    calls = []
    original = Policy.__call__

    def killed(self, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(model, source, str(out), SETTINGS, log_probabilities=True)
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(read(partial)) == 6
    # As if it had been killed while it wrote: of the second three rows one and a half are there.
    content = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(content[:4]) + content[4][:30])
    with pytest.raises(
        UserError, match=r"out\.jsonl\.partial: begun with other values of settings;"
    ):
        sample(model, source, str(out), SamplingSettings(n=3), log_probabilities=True)
    lines = sample(model, source, str(out), SETTINGS, log_probabilities=True)
    assert lines[0] == "8 rows, 3 of them before"
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


@pytest.mark.slow
def test_a_prompt_that_an_earlier_row_has_is_passed_over_if_asked(model, tmp_path):
    rows = [{"prompt": text, "id": i} for i, text in enumerate(["a", "b", "a", "c", "b"])]
    source, all_, distinct = write(tmp_path / "in.jsonl", rows), tmp_path / "1", tmp_path / "2"
    sample(model, source, str(all_), SETTINGS)
    lines = sample(model, source, str(distinct), SETTINGS, distinct=True)
    assert read(distinct) == [read(all_)[i] for i in (0, 1, 3)]
    assert "2 rows are passed over: an earlier row has their prompt" in lines


def test_ratings_of_the_response_that_a_row_had_are_left_out(model, tmp_path):
    row = {"prompt": "a", "response": "b", "helpfulness": 4, "verbosity": 1, "id": 7}
    out = tmp_path / "out.jsonl"
    lines = sample(model, write(tmp_path / "in.jsonl", [row]), str(out), SETTINGS)
    assert read(out)[0].keys() == {"prompt", "id", "responses", "ended", "token_ids"}
    assert any("helpfulness (1), response (1), verbosity (1)" in line for line in lines)


def test_score_and_choose_read_it_as_it_is(model, reward_model, tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS[:5])
    out, scored, chosen = (tmp_path / f"{name}.jsonl" for name in ("out", "scored", "chosen"))
    arguments = ["-m", "rmjax.sample", model, source, out, "--n=2", "--temperature=0.7"]
    arguments += ["--top-p=0.9", "--top-k=50", "--max-tokens=8", "--seed=1", "--stop=zz"]
    done = forked.run([*arguments, "--dtype=float32", "--mesh=fsdp:-1"])
    assert done.returncode == 0, done.stderr
    assert "5 rows" in done.stdout
    sampled = read(out)
    score(reward_model, str(out), str(scored))
    kept = read(scored)
    assert [len(row["scores"]) for row in kept] == [2, 2, 2, 2, 0]
    counts = choose_file(str(scored), str(chosen), Choice("best-of", unended=True))
    assert counts["read"] == 5 and counts["written"] == 4
    for row, before, after in zip(read(chosen), sampled, kept):
        best = before["responses"][int(np.argmax(after["scores"]))]
        assert row["messages"] == [*before["prompt"], {"role": "assistant", "content": best}]
        assert row.get("tools") == before.get("tools")


def test_what_cannot_be_sampled_is_named(model, reward_model, tmp_path):
    good, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="a reward model, which has no language-model head"):
        sample(reward_model, good, str(out), SETTINGS)
    bad = write(tmp_path / "bad.jsonl", [ROWS[0], {"question": "?"}])
    with pytest.raises(UserError, match=r"bad\.jsonl row 2: there is no prompt in it; the row has"):
        sample(model, bad, str(out), SETTINGS)
    assert not (tmp_path / "out.jsonl.partial").stat().st_size
    sample(model, write(tmp_path / "bad.jsonl", ROWS[:1]), str(out), SETTINGS)  # it is mended
    assert len(read(out)) == 1
    for bad, words in (
        (tmp_path / "in.jsonl" / "out", "in.jsonl: a file, and no directory"),
        (tmp_path / ("x" * 300), "cannot be written .File name too long"),
    ):
        with pytest.raises(UserError, match=words):
            sample("no model is looked for", good, str(bad), SETTINGS)
    out.write_text("")
    with pytest.raises(UserError, match="is there already"):
        sample(model, good, str(out), SETTINGS)


def test_a_language_model_scores_the_tokens_that_were_sampled(model, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", ROWS[:1])
    samples, out = tmp_path / "samples.jsonl", tmp_path / "scored.jsonl"
    sample(model, prompts, str(samples), SETTINGS, log_probabilities=True)
    score(model, str(samples), str(out), value="log_probability")
    (row,) = read(out)
    np.testing.assert_allclose(row["scores"], [sum(x) for x in row["log_probabilities"]], atol=1e-4)
    assert row["attributes"] == [{"log_probability": value} for value in row["scores"]]
    (row,) = read(samples)
    bad = row | {"token_ids": [row["token_ids"][0], [9999]]}
    with pytest.raises(UserError, match="response 2: its token_ids are no list of tokens of this"):
        score(
            model, write(tmp_path / "b.jsonl", [bad]), str(tmp_path / "c"), value="log_probability"
        )


def test_a_language_model_scores_texts_as_transformers_does(model):
    rm = rmjax.load(model, value="log_probability")
    answers = ["Because.", "So it is", "Because of it."]
    found = rm.score_many([turns("Why?", answer) for answer in answers])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(model)
    start = tokenizer.apply_chat_template(turns("Why?"), add_generation_prompt=True)["input_ids"]
    for answer, score_ in zip(answers, found):
        ids = tokenizer.apply_chat_template(turns("Why?", answer))["input_ids"]
        with torch.no_grad():
            logits = torch_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        said = [float(logits[i - 1, ids[i]]) for i in range(len(start), len(ids))]
        assert abs(sum(said) - score_.value) < 1e-4
    with pytest.raises(UserError, match="without a reward head"):
        rmjax.load(model)
