"""The report of a training run: how it went, what came of it, with what it was made."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.reports import plots
from rmjax.reports.document import (
    Block,
    Collapsible,
    Document,
    Facts,
    Figure,
    Heading,
    Headline,
    Paragraph,
    Table,
    Warning,
)
from rmjax.reports.numbers import DASH, count, decimal, interval, percent, short
from rmjax.reports.plots import Curve
from rmjax.reports.runfiles import Evaluation, RunFiles

FORMAT = "rmjax.report.run/1"
_LAST = 20  # steps whose mean loss is the final one
_STRENGTH = "accuracy_at_strength_"


def run_document(run: RunFiles) -> Document:
    """What is shown of a run."""
    blocks: list[Block] = [Headline(_headline(run)), *map(Warning, notes(run))]
    if run.best:
        blocks += _result(run.best)
        blocks += _evaluations(run)
    if run.steps:
        blocks += _training(run)
    blocks += _data(run.data)
    versions = Facts(tuple((name, str(version)) for name, version in run.versions.items()))
    blocks += [
        Heading("Made with"),
        Collapsible("Versions", (versions,)),
        Collapsible("Configuration", (_config(run.config),)),
    ]
    source = run.data.get("train", {}).get("source") or run.config.get("data.train", "")
    return Document(
        title=f"Training run {run.directory.name}",
        subtitle=_state(run),
        facts=(
            ("objective", str(run.config.get("objective", DASH))),
            ("weights", str(run.config.get("init") or "random")),
            ("training data", str(source)),
            ("devices", run.devices or DASH),
            ("batch", f"{run.config.get('batch_size', DASH)} responses"),
            ("seed", str(run.config.get("seed", DASH))),
        ),
        blocks=tuple(blocks),
    )


def run_data(run: RunFiles) -> dict[str, Any]:
    """A run's numbers, as `report.json` holds them."""
    best = run.best
    return {
        "format": FORMAT,
        "run": str(run.directory),
        "state": {
            "going_on": run.going_on,
            "last_step": run.steps[-1] if run.steps else 0,
            "planned_steps": run.planned,
            "checkpoints": run.checkpoints,
        },
        "summary": {
            "final_loss": _final_loss(run),
            "best_step": best.step if best else None,
            "best_validation_loss": best.loss if best else None,
            "tokens": int(np.nansum(run.numbers["tokens"])),
            "median_tokens_per_second": _speed(run),
        },
        "notes": notes(run),
        "evaluations": [
            {
                "step": e.step,
                "validation_loss": e.loss,
                "seconds": e.seconds,
                "attributes": e.attributes,
                "pairs": e.pairs or None,
            }
            for e in run.evaluations
        ],
        "steps": {"step": run.steps, **run.numbers},
        "data": run.data,
        "config": run.config,
        "versions": run.versions,
        "devices": run.devices,
    }


def notes(run: RunFiles) -> list[str]:
    """What a reader must know of this run before the numbers."""
    found = []
    if not run.steps:
        found.append("The run has not finished a step yet.")
    elif not run.evaluations:
        found.append(
            "There is no evaluation yet: it comes every eval.every steps and after the last one, "
            "if the run has validation data."
        )
    if run.unread:
        lines = "line" if run.unread == 1 else "lines"
        found.append(
            f"{run.unread} {lines} of metrics.jsonl cannot be read, as when a run was killed "
            "while it wrote one; left out here."
        )
    broken = [step for step, loss in zip(run.steps, run.numbers["loss"]) if not math.isfinite(loss)]
    if broken:
        found.append(f"The loss is not finite at step {broken[0]}.")
    return found


def _state(run: RunFiles) -> str:
    last, planned = (run.steps[-1] if run.steps else 0), run.planned
    about = "" if run.config.get("steps") else "about "
    of = f" of {about}{count(planned)}" if planned else ""
    if run.going_on:
        return f"Going on: step {count(last)}{of} is done."
    if planned and not about and last >= planned:
        return f"Finished: {count(last)} steps."
    ended = "Not running" if run.going_on is False else "As of its records"
    return f"{ended}: step {count(last)}{of} is the last one on record."


def _final_loss(run: RunFiles) -> float:
    losses = run.numbers["loss"][-_LAST:]
    return float(np.mean(losses)) if len(losses) else math.nan


def _speed(run: RunFiles) -> float:
    rates = run.numbers["tokens_per_second"]
    rates = rates[np.isfinite(rates)]
    rates = rates[1:] if len(rates) > 1 else rates  # the first step waits for the compiler
    return float(np.median(rates)) if len(rates) else math.nan


