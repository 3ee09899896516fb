"""Tables that reports of ratings and of preferences share."""

import math
from collections.abc import Mapping

from rmjax.reports.document import (
    Block,
    Collapsible,
    Facts,
    Table,
)
from rmjax.reports.numbers import DASH, count, percent, short

_ROWS = 8  # of a tally that is not collapsed
_LENGTHS = {
    "prompt_characters": "prompt, characters",
    "response_characters": "response, characters",
    "chosen_characters": "chosen response, characters",
    "rejected_characters": "rejected response, characters",
    "response_tokens": "response, tokens",
    "chosen_tokens": "chosen response, tokens",
    "rejected_tokens": "rejected response, tokens",
    "sample_tokens": "templated conversation, tokens",
}


def tally_block(what: str, whats: str, found: Mapping[str, int]) -> Block:
    """How often each whole number occurs; of many numbers collapsed."""
    whole = sum(found.values())
    rows = tuple((name, count(n), percent(n / whole)) for name, n in found.items())
    if len(rows) == 1:
        return Facts(((what, f"{rows[0][0]}, of all {rows[0][1]} {whats}"),))
    table = Table((what, whats, "share"), rows)
    if len(rows) <= _ROWS:
        return table
    return Collapsible(f"{whats.capitalize()} by {what}: {rows[0][0]} to {rows[-1][0]}", (table,))


def length_table(lengths: Mapping[str, Mapping[str, float]]) -> Table:
    """The table of `lengths.spread` of several lengths."""
    fields = ("mean", "sd", "min", "p5", "median", "p95", "max")
    rows = tuple(
        (
            _LENGTHS[name],
            *(short(round(row[f]) if math.isfinite(row[f]) else row[f]) for f in fields),
        )
        for name, row in lengths.items()
    )
    columns = ("", "mean", "sd", "least", "5 %", "median", "95 %", "most")
    return Table(columns, rows, caption="Lengths", note="5 % and 95 % are percentiles.")


def percents(found: Mapping[str, float]) -> str:
    """The interval of a share, in per cent."""
    if not math.isfinite(found["low"]):
        return DASH
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"
