"""How well things agree: calibration, correlations, accuracy by length and by subset."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rmjax.evaluation.metrics import wilson_interval
from rmjax.reports.plots.common import (
    HEIGHT,
    XLABEL,
    Numbers,
    chance_line,
    empty,
    finite_pairs,
    in_percent,
    label_rows,
    legend,
    new_axes,
    new_figure,
    shortened,
    styled,
    whiskers,
)
from rmjax.reports.theme import INK, LINE, MUTED, PAPER, SERIES


@styled
def reliability(probabilities: Numbers, outcomes: Numbers, bins: int = 10) -> Figure:
    """A reliability diagram: the share that is right by the predicted probability.

    Whiskers are 95 % intervals (Wilson). A histogram below shows how many cases each bin has.

    Args:
      probabilities: of each case, in [0, 1]; if all are at least 1/2 the axis begins there.
      outcomes: 1 if right, 0 if wrong, 1/2 for a draw.
      bins: how many, of equal width.
    """
    figure = new_figure(HEIGHT + 50)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    said, true = finite_pairs(probabilities, outcomes)
    if not len(said):
        lower.set_visible(False)
        return empty(figure, upper)
    start = 0.5 if said.min() >= 0.5 else 0.0
    edges = np.linspace(start, 1.0, bins + 1)
    which = np.clip(np.digitize(said, edges) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    upper.plot((start, 1), (start, 1), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    points = [
        (said[which == i].mean(), true[which == i].mean(), true[which == i].sum(), counts[i])
        for i in range(bins)
        if counts[i]
    ]
    x, y = [p[0] for p in points], [p[1] for p in points]
    intervals = [wilson_interval(float(p[2]), int(p[3])) for p in points]
    whiskers(upper, x, intervals, SERIES[0])
    upper.plot(x, y, "o-", color=SERIES[0], markersize=5)
    upper.set_xlim(start, 1)
    upper.set_ylim(min(start, *(low for low, _ in intervals)), 1.02)
    upper.set_ylabel("share that is right")
    in_percent(upper.yaxis)
    lower.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=SERIES[0], alpha=0.6)
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    lower.set_ylabel("cases")
    lower.set_xlabel("probability according to the model")
    lower.grid(axis="x", visible=False)
    in_percent(lower.xaxis)
    return figure


@styled
def correlation_matrix(names: Sequence[str], matrix: Float[np.ndarray, "A A"]) -> Figure:
    """A heat map with its numbers: blue is positive, orange negative; weaker is paler.

    Args:
      names: of rows and columns.
      matrix: correlations, from -1 to 1; NaN where one is not defined.
    """
    matrix, count = np.asarray(matrix, float), len(names)
    figure, axes = new_axes(max(150.0, min(460.0, 100 + 52 * count)))
    if not count:
        return empty(figure, axes)
    size = 12 if count <= 6 else 10
    for i in range(count):
        for j in range(count):
            value = matrix[i, j]
            defined = bool(np.isfinite(value))
            colour = SERIES[0] if defined and value >= 0 else SERIES[1]
            # Opacity instead of a mixed colour: it suits whatever is behind.
            opacity = 0.62 * min(1.0, abs(float(value))) if defined else 0.0
            axes.bar(j, 0.96, 0.96, i - 0.48, color=colour, alpha=opacity)
            shown = f"{value:.2f}".replace("-", "−") if defined else "–"
            axes.text(j, i, shown, ha="center", va="center", fontsize=size)
    labels = [shortened(name, 18) for name in names]
    axes.set_xticks(
        range(count),
        labels,
        rotation=35 if count > 3 else 0,
        ha="right" if count > 3 else "center",
        rotation_mode="anchor" if count > 3 else None,
    )
    axes.set_yticks(range(count), labels)
    axes.tick_params(length=0, labelcolor=INK)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return figure


@styled
def accuracy_by_length(
    differences: Numbers, right: Numbers, xlabel: str = "length difference", bins: int = 8
) -> Figure:
    """Accuracy by how much longer the chosen response is than the rejected one.

    Each bin has about equally many pairs; its point is at their median, with a 95 % interval.

    Args:
      differences: length of the chosen response minus that of the rejected one.
      right: 1 if the pair is ordered as people did, 1/2 for a draw, else 0.
      xlabel: what the differences are, with their unit.
      bins: the most there can be.
    """
    figure, axes = new_axes()
    lengths, right_ = finite_pairs(differences, right)
    if not len(lengths):
        return empty(figure, axes)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)))
    which = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    x, y, intervals = [], [], []
    for i in np.unique(which):
        members = right_[which == i]
        x.append(float(np.median(lengths[which == i])))
        y.append(float(members.mean()))
        intervals.append(wilson_interval(float(members.sum()), len(members)))
    axes.axvline(0, color=LINE, linewidth=1.4)
    chance_line(axes.axhline, 0.5)
    whiskers(axes, x, intervals, SERIES[0])
    axes.plot(x, y, "o-", color=SERIES[0], markersize=5)
    axes.set_ylim(min(0.4, *(low for low, _ in intervals)), 1.02)
    axes.set_xlabel(shortened(xlabel, XLABEL))
    axes.set_ylabel("accuracy")
    in_percent(axes.yaxis)
    legend(axes)
    return figure


@styled
def bars(
    labels: Sequence[str],
    values: Numbers,
    xlabel: str,
    low: Numbers | None = None,
    high: Numbers | None = None,
    chance: float | None = None,
) -> Figure:
    """Horizontal bars with their numbers, such as the accuracy of each subset.

    Args:
      labels: from top to bottom.
      values: one for each label.
      xlabel: what the values are.
      low: lower ends of intervals, if there are any.
      high: upper ends of the intervals.
      chance: what guessing gives, drawn as a line.
    """
    figure, axes = new_axes(76 + 27 * max(1, len(labels)))
    numbers = np.asarray(values, float)
    if not np.isfinite(numbers).any():
        return empty(figure, axes)
    rows = [-float(i) for i in range(len(labels))]
    filled = np.nan_to_num(numbers)
    axes.barh(rows, filled, 0.62, color=SERIES[0], alpha=0.8)
    ends = filled.copy()
    if low is not None and high is not None:
        lows, highs = np.asarray(low, float), np.asarray(high, float)
        axes.hlines(rows, lows, highs, color=INK, linewidth=1.3)
        ends = np.fmax(ends, highs)
    if chance is not None:
        chance_line(axes.axvline, chance)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0, borderaxespad=0.2)
    span = max(ends.max(), 0.0) - min(filled.min(), 0.0) or 1.0
    for row, value, end in zip(rows, numbers, ends):
        shown = f"{value:.3f}".replace("-", "−") if np.isfinite(value) else "–"
        box = {"facecolor": PAPER, "pad": 0.8, "linewidth": 0}  # above the line of chance
        axes.text(max(end, 0) + 0.015 * span, row, shown, va="center", fontsize=11.5, bbox=box)
    axes.set_xlim(min(filled.min(), 0.0), max(ends.max(), 0.0) + 0.16 * span)
    label_rows(axes, labels, rows)
    axes.set_xlabel(shortened(xlabel, XLABEL), loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure
