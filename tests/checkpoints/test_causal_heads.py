"""Causal models whose reward is that of tokens' logits or a value head's output."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import rmjax
from helpers.checks import known
from helpers.damage import Bomb
from helpers.families import FAMILY_MODELS
from helpers.gguf_files import write_gguf
from helpers.hf_models import TALK, edit_tensors, save_hf, tensors_of
from helpers.models import make_model, score_array, tiny_llama
from rmjax.alignment.rewards import ModelReward
from rmjax.checkpoints.causal_heads import parse_head, with_head
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.conversation import Conversation, parse_conversation
from rmjax.data.readers import open_source
from rmjax.errors import UserError
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmarks import BENCHMARKS
from rmjax.evaluation.score_cache import ScoreCache, score_items
from rmjax.inference.score_file import score_file
from rmjax.inference.scorer import Scorer
from rmjax.models.rewards.aggregation import model_rule, parse_rule
from rmjax.runtime.files import read_json
from rmjax.training.experiment import with_first_head

WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"
LLAMA = tiny_llama(max_position_embeddings=256)


def load(path: Path) -> Scorer:
    return scorer_of(open_pretrained(str(path)))


def scorer_of(source: Pretrained) -> Scorer:
    """On one device, whose program is the quickest to compile."""
    spec = source.reward_spec()
    model = make_model(source.decoder, len(spec.attributes))
    params = load_params(source, model, seed=0, dtype=np.float32)
    return Scorer(model, params, source.tokenizer(), spec, model_rule(spec), "error")


def last_states(directory: Path, output: str, question: str = "") -> torch.Tensor:
    """transformers' logits or last hidden states at the last token of each conversation.

    With a question, where the answer to it would begin.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    after = [{"role": "user", "content": question}] if question else []
    for talk in TALK:
        text = tokenizer.apply_chat_template(
            [*talk, *after], tokenize=False, add_generation_prompt=bool(question)
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            result = model.eval()(ids, output_hidden_states=True)
        found.append((result.logits if output == "logits" else result.hidden_states[-1])[0, -1])
    return torch.stack(found)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    directory = tmp_path_factory.mktemp("causal")
    return open_pretrained(str(save_hf(directory, LLAMA, causal=True, dtype=torch.bfloat16)))


# ---- logits of tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("token", [0, 70])
def test_a_tokens_logit_becomes_the_reward(tied, token, tmp_path):
    decoder = tiny_llama(max_position_embeddings=256, tie_word_embeddings=tied)
    source = save_hf(tmp_path / "hf", decoder, causal=True, dtype=torch.bfloat16)
    expected = last_states(source, "logits")[:, token]
    assert expected.std() > 1e-2
    notes = hf_to_orbax(str(source), str(tmp_path / "orbax"), head={"reward": {str(token): 1}})
    assert notes[0] == f"reward = +1 * logit of token {token}: reward"
    found = load(tmp_path / "orbax").score_many(TALK)
    np.testing.assert_allclose([score.value for score in found], expected, atol=1e-4)
    assert [list(score.attributes) for score in found] == [["reward"]] * len(TALK)

    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    matrix = load_file(source / "model.safetensors")
    row = matrix["model.embed_tokens.weight" if tied else "lm_head.weight"][token : token + 1]
    exported = load_file(tmp_path / "back" / "model.safetensors")["score.weight"]
    assert torch.equal(exported, row.float())
    assert "offset" not in read_json(tmp_path / "back" / "rmjax.json")


def test_a_logit_that_is_capped_is_no_reward_head(tmp_path):
    causal = save_hf(tmp_path / "hf", FAMILY_MODELS["gemma2"], causal=True)
    with pytest.raises(UserError, match=r"'final_logit_softcapping' is 3: .* capped"):
        hf_to_orbax(str(causal), str(tmp_path / "orbax"), head={"0": 1})


def test_another_token_is_another_conversion(tmp_path):
    """What a kill left of one must not be continued as the other."""
    source = save_hf(tmp_path / "hf", causal=True)
    plans = []
    for token in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rmjax.convert.convert_slices", lambda *a: plans.append(a[3]) or [])
            hf_to_orbax(str(source), str(tmp_path / "orbax"), head={"reward": {str(token): 1}})
    assert plans[0] != plans[1]


def test_outputs_have_names_and_as_many_tokens_as_one_likes(causal):
    logits = last_states(causal.files, "logits")
    head = {"quality": {"3": 0.5, 71: 2, "a": -1}, "ease": {"9": 1}}
    given, _ = with_head(causal, head)
    spec = known(given.spec)
    assert (spec.attributes, spec.scalar, spec.seed) == (
        ("quality", "ease"),
        {"quality": 1.0},
        None,
    )
    (a,) = transformers.AutoTokenizer.from_pretrained(causal.files)("a")["input_ids"][-1:]
    expected = logits @ torch.zeros(262, 2).index_put(
        (torch.tensor([3, 71, a, 9]), torch.tensor([0, 0, 0, 1])),
        torch.tensor([0.5, 2.0, -1.0, 1.0]),
    )
    np.testing.assert_allclose(score_array(scorer_of(given).score_many(TALK)), expected, atol=1e-4)


QUESTION = "Does it say why? Only answer Y or N."


def test_the_reward_is_read_in_the_answer_to_a_question(tmp_path):
    """As of NVIDIA's Llama-3.3-Nemotron-70B-Reward-Principle: Yes less No."""
    source = save_hf(tmp_path / "hf", LLAMA, causal=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    yes, no = (tokenizer(text)["input_ids"][-1] for text in "YN")
    logits = last_states(source, "logits", QUESTION)
    expected = (logits[:, yes] - logits[:, no]).numpy()
    assert np.abs(expected - (last_states(source, "logits") @ torch.ones(262)).numpy()).min() > 1e-2
    head = {"Y": 1, "N": -1}
    direct = rmjax.load(source, head=head, suffix_turn=QUESTION)
    np.testing.assert_allclose([s.value for s in direct.score_many(TALK)], expected, atol=1e-4)

    notes = hf_to_orbax(str(source), str(tmp_path / "orbax"), head=head, suffix_turn=QUESTION)
    assert notes[0] == (
        f"reward = +1 * logit of token {yes} (Y) -1 * logit of token {no} (N), after the question "
        f"{QUESTION!r}: reward"
    )
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    for path in ("orbax", "back"):
        assert read_json(tmp_path / path / "rmjax.json")["suffix_turn"] == QUESTION
        found = load(tmp_path / path)
        np.testing.assert_allclose([s.value for s in found.score_many(TALK)], expected, atol=1e-4)

    # Another principle, without another conversion; which is another model to a cache of scores.
    other, _ = with_head(open_pretrained(str(tmp_path / "back")), None, "Is it short?")
    assert other.state() != open_pretrained(str(tmp_path / "back")).state()
    logits = last_states(source, "logits", "Is it short?")
    found = [s.value for s in scorer_of(other).score_many(TALK)]
    np.testing.assert_allclose(found, (logits[:, yes] - logits[:, no]).numpy(), atol=1e-4)

    # What does not ask the question says so.
    config = Config("", DataConfig("", attributes=("reward",)), OptimizerConfig(1.0), 2)
    with pytest.raises(UserError, match=r"config\.init = .*training does not ask"):
        with_first_head(config, open_pretrained(str(tmp_path / "orbax")))


def test_whoever_scores_asks_the_question(causal, tmp_path):
    """rm.score, a file of scores, a benchmark and the reward of a policy's samples, alike."""
    given, _ = with_head(causal, {"Y": 1, "N": -1}, QUESTION)
    scorer = scorer_of(given)
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal.files)
    talks = [
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": said}]
        for said in ("Because.", "No idea.")
    ]
    question = {"role": "user", "content": QUESTION}
    for talk in talks:
        expected = tokenizer.apply_chat_template(
            [*talk, question], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        found = scorer.encode(parse_conversation(talk), "here").tokens
        assert found.tolist() == expected
    values = [score.value for score in scorer.score_many(talks)]
    assert abs(values[0] - values[1]) > 1e-3

    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    score_file(scorer, open_source(str(tmp_path / "pairs.jsonl"), ""), tmp_path / "out.jsonl", {})
    assert json.loads((tmp_path / "out.jsonl").read_text())["scores"] == pytest.approx(values)
    pairs = BenchmarkData(BENCHMARKS["pairs"], str(tmp_path / "pairs.jsonl"))
    ((item,),) = score_items(scorer, [pairs], ScoreCache(tmp_path / "c.jsonl", ("reward",)))
    assert item.scores[:, 0] == pytest.approx(values)
    asked = Conversation([{"role": "user", "content": "Why?"}])
    rewards, _ = ModelReward(scorer)([asked], [["Because.", "No idea."]])
    assert rewards[0] == pytest.approx(values)


def test_a_question_is_of_models_that_answer_one(tmp_path):
    for name, causal in (("causal", True), ("classifier", False)):
        source = save_hf(tmp_path / name, causal=causal)
        with pytest.raises(UserError, match=r"suffix_turn .* this one does not"):
            rmjax.load(source, suffix_turn="Is it short?")


def test_a_gguf_file_has_tokens_too(causal_state, tmp_path):
    decoder, state = causal_state
    file = write_gguf(tmp_path / "m.gguf", decoder, state)
    save_hf(tmp_path / "hf", decoder, causal=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "hf" / name).rename(tmp_path / name)
    hf_to_orbax(str(file), str(tmp_path / "orbax"), head={"reward": {"5": 1}})
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    exported = load_file(tmp_path / "back" / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(exported.numpy(), state["lm_head.weight"][5:6])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (262, "token 262 is not there; the model's tokens are 0 to 261"),
        (-1, r"'-1' is not one token of the vocabulary but 2 \(.*\); name a text that is one"),
        ("Yes", "'Yes' is not one token of the vocabulary but 3"),
        ("", r"'' is not one token of the vocabulary but 0 \(none\)"),
    ],
)
def test_a_token_that_is_not_there_is_an_error(token, message, tmp_path):
    source = save_hf(tmp_path / "hf", causal=True)
    with pytest.raises(UserError, match=f"head 'reward': {message}"):
        hf_to_orbax(str(source), str(tmp_path / "orbax"), head={"reward": {str(token): 1}})
    edit_tensors(source, **{"lm_head.weight": None})
    with pytest.raises(UserError, match=r"1 tensor\(s\) missing: lm_head\.weight; .*'tie_word_emb"):
        hf_to_orbax(str(source), str(tmp_path / "orbax"), head={"reward": {"0": 1}})
    assert not (tmp_path / "orbax").exists()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("valuehead", r"head 'valuehead': expected 'value_head', tokens with weights"),
        ({}, r"head \{\}: expected 'value_head'"),
        ({"reward": {"0": 1}, "1": 2}, r"head \{.*\}: expected 'value_head'"),
        ({"reward": {}}, "head 'reward': expected tokens, and a weight that is not 0"),
        ({"reward": {"0": 0}}, "head 'reward': expected tokens, and a weight that is not 0"),
        ({" ": {"0": 1}}, "head: ' ' is no name of an output"),
        ({"a\nb": {"0": 1}}, r"head: 'a.+nb' is no name of an output"),
        ({"reward": {"0": 1, 0: 2}}, "head 'reward': two of 0, 0 are the same token"),
        ({"reward": {"0": 1e300}}, r"the weight of '0' is 1e\+300, not a number"),
        ({"reward": {"0": [1]}}, r"the weight of '0' is \[1\], not a number"),
        ({"reward": {"\ud83d": 1}}, "head 'reward' is not valid Unicode"),
        ({"reward": {"\u0663": 1}}, "'\u0663' is not one token of the vocabulary"),
        ({"reward": {"9" * 5000: 1}}, "token 9+ is not there; the model's"),
        ({"good": {"0": "1"}}, "head 'good': the weight of '0' is '1', not a number"),
        ({"good": {"0": float("nan")}}, "head 'good': the weight of '0' is nan, not a number"),
        ({"good": {"7": 1, "07": 1}}, "head 'good': two of 7, 07 are the same token"),
    ],
    ids=str,
)
def test_a_head_of_another_form_is_an_error(head, message, causal):
    with pytest.raises(UserError, match=message):
        with_head(causal, head)


