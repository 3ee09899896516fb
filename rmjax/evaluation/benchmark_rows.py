"""The rows of a benchmark, and what the readers of several formats take from one.

Rows stand in the benchmark's parts on the hub or in a directory, or in the files of a clone.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmjax.data.conversation import Conversation
from rmjax.data.fields import check_fields
from rmjax.data.readers import Row, divide_source, open_source
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError, listed
from rmjax.evaluation.benchmarks import Benchmark


def benchmark_rows(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[tuple[Row, str]]:
    """The rows, each with the place where it stands: a file, a directory or a hub id.

    Args:
      benchmark: a row of the table.
      source: see `open_source`; it may also hold the benchmark's parts or files.
      reader: is told of columns that name a row's split.
      dropped: is told of rows of other splits.

    Raises:
      UserError: there is no such source, or nothing of the benchmark in it.
    """
    pairs = {"pairs": True, "ratings": False}.get(benchmark.row_format)
    for place in row_places(benchmark, source):
        opened = open_source(place, benchmark.split, pairs)
        reader.used.update(opened.split_columns)
        for row in opened:
            yield row, place
        dropped.update(opened.skipped)


def row_places(benchmark: Benchmark, source: str) -> list[str]:
    """The sources whose rows are the benchmark's: its parts, its files, or the source itself.

    Raises:
      UserError: the benchmark is read from a clone, and this is none.
    """
    path, address, split = divide_source(source)
    if benchmark.files and path and path.is_dir():
        inner = path / benchmark.source
        root = inner if benchmark.clone and inner.is_dir() else path
        if files := sorted(root.rglob(benchmark.files)):
            return [*map(str, files)]
    if benchmark.clone and not (path and path.is_file()):
        raise UserError(
            f"{source}: {benchmark.title} is read from the directory {benchmark.source} of a clone "
            f"of its repository ({benchmark.clone}); there are no files {benchmark.files!r} of it"
        )
    parts = [name for name, _ in benchmark.parts]
    if path and path.is_dir():
        parts = [name for name in parts if (path / name).is_dir()]
    elif path or address.count("/") != benchmark.source.count("/"):
        parts = []
    return [f"{address}/{name}{':' * bool(split)}{split}" for name in parts] or [source]


def row_subset(benchmark: Benchmark, row: Row, place: str) -> str:
    """The subset that a row names, behind the part that it stands in.

    Of RM-Bench it is the domain: a field, or the name of the domain's file.
    """
    if benchmark.name == "rm-bench":
        named = str(row.fields.get("domain") or Path(row.where.rpartition(" row ")[0]).stem)
        return named.removeprefix("rm_bench_").replace("_", "-").split("-")[0]
    found = row.fields.get(benchmark.subset)
    names = (_subset_part(benchmark, place), "" if found is None else str(found))
    return "/".join(filter(None, names))


def _subset_part(benchmark: Benchmark, place: str) -> str:
    """What a row's part adds to the name of its subset, from a directory's name; empty for nothing.

    Raises:
      UserError: the part matters, and no directory says which it is.
    """
    names = dict(benchmark.parts)
    for word in reversed(re.split(r"[/\\:]", place)):
        if word in names:
            return names[word]
    if any(names.values()):
        raise UserError(
            f"{place}: which part of {benchmark.title} is it? The name of a directory in its path "
            f"says so, as on the hub: {listed(names)}"
        )
    return ""


def row_id(row: Row, field: str = "id") -> str:
    """The name of a row: a field, or its number."""
    found = row.fields.get(field)
    return str(row.number if found is None else found)


def labelled_pair(
    reader: RowReader, row: Row, prompt: str, fields: Mapping[Any, str], by: str = "label"
) -> tuple[Conversation, Conversation]:
    """The response that a label chooses and the other one; `fields` are by the label's value."""
    used = [prompt, *fields.values()]
    check_fields(row.fields, used, row.where)
    reader.see(row.fields, [*used, by])
    first, second = (reader.conversation(row.fields, f, row.where, prompt) for f in fields.values())
    labels, label = [*fields], row.fields.get(by)
    if label not in labels:
        expected = " or ".join(map(repr, labels))
        raise UserError(f"{row.where}: field {by!r} is {label!r}, expected {expected}")
    return (first, second) if label == labels[0] else (second, first)
