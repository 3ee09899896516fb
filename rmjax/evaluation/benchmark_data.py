"""A benchmark's data: its items, and what of its rows is not among them."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rmjax.data.conversation import conversation_key
from rmjax.data.records import EMPTY, EQUAL, TIE
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError
from rmjax.evaluation.benchmarks import BENCHMARKS, Benchmark
from rmjax.evaluation.item_readers import DECIDING, READERS
from rmjax.evaluation.items import Item


class BenchmarkData:
    """The items of one benchmark, and how many rows were dropped.

    Attributes:
      benchmark: the row of the table.
      label: its name in reports: the benchmark's name, or that with the user's file.
      source: where the rows come from.
      items: in the order of the rows.
      dropped: how many rows were left out, by reason.
      notes: what of the rows was not used, in words.
      gold: the rating that decides; empty where responses are good or bad.
    """

    def __init__(self, benchmark: Benchmark, source: str = "", label: str = "", gold: str = ""):
        """Reads and checks all rows.

        Args:
          benchmark: a row of the table.
          source: see `open_source`; empty for the benchmark's own.
          label: see above; empty for the benchmark's name.
          gold: which of several ratings decides; empty for helpfulness, overall, or the first
            column.

        Raises:
          UserError: a bad row, with its file and field; or no item is left.
        """
        self.benchmark, self.label = benchmark, label or benchmark.name
        self.source = source or benchmark.source
        self.dropped: Counter[str] = Counter()
        reader = RowReader(("id", benchmark.subset))
        items = list(READERS[benchmark.row_format](benchmark, self.source, reader, self.dropped))
        self.dropped.update(reader.skipped)
        self.notes = reader.notes()
        self.gold = _deciding_rating(items, gold, self.source)
        self.items = [self._with_gold(item) for item in items if not self._drop(item)]
        if not self.items:
            raise UserError(
                f"{self.source}: no item is left of {len(items)} ({dict(self.dropped)})"
            )

    def _with_gold(self, item: Item) -> Item:
        gold = [float(number < item.good) for number in range(len(item.responses))]
        if self.gold:
            gold = [ratings.get(self.gold, math.nan) for ratings in item.ratings]
        return dataclasses.replace(item, gold=tuple(gold))

    def _drop(self, item: Item) -> bool:
        reason = ""
        if self.benchmark.row_format == "ratings":
            return False  # the responses that say nothing are not among them
        if any(conversation.is_empty for conversation in item.conversations):
            reason = EMPTY
        elif item.strength == 0:
            reason = TIE
        elif self.benchmark.row_format == "pairs" and item.is_same:
            reason = EQUAL
        self.dropped.update([reason] if reason else [])
        return bool(reason)

    @property
    def key(self) -> str:
        """A fingerprint of the items."""
        digest = hashlib.sha256()
        for item in self.items:
            said = list(map(conversation_key, item.conversations))
            parts = [item.id, item.subset, said, item.good, item.pairs]
            parts.append([sorted(r.items()) for r in item.ratings])
            digest.update(json.dumps(parts).encode())
        return digest.hexdigest()[:32]


def read_benchmarks(names: Sequence[str], gold: str = "") -> list[BenchmarkData]:
    """Reads benchmarks, each given as `NAME` or `NAME=SOURCE`.

    Args:
      names: the benchmarks. If a name comes twice, the label says the file too.
      gold: see `BenchmarkData`.

    Raises:
      UserError: an unknown name, or bad data.
    """
    read: dict[str, BenchmarkData] = {}
    for text in names:
        name, _, source = text.partition("=")
        if name not in BENCHMARKS:
            raise UserError(
                f"{text!r}: there are {', '.join(BENCHMARKS)}, each with =SOURCE or not"
            )
        benchmark = BENCHMARKS[name]
        if not source and not benchmark.source:
            raise UserError(f"{text!r}: which? {name}=FILE, a directory or a hub id")
        label = name if benchmark.source else f"{name} {Path(source).name.split('.')[0]}"
        if label in read:
            label = f"{name} {source}"
        if label in read:
            raise UserError(f"{text!r} is there twice")
        read[label] = BenchmarkData(benchmark, source, label, gold)
    return list(read.values())


def _deciding_rating(items: Sequence[Item], wanted: str, source: str) -> str:
    names = list(dict.fromkeys(name for item in items for r in item.ratings for name in r))
    if wanted and names and wanted not in names:
        raise UserError(f"{source}: there is no rating {wanted!r}; there are {', '.join(names)}")
    known = [name for name in (wanted, *DECIDING) if name in names]
    if not known and len(names) > 1:
        raise UserError(f"{source}: which rating decides? --gold=NAME, one of {', '.join(names)}")
    return (known or names or [""])[0]
