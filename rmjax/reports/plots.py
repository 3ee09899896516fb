"""Numbers to figures, in one style. Each function takes plain sequences and returns a figure.

Values that are not finite are left out; where nothing is left the figure says so. Figures are made
without pyplot, so none is kept or shown, and nothing of the user's matplotlib changes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rmjax.metrics import wilson_interval
from rmjax.reports.drawing import PIXEL, style
from rmjax.reports.text import one_line
from rmjax.reports.theme import INK, LINE, MUTED, PAPER, SERIES

Numbers = Sequence[float] | Float[np.ndarray, "N"]
_P = ParamSpec("_P")

WIDTH, HEIGHT = 430, 280  # of a figure, in a page's pixels; two stand side by side
_LETTER = 6.5  # pixels of a letter in an axis's numbers, about
_SOFT = 0.25  # opacity of bands
_LABEL = 24  # letters of a name or of a label beside an axis
_XLABEL = 36  # of one below


def _styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # all forms have the same layout
            return figure

    return styled


def _figure(height: float = HEIGHT, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width * PIXEL, height * PIXEL), layout="constrained")


def _axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = _figure(height)
    return figure, figure.add_subplot()


# ---- distributions ------------------------------------------------------------------------------


@_styled
def histograms(groups: Mapping[str, Numbers], xlabel: str, bins: int = 30) -> Figure:
    """Distributions of up to three groups over each other: the share of a group in each bin.

    Args:
      groups: name and values.
      xlabel: what the values are, with their unit.
      bins: how many; whole numbers have at most one for each.
    """
    figure, axes = _axes()
    found = {name: _finite(values) for name, values in groups.items()}
    edges = _edges(list(found.values()), bins)
    if edges is None:
        return _empty(figure, axes)
    for i, (name, values) in enumerate(found.items()):
        if len(values):
            shares = np.histogram(values, edges)[0] / len(values)
            colour = SERIES[i % len(SERIES)]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=_SOFT)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=_label(name))
    _percent(axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_label(xlabel, _XLABEL))
    axes.set_ylabel("share")
    axes.grid(axis="x", visible=False)
    if len(found) > 1:
        _legend(axes)
    return figure


@_styled
def distributions(groups: Mapping[str, Numbers], xlabel: str, bins: int = 40) -> Figure:
    """Distributions of many groups, a row each on one axis, with a line at each median.

    Args:
      groups: name and values.
      xlabel: what the values are, with their unit.
      bins: how many.
    """
    found = {name: _finite(values) for name, values in groups.items()}
    figure = _figure(64 + 44 * max(1, len(found)))
    edges = _edges(list(found.values()), bins)
    if edges is None:
        return _empty(figure, figure.add_subplot())
    rows = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(rows, found.items()):
        counts = np.histogram(values, edges)[0]
        axes.stairs(counts / max(1, counts.max()), edges, fill=True, color=SERIES[0], alpha=0.75)
        if len(values):
            axes.axvline(float(np.median(values)), color=INK, linewidth=1.4)
        axes.set_ylim(0, 1.12)
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_ylabel(_label(name), rotation=0, ha="right", va="center", color=INK)
        axes.tick_params(axis="x", length=3 if axes is rows[-1] else 0)
    rows[-1].set_xlabel(_label(xlabel, _XLABEL), loc="right")
    return figure


@_styled
def margin_histogram(margins: Numbers, xlabel: str = "margin", bins: int = 40) -> Figure:
    """How far chosen responses are ahead of rejected ones: those behind in another colour.

    Args:
      margins: the chosen response's reward minus the rejected one's, of each pair.
      xlabel: what they are.
      bins: how many, about.
    """
    figure, axes = _axes()
    values = _finite(margins)
    if not len(values):
        return _empty(figure, axes)
    width = max(float(np.ptp(np.append(values, 0.0))), 1e-9) / bins
    first, last = np.floor(values.min() / width), np.floor(values.max() / width) + 1
    edges = width * np.arange(min(first, 0.0), max(last, 1.0) + 1)
    counts = np.histogram(values, edges)[0]
    behind = edges[:-1] < -width / 2
    for where, colour, name in (
        (behind, SERIES[1], f"rejected ahead ({_share(float(np.mean(values < 0)))})"),
        (~behind, SERIES[0], f"chosen ahead ({_share(float(np.mean(values > 0)))})"),
    ):
        axes.bar(
            edges[:-1][where], counts[where], 0.9 * width, align="edge", color=colour, label=name
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel(_label(xlabel, _XLABEL))
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="x", visible=False)
    _legend(axes)
    return figure


@_styled
def columns(
    categories: Sequence[str], groups: Mapping[str, Numbers], xlabel: str, ylabel: str = "share"
) -> Figure:
    """Upright bars over categories, those of several groups beside each other.

    Args:
      categories: their names, from left to right.
      groups: name and one share (of 1) for each category.
      xlabel: what the categories are.
      ylabel: what the shares are of.
    """
    figure, axes = _axes()
    if not categories or not groups:
        return _empty(figure, axes)
    places, width = np.arange(len(categories)), 0.8 / len(groups)
    for i, (name, shares) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * width
        axes.bar(
            places + offset,
            np.nan_to_num(np.asarray(shares, float)),
            0.92 * width,
            color=SERIES[i % len(SERIES)],
            label=_label(name),
        )
    names = [_label(name, 12) for name in categories]
    # As many names as have room: the first, and every so many after it.
    every = math.ceil(_LETTER * (2 + max(map(len, names))) * len(names) / (WIDTH - 70))
    axes.set_xticks(places[::every], names[::every])
    axes.tick_params(axis="x", length=0)
    _percent(axes.yaxis)
    axes.set_xlabel(_label(xlabel, _XLABEL))
    axes.set_ylabel(_label(ylabel))
    axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        _legend(axes)
    return figure


@_styled
def boxes(groups: Mapping[str, Numbers], xlabel: str) -> Figure:
    """Lying boxes: quartiles and median, whiskers from the 5th to the 95th percentile.

    Args:
      groups: name and values, from top to bottom.
      xlabel: what the values are, with their unit.
    """
    figure, axes = _axes(76 + 32 * max(1, len(groups)))
    found = {name: _finite(values) for name, values in groups.items()}
    if not any(map(len, found.values())):
        return _empty(figure, axes)
    statistics = []
    for values in found.values():
        values = values if len(values) else np.full(1, np.nan)
        low, q1, median, q3, high = np.percentile(values, (5, 25, 50, 75, 95))
        statistics.append({"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high})
    places = [-float(i) for i in range(len(found))]
    thin = {"color": MUTED, "linewidth": 1.2}
    axes.bxp(
        statistics,
        positions=places,
        orientation="horizontal",
        widths=0.55,
        showfliers=False,
        showcaps=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": SERIES[0], "alpha": 0.75, "linewidth": 0},
        medianprops={"color": INK, "linewidth": 1.8},
        whiskerprops=thin,
    )
    _rows(axes, list(found), places)
    axes.set_xlabel(_label(xlabel, _XLABEL), loc="right")
    return figure


# ---- agreement ----------------------------------------------------------------------------------


@_styled
def reliability(probabilities: Numbers, outcomes: Numbers, bins: int = 10) -> Figure:
    """Whether what is said to be right with probability p is right in p of the cases.

    Below the diagram stands how many cases each bin has; bars are 95 % intervals (Wilson).

    Args:
      probabilities: of each case, in [0, 1]; if all are at least 1/2 the axis begins there.
      outcomes: 1 where it came true, 0 where not, 1/2 for a draw.
      bins: how many, of equal width.
    """
    figure = _figure(HEIGHT + 50)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    said, true = _finite_pairs(probabilities, outcomes)
    if not len(said):
        lower.set_visible(False)
        return _empty(figure, upper)
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
    _whiskers(upper, x, intervals, SERIES[0])
    upper.plot(x, y, "o-", color=SERIES[0], markersize=5)
    upper.set_xlim(start, 1)
    upper.set_ylim(min(start, *(low for low, _ in intervals)), 1.02)
    upper.set_ylabel("share that is right")
    _percent(upper.yaxis)
    lower.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=SERIES[0], alpha=0.6)
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    lower.set_ylabel("cases")
    lower.set_xlabel("probability according to the model")
    lower.grid(axis="x", visible=False)
    _percent(lower.xaxis)
    return figure


@_styled
def correlation_matrix(names: Sequence[str], matrix: Float[np.ndarray, "A A"]) -> Figure:
    """A heat map with its numbers: blue for positive, orange for negative, paler for weaker.

    Args:
      names: of rows and columns.
      matrix: correlations, from -1 to 1; NaN where one is not defined.
    """
    matrix, count = np.asarray(matrix, float), len(names)
    figure, axes = _axes(max(150.0, min(460.0, 100 + 52 * count)))
    if not count:
        return _empty(figure, axes)
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
    labels = [_label(name, 18) for name in names]
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


@_styled
def accuracy_by_length(
    differences: Numbers, right: Numbers, xlabel: str = "length difference", bins: int = 8
) -> Figure:
    """Share of pairs that are right where the chosen response is shorter, as long, or longer.

    A point for each bin of about equally many pairs, at their median, with a 95 % interval.

    Args:
      differences: length of the chosen response minus that of the rejected one.
      right: 1 where the pair is ordered as people did, 1/2 in a draw, else 0.
      xlabel: what the differences are, with their unit.
      bins: at most how many.
    """
    figure, axes = _axes()
    lengths, right_ = _finite_pairs(differences, right)
    if not len(lengths):
        return _empty(figure, axes)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)))
    which = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    x, y, intervals = [], [], []
    for i in np.unique(which):
        members = right_[which == i]
        x.append(float(np.median(lengths[which == i])))
        y.append(float(members.mean()))
        intervals.append(wilson_interval(float(members.sum()), len(members)))
    axes.axvline(0, color=LINE, linewidth=1.4)
    _chance(axes.axhline, 0.5)
    _whiskers(axes, x, intervals, SERIES[0])
    axes.plot(x, y, "o-", color=SERIES[0], markersize=5)
    axes.set_ylim(min(0.4, *(low for low, _ in intervals)), 1.02)
    axes.set_xlabel(_label(xlabel, _XLABEL))
    axes.set_ylabel("accuracy")
    _percent(axes.yaxis)
    _legend(axes)
    return figure


@_styled
def bars(
    labels: Sequence[str],
    values: Numbers,
    xlabel: str,
    low: Numbers | None = None,
    high: Numbers | None = None,
    chance: float | None = None,
) -> Figure:
    """Lying bars with their numbers, such as accuracy per subset.

    Args:
      labels: from top to bottom.
      values: one for each.
      xlabel: what they are.
      low: of the intervals, if there are any.
      high: of the same.
      chance: what guessing gives; a line.
    """
    figure, axes = _axes(76 + 27 * max(1, len(labels)))
    numbers = np.asarray(values, float)
    if not np.isfinite(numbers).any():
        return _empty(figure, axes)
    places = [-float(i) for i in range(len(labels))]
    filled = np.nan_to_num(numbers)
    axes.barh(places, filled, 0.62, color=SERIES[0], alpha=0.8)
    ends = filled.copy()
    if low is not None and high is not None:
        lows, highs = np.asarray(low, float), np.asarray(high, float)
        axes.hlines(places, lows, highs, color=INK, linewidth=1.3)
        ends = np.fmax(ends, highs)
    if chance is not None:
        _chance(axes.axvline, chance)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0, borderaxespad=0.2)
    span = max(ends.max(), 0.0) - min(filled.min(), 0.0) or 1.0
    for place, value, end in zip(places, numbers, ends):
        shown = f"{value:.3f}".replace("-", "−") if np.isfinite(value) else "–"
        box = {"facecolor": PAPER, "pad": 0.8, "linewidth": 0}  # above the line of chance
        axes.text(max(end, 0) + 0.015 * span, place, shown, va="center", fontsize=11.5, bbox=box)
    axes.set_xlim(min(filled.min(), 0.0), max(ends.max(), 0.0) + 0.16 * span)
    _rows(axes, labels, places)
    axes.set_xlabel(_label(xlabel, _XLABEL), loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


# ---- over something -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line.

    Attributes:
      label: its name in the legend; empty for none.
      x: where.
      y: how much; NaN makes a gap.
      low: of a band, such as a 95 % interval; empty for none.
      high: of the same.
      rough: numbers of single steps: drawn pale, with their moving mean.
      dashed: a level to compare with, in grey.
    """

    label: str
    x: Numbers
    y: Numbers
    low: Numbers = ()
    high: Numbers = ()
    rough: bool = False
    dashed: bool = False


