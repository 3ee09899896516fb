"""What the plots share: figures and axes, labels, legends, ticks, bins."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rmjax.reports.drawing import PIXEL, style
from rmjax.reports.text import one_line
from rmjax.reports.theme import INK, MUTED

Numbers = Sequence[float] | Float[np.ndarray, "N"]
_P = ParamSpec("_P")

WIDTH, HEIGHT = 430, 280  # of a figure, in a page's pixels; two stand side by side
LETTER = 6.5  # pixels of a letter in an axis's numbers, about
SOFT = 0.25  # opacity of bands
_LABEL = 24  # letters of a name or of a label beside an axis
XLABEL = 36  # of one below


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Makes a function draw in the style of reports, and fixes the layout of its figure."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # the same in all formats
            return figure

    return styled


def new_figure(height: float = HEIGHT, width: float = WIDTH) -> Figure:
    """An empty figure, its size in pixels of a page."""
    return Figure(figsize=(width * PIXEL, height * PIXEL), layout="constrained")


def new_axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = new_figure(height)
    return figure, figure.add_subplot()


def finite(values: Numbers) -> Float[np.ndarray, "N"]:
    """The finite values."""
    array = np.asarray(values, float).ravel()
    return array[np.isfinite(array)]


def finite_pairs(
    one: Numbers, other: Numbers
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """The values of both where both are finite."""
    a, b = np.asarray(one, float), np.asarray(other, float)
    present = np.isfinite(a) & np.isfinite(b)
    return a[present], b[present]


def edges_of(groups: Sequence[Float[np.ndarray, "N"]], bins: int) -> Float[np.ndarray, "B"] | None:
    """Edges of bins for all groups: one for each of few whole numbers, else without outliers."""
    everything = np.concatenate([np.empty(0), *groups])
    if not len(everything):
        return None
    low, high = everything.min(), everything.max()
    if np.all(everything == np.round(everything)) and high - low < bins:
        return np.arange(low - 0.5, high + 1)
    low, high = np.percentile(everything, (0.1, 99.9)) if len(everything) > 500 else (low, high)
    return np.linspace(low, high if high > low else low + 1, bins + 1)


def label_rows(axes: Axes, labels: Sequence[str], rows: Sequence[float]) -> None:
    """Puts the names of rows beside them, from top to bottom."""
    axes.set_yticks(rows, [shortened(name) for name in labels])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    axes.grid(axis="y", visible=False)


def whiskers(
    axes: Axes, x: Sequence[float], intervals: Sequence[tuple[float, float]], colour: str
) -> None:
    """Draws intervals as lines."""
    axes.vlines(
        x, [low for low, _ in intervals], [high for _, high in intervals], color=colour, alpha=0.45
    )


def chance_line(line: Callable[..., Any], value: float) -> None:
    """Draws the line of guessing, by `axvline` or `axhline`."""
    line(value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="chance")


def legend(axes: Axes) -> None:
    """Puts a legend above the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        # As many in a row as there is room for; a mark takes about five letters.
        fit = max(1, 54 // (5 + max(map(len, labels))))
        rows = -(-len(labels) // fit)
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=-(-len(labels) // rows),
            columnspacing=1.4,
            handletextpad=0.5,
            borderpad=0,
            borderaxespad=0.4,
        )


def empty(figure: Figure, axes: Axes) -> Figure:
    """Says in the figure that there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no data", ha="center", color=MUTED, transform=axes.transAxes)
    return figure


def shortened(name: str, most: int = _LABEL) -> str:
    """One line of at most so many letters."""
    line = one_line(name)
    return line if len(line) <= most else line[: most - 1] + "…"


def in_percent(axis: Any) -> None:
    """Formats the numbers of an axis of shares."""
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(value)))


def percent_text(value: float) -> str:
    """A share of 1 in per cent, to three digits."""
    return f"{100 * value:.3g} %"


def tick_text(value: float, _: int) -> str:
    """A number on an axis: 0.1, 25, 20k, 2e−6."""
    if value == 0:
        return "0"
    if abs(value) >= 10000 or abs(value) < 1e-3:
        digits = f"{value:.2g}"
        if abs(value) >= 10000:
            digits = f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
        return digits.replace("e-0", "e-").replace("-", "−")
    return f"{value:g}".replace("-", "−")
