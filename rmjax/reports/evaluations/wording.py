"""How evaluations write scores and names: in per cent, and a dash for what is missing."""

import re
from collections.abc import Mapping
from typing import Any

from rmjax.reports.numbers import DASH, interval, percent, signed


def score(figures: Mapping[str, Any] | None) -> str:
    """The score of a benchmark, section or subset, if there is one."""
    return percent(figures["score"]) if figures else DASH


def score_interval(figures: Mapping[str, Any] | None) -> str:
    """The interval of a score, if there is one."""
    if not figures or figures["low"] is None:
        return DASH
    return interval(100 * figures["low"], 100 * figures["high"], 1)


def points(low: float, high: float) -> str:
    """An interval of a difference, in percentage points."""
    return f"{signed(100 * low, 1)} to {signed(100 * high, 1)}"


def title(benchmark: Mapping[str, Any]) -> str:
    """The title of a benchmark, which says so if items are missing."""
    return benchmark["title"] if benchmark["complete"] else f"{benchmark['title']}, in part"


def slug(name: str) -> str:
    """The name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
