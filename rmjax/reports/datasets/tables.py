"""Blocks that the reports of ratings and of preferences share."""

from collections.abc import Mapping

from rmjax.reports.document import Block, Collapsible, Facts, Table
from rmjax.reports.numbers import DASH, count, decimal, defined, interval, percent

_ROWS = 8  # of a table that is not collapsed
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


def counts_block(value: str, counted: str, counts: Mapping[str, int]) -> Block:
    """How often each value occurs, as a table; collapsed if it is long."""
    whole = sum(counts.values())
    rows = tuple((name, count(n), percent(n / whole)) for name, n in counts.items())
    if len(rows) == 1:
        return Facts(((value, f"{rows[0][0]}, of all {rows[0][1]} {counted}"),))
    table = Table((value, counted, "share"), rows)
    if len(rows) <= _ROWS:
        return table
    return Collapsible(
        f"{counted.capitalize()} by {value}: {rows[0][0]} to {rows[-1][0]}", (table,)
    )


def length_table(lengths: Mapping[str, Mapping[str, float]]) -> Table:
    """The table of several lengths, each from `lengths.summary_statistics`."""
    fields = ("mean", "sd", "min", "p5", "median", "p95", "max")
    rows = tuple(
        (_LENGTHS[name], *(decimal(row[field], 0) for field in fields))
        for name, row in lengths.items()
    )
    columns = ("", "mean", "sd", "least", "5 %", "median", "95 %", "most")
    return Table(columns, rows, caption="Lengths", note="5 % and 95 % are percentiles.")


def percent_interval(share: Mapping[str, float]) -> str:
    """The interval of a share, in per cent."""
    if not defined(share["low"]):
        return DASH
    return f"{interval(100 * share['low'], 100 * share['high'], 1)} %"
