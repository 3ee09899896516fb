"""How evaluations write scores: in per cent, with what is not defined as a dash."""

import re
from collections.abc import Mapping
from typing import Any

from rmjax.reports.numbers import DASH, decimal, interval, percent, signed


def score(figure: Mapping[str, Any] | None) -> str:
    """The score of a figure, which may be missing."""
    return share(figure["score"] if figure else None)


def share(score: float | None) -> str:
    """A share of 1."""
    return DASH if score is None else percent(score)


def score_interval(figure: Mapping[str, Any] | None) -> str:
    """The interval of a figure."""
    if not figure or figure["low"] is None:
        return DASH
    return interval(100 * figure["low"], 100 * figure["high"], 1)


def points(low: float, high: float) -> str:
    """From and to, in points."""
    return f"{signed(100 * low, 1)} to {signed(100 * high, 1)}"


def title(b: Mapping[str, Any]) -> str:
    """Of a benchmark, which may be there in part."""
    return b["title"] if b["complete"] else f"{b['title']}, in part"


def number(value: float | None) -> str:
    """A number, or a dash."""
    return DASH if value is None else decimal(value)


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
