"""Numbers at their edges that are read from files, or written into them: JSON has no NaN."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest

from rmjax.alignment.reward_functions import FunctionReward
from rmjax.alignment.rewards import Rewards
from rmjax.alignment.standards import kept_standard
from rmjax.checkpoints.model_files import _write_spec, read_spec
from rmjax.choose import choose_file
from rmjax.config import RewardConfig, as_flat_dict
from rmjax.data.choosing import Choice
from rmjax.data.conversation import Conversation
from rmjax.data.fields import number_field
from rmjax.data.readers import Row
from rmjax.data.row_file import json_line, said_nulls
from rmjax.errors import UserError
from rmjax.evaluation.fit_weights import read_weights
from rmjax.evaluation.metrics import AttributeMetrics
from rmjax.evaluation.model_scores import read_scores
from rmjax.models.rewards.spec import RewardSpec
from rmjax.reports.runs.run_directory import _read_lines
from rmjax.training.config_file import load_config
from rmjax.training.console import attribute_table
from rmjax.training.logger import MetricsLogger
from rmjax.training.validation import ValidationMetrics


def strict(text):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


# ---- written ------------------------------------------------------------------------------------


def test_metrics_have_no_infinity_and_null_for_nan(tmp_path):
    with MetricsLogger(tmp_path, start=0, total=2, wandb="", config={}) as report:
        report.numbers(1, {"a": 1.0, "b": math.nan})
        with pytest.raises(UserError, match="step 2: kl inf: larger than numbers are here"):
            report.numbers(2, {"kl": math.inf})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": 1.0, "b": None}


def test_metrics_of_a_checkpoint_are_json_and_are_printed():
    row = AttributeMetrics(2, 0.5, 1.0, math.nan, math.nan, math.nan, 0)
    record = ValidationMetrics(0.5, {"wit": row}, None).record()
    found = strict(json.dumps(record))["attributes"]["wit"]
    assert found["pearson"] is None and found["mse"] == 0.5
    assert attribute_table("", {"wit": AttributeMetrics(**found)}).row_count == 1


def test_a_row_that_is_written_has_null_for_nan_and_says_so():
    nulls: Counter[str] = Counter()
    row = Row("x row 1", 1, {})
    line = json_line(row, {"a": [1, {"b": math.nan}], "c": -0.0, "d": "NaN"}, nulls)
    assert strict(line) == {"a": [1, {"b": None}], "c": 0.0, "d": "NaN"}
    assert said_nulls(nulls) == ["NaN is written as null: a (1 rows)"]
    with pytest.raises(UserError, match="x row 1: cannot be written as JSON"):
        json_line(row, {"a": [math.inf]}, nulls)


def test_a_config_without_a_limit_is_json():
    config = load_config("quickstart")
    data = dataclasses.replace(config.data, label_range=(0.0, math.inf))
    flat = as_flat_dict(dataclasses.replace(config, data=data))
    assert strict(json.dumps(flat))["data.label_range"] == [0.0, "inf"]


@pytest.mark.parametrize(("field", "value"), (("offset", {"wit": 1e59}), ("folded", {"wit": 1e60})))
def test_a_model_that_nobody_would_read_again_is_not_written(tmp_path, field, value):
    spec = dataclasses.replace(RewardSpec(("wit",), {"wit": 1.0}), **{field: value})
    with pytest.raises(UserError, match=f"field '{field}' is"):
        _write_spec(tmp_path, spec)


@pytest.mark.parametrize("scores", ("[1e308, -1e308]", "[NaN, 1]", "[1, Infinity]"))
def test_margins_of_chosen_pairs_are_numbers(tmp_path, scores):
    row = f'{{"prompt": "a?", "responses": ["b", "c"], "scores": {scores}}}\n'
    (tmp_path / "in.jsonl").write_text(row)
    with pytest.raises(UserError, match="row 1: field 'scores' has"):
        choose_file(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), Choice("pairs"))


def test_what_is_chosen_is_json(tmp_path):
    row = '{"prompt": "a?", "responses": ["b", "c"], "scores": [1, 2], "id": NaN}\n'
    (tmp_path / "in.jsonl").write_text(row)
    with pytest.raises(UserError, match="NaN or infinity is in row 1"):
        choose_file(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), Choice("pairs"))
    assert not (tmp_path / "out.jsonl").exists()


# ---- read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (1e39, -1e300, 10**400, math.inf, math.nan))
def test_a_margin_that_float32_has_not_is_refused(value):
    with pytest.raises(UserError, match=r"x row 1: field 'm' is .* a number up to 3\.4e\+38"):
        number_field({"m": value}, "m", "x row 1")


@pytest.mark.parametrize("score", ("NaN", "-Infinity", "1e400", "1e39", "9" * 400, "[" * 10**5))
def test_scores_of_a_file_are_numbers(tmp_path, score):
    (tmp_path / "s.jsonl").write_text(f'{{"id": "a", "scores": [{score}, 0]}}\n')
    with pytest.raises(UserError, match=r"s\.jsonl row 1: expected"):
        read_scores(tmp_path / "s.jsonl", [])


@pytest.mark.parametrize("pairs", ("Infinity", "NaN", "[" * 10**5))
def test_a_file_of_weights_whose_numbers_are_none(tmp_path, pairs):
    text = f'{{"format": "rmjax.weights/1", "weights": {{}}, "source": "", "pairs": {pairs}}}'
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(UserError, match=r"w\.json: not a file of weights"):
        read_weights(tmp_path / "w.json")


_SCALE = {"lowest": 0, "highest": 2, "attributes": ["wit"]}


@pytest.mark.parametrize(
    "fields",
    (
        *({"ordinal": _SCALE | {"thresholds": [row]}} for row in ([0, math.nan], [0, math.inf])),
        {"ordinal": _SCALE | {"thresholds": [[1, 0]]}},
        {"ordinal": _SCALE | {"highest": 2.0, "thresholds": [[0, 1]]}},
        *({"general_preference": {"beta": beta}} for beta in (0, -1, math.nan, True)),
        *({"temperature": {"value": t, "rule": "wit", "pairs": 1}} for t in (0, -1, math.nan)),
    ),
)
def test_scales_of_a_model_are_numbers(tmp_path, fields):
    _write_spec(tmp_path, RewardSpec(("wit",), {"wit": 1.0}))
    raw = json.loads((tmp_path / "rmjax.json").read_text())
    (tmp_path / "rmjax.json").write_text(json.dumps(raw | fields))
    with pytest.raises(UserError, match=rf"rmjax\.json: .*{next(iter(fields))}"):
        read_spec(tmp_path)


@pytest.mark.parametrize("text", ("NaN", "Infinity", "9" * 400, "1e308", "null", '"x"'))
def test_metrics_that_no_run_writes_are_no_numbers(tmp_path, text):
    lines = [f'{{"step": 1, "loss": {text}}}', f'{{"step": {text}, "loss": 1}}', "[" * 10**5]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    found, unread = _read_lines(tmp_path / "m.jsonl", None)
    assert [line["step"] for line in found] == [1] and unread == 2


# ---- rewards ------------------------------------------------------------------------------------

_ASKED = [Conversation([{"role": "user", "content": "a?"}])]


@pytest.mark.parametrize("value", ("1e39", "float('nan')", "10**400", "1j", "'1'"))
def test_a_function_gives_numbers_of_float32(tmp_path, value):
    (tmp_path / "f.py").write_text(f"def f(prompts, responses):\n    return [{value}]\n")
    with pytest.raises(UserError, match=r"a reward is .* a number up to 3\.4e\+38, or None"):
        FunctionReward(f"{tmp_path}/f.py:f", 10.0, "config")(_ASKED, [["b"]])


def test_a_sum_of_rewards_is_finite():
    def large(prompts, responses):
        return np.full((1, 1), 1e30), None

    with pytest.raises(UserError, match=r"config\.rewards\.r: as it is standardized"):
        Rewards({"r": RewardConfig("m", weight=1e300)}, {"r": large})(_ASKED, [["b"]])


def test_a_standard_of_rewards_that_hardly_differ_is_none(tmp_path):
    rows = [{"prompt": "a?", "response": "b" * n} for n in (1, 2)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def tiny(prompts, responses):
        return np.asarray([[1e-320 * len(text) for text in texts] for texts in responses]), None

    with pytest.raises(UserError, match="these do not differ"):
        kept_standard(tmp_path, "r", tiny, f"{tmp_path}/r.jsonl")


@pytest.mark.parametrize(("mean", "deviation"), (("NaN", "1"), ("Infinity", "1"), ("0", "0")))
def test_a_standard_on_disk_is_of_numbers(tmp_path, mean, deviation):
    kept = f'{{"r": {{"source": "s", "mean": {mean}, "deviation": {deviation}, '
    (tmp_path / "rewards.json").write_text(kept + '"responses": 1, "without": 0}}')
    with pytest.raises(UserError, match=r"rewards\.json: damaged"):
        kept_standard(tmp_path, "r", None, "s")
