"""The plots of reports, in one style. Each function takes sequences and returns a figure.

Values that are not finite are left out; if nothing is left, the figure says so. pyplot is not used,
so no figure is kept or shown, and the user's matplotlib settings do not change.
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
