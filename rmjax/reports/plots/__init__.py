"""Numbers to figures, in one style. Each function takes plain sequences and returns a figure.

Values that are not finite are left out; where nothing is left the figure says so. Figures are made
without pyplot, so none is kept or shown, and nothing of the user's matplotlib changes.
"""

from rmjax.reports.plots.agreement import accuracy_by_length, bars, correlation_matrix, reliability
from rmjax.reports.plots.lines import Curve, best_of_n, curves, moving_mean
from rmjax.reports.plots.spread import boxes, columns, distributions, histograms, margin_histogram

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
