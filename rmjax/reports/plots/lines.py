"""Lines: numbers over steps, or over n."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rmjax.reports.plots.common import (
    XLABEL,
    Numbers,
    empty,
    legend,
    new_axes,
    shortened,
    styled,
    tick_text,
)
from rmjax.reports.theme import MUTED, SERIES


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line.

    Attributes:
      label: its name in the legend; empty for none.
      x: positions.
      y: values; NaN makes a gap.
      low: lower end of a band, such as a 95 % interval; empty for none.
      high: upper end of the band.
      rough: whether the values are noisy: drawn pale, with their moving mean.
      dashed: whether it is a level to compare with: drawn dashed, in grey.
    """

    label: str
    x: Numbers
    y: Numbers
    low: Numbers = ()
    high: Numbers = ()
    rough: bool = False
    dashed: bool = False


@styled
def curves(lines: Sequence[Curve], xlabel: str, ylabel: str, logarithmic: bool = False) -> Figure:
    """Lines over steps; few points get marks.

    Args:
      lines: up to six.
      xlabel: label of the x axis.
      ylabel: label of the y axis.
      logarithmic: whether the y axis is; it then leaves out what is not positive.
    """
    figure, axes = new_axes()
    drawn = 0
    for curve, colour in zip(lines, _colours(lines)):
        y = np.asarray(curve.y, float)
        y = np.where((y > 0) | (not logarithmic), y, np.nan)
        drawn += int(np.isfinite(y).sum())
        _line(axes, curve, y, colour, logarithmic)
    if not drawn:
        return empty(figure, axes)
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(shortened(xlabel, XLABEL))
    axes.set_ylabel(shortened(ylabel))
    if any(curve.label for curve in lines):
        legend(axes)
    return figure


@styled
def best_of_n(lines: Sequence[Curve], ylabel: str) -> Figure:
    """The worth of the best of n responses, over n on a logarithmic axis.

    Args:
      lines: their `x` is n.
      ylabel: what is averaged.
    """
    figure, axes = new_axes()
    sizes = sorted({float(n) for curve in lines for n in curve.x if n > 0})
    if not sizes:
        return empty(figure, axes)
    for curve, colour in zip(lines, _colours(lines)):
        _line(axes, curve, np.asarray(curve.y, float), colour, False)
    axes.set_xscale("log", base=2)
    powers = [n for n in sizes if float(np.log2(n)).is_integer()] or sizes
    axes.set_xticks(powers, [f"{n:g}" for n in powers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("n")
    axes.set_ylabel(shortened(ylabel))
    legend(axes)
    return figure


def _colours(lines: Sequence[Curve]) -> list[str]:
    """A colour for each line: the series in turn, grey for dashed ones."""
    series = itertools.cycle(SERIES)
    return [MUTED if curve.dashed else next(series) for curve in lines]


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
    axes.plot(x, y, color=colour, label=shortened(curve.label) or None, **look)


def moving_mean(values: Float[np.ndarray, "N"], reach: int) -> Float[np.ndarray, "N"]:
    """The mean of each value and those up to `reach` away, without NaN.

    At the beginning, where curves are steep, it takes as many values before as after.
    """
    present = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(present, values, 0.0)))
    counts = np.append(0, np.cumsum(present))
    indices = np.arange(len(values))
    first = indices - np.minimum(reach, indices)
    last = np.minimum(indices + np.minimum(reach, indices) + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)
