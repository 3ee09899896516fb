"""Runs that train a policy: their losses by transformers, their checkpoints, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import rmjax
from helpers.hf_models import save_hf, tensors_of
from helpers.models import tiny_llama
from helpers.runs import assert_same_bits, contents, metrics, numbers, run, tiny_config
from rmjax.convert import orbax_to_peft
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.report import report_run
from rmjax.training import reference
from rmjax.training.features import cached_values
from rmjax.training.validate_config import validate

BETA = 0.5
WORDS = ("tea", "snow", "maps and bees", "rain", "no", "it is so", "bread", "é")


def pairs(seed: int, count: int) -> list[dict]:
    """Of some prompts two responses, in which chosen and rejected ones begin alike at times."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        chosen, other = rng.choice(len(WORDS), 2, replace=False)
        prompt = f"{number}: what of {rng.choice(WORDS)}?"
        rows.append({"prompt": prompt, "chosen": WORDS[chosen], "rejected": WORDS[other]})
    return rows


TRAINED, HELD = pairs(0, 6), pairs(1, 5)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model as transformers saves it."""
    decoder = tiny_llama(num_hidden_layers=2, max_position_embeddings=128)
    return save_hf(tmp_path_factory.mktemp("base") / "hf", decoder, causal=True)


def config_of(workdir, base, data, **changes):
    fields = dict(
        init=str(base),
        model=None,
        tokenizer="",
        data__train=data,
        data__validation="",
        data__attributes=(),
        data__max_length=128,
        data__row_length=0,
        optimizer__learning_rate=1e-2,
        optimizer__warmup_steps=1,
        eval_every=0,
        checkpoint_every=3,
    )
    return tiny_config(workdir, **(fields | changes))


def dpo_config(workdir, base, data, **changes):
    settings = dict(objective="dpo", preference__beta=BETA, batch_size=2 * len(TRAINED))
    return config_of(workdir, base, data, **(settings | changes))


def torch_log_probabilities(directory, dialogues) -> tuple[np.ndarray, np.ndarray]:
    """Of each response the sum of its tokens' log-probabilities, and how many it has.

    The response's tokens are those behind the templated prompt, its end token among them.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).float().eval()
    tokenizer = byte_tokenizer()
    sums, counts = [], []
    for prompt, response in dialogues:
        asked = [{"role": "user", "content": prompt}]
        said = [*asked, {"role": "assistant", "content": response}]
        start = len(
            tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        )
        tokens = torch.tensor([tokenizer.apply_chat_template(said, return_dict=False)])
        with torch.no_grad():
            logs = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
        each = torch.gather(logs, 1, tokens[0, 1:, None])[start - 1 :, 0]
        sums.append(float(each.sum()))
        counts.append(len(each))
    return np.asarray(sums), np.asarray(counts)


def test_the_loss_of_sft_is_transformers(base, tmp_path):
    """Of rows of both forms, the first of which are rated as well."""
    rows = [{"prompt": r["prompt"], "response": r["chosen"], "helpfulness": 3} for r in TRAINED[:3]]
    for row in TRAINED[3:]:
        turns = zip(("user", "assistant"), (row["prompt"], row["chosen"]))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    data = write(tmp_path / "rows.jsonl", rows[:3])
    whole = write(tmp_path / "messages.jsonl", rows[3:])
    config = dict(objective="sft", batch_size=3, steps=1)
    for number, (file, part) in enumerate(((data, TRAINED[:3]), (whole, TRAINED[3:]))):
        run(config_of(tmp_path / f"run{number}", base, file, **config))
        sums, counts = torch_log_probabilities(base, [(r["prompt"], r["chosen"]) for r in part])
        loss = metrics(tmp_path / f"run{number}")[0]["loss"]
        assert loss == pytest.approx(-sums.sum() / counts.sum(), rel=1e-5)


def dpo_margins(base, now, rows) -> np.ndarray:
    """beta h of each pair, by transformers: `now` is the policy, `base` the reference."""
    dialogues = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    before, after = (torch_log_probabilities(path, dialogues)[0] for path in (base, now))
    ratios = (after - before).reshape(-1, 2)
    return BETA * (ratios[:, 0] - ratios[:, 1])