def _mean(values: Float[np.ndarray, "N"]) -> float:
    present = values[np.isfinite(values)]
    return float(present.mean()) if len(present) else math.nan


def _headline(run: RunFiles) -> tuple[tuple[str, str, str], ...]:
    last, best = (run.steps[-1] if run.steps else 0), run.best
    items = [
        (
            "Steps",
            count(last),
            f"{count(int(np.nansum(run.numbers['tokens'])))} tokens" if last else "",
        ),
        (
            "Training loss",
            decimal(_final_loss(run), 4),
            f"last {_LAST} steps" if last >= _LAST else "",
        ),
    ]
    if best:
        items.append(("Validation loss", decimal(best.loss, 4), f"the best, step {best.step}"))
        if best.pairs:
            low, high = best.pairs.get("low", math.nan), best.pairs.get("high", math.nan)
            accuracy = best.pairs.get("accuracy", math.nan)
            items.append(
                (
                    "Pair accuracy",
                    decimal(accuracy),
                    f"95 %: {interval(low, high)}, step {best.step}",
                )
            )
        elif best.attributes:
            name, row = next(iter(best.attributes.items()))
            shown = decimal(row.get("pearson", math.nan))
            items.append((f"Pearson, {name}", shown, f"step {best.step}"))
    items.append(("Speed", decimal(_speed(run), 0), "tokens/s, median"))
    return tuple(items)


# ---- held-out data ------------------------------------------------------------------------------