@_styled
def curves(found: Sequence[Curve], xlabel: str, ylabel: str, logarithmic: bool = False) -> Figure:
    """Lines over steps or anything else; few points get marks.

    Args:
      found: up to six.
      xlabel: what x is.
      ylabel: what y is.
      logarithmic: y's axis, which then leaves out what is not positive.
    """
    figure, axes = _axes()
    drawn = 0
    for curve, colour in zip(found, _colours(found)):
        y = np.asarray(curve.y, float)
        y = np.where((y > 0) | (not logarithmic), y, np.nan)
        drawn += int(np.isfinite(y).sum())
        _line(axes, curve, y, colour, logarithmic)
    if not drawn:
        return _empty(figure, axes)
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(_label(xlabel, _XLABEL))
    axes.set_ylabel(_label(ylabel))
    if any(curve.label for curve in found):
        _legend(axes)
    return figure


@_styled
def best_of_n(found: Sequence[Curve], ylabel: str) -> Figure:
    """What the best of n responses is worth, over n on a logarithmic axis.

    Args:
      found: `x` is n; with bands if they have any.
      ylabel: what is averaged.
    """
    figure, axes = _axes()
    places = sorted({float(n) for curve in found for n in curve.x if n > 0})
    if not places:
        return _empty(figure, axes)
    for curve, colour in zip(found, _colours(found)):
        _line(axes, curve, np.asarray(curve.y, float), colour, False)
    axes.set_xscale("log", base=2)
    powers = [n for n in places if float(np.log2(n)).is_integer()] or places
    axes.set_xticks(powers, [f"{n:g}" for n in powers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("n")
    axes.set_ylabel(_label(ylabel))
    _legend(axes)
    return figure


def _colours(found: Sequence[Curve]) -> list[str]:
    """A colour for each curve: the series' in turn, grey for levels."""
    series = itertools.cycle(SERIES)
    return [MUTED if curve.dashed else next(series) for curve in found]


def _line(
    axes: Axes, curve: Curve, y: Float[np.ndarray, "N"], colour: str, logarithmic: bool
) -> None:
    x = np.asarray(curve.x, float)
    look: Any = {"marker": "o", "markersize": 4.5} if np.isfinite(y).sum() <= 25 else {}
    if curve.rough and len(y) > 25:
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
        reach = max(3, len(y) // 30)
        y = np.exp(moving_mean(np.log(y), reach)) if logarithmic else moving_mean(y, reach)
        look = {}
    if len(curve.low):
        low, high = np.asarray(curve.low, float), np.asarray(curve.high, float)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    if curve.dashed:
        look = {"linestyle": (0, (4, 3)), "linewidth": 1.4}
    axes.plot(x, y, color=colour, label=_label(curve.label) or None, **look)


def moving_mean(values: Float[np.ndarray, "N"], reach: int) -> Float[np.ndarray, "N"]:
    """The mean of each value with those up to `reach` away, NaN left out.

    At the beginning, where curves are steep, as far on one side as on the other.
    """
    present = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(present, values, 0.0)))
    counts = np.append(0, np.cumsum(present))
    places = np.arange(len(values))
    first = places - np.minimum(reach, places)
    last = np.minimum(places + np.minimum(reach, places) + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


# ---- parts --------------------------------------------------------------------------------------


def _finite(values: Numbers) -> Float[np.ndarray, "N"]:
    array = np.asarray(values, float).ravel()
    return array[np.isfinite(array)]


def _finite_pairs(
    one: Numbers, other: Numbers
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    a, b = np.asarray(one, float), np.asarray(other, float)
    present = np.isfinite(a) & np.isfinite(b)
    return a[present], b[present]


def _edges(groups: Sequence[Float[np.ndarray, "N"]], bins: int) -> Float[np.ndarray, "B"] | None:
    """Edges for all groups: one bin a value for few whole numbers, else without the far ends."""
    everything = np.concatenate([np.empty(0), *groups])
    if not len(everything):
        return None
    low, high = everything.min(), everything.max()
    if np.all(everything == np.round(everything)) and high - low < bins:
        return np.arange(low - 0.5, high + 1)
    low, high = np.percentile(everything, (0.1, 99.9)) if len(everything) > 500 else (low, high)
    return np.linspace(low, high if high > low else low + 1, bins + 1)


def _rows(axes: Axes, labels: Sequence[str], places: Sequence[float]) -> None:
    axes.set_yticks(places, [_label(name) for name in labels])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    axes.grid(axis="y", visible=False)


def _whiskers(
    axes: Axes, x: Sequence[float], intervals: Sequence[tuple[float, float]], colour: str
) -> None:
    axes.vlines(
        x, [low for low, _ in intervals], [high for _, high in intervals], color=colour, alpha=0.45
    )


def _chance(line: Callable[..., Any], value: float) -> None:
    line(value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="chance")


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        wide = sum(map(len, labels)) + 5 * len(labels) > 50
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=2 if wide else len(labels),
            columnspacing=1.4,
            handletextpad=0.5,
            borderpad=0,
            borderaxespad=0.4,
        )


def _empty(figure: Figure, axes: Axes) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no data", ha="center", color=MUTED, transform=axes.transAxes)
    return figure


def _label(name: str, most: int = _LABEL) -> str:
    line = one_line(name)
    return line if len(line) <= most else line[: most - 1] + "…"


def _percent(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _share(value)))


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _short(value: float, _: int) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10000 or abs(value) < 1e-3:
        digits = f"{value:.2g}"
        if abs(value) >= 10000:
            digits = f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
        return digits.replace("e-0", "e-").replace("-", "−")
    return f"{value:g}".replace("-", "−")


__all__ = [
    "Curve",
    "accuracy_by_length",
    "bars",
    "best_of_n",
    "boxes",
    "columns",
    "correlation_matrix",
    "curves",
    "distributions",
    "histograms",
    "margin_histogram",
    "moving_mean",
    "reliability",
]