def test_losses_and_metrics_of_dpo_are_numpys_on_transformers_log_probabilities(
    base, tmp_path, capsys
):
    """The second step's loss is of the weights that the first one left, as they are exported."""
    data = write(tmp_path / "train.jsonl", TRAINED)
    held = write(tmp_path / "held.jsonl", HELD)
    changes = dict(data__validation=held, eval_every=1)
    run(dpo_config(tmp_path / "run", base, data, steps=1, **changes))
    assert "references" in capsys.readouterr().out
    rmjax.orbax_to_hf(tmp_path / "run", tmp_path / "hf")
    run(dpo_config(tmp_path / "run", base, data, steps=2, **changes))
    shown = capsys.readouterr().out
    assert "references" not in shown  # known by now
    assert "log(policy / reference) of a token" in shown and "implicit reward, chosen" in shown

    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    margins = dpo_margins(base, tmp_path / "hf", TRAINED)
    assert np.abs(margins).max() > 0.1
    assert lines[1]["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)

    margins = dpo_margins(base, tmp_path / "hf", HELD)
    found = next(line for line in metrics(tmp_path / "run") if "validation_loss" in line)
    assert found["validation_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    assert found["pairs/accuracy"] == np.mean(margins > 0)
    assert found["pairs/mean_margin"] == pytest.approx(margins.mean(), rel=1e-3)

    dialogues = [(row["prompt"], row[side]) for row in HELD for side in ("chosen", "rejected")]
    (before, counts), (after, _) = (
        torch_log_probabilities(path, dialogues) for path in (base, tmp_path / "hf")
    )
    assert (found["policy/responses"], found["policy/tokens"]) == (10, counts.sum())
    for field, expected in {
        "token_log_probability": after.sum() / counts.sum(),
        "log_ratio": (after - before).sum() / counts.sum(),
        "chosen_log_probability": after[::2].mean(),
        "rejected_log_probability": after[1::2].mean(),
        "chosen_reward": BETA * (after - before)[::2].mean(),
        "rejected_reward": BETA * (after - before)[1::2].mean(),
    }.items():
        assert found[f"policy/{field}"] == pytest.approx(expected, rel=1e-3, abs=1e-4), field
    _, files = report_run(str(tmp_path / "run"), str(tmp_path / "out"))
    page, _, drawn = (file.read_text() for file in files)
    assert json.loads(drawn)["evaluations"][0]["policy"] == {
        key.removeprefix("policy/"): value
        for key, value in found.items()
        if key.startswith("policy/")
    }
    assert "log-probability of a chosen response" in page and "no KL divergence" in page


def test_a_policy_without_a_reference_has_no_ratio(base, tmp_path, capsys):
    """The loss of simpo, by transformers' log-probabilities, and what of the metrics is defined."""
    data = write(tmp_path / "train.jsonl", TRAINED)
    held = write(tmp_path / "held.jsonl", HELD)
    settings = dict(objective="simpo", preference__beta=2.0, preference__gamma=0.3, steps=1)
    run(dpo_config(tmp_path / "run", base, data, data__validation=held, **settings))
    assert "references" not in capsys.readouterr().out
    dialogues = [(row["prompt"], row[side]) for row in TRAINED for side in ("chosen", "rejected")]
    sums, counts = torch_log_probabilities(base, dialogues)
    means = 2.0 * (sums / counts).reshape(-1, 2)
    margins = means[:, 0] - means[:, 1] - 0.3
    first, last = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert last["policy/log_ratio"] is None
    gap = last["policy/chosen_reward"] - last["policy/rejected_reward"]
    assert gap == pytest.approx(last["pairs/mean_margin"], abs=1e-5)


def test_three_steps_and_three_more_are_six(base, tmp_path, monkeypatch):
    """Also where the reference is not known any more and is computed again."""
    data = write(tmp_path / "train.jsonl", TRAINED)
    settings = dict(objective="dpo + 0.1 * sft", batch_size=4)
    whole = dpo_config(tmp_path / "six", base, data, steps=6, **settings)
    run(whole)
    run(dpo_config(tmp_path / "three", base, data, steps=3, **settings))
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "cache"))
    run(dpo_config(tmp_path / "three", base, data, steps=6, **settings))
    assert numbers(tmp_path / "six") == numbers(tmp_path / "three")
    # `restore` asks for the architecture, which these configs leave to `init`.
    policies = [rmjax.load_policy(tmp_path / name) for name in ("six", "three")]
    assert_same_bits(*(policy.params for policy in policies))