def test_broken_json_of_a_head_is_an_error():
    assert parse_head('{"Yes": 1, "No": -1}') == {"Yes": 1, "No": -1}
    assert parse_head("value_head") == "value_head"
    for parse, option in ((parse_head, "--head"), (parse_rule, "--value")):
        with pytest.raises(UserError, match=option + r"=\{Yes: 1\}: broken JSON"):
            parse("{Yes: 1}")
        with pytest.raises(UserError, match=option + r"=.*the key 'Yes' is there twice"):
            parse('{"Yes": 1, "Yes": 2}')
        with pytest.raises(UserError, match=option + r"=.*broken JSON \(maximum recursion"):
            parse('{"a":' * 100_000)


# ---- a value head -----------------------------------------------------------------------------


def save_value_head(directory: Path, place: str, bias: float | None, dtype=torch.float32) -> Path:
    """A causal model with a value head: LLaMA-Factory's file, or TRL's tensors."""
    save_hf(directory, LLAMA, causal=True)
    torch.manual_seed(3)
    head = {WEIGHT: torch.randn(1, 32).to(dtype)}
    if bias is not None:
        head[BIAS] = torch.tensor([bias]).to(dtype)
    if place == "file":
        save_file(head, directory / "value_head.safetensors", {"format": "pt"})
    else:
        edit_tensors(directory, **head)
    return directory


