"""Small checks of values."""

from typing import TypeVar

T = TypeVar("T")


def known(value: T | None) -> T:
    """A value that must be there."""
    assert value is not None
    return value
