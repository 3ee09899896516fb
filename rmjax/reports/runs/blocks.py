"""The sections of the report of a run."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.reports import plots
from rmjax.reports.document import Block, Facts, Figure, Heading, Table
from rmjax.reports.numbers import DASH, count, decimal, interval, percent, short
from rmjax.reports.plots import Curve
from rmjax.reports.runs.run_directory import LoggedEvaluation, RunFiles

_STRENGTH = "accuracy_at_strength_"


# ---- held-out data ------------------------------------------------------------------------------


def result_blocks(best: LoggedEvaluation) -> list[Block]:
    """The tables of the best evaluation."""
    blocks: list[Block] = [Heading("Held-out data")]
    if best.attributes:
        fields = ("mse", "mse_constant", "pearson", "spearman", "pair_accuracy")
        rows = tuple(
            (
                name,
                count(row.get("count")),
                *(decimal(row.get(field)) for field in fields),
                count(row.get("pairs")),
            )
            for name, row in best.attributes.items()
        )
        blocks.append(
            Table(
                (
                    "attribute",
                    "ratings",
                    "MSE",
                    "MSE of the mean",
                    "Pearson",
                    "Spearman",
                    "pair accuracy",
                    "pairs",
                ),
                rows,
                caption=f"Ratings at step {best.step}, the best validation loss",
                note="MSE of the mean: always answering the mean rating of the training data. "
                "Pairs: responses to one prompt with different ratings; chance is 0.5.",
            )
        )
    if best.pairs:
        blocks.append(_pairs(best))
    if best.policy:
        blocks.append(_policy(best))
    return blocks


def _pairs(best: LoggedEvaluation) -> Table:
    get = best.pairs.get
    rows = [
        ("pairs", count(get("pairs"))),
        ("accuracy", decimal(get("accuracy"))),
        ("95 % interval of the accuracy", interval(get("low"), get("high"))),
    ]
    rows += [
        (f"accuracy at strength {field.removeprefix(_STRENGTH)}", decimal(value))
        for field, value in best.pairs.items()
        if field.startswith(_STRENGTH)
    ]
    rows += [
        ("mean margin", decimal(get("mean_margin"))),
        ("calibration error", decimal(get("calibration_error"))),
        ("temperature", decimal(get("temperature"))),
        ("correlation of reward and length", decimal(get("length_correlation"))),
    ]
    return Table(
        ("preference pairs", "value"),
        tuple(rows),
        caption=f"Preference pairs at step {best.step}, the best validation loss",
        note="Equal rewards count one half. The interval is Wilson's.",
    )


def _policy(best: LoggedEvaluation) -> Table:
    get = best.policy.get
    rows = [("responses", count(get("responses"))), ("tokens of them", count(get("tokens")))]
    rows += [
        (label, decimal(get(field)))
        for label, field in (
            ("log-probability of a token", "token_log_probability"),
            ("log(policy / reference) of a token", "log_ratio"),
            ("log-probability of a chosen response", "chosen_log_probability"),
            ("log-probability of a rejected response", "rejected_log_probability"),
            ("implicit reward of a chosen response", "chosen_reward"),
            ("implicit reward of a rejected response", "rejected_reward"),
        )
        if math.isfinite(get(field, math.nan))
    ]
    return Table(
        ("policy", "value"),
        tuple(rows),
        caption=f"What the policy says of held-out responses at step {best.step}",
        note="Means. log(policy / reference) is no KL divergence: the tokens are the data's, and "
        "not the policy's.",
    )


def evaluation_blocks(run: RunFiles) -> list[Block]:
    """Figures over evaluations, if there are at least two."""
    if len(run.evaluations) < 2:
        return []
    figures = []
    names = list(run.evaluations[-1].attributes)
    for measure, label, caption in (
        ("pearson", "Pearson", "Correlation of scores and ratings on held-out data."),
        ("pair_accuracy", "pair accuracy", "Share of a prompt's responses in the rated order."),
    ):
        curves = [Curve(name, *_over(run, name, measure)) for name in names]
        if any(np.isfinite(curve.y).any() for curve in curves):
            figures.append(_curves(measure.replace("_", "-"), curves, label, caption))
    for i, name in enumerate(names):
        model = Curve("model", *_over(run, name, "mse"))
        constant = Curve("constant mean", *_over(run, name, "mse_constant"), dashed=True)
        caption = f"{name}: error on held-out ratings, beside that of always answering the mean."
        figures.append(_curves(f"mse-{i}", [model, constant], "mean squared error", caption))
    figures += _pair_curves(run) + _policy_curves(run)
    return [Heading("Over the run"), *figures]


def _pair_curves(run: RunFiles) -> list[Figure]:
    evaluations = [e for e in run.evaluations if e.pairs]
    if len(evaluations) < 2:
        return []
    steps = [e.step for e in evaluations]

    def values(field: str) -> list[float]:
        return [e.pairs.get(field, math.nan) for e in evaluations]

    def line(field: str, label: str = "", **bounds: Any) -> Curve:
        return Curve(label, steps, values(field), **bounds)

    accuracy = line("accuracy", "accuracy", low=values("low"), high=values("high"))
    chance = Curve("chance", [steps[0], steps[-1]], [0.5, 0.5], dashed=True)
    caption = "Share of held-out pairs whose chosen response has the higher reward; 95 % intervals."
    figures = [_curves("pairs-accuracy", [accuracy, chance], "accuracy", caption)]
    strengths = [field for field in evaluations[-1].pairs if field.startswith(_STRENGTH)]
    if len(strengths) > 1:
        curves = [line(field, f"strength {field.removeprefix(_STRENGTH)}") for field in strengths]
        caption = "The same by the strength of the preference."
        figures.append(_curves("pairs-strength", curves, "accuracy", caption))
    caption = "Expected calibration error of sigmoid(margin)."
    errors = [line("calibration_error")]
    figures.append(_curves("pairs-calibration", errors, "calibration error", caption))
    caption = "Pearson correlation of reward and tokens, over all responses."
    length = [line("length_correlation")]
    return [*figures, _curves("pairs-length", length, "correlation with length", caption)]


def _policy_curves(run: RunFiles) -> list[Figure]:
    evaluations = [e for e in run.evaluations if e.policy]
    if len(evaluations) < 2:
        return []
    steps, figures = [e.step for e in evaluations], []
    sides = {"chosen": "chosen_", "rejected": "rejected_"}
    for name, ylabel, fields, caption in (
        ("reward", "implicit reward", sides, "Mean implicit reward of held-out responses."),
        (
            *("log_probability", "log-probability", sides),
            "Mean log-probability of held-out responses, the sum over their tokens.",
        ),
        (
            *("log_ratio", "log(policy / reference)", {"": ""}),
            "Mean over the tokens of held-out responses; no KL divergence, since the tokens are "
            "the data's.",
        ),
    ):
        curves = [
            Curve(label, steps, [e.policy.get(f"{prefix}{name}", math.nan) for e in evaluations])
            for label, prefix in fields.items()
        ]
        if any(np.isfinite(curve.y).any() for curve in curves):
            figures.append(_curves(f"policy-{name.replace('_', '-')}", curves, ylabel, caption))
    return figures


def _over(run: RunFiles, name: str, field: str) -> tuple[list[int], list[float]]:
    values = [e.attributes.get(name, {}).get(field, math.nan) for e in run.evaluations]
    return [e.step for e in run.evaluations], values


def _curves(
    name: str, curves: Sequence[Curve], ylabel: str, caption: str, logarithmic: bool = False
) -> Figure:
    drawing = plots.curves(curves, "step", ylabel, logarithmic=logarithmic)
    return Figure(drawing, name, f"{caption} {_ends(curves)}".strip(), caption)


def _ends(curves: Sequence[Curve]) -> str:
    """First and last values in words, for readers who cannot see the figure."""
    parts = []
    for curve in curves:
        values = [value for value in np.asarray(curve.y, float) if math.isfinite(value)]
        if values and not curve.dashed:
            parts.append(f"{curve.label or 'From'} {short(values[0], 3)} to {short(values[-1], 3)}")
    return "; ".join(parts) + "." if parts else ""


# ---- training -----------------------------------------------------------------------------------


def training_blocks(run: RunFiles) -> list[Block]:
    """Figures over the steps."""
    steps, numbers = run.steps, run.numbers
    loss = [Curve("training", steps, numbers["loss"], rough=True)]
    if run.evaluations:
        evaluated = [e.step for e in run.evaluations]
        loss.append(Curve("validation", evaluated, [e.loss for e in run.evaluations]))
    drawn = np.concatenate([np.asarray(curve.y, float) for curve in loss])
    drawn = drawn[np.isfinite(drawn)]
    wide = len(drawn) > 0 and 0 < 30 * drawn.min() < drawn.max()
    speed = (
        f"Tokens per second without padding. Median {decimal(median_speed(run), 0)}; padding: "
        f"{percent(_mean(numbers['padding']))} of the computed positions."
    )

    def line(field: str, rough: bool = True) -> list[Curve]:
        return [Curve("", steps, numbers[field], rough=rough)]

    clipping = "Norm of the gradient before clipping."
    figures = [
        _curves("loss", loss, "loss", "The objective at each step.", logarithmic=bool(wide)),
        _curves("gradient", line("grad_norm"), "gradient norm", clipping, logarithmic=True),
        _curves("learning-rate", line("learning_rate", False), "learning rate", "Learning rate."),
        _curves("speed", line("tokens_per_second"), "tokens/s", speed),
    ]
    return [Heading("Training"), *figures]


# ---- data and configuration ---------------------------------------------------------------------


def data_blocks(data: Mapping[str, Any], unit: str = "sample") -> list[Block]:
    """How many samples, or other units, were kept and dropped, their tokens and ratings."""
    if not data:
        return []
    parts = list(data)
    reasons = list(dict.fromkeys(reason for part in parts for reason in data[part]["samples"]))
    rows = [
        (reason, *(count(data[part]["samples"].get(reason)) for part in parts))
        for reason in reasons
    ]
    rows += [
        (f"tokens per {unit}, mean", *(decimal(data[p]["tokens"]["mean"], 1) for p in parts)),
        (f"tokens per {unit}, most", *(count(data[p]["tokens"]["max"]) for p in parts)),
        ("tokens", *(count(data[p]["tokens"]["total"]) for p in parts)),
    ]
    blocks: list[Block] = [
        Heading("Data"),
        Facts(
            (
                *((part, str(data[part]["source"])) for part in parts),
                *(
                    (f"{part}, note", note)
                    for part in parts
                    for note in data[part].get("notes", ())
                ),
            )
        ),
        Table(("", *parts), tuple(rows), caption=f"{unit.capitalize()}s, kept and dropped"),
    ]
    labels = [
        (name, part, count(row["count"]), decimal(row["mean"]), decimal(row["sd"]))
        for part in parts
        for name, row in data[part].get("labels", {}).items()
    ]
    if labels:
        columns = ("attribute", "split", "ratings", "mean", "standard deviation")
        blocks.append(Table(columns, tuple(labels), caption="Ratings", align="llrrr"))
    return blocks


def config_facts(config: Mapping[str, Any]) -> Facts:
    """Every field of the config."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or DASH
        return str(value) if value != "" else DASH

    return Facts(tuple((re.sub(r"^config\.", "", name), shown(v)) for name, v in config.items()))


def median_speed(run: RunFiles) -> float:
    """Tokens per second without padding, without the first step."""
    rates = run.numbers["tokens_per_second"]
    rates = rates[np.isfinite(rates)]
    rates = rates[1:] if len(rates) > 1 else rates  # the first step waits for the compiler
    return float(np.median(rates)) if len(rates) else math.nan


def _mean(values: Float[np.ndarray, "N"]) -> float:
    present = values[np.isfinite(values)]
    return float(present.mean()) if len(present) else math.nan