def value_head_scores(directory: Path) -> np.ndarray:
    """torch's linear layer on transformers' last hidden state, as TRL and LLaMA-Factory have it."""
    files = (directory / "value_head.safetensors", directory / "model.safetensors")
    head = load_file(next(file for file in files if file.exists()))
    summary = torch.nn.Linear(32, 1)
    with torch.no_grad():
        summary.weight.copy_(head[WEIGHT])
        summary.bias.copy_(head.get(BIAS, torch.zeros(1)))
        return summary(last_states(directory, "hidden"))[:, 0].numpy()


@pytest.mark.parametrize("place", ["file", "tensors"])
@pytest.mark.parametrize("bias", [0.0, 1.75, None], ids=str)
def test_a_value_head_becomes_the_reward_head(place, bias, tmp_path):
    source = save_value_head(tmp_path / "hf", place, bias)
    expected = value_head_scores(source)
    notes = hf_to_orbax(str(source), str(tmp_path / "orbax"), head="value_head")
    assert notes[0] == f"value head, bias {bias or 0:g}: reward"
    assert notes[1] == "left out, a reward model has no use for them: lm_head.weight"
    scorer = load(tmp_path / "orbax")
    found = scorer.score_many(TALK)
    np.testing.assert_allclose([score.value for score in found], expected, atol=1e-4)
    np.testing.assert_allclose(score_array(found)[:, 0], expected, atol=1e-4)

    # The export has all but the constant, and says so; here it is still exact.
    notes = orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert any("other programs' numbers are less by 1.75" in n for n in notes) == (bias == 1.75)
    spec = read_json(tmp_path / "back" / "rmjax.json")
    assert spec.get("offset") == ({"reward": 1.75} if bias else None)
    back = load(tmp_path / "back")
    back._score = scorer._score
    np.testing.assert_allclose([s.value for s in back.score_many(TALK)], expected, atol=1e-4)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    weight = plain.state_dict()["score.weight"]
    theirs = (last_states(source, "hidden") @ weight.T)[:, 0].numpy()
    np.testing.assert_allclose(theirs + (bias or 0), expected, atol=1e-4)