def said_of(model, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [places, vocabulary] by transformers."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1).numpy()


def assert_probabilities_of(model, found, prompt: str) -> None:
    """A sample's log-probabilities are those that transformers gives its tokens."""
    asked = byte_tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    logs = said_of(model, [*asked, *found.tokens.tolist()])
    places = np.arange(len(asked) - 1, len(logs) - 1)
    np.testing.assert_allclose(found.log_probabilities, logs[places, found.tokens], atol=1e-4)


def test_references_are_those_of_the_samples_that_steps_have(base, tmp_path, monkeypatch):
    """A step on two of six pairs waits for two of six, and is the first step of a longer run."""
    computed = []

    def spy(what, batches, *rest):
        computed.append(len(batches.data))
        return cached_values(what, batches, *rest)

    monkeypatch.setattr(reference, "cached_values", spy)
    data = write(tmp_path / "pairs.jsonl", TRAINED)
    short = dict(batch_size=4, optimizer__schedule="constant")
    run(dpo_config(tmp_path / "one", base, data, steps=1, **short))
    run(dpo_config(tmp_path / "two", base, data, steps=2, **short))
    assert computed == [4, 8]
    first, again = (metrics(tmp_path / name)[0] for name in ("one", "two"))
    assert first["loss"] == pytest.approx(again["loss"], rel=1e-6)


def test_a_run_ends_answers_as_its_model_did(base, tmp_path):
    """Of which a generation_config.json may name several end tokens."""
    own = tmp_path / "own"
    shutil.copytree(base, own)
    (own / "generation_config.json").write_text('{"eos_token_id": [9, 20]}')
    data = write(tmp_path / "train.jsonl", TRAINED)
    run(dpo_config(tmp_path / "run", own, data, steps=1))
    ends = rmjax.load_policy(own).end_tokens
    assert {9, 20} < set(ends) and rmjax.load_policy(tmp_path / "run").end_tokens == ends


def test_a_run_is_a_language_model(base, tmp_path):
    data = write(tmp_path / "train.jsonl", TRAINED)
    run(dpo_config(tmp_path / "run", base, data, steps=1))
    assert not (tmp_path / "run" / "model" / "rmjax.json").exists()
    rmjax.orbax_to_hf(tmp_path / "run", tmp_path / "hf")
    policy = rmjax.load_policy(tmp_path / "run")
    [[found]] = policy.sample(["what of tea?"], n=1, max_tokens=8)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_probabilities_of(model, found, "what of tea?")
    with pytest.raises(UserError, match=r"a language model without a reward head\. To sample"):
        rmjax.load(tmp_path / "run")


LORA = dict(lora__rank=2, lora__alpha=8.0, lora__targets=("q", "o", "down"))


def test_adapters_alone_are_trained_and_the_reference_is_the_frozen_base(base, tmp_path, capsys):
    """The second step's loss, by transformers, of the weights that the first one left."""
    data = write(tmp_path / "train.jsonl", TRAINED)
    held = write(tmp_path / "held.jsonl", HELD)
    changes = dict(data__validation=held, eval_every=1, **LORA)
    run(dpo_config(tmp_path / "run", base, data, steps=1, **changes))
    assert "trained: adapters of rank 2 for q, o, down" in capsys.readouterr().out
    rmjax.orbax_to_hf(tmp_path / "run", tmp_path / "hf")
    before, after = tensors_of(base), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    adapted = tuple(f"{name}_proj.weight" for name in ("q", "o", "down"))
    for key in before:
        assert (before[key] == after[key]) == (not key.endswith(adapted)), key

    run(dpo_config(tmp_path / "run", base, data, steps=2, **changes))
    assert "references" not in capsys.readouterr().out  # known by now
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    margins = dpo_margins(base, tmp_path / "hf", TRAINED)
    assert np.abs(margins).max() > 0.1
    assert lines[1]["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    margins = dpo_margins(base, tmp_path / "hf", HELD)
    found = next(line for line in metrics(tmp_path / "run") if "validation_loss" in line)
    assert found["pairs/mean_margin"] == pytest.approx(margins.mean(), rel=1e-3)


def test_adapters_of_a_policy_are_sampled_with_and_are_pefts(base, tmp_path):
    peft = pytest.importorskip("peft", reason="the other side: pip install --no-deps peft==0.21.2")
    data = write(tmp_path / "train.jsonl", TRAINED)
    run(dpo_config(tmp_path / "run", base, data, steps=2, **LORA))
    orbax_to_peft(str(tmp_path / "run"), str(tmp_path / "peft"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base).float()
    plain = said_of(model, [1, 2, 3])
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM"
    assert theirs.peft_config["default"].base_model_name_or_path == base.name
    state = peft.get_peft_model_state_dict(theirs)
    written = tensors_of(tmp_path / "peft")
    assert state.keys() == written.keys() and len(state) == 2 * 3 * 2  # A and B, targets, layers
    for key, tensor in state.items():
        assert written[key] == ("float32", tuple(tensor.shape), tensor.numpy().tobytes()), key

    policy = rmjax.load_policy(tmp_path / "run")
    [[found]] = policy.sample(["what of tea?"], n=1, max_tokens=8)
    assert_probabilities_of(theirs, found, "what of tea?")
    assert np.abs(said_of(theirs, [1, 2, 3]) - plain).max() > 1e-3  # the adapters have learned


def test_files_of_a_policy_are_written_once(base, tmp_path):
    """And again if the last of them is missing, as after a kill."""
    data = write(tmp_path / "train.jsonl", TRAINED)
    run(dpo_config(tmp_path / "run", base, data, steps=1))
    files = tmp_path / "run" / "model"
    kept = contents(files)
    run(dpo_config(tmp_path / "run", base, data, steps=2))
    assert contents(files) == kept
    (files / "config.json").unlink()
    run(dpo_config(tmp_path / "run", base, data, steps=3))
    assert {name: text for name, (text, _) in contents(files).items()} == {
        name: text for name, (text, _) in kept.items()
    }


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_a_reward_model_cannot_become_a_policy(objective, tmp_path):
    """It is said before any data is read."""
    decoder = tiny_llama(num_hidden_layers=1, max_position_embeddings=128)
    reward = save_hf(tmp_path / "hf", decoder)
    with pytest.raises(UserError, match="a reward model, which has no language-model head"):
        run(dpo_config(tmp_path / "run", reward, "no such file", objective=objective))
    with pytest.raises(UserError, match=r"a reward model, .* cannot write"):
        rmjax.load_policy(reward)


@pytest.mark.parametrize("objective", ["dpo", "sft", "regression"])
def test_an_empty_file_is_an_error(objective, base, tmp_path):
    data = write(tmp_path / "train.jsonl", [])
    changes = dict(data__attributes=("helpfulness",), objective=objective)
    with pytest.raises(UserError, match=r"train\.jsonl: there is no row in it"):
        run(dpo_config(tmp_path / "run", base, data, **changes))


def test_every_turn_is_learned_if_asked_for(base, tmp_path):
    """The loss is transformers', of the tokens of all turns of the assistant's."""
    texts = ("tea?", "it is so", "and maps?", "no")
    roles = ("user", "assistant") * 2
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    data = write(tmp_path / "rows.jsonl", [{"messages": talk}])
    config = dict(objective="sft", batch_size=1, steps=1, data__turns="all")
    run(config_of(tmp_path / "run", base, data, **config))
    tokenizer = byte_tokenizer()
    tokens = tokenizer.apply_chat_template(talk, return_dict=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).float()
    logs, total, count = said_of(model, tokens), 0.0, 0
    for turn in (1, 3):
        start = len(
            tokenizer.apply_chat_template(
                talk[:turn], add_generation_prompt=True, return_dict=False
            )
        )
        words = tokenizer(talk[turn]["content"], add_special_tokens=False)["input_ids"]
        words.append(tokenizer.eos_token_id)
        assert tokens[start : start + len(words)] == words
        total += sum(logs[start + i - 1, word] for i, word in enumerate(words))
        count += len(words)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(-total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(lora__rank=4, trainable=("embed",)), "adapters and a reward model's head"),
        (dict(data__over_long="truncate_left"), "answers to prompts that it did not see"),
        (dict(data__turns="all"), "data.turns = 'all' with config.objective = 'dpo'"),
        (dict(data__turns="every"), "config.data.turns = 'every': there are last, all"),
        (dict(objective="dpo + regression"), "a model is one of them"),
        (dict(preference__beta=0.0), "config.preference.beta = 0.0"),
        (dict(batch_size=3), "with pairs it must be even"),
        (dict(objective="regression"), "data.attributes"),
    ],
)
def test_settings_that_a_policy_cannot_have(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        validate(dpo_config(tmp_path, "base", "pairs.jsonl", **changes))
