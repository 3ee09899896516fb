"""How reports write numbers. What is not defined is a dash."""

import math

DASH = "–"
_MINUS = "−"


def decimal(value: float, digits: int = 3) -> str:
    """With a fixed number of digits behind the point."""
    return _signed(f"{value:,.{digits}f}") if math.isfinite(value) else DASH


def signed(value: float, digits: int = 3) -> str:
    """As `decimal`, with a plus where it is positive."""
    return _signed(f"{value:+,.{digits}f}") if math.isfinite(value) else DASH


def short(value: float, digits: int = 4) -> str:
    """With so many significant digits, whatever its size: 2.000e-06, 0.1, 1,234."""
    if not math.isfinite(value):
        return DASH
    if value == int(value) and abs(value) < 1e9:
        return count(int(value))
    return _signed(f"{value:.{digits}g}")


def count(value: int) -> str:
    """A whole number, its thousands apart."""
    return _signed(f"{value:,}")


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    return f"{_signed(f'{100 * share:.{digits}f}')} %" if math.isfinite(share) else DASH


def interval(low: float, high: float, digits: int = 3) -> str:
    """From and to."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return DASH
    return f"{decimal(low, digits)} to {decimal(high, digits)}"


def minus(text: str) -> str:
    """A number's text with a true minus."""
    return _MINUS + text[1:] if text.startswith("-") else text


def _signed(text: str) -> str:
    """A true minus, and none before what was rounded to zero."""
    return minus(text) if text.strip("+-0.,") else text.strip("+-")