def test_an_offset_changes_no_comparison(tmp_path):
    source = save_value_head(tmp_path / "hf", "file", 4.5)
    hf_to_orbax(str(source), str(tmp_path / "orbax"), head="value_head")
    found = load(tmp_path / "orbax").compare("Why?", "Because.", "No idea at all.")
    assert found.margin == pytest.approx(found.a.value - found.b.value, abs=1e-6)
    expected = value_head_scores(source)
    scores = [s.value for s in load(tmp_path / "orbax").score_many(TALK)]
    assert scores[0] - scores[1] == pytest.approx(expected[0] - expected[1], abs=1e-4)


def test_training_says_what_becomes_of_a_value_head(tmp_path):
    source = save_value_head(tmp_path / "hf", "file", 4.5)
    hf_to_orbax(str(source), str(tmp_path / "orbax"), head="value_head")
    config = Config("", DataConfig("", attributes=("reward",)), OptimizerConfig(1.0), 2)
    kept, text = with_first_head(config, open_pretrained(str(tmp_path / "orbax")))
    assert kept.spec and "its head (without the constant" in text
    fresh, text = with_first_head(config, open_pretrained(str(source)))
    assert fresh.spec is None and "its value head is left out; `rmjax.convert hf-to-orb" in text


@pytest.mark.parametrize("place", ["file", "tensors"])
def test_without_the_flag_it_is_named(place, tmp_path):
    source = save_value_head(tmp_path / "hf", place, 0.5)
    with pytest.raises(UserError, match=r"with a value head .* hf-to-orbax`: value_head,"):
        rmjax.load(source)
    with pytest.raises(UserError, match=r"there is a value head .* --head=value_head makes it"):
        hf_to_orbax(str(source), str(tmp_path / "orbax"))
    assert not (tmp_path / "orbax").exists()
    # As a language model it is asked for by name, and so is a token.
    hf_to_orbax(str(source), str(tmp_path / "lm"), language_model=True)
    orbax_to_hf(str(tmp_path / "lm"), str(tmp_path / "lm_back"))
    assert tensors_of(tmp_path / "lm_back").keys() == {
        key for key in load_file(source / "model.safetensors") if not key.startswith("v_head")
    }
    notes = hf_to_orbax(str(source), str(tmp_path / "token"), head={"reward": {"0": 1}})
    assert (WEIGHT in notes[1]) == (place == "tensors")