def _result(best: Evaluation) -> list[Block]:
    blocks: list[Block] = [Heading("Held-out data")]
    if best.attributes:
        names = ("count", "mse", "mse_constant", "pearson", "spearman", "pair_accuracy", "pairs")
        whole = ("count", "pairs")
        rows = tuple(
            (
                name,
                *(
                    _whole(row.get(field)) if field in whole else decimal(row.get(field, math.nan))
                    for field in names
                ),
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
    return blocks


def _pairs(best: Evaluation) -> Table:
    def get(field: str) -> float:
        return best.pairs.get(field, math.nan)

    rows = [
        ("pairs", _whole(get("pairs"))),
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


def _whole(value: float | None) -> str:
    return count(int(value)) if value is not None and math.isfinite(value) else DASH


def _evaluations(run: RunFiles) -> list[Block]:
    """Figures over evaluations, if there are at least two."""
    if len(run.evaluations) < 2:
        return []
    figures = []
    names = list(run.evaluations[-1].attributes)
    for measure, label, caption in (
        ("pearson", "Pearson", "Correlation of scores and ratings on held-out data."),
        ("pair_accuracy", "pair accuracy", "Share of two responses to a prompt ordered as rated."),
    ):
        found = [Curve(name, *_over(run, name, measure)) for name in names]
        if any(np.isfinite(curve.y).any() for curve in found):
            figures.append(_curves(measure.replace("_", "-"), found, label, caption))
    for i, name in enumerate(names):
        model = Curve("model", *_over(run, name, "mse"))
        constant = Curve("constant mean", *_over(run, name, "mse_constant"), dashed=True)
        caption = f"{name}: error on held-out ratings, and that of always answering the mean."
        figures.append(_curves(f"mse-{i}", [model, constant], "mean squared error", caption))
    figures += _pair_curves(run)
    return [Heading("Over the run"), *figures]


def _pair_curves(run: RunFiles) -> list[Figure]:
    found = [e for e in run.evaluations if e.pairs]
    if len(found) < 2:
        return []
    steps = [e.step for e in found]

    def line(label: str, field: str, **bounds: Any) -> Curve:
        return Curve(label, steps, [e.pairs.get(field, math.nan) for e in found], **bounds)

    accuracy = line(
        "accuracy",
        "accuracy",
        low=[e.pairs.get("low", math.nan) for e in found],
        high=[e.pairs.get("high", math.nan) for e in found],
    )
    chance = Curve("chance", [steps[0], steps[-1]], [0.5, 0.5], dashed=True)
    figures = [
        _curves(
            "pairs-accuracy",
            [accuracy, chance],
            "accuracy",
            "Share of held-out pairs whose chosen response has the higher reward, with its 95 % "
            "interval.",
        )
    ]
    strengths = [f for f in found[-1].pairs if f.startswith(_STRENGTH)]
    if len(strengths) > 1:
        by_strength = [line(f"strength {f.removeprefix(_STRENGTH)}", f) for f in strengths]
        caption = "The same by the strength of the preference."
        figures.append(_curves("pairs-strength", by_strength, "accuracy", caption))
    errors = [line("", "calibration_error")]
    caption = "Expected calibration error of sigmoid(margin)."
    figures.append(_curves("pairs-calibration", errors, "calibration error", caption))
    length = [line("", "length_correlation")]
    caption = "Pearson correlation of reward and tokens, over all responses."
    figures.append(_curves("pairs-length", length, "correlation with length", caption))
    return figures


def _over(run: RunFiles, name: str, field: str) -> tuple[list[int], list[float]]:
    found = [(e.step, e.attributes.get(name, {}).get(field, math.nan)) for e in run.evaluations]
    return [step for step, _ in found], [value for _, value in found]


def _curves(
    name: str, found: Sequence[Curve], ylabel: str, caption: str, logarithmic: bool = False
) -> Figure:
    drawing = plots.curves(found, "step", ylabel, logarithmic=logarithmic)
    return Figure(drawing, name, f"{caption} {_ends(found)}".strip(), caption)


def _ends(found: Sequence[Curve]) -> str:
    """First and last values in words, for who cannot see the figure."""
    parts = []
    for curve in found:
        values = [value for value in np.asarray(curve.y, float) if math.isfinite(value)]
        if values and not curve.dashed:
            parts.append(f"{curve.label or 'From'} {short(values[0], 3)} to {short(values[-1], 3)}")
    return "; ".join(parts) + "." if parts else ""


# ---- training -----------------------------------------------------------------------------------


def _training(run: RunFiles) -> list[Block]:
    steps, numbers = run.steps, run.numbers
    loss = [Curve("training", steps, numbers["loss"], rough=True)]
    if run.evaluations:
        evaluated = [e.step for e in run.evaluations]
        loss.append(Curve("validation", evaluated, [e.loss for e in run.evaluations]))
    positive = all(np.nanmin(curve.y) > 0 for curve in loss if np.isfinite(curve.y).any())
    wide = np.nanmax(numbers["loss"]) > 30 * np.nanmin(numbers["loss"]) if positive else False
    figures = [
        _curves("loss", loss, "loss", "The objective, a step at a time.", logarithmic=bool(wide)),
        _curves(
            "gradient",
            [Curve("", steps, numbers["grad_norm"], rough=True)],
            "gradient norm",
            "Norm of the gradient before clipping.",
            logarithmic=True,
        ),
        _curves(
            "learning-rate",
            [Curve("", steps, numbers["learning_rate"], rough=False)],
            "learning rate",
            "Learning rate.",
        ),
        _curves(
            "speed",
            [Curve("", steps, numbers["tokens_per_second"], rough=True)],
            "tokens/s",
            f"Real tokens a second, padding not counted. Median {decimal(_speed(run), 0)}; "
            f"padding {percent(_mean(numbers['padding']))} of the places.",
        ),
    ]
    return [Heading("Training"), *figures]


# ---- data and configuration ---------------------------------------------------------------------


def _data(data: Mapping[str, Any]) -> list[Block]:
    if not data:
        return []
    parts = list(data)
    reasons = list(dict.fromkeys(reason for part in parts for reason in data[part]["samples"]))
    rows = [
        (reason, *(_whole(data[part]["samples"].get(reason)) for part in parts))
        for reason in reasons
    ]
    rows += [
        ("tokens a sample, mean", *(decimal(data[p]["tokens"]["mean"], 1) for p in parts)),
        ("tokens a sample, most", *(count(data[p]["tokens"]["max"]) for p in parts)),
        ("tokens", *(count(data[p]["tokens"]["total"]) for p in parts)),
    ]
    blocks: list[Block] = [
        Heading("Data"),
        Facts(tuple((part, str(data[part]["source"])) for part in parts)),
        Table(("", *parts), tuple(rows), caption="Samples by what became of them"),
    ]
    labels = [
        (name, part, count(row["count"]), decimal(row["mean"]), decimal(row["sd"]))
        for part in parts
        for name, row in data[part].get("labels", {}).items()
    ]
    if labels:
        columns = ("attribute", "split", "ratings", "mean", "standard deviation")
        blocks.append(Table(columns, tuple(labels), caption="Ratings", align="llrrr"))
    else:
        blocks.append(Paragraph("The data are preference pairs; there are no ratings."))
    return blocks


def _config(config: Mapping[str, Any]) -> Facts:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or DASH
        return str(value) if value != "" else DASH

    return Facts(tuple((re.sub(r"^config\.", "", name), shown(v)) for name, v in config.items()))
