"""The temperature that a run's held-out pairs gave, in all forms of the model, and its use."""

import json
import math

import pytest

import rmjax
from helpers.runs import numbers, run, tiny_config
from rmjax.checkpoints.conversion.extrapolation import open_parents
from rmjax.checkpoints.model_files import read_spec
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.inference.scorer import Scorer
from rmjax.inference.scores import Comparison, Score
from rmjax.models.rewards.spec import Temperature


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A run on pairs, its export, that as an Orbax model, and that exported again."""
    root = tmp_path_factory.mktemp("temperature")
    config = tiny_config(
        root / "run",
        objective="bradley_terry",
        data__compare="helpfulness",
        data__attributes=("reward", "other"),
        data__train="generated:200",
        data__validation="generated:100",
        steps=20,
        eval_every=10,
        checkpoint_every=10,
    )
    run(config)
    orbax_to_hf(config.workdir, str(root / "hf"))
    hf_to_orbax(str(root / "hf"), str(root / "orbax"))
    orbax_to_hf(str(root / "orbax"), str(root / "again"))
    return [root / "run", root / "hf", root / "orbax", root / "again"]


@pytest.fixture(scope="module")
def scorer(forms) -> Scorer:
    return rmjax.load(str(forms[1]))


def test_every_form_carries_what_the_best_evaluation_fitted(forms):
    lines = [line for line in numbers(forms[0]) if "validation_loss" in line]
    best = min(lines, key=lambda line: line["validation_loss"])
    value, pairs = best["pairs/temperature"], best["pairs/pairs"]
    assert math.isfinite(value) and pairs > 10
    for path in forms:
        spec = open_pretrained(str(path)).spec
        assert spec and spec.temperature == Temperature(value, "reward", pairs)
    written = json.loads((forms[3] / "rmjax.json").read_text())["temperature"]
    assert written == {"value": value, "rule": "reward", "pairs": pairs}


def test_the_probability_is_the_sigmoid_of_the_margin_over_it(scorer):
    found = scorer.compare("Which?", "This one, I think.", "That.")
    t = scorer.spec.temperature
    assert t and found.temperature == t
    assert found.probability == pytest.approx(1 / (1 + math.exp(-found.margin / t.value)))
    assert scorer.compare("Which?", "That.", "That.").probability == 0.5


def test_another_rule_has_none(scorer, forms):
    for value in ("other", {"reward": 1.0, "other": 1.0}, {"reward": 2.0}):
        loaded = rmjax.load(str(forms[1]), value=value)
        loaded._score_rows = scorer._score_rows
        found = loaded.compare("Which?", "This one, I think.", "That.")
        assert found.temperature is None and found.probability is None
        assert "P(a)" not in repr(found)


def test_what_is_shown_says_where_it_comes_from():
    score, other = (Score({"reward": x}, x, "reward", 4) for x in (2.0, 0.5))
    shown = repr(Comparison(score, other, 1.5, Temperature(0.75, "reward", 1234)))
    assert shown.splitlines()[-1] == "P(a) = 0.881   (T = 0.75, fitted on 1,234 held-out pairs)"
    assert repr(Comparison(score, other, 1.5)) == shown.rsplit("\n", 1)[0]


def test_a_model_that_is_extrapolated_loses_it(forms):
    parents = open_parents(str(forms[1]), str(forms[2]))
    assert parents.spec.temperature and parents.child(1.5).temperature is None


def test_cards_without_the_field_are_read(forms, tmp_path):
    fields = json.loads((forms[1] / "rmjax.json").read_text())
    del fields["temperature"]
    (tmp_path / "rmjax.json").write_text(json.dumps(fields))
    spec = read_spec(tmp_path)
    assert spec.temperature is None and spec.ordinal is None and spec.general_preference is None


def test_a_run_without_pairs_has_none(tmp_path):
    run(tiny_config(tmp_path / "run", steps=3))
    spec = open_pretrained(str(tmp_path / "run")).spec
    assert spec and spec.temperature is None
