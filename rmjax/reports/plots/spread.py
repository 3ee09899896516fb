"""Distributions: histograms, columns and boxes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from rmjax.reports.plots.common import (
    LETTER,
    SOFT,
    WIDTH,
    XLABEL,
    Numbers,
    edges_of,
    empty,
    finite,
    in_percent,
    label_rows,
    legend,
    new_axes,
    new_figure,
    percent_text,
    shortened,
    styled,
)
from rmjax.reports.theme import INK, MUTED, SERIES


@styled
def histograms(groups: Mapping[str, Numbers], xlabel: str, bins: int = 30) -> Figure:
    """Histograms of up to three groups over each other: the share of a group in each bin.

    Args:
      groups: name and values.
      xlabel: what the values are, with their unit.
      bins: how many; few whole numbers get one each.
    """
    figure, axes = new_axes()
    finite_groups = {name: finite(values) for name, values in groups.items()}
    edges = edges_of(list(finite_groups.values()), bins)
    if edges is None:
        return empty(figure, axes)
    for i, (name, values) in enumerate(finite_groups.items()):
        if len(values):
            shares = np.histogram(values, edges)[0] / len(values)
            colour = SERIES[i % len(SERIES)]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=SOFT)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=shortened(name))
    in_percent(axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(shortened(xlabel, XLABEL))
    axes.set_ylabel("share")
    axes.grid(axis="x", visible=False)
    if len(finite_groups) > 1:
        legend(axes)
    return figure


@styled
def distributions(groups: Mapping[str, Numbers], xlabel: str, bins: int = 40) -> Figure:
    """Histograms of many groups, one below the other, with a line at each median.

    Args:
      groups: name and values.
      xlabel: what the values are, with their unit.
      bins: how many.
    """
    finite_groups = {name: finite(values) for name, values in groups.items()}
    figure = new_figure(64 + 44 * max(1, len(finite_groups)))
    edges = edges_of(list(finite_groups.values()), bins)
    if edges is None:
        return empty(figure, figure.add_subplot())
    rows = figure.subplots(len(finite_groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(rows, finite_groups.items()):
        counts = np.histogram(values, edges)[0]
        axes.stairs(counts / max(1, counts.max()), edges, fill=True, color=SERIES[0], alpha=0.75)
        if len(values):
            axes.axvline(float(np.median(values)), color=INK, linewidth=1.4)
        axes.set_ylim(0, 1.12)
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_ylabel(shortened(name), rotation=0, ha="right", va="center", color=INK)
        axes.tick_params(axis="x", length=3 if axes is rows[-1] else 0)
    rows[-1].set_xlabel(shortened(xlabel, XLABEL), loc="right")
    return figure


@styled
def margin_histogram(margins: Numbers, xlabel: str = "margin", bins: int = 40) -> Figure:
    """A histogram of margins, in two colours for chosen and rejected responses ahead.

    Args:
      margins: the chosen response's reward minus the rejected one's, of each pair.
      xlabel: what the margins are.
      bins: about how many.
    """
    figure, axes = new_axes()
    values = finite(margins)
    if not len(values):
        return empty(figure, axes)
    width = max(float(np.ptp(np.append(values, 0.0))), 1e-9) / bins
    first, last = np.floor(values.min() / width), np.floor(values.max() / width) + 1
    edges = width * np.arange(min(first, 0.0), max(last, 1.0) + 1)
    counts = np.histogram(values, edges)[0]
    behind = edges[:-1] < -width / 2
    for where, colour, name in (
        (behind, SERIES[1], f"rejected ahead ({percent_text(float(np.mean(values < 0)))})"),
        (~behind, SERIES[0], f"chosen ahead ({percent_text(float(np.mean(values > 0)))})"),
    ):
        axes.bar(
            edges[:-1][where], counts[where], 0.9 * width, align="edge", color=colour, label=name
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel(shortened(xlabel, XLABEL))
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="x", visible=False)
    legend(axes)
    return figure


@styled
def columns(
    categories: Sequence[str], groups: Mapping[str, Numbers], xlabel: str, ylabel: str = "share"
) -> Figure:
    """Vertical bars over categories, those of several groups beside each other.

    Args:
      categories: their names, from left to right.
      groups: name and one share (of 1) for each category.
      xlabel: what the categories are.
      ylabel: what the shares are of.
    """
    figure, axes = new_axes()
    if not categories or not groups:
        return empty(figure, axes)
    positions, width = np.arange(len(categories)), 0.8 / len(groups)
    for i, (name, shares) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * width
        axes.bar(
            positions + offset,
            np.nan_to_num(np.asarray(shares, float)),
            0.92 * width,
            color=SERIES[i % len(SERIES)],
            label=shortened(name),
        )
    names = [shortened(name, 12) for name in categories]
    # As many names as have room: the first, and every so many after it.
    every = math.ceil(LETTER * (2 + max(map(len, names))) * len(names) / (WIDTH - 70))
    axes.set_xticks(positions[::every], names[::every])
    axes.tick_params(axis="x", length=0)
    in_percent(axes.yaxis)
    axes.set_xlabel(shortened(xlabel, XLABEL))
    axes.set_ylabel(shortened(ylabel))
    axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        legend(axes)
    return figure


@styled
def boxes(groups: Mapping[str, Numbers], xlabel: str) -> Figure:
    """Horizontal boxes: quartiles and median, whiskers from the 5th to the 95th percentile.

    Args:
      groups: name and values, from top to bottom.
      xlabel: what the values are, with their unit.
    """
    figure, axes = new_axes(76 + 32 * max(1, len(groups)))
    finite_groups = {name: finite(values) for name, values in groups.items()}
    if not any(map(len, finite_groups.values())):
        return empty(figure, axes)
    rows = [-float(i) for i in range(len(finite_groups))]
    for row, values in zip(rows, finite_groups.values()):
        if len(values):
            low, q1, median, q3, high = np.percentile(values, (5, 25, 50, 75, 95))
            axes.hlines(row, low, high, color=MUTED, linewidth=1.2)
            axes.barh(row, q3 - q1, 0.55, q1, color=SERIES[0], alpha=0.8)
            axes.vlines(median, row - 0.275, row + 0.275, color=INK, linewidth=1.8)
    label_rows(axes, list(finite_groups), rows)
    axes.set_xlabel(shortened(xlabel, XLABEL), loc="right")
    return figure
