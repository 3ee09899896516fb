"""Single fields of a row: whether they are there, and what numbers they hold."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from rmjax.errors import UserError

LARGEST = 3.4028234663852886e38  # float32's, in which labels, margins and scores are computed
_MASKED = -100  # what NeMo's files put where a label is missing


def check_fields(
    row: Mapping[str, Any], fields: Collection[str], where: str, advice: str = ""
) -> None:
    """Raises a `UserError`, which may end with advice, unless a row has all of these."""
    for field in fields:
        if field not in row:
            raise UserError(
                f"{where}: field {field!r} is missing; the row has "
                f"{', '.join(sorted(row)) or 'no field'}{advice}"
            )


def number_field(row: Mapping[str, Any], field: str, where: str) -> float:
    """A number of a row that float32 has, or a `UserError`."""
    value = row[field]
    if not is_number(value) or not abs(value) <= LARGEST:
        raise UserError(
            f"{where}: field {field!r} is {_brief(value)}, expected a number up to {LARGEST:.3g}"
        )
    return float(value)


def rating_field(
    row: Mapping[str, Any],
    field: str,
    where: str,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> float:
    """A rating of a row; NaN where it is null, NaN or -100, which all say that there is none.

    Raises:
      UserError: it is no number, or outside of the limits.
    """
    value = row.get(field)
    if value is None:
        return math.nan
    if not is_number(value):
        raise UserError(f"{where}: field {field!r} is {_brief(value)}, expected a number")
    if value != value or value == _MASKED:  # NaN (math.isnan refuses integers too big for a float)
        return math.nan
    if not limits[0] <= value <= limits[1]:
        raise UserError(
            f"{where}: field {field!r} is {_brief(value)}, outside {limits[0]:g} to {limits[1]:g} "
            "(--config.data.label_range)"
        )
    return number_field(row, field, where)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_number(value: Any) -> bool:
    """Whether a field's value can be a rating."""
    return isinstance(value, int | float) and not isinstance(value, bool)