def test_a_causal_model_names_the_ways_to_a_reward(tmp_path):
    source = save_hf(tmp_path / "hf", causal=True)
    with pytest.raises(UserError, match=r"--head of .*value_head,.*\{\"0\": 1\}.*fresh head with"):
        rmjax.load(source)
    with pytest.raises(UserError, match=r"no value head here\. Looked for value_head\.safetensors"):
        hf_to_orbax(str(source), str(tmp_path / "orbax"), head="value_head")


def test_a_pickled_value_head_is_never_opened(tmp_path):
    source = save_hf(tmp_path / "hf", causal=True)
    (source / "value_head.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"value_head\.bin|value head"):
        hf_to_orbax(str(source), str(tmp_path / "orbax"))
    with pytest.raises(UserError, match=r"value_head\.bin is a pickle.*'value_head\.safetensors'"):
        hf_to_orbax(str(source), str(tmp_path / "orbax"), head="value_head")


def test_value_heads_of_another_form_are_refused(tmp_path):
    source = save_value_head(tmp_path / "hf", "file", 0.5)
    file = source / "value_head.safetensors"
    for tensors in (
        {WEIGHT: torch.ones(1, 16)},
        {WEIGHT: torch.ones(2, 32)},
        {BIAS: torch.ones(1)},
        {WEIGHT: torch.ones(1, 32), "v_head.layer.weight": torch.ones(32, 32)},
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=r"value_head\.safetensors: expected the tensors"):
            hf_to_orbax(str(source), str(tmp_path / "orbax"), head="value_head")


@pytest.mark.parametrize("name", ["score", "v_head.summary"], ids=["INF-ORM", "GRM"])
def test_heads_of_several_layers_are_refused_by_name(name, tmp_path):
    """As `INFORMForSequenceClassification` and `GRewardModel` of RewardBench save them."""
    source = save_hf(tmp_path / "hf", causal=True)
    layers = {f"{name}.0.weight": torch.ones(32, 32), f"{name}.0.bias": torch.ones(32)}
    edit_tensors(source, **layers, **{f"{name}.2.weight": torch.ones(1, 32)})
    message = rf"a reward head of several layers \({re.escape(name)}\.0\.bias, .*INF-ORM and GRM"
    with pytest.raises(UserError, match=message):
        open_pretrained(str(source))


def test_two_heads_are_an_error(tmp_path):
    source = save_value_head(tmp_path / "hf", "file", 0.5)
    edit_tensors(source, **{WEIGHT: torch.ones(1, 32)})
    with pytest.raises(UserError, match="two value heads"):
        open_pretrained(str(source))
    source = save_hf(tmp_path / "classifier")
    save_file({WEIGHT: torch.ones(1, 32)}, source / "value_head.safetensors")
    with pytest.raises(UserError, match=r"two heads, 'score\.weight' and the value head"):
        open_pretrained(str(source))


def test_a_reward_model_keeps_what_it_has(tmp_path):
    source = save_hf(tmp_path / "hf")
    given: list[dict[str, Any]] = [
        {"head": {"0": 1}},
        {"head": "value_head"},
    ]
    for options in given:
        with pytest.raises(UserError, match=r"a reward model, which keeps its head and the names"):
            hf_to_orbax(str(source), str(tmp_path / "orbax"), **options)
    with pytest.raises(
        UserError, match=r"--attributes names the outputs of a fresh head, and here"
    ):
        hf_to_orbax(str(source), str(tmp_path / "orbax"), attributes=("a",))
    with pytest.raises(UserError, match="a language model has no reward head"):
        hf_to_orbax(str(source), str(tmp_path / "no"), language_model=True, head="value_head")


def test_the_offset_of_an_extrapolated_model_lies_on_the_line(tmp_path):
    from rmjax.extrapolate import extrapolate

    for name, bias in (("weak", 1.0), ("strong", 3.0)):
        save_value_head(tmp_path / f"{name}_hf", "file", bias)
        hf_to_orbax(str(tmp_path / f"{name}_hf"), str(tmp_path / name), head="value_head")
    extrapolate(str(tmp_path / "weak"), str(tmp_path / "strong"), str(tmp_path / "x"), alpha=1.5)
    assert json.loads((tmp_path / "x" / "rmjax.json").read_text())["offset"] == {"reward": 4.0}
