"""Runs that learn from preference pairs, alone or beside ratings."""

import json

import numpy as np
import pytest

from helpers.checks import known
from helpers.runs import numbers, parts, run, tiny_config
from rmjax.data.batch import Targets
from rmjax.data.batches import training_batches
from rmjax.data.planning import plan_steps, row_shape
from rmjax.errors import UserError
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score, score_data
from rmjax.models.init import random_params
from rmjax.training.experiment import config_objective
from rmjax.training.validate_config import validate
from rmjax.training.validation import evaluate

PAIRS = dict(objective="scaled_bradley_terry", data__compare="helpfulness")
MIXED = PAIRS | dict(
    objective="regression + 0.5 * scaled_bradley_terry",
    preference__attribute="reward",
    data__attributes=("helpfulness", "verbosity", "reward"),
    data__pairs="generated:24",
    data__validation_pairs="generated:16",
    data__row_length=256,
)


@pytest.mark.slow
def test_ratings_and_pairs_in_one_run(tmp_path, capsys):
    """Both are learned, evaluated by kind, told of at the end; in two parts the same."""
    config = tiny_config(tmp_path / "whole", **MIXED)
    run(config)
    said = capsys.readouterr().out
    assert "preference pairs" in said and "strength" in said and "correlation with length" in said
    lines = [line for line in numbers(tmp_path / "whole") if "validation_loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert {"helpfulness/mse", "verbosity/pearson", "pairs/accuracy"} <= set(lines[0])
    assert "reward/mse" not in lines[0]

    run(tiny_config(tmp_path / "parts", **MIXED, steps=3))
    run(tiny_config(tmp_path / "parts", **MIXED))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_pairs_stay_whole_at_any_batch_size():
    """In the plan, in the rows and in the targets; ratings of the same prompts are beside them."""
    config = tiny_config("unused", **MIXED)
    _, data, held = parts(config)
    held = known(held)
    assert data.chosen.sum() > 0 and (~data.chosen).sum() > 2 * data.chosen.sum()
    second = np.concatenate([[False], data.chosen[:-1]])
    for size in (2, 6, 16):
        plan = plan_steps(data, batch_size=size, seed=3, epochs=1.0)
        shape = row_shape(data, rows=2, length=256)
        batches = training_batches(data, plan, shape)
        seen, rated = [], 0
        for number, step in enumerate(plan):
            batch = batches[number]
            assert len(step) <= size
            slots = batch.samples.reshape(-1, shape.slots)
            assert isinstance(batch.targets, Targets)
            pairs = [x.reshape(len(slots), -1) for x in batch.targets.pairs]
            for row, chosen, rejected, weights, strengths in zip(slots, *pairs):
                for a, b, weight, strength in zip(chosen, rejected, weights, strengths):
                    if weight:
                        assert row[b] == row[a] + 1 and data.chosen[row[a]]
                        assert strength == data.strengths[row[a]]
                        seen.append(row[a])
            assert isinstance(batch.targets, Targets)
            rated += int(batch.targets.ratings.weights.sum())
        assert sorted(seen) == np.flatnonzero(data.chosen).tolist()
        assert rated == int((~np.isnan(data.labels)).sum())
        assert np.isnan(data.labels[data.chosen | second]).all()
    assert held.chosen.any() and not held.chosen.all()


def test_pairs_are_judged_by_the_column_they_train():
    """Margins, loss and lengths by numpy from the scores of every held-out sample."""
    config = tiny_config("unused", **MIXED)
    model, _, held = parts(config)
    held = known(held)
    batches = evaluation_batches(held, row_shape(held, rows=2, length=256))
    params, score, sharding = random_params(model, 1), make_score(model), model.options.sharding
    objective = config_objective(config)
    found = evaluate(score, params, batches, np.zeros(3), objective, sharding)
    scores = score_data(score, params, batches, sharding).astype(np.float64)
    first = np.flatnonzero(held.chosen)
    margins, strengths = scores[first, 2] - scores[first + 1, 2], held.strengths[first]
    assert found.pairs is not None and found.pairs.attribute == "reward"
    assert found.pairs.mean_margin == pytest.approx(margins.mean(), rel=1e-5)
    assert found.pairs.accuracy == pytest.approx((margins > 0).mean())
    squared = np.nanmean((scores - held.labels) ** 2)
    scaled = np.mean(strengths * np.logaddexp(0, -margins))
    assert found.loss == pytest.approx(squared + 0.5 * scaled, rel=1e-5)


@pytest.mark.slow
def test_a_run_on_pairs_alone(tmp_path):
    run(tiny_config(tmp_path / "run", **PAIRS))
    last = numbers(tmp_path / "run")[-1]
    assert {"pairs/accuracy", "pairs/low", "pairs/temperature"} <= set(last)
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    counts = record["train"]["samples"]
    dropped = sum(count for reason, count in counts.items() if reason.startswith("dropped"))
    assert counts["read"] == counts["kept"] + dropped and counts["dropped: a tie"] > 0
    assert record["train"]["labels"] == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(objective="bradley_terry", batch_size=7), "with pairs it must be even"),
        (
            dict(preference__label_smoothing=0.5),
            "label_smoothing = 0.5: expected 0 or more, less than .5",
        ),
        (dict(preference__ties="second"), "preference.ties = 'second': there are drop, half"),
        (
            dict(preference__center_rewards_coefficient=-1.0),
            "preference.center_rewards_coefficient = -1.0: expected 0 or more",
        ),
        (
            dict(data__pairs="x.jsonl"),
            "data.pairs = 'x.jsonl' with config.objective = 'regression'",
        ),
        (dict(objective="regression + bradley_terry"), "data.pairs = '' with config.objective"),
        (MIXED | dict(data__validation_pairs=""), "validation_pairs = '': it goes with data.pairs"),
        (dict(data__compare="helpfulness"), "makes pairs, and config.objective = 'regression'"),
        (
            dict(objective="bradley_terry", preference__attribute="reward"),
            "preference.attribute = 'reward': config.data.attributes has helpfulness",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_data_says_why(changes, said):
    with pytest.raises(UserError, match=said):
        validate(tiny_config("unused", **changes))


def test_strengths_must_be_there_where_they_are_used(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    changes = dict(data__train=str(path), data__validation="")
    with pytest.raises(UserError, match=r"row 1: .*'margin_bradley_terry' needs to know how much"):
        parts(tiny_config("unused", objective="margin_bradley_terry", **changes))
    _, data, _ = parts(tiny_config("unused", objective="bradley_terry", **changes))
    assert len(data) == 2
