"""The figures of an alignment run: its numbers over the steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.reports import plots
from rmjax.reports.alignments.alignment_files import AlignmentFiles
from rmjax.reports.document import Block, Collapsible, Figure, Heading
from rmjax.reports.numbers import short
from rmjax.reports.plots import Curve

_COLOURS = 6  # lines of a figure
_LOGARITHMIC = ("grad_norm",)
# Of each figure: its name, the label of its axis, the numbers of steps that it draws by their
# labels, the field of an evaluation that it draws beside them, and what it shows.
_FIGURES: tuple[tuple[str, str, Mapping[str, str], str, str], ...] = (
    (
        *("reward", "reward", {"reward": "of the step"}, "reward"),
        "Mean reward of a step's samples, before penalties and KL, and of held-out prompts.",
    ),
    (
        *("kl", "KL of a sample, nats", {"kl": ""}, ""),
        "log(policy / reference) of a sample, the sum over its tokens; mean of a step.",
    ),
    (
        *("length", "tokens", {"length": "of the step"}, "length"),
        "Mean tokens of an answer.",
    ),
    (
        *("ended", "share that ended", {"ended": "of the step"}, "ended"),
        "Share of answers that came to an end by themselves.",
    ),
    (
        *("entropy", "entropy, nats", {"entropy": ""}, ""),
        "Mean entropy of what a token was drawn from.",
    ),
    (*("loss", "loss", {"loss": ""}, ""), "The objective; mean of a step's updates."),
    (
        *("grad_norm", "gradient norm", {"grad_norm": ""}, ""),
        "Norm of the gradient before clipping; mean of a step's updates.",
    ),
    (
        *("sampler_gap", "difference, nats", {"sampler_gap": ""}, ""),
        "How far the sampler's log-probability of a token is from the trainer's, on average.",
    ),
)


def step_blocks(files: AlignmentFiles, data: Mapping[str, Any]) -> list[Block]:
    """The figures of what is always looked at, and behind a title those of all other numbers."""
    if not files.run.steps and len(files.evaluations) < 2:
        return []
    figures = [_of_table(files, data, row) for row in _FIGURES]
    blocks: list[Block] = [Heading("Over the run"), *(figure for figure in figures if figure)]
    blocks += _attributes(data)
    shown = {name for _, _, fields, _, _ in _FIGURES for name in fields}
    rest = [name for name in files.numbers if name not in shown]
    drawn = [_of_steps(files, name) for name in rest]
    others = tuple(figure for figure in drawn if figure)
    return [*blocks, Collapsible("All other numbers of the steps", others)] if others else blocks


def judge_figures(data: Mapping[str, Any]) -> list[Figure]:
    """The held-out answers by each other judge, over the evaluations."""
    judges = dict.fromkeys(name for entry in data["evaluations"] for name in entry["judges"])
    figures = []
    for number, name in enumerate(judges):
        known = [(e["step"], e["judges"][name]) for e in data["evaluations"] if name in e["judges"]]
        curve = _held_out("", [(step, judge["reward"]) for step, judge in known])
        caption = f"Mean score of held-out answers by {name}, with 95 % intervals."
        figures.append(_figure(f"judge-{number}", [curve], f"score by {name}", caption))
    return figures


def _of_table(
    files: AlignmentFiles,
    data: Mapping[str, Any],
    row: tuple[str, str, Mapping[str, str], str, str],
) -> Figure | None:
    name, ylabel, fields, of_evaluations, caption = row
    lines = [
        Curve(label, files.run.steps, files.numbers[field], rough=True)
        for field, label in fields.items()
        if field in files.numbers
    ]
    held = [(e["step"], e[of_evaluations]) for e in data["evaluations"]] if of_evaluations else []
    if held:
        lines.append(_held_out("held-out", held))
    if held and len(lines[-1].low):
        caption += " The band is a 95 % interval (bootstrap over prompts)."
    drawn = any(np.isfinite(np.asarray(line.y, float)).any() for line in lines)
    return _figure(name, lines, ylabel, caption) if drawn else None


def _of_steps(files: AlignmentFiles, name: str) -> Figure | None:
    if not np.isfinite(files.numbers[name]).any():
        return None
    line = Curve("", files.run.steps, files.numbers[name], rough=True)
    return _figure(f"step-{name}", [line], name, "")


def _held_out(label: str, known: Sequence[tuple[int, Any]]) -> Curve:
    """Numbers of evaluations; a mean with its interval is a band."""
    steps = [step for step, _ in known]
    if not isinstance(known[0][1], dict):
        return Curve(label, steps, [_number(value) for _, value in known])
    mean, low, high = ([_number(x[k]) for _, x in known] for k in ("mean", "low", "high"))
    if not np.isfinite(low).any():
        return Curve(label, steps, mean)
    return Curve(label, steps, mean, low, high)


def _attributes(data: Mapping[str, Any]) -> list[Figure]:
    evaluations = [entry for entry in data["evaluations"] if entry["attributes"]]
    names = list(dict.fromkeys(name for entry in evaluations for name in entry["attributes"]))
    if len(evaluations) < 2 or len(names) < 2:
        return []
    steps, figures = [entry["step"] for entry in evaluations], []
    for start in range(0, len(names), _COLOURS):
        lines = [
            Curve(name, steps, [_number(entry["attributes"].get(name)) for entry in evaluations])
            for name in names[start : start + _COLOURS]
        ]
        caption = "Mean of held-out answers by each attribute of the reward."
        figures.append(_figure(f"attributes-{start}", lines, "mean of held-out answers", caption))
    return figures


def _figure(name: str, lines: Sequence[Curve], ylabel: str, caption: str) -> Figure:
    said = []
    for line in lines:
        values = [value for value in np.asarray(line.y, float) if math.isfinite(value)]
        if values:
            label = f"{line.label}: " if line.label else ""
            said.append(f"{label}{short(values[0], 3)} to {short(values[-1], 3)}")
    drawing = plots.curves(lines, "step", ylabel, logarithmic=name in _LOGARITHMIC)
    alt = f"{caption or ylabel} {'; '.join(said)}"
    return Figure(drawing, name.replace("_", "-").replace("/", "-"), alt, caption)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
