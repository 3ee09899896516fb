"""How reports write numbers. A number that is missing or not finite is a dash."""

import math
from typing import TypeGuard

DASH = "–"
_MINUS = "−"


def defined(value: float | None) -> TypeGuard[float]:
    """Whether a number is there and finite."""
    return value is not None and math.isfinite(value)


def decimal(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits after the point."""
    return _signed(f"{value:,.{digits}f}") if defined(value) else DASH


def signed(value: float | None, digits: int = 3) -> str:
    """As `decimal`, with a plus sign if positive."""
    return _signed(f"{value:+,.{digits}f}") if defined(value) else DASH


def short(value: float | None, digits: int = 4) -> str:
    """At most so many significant digits: 2.5e-06, 0.1, 1,234."""
    if defined(value) and not (value == int(value) and abs(value) < 1e9):
        return _signed(f"{value:.{digits}g}")
    return count(value)


def count(value: float | None) -> str:
    """A whole number with separated thousands."""
    return _signed(f"{int(value):,}") if defined(value) else DASH


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    return f"{_signed(f'{100 * share:.{digits}f}')} %" if defined(share) else DASH


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Both ends of an interval."""
    if not (defined(low) and defined(high)):
        return DASH
    return f"{decimal(low, digits)} to {decimal(high, digits)}"


def minus(text: str) -> str:
    """The text of a number with a true minus sign."""
    return _MINUS + text[1:] if text.startswith("-") else text


def _signed(text: str) -> str:
    """With a true minus sign, and no sign for a number that was rounded to zero."""
    return minus(text) if text.strip("+-0.,") else text.strip("+-")
