"""The items of a benchmark: conversations that are compared, some of them better than others."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from rmjax.data.conversation import (
    Conversation,
    conversation_key,
    prompt_key,
    shared_messages,
)
from rmjax.data.fields import check_fields, is_number, rating_field
from rmjax.data.messages import Message, message_text
from rmjax.data.readers import Row, find_path, open_source
from rmjax.data.records import EMPTY, EQUAL, TIE
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError
from rmjax.evaluation.benchmarks import BENCHMARKS, JUDGE_BENCH_SOURCES, Benchmark

_DECIDING = ("helpfulness", "overall")  # which rating decides, if the user does not say
_NOT_RATINGS = (
    "id",
    "row",
    "index",
    "seed",
    "split",
    "fold",
)  # columns of numbers that are not ratings
_NAMES = ("id", "subset")  # columns that every reader here uses, if they are there


@dataclasses.dataclass(frozen=True)
class Item:
    """Conversations that are compared.

    Attributes:
      id: from the data, or the row's number.
      subset: from the data, or empty.
      conversations: the good ones first. They may differ anywhere.
      good: how many of them are good; 0 if they have ratings instead.
      where: file and row, for messages.
      strength: of a pair's preference; 0 for a tie, NaN if the data do not say.
      gold: what each response is worth: 1 if good and 0 if not, or the deciding rating, NaN where
        that is missing.
      ratings: for each response, its ratings by name; empty without ratings.
    """

    id: str
    subset: str
    conversations: tuple[Conversation, ...]
    good: int
    where: str
    strength: float = float("nan")
    gold: tuple[float, ...] = ()
    ratings: tuple[Mapping[str, float], ...] = ()

    @property
    def prompt(self) -> list[Message]:
        """The messages that all conversations begin with."""
        return self.conversations[0].messages[: shared_messages(self.conversations)]

    def without(self, which: Bool[np.ndarray, "n"]) -> "Item":
        """The item without some of its responses."""
        kept = np.flatnonzero(~which)
        parts = {
            name: tuple(getattr(self, name)[i] for i in kept)
            for name in ("conversations", "gold", "ratings")
        }
        return dataclasses.replace(self, **parts)

    @property
    def is_same(self) -> bool:
        """Whether all conversations are the same, message by message and field by field."""
        return all(other == self.conversations[0] for other in self.conversations)

    @property
    def responses(self) -> tuple[str, ...]:
        """What each conversation says after the prompt."""
        begin = shared_messages(self.conversations)
        return tuple(_said(c.messages[begin:]) for c in self.conversations)


def _said(messages: Sequence[Message]) -> str:
    """The text of a response, or of several turns, each with its role."""
    if len(messages) == 1:
        return message_text(messages[0])
    return "\n\n".join(f"{m['role']}: {message_text(m)}" for m in messages)


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
        reader = RowReader(_NAMES)
        items = list(_READERS[benchmark.row_format](benchmark, self.source, reader, self.dropped))
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
            parts = [item.id, item.subset, said, item.good]
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
    known = [name for name in (wanted, *_DECIDING) if name in names]
    if not known and len(names) > 1:
        raise UserError(f"{source}: which rating decides? --gold=NAME, one of {', '.join(names)}")
    return (known or names or [""])[0]


# ---- a reader for each row format ---------------------------------------------------------------

Reader = Callable[[Benchmark, str, RowReader, Counter[str]], Iterator[Item]]


def _choices(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """`prompt`, `chosen` and `rejected`; the latter two are a response or a list of responses."""
    for row in _rows(benchmark, source, reader, dropped):
        fields = ("prompt", "chosen", "rejected")
        check_fields(row.fields, fields, row.where)
        reader.see(row.fields, [*fields, "domain"] if benchmark.name == "rm-bench" else fields)
        good, bad = (_responses(reader, row, field) for field in fields[1:])
        yield Item(
            id=_id(row),
            subset=_subset(benchmark, row),
            conversations=(*good, *bad),
            good=len(good),
            where=row.where,
        )


def _judgements(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """JudgeBench: `question`, `response_A`, `response_B`, `label` "A>B" or "B>A", `source`."""
    fields = {"A>B": "response_A", "B>A": "response_B"}
    reader.used.update(("pair_id", "source"))
    for row in _rows(benchmark, source, reader, dropped):
        check_fields(row.fields, ["source"], row.where)
        part = str(row.fields["source"])
        subsets = [name for start, name in JUDGE_BENCH_SOURCES.items() if part.startswith(start)]
        yield Item(
            id=_id(row, "pair_id"),
            subset=subsets[0] if subsets else part,
            conversations=_labelled_pair(reader, row, "question", fields),
            good=1,
            where=row.where,
        )


def _llmbar(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """LLMBar: `input`, `output_1`, `output_2`, `label` 1 or 2; each `dataset.json` is a subset."""
    root = find_path(source)
    files = [root] if root else []
    if root and root.is_dir():
        files = sorted(root.rglob("dataset.json"))
    if not files:
        raise UserError(
            f"{source}: LLMBar is read from the directory Dataset/LLMBar of a clone of its "
            "repository (princeton-nlp/LLMBar); on the hub it is a program, which is not run here"
        )
    for file in files:
        for row in _rows(benchmark, str(file), reader, dropped):
            yield Item(
                id=str(row.number),
                subset=file.parent.name,
                conversations=_labelled_pair(reader, row, "input", {1: "output_1", 2: "output_2"}),
                good=1,
                where=row.where,
            )


def _labelled_pair(
    reader: RowReader, row: Row, prompt: str, fields: Mapping[Any, str]
) -> tuple[Conversation, Conversation]:
    """The response that the label chooses and the other one; `fields` are by the label's value."""
    used = [prompt, *fields.values()]
    check_fields(row.fields, used, row.where)
    reader.see(row.fields, [*used, "label"])
    first, second = (reader.conversation(row.fields, f, row.where, prompt) for f in fields.values())
    labels, label = [*fields], row.fields.get("label")
    if label not in labels:
        expected = " or ".join(map(repr, labels))
        raise UserError(f"{row.where}: field 'label' is {label!r}, expected {expected}")
    return (first, second) if label == labels[0] else (second, first)


def _pairs(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """Preference pairs in any layout that training reads."""
    for row in _rows(benchmark, source, reader, dropped):
        pairs = reader.pairs(row)
        for number, (chosen, rejected) in enumerate(pairs, start=1):
            id = _id(row)
            yield Item(
                id=f"{id}.{number}" if len(pairs) > 1 else id,
                subset=_subset(benchmark, row),
                conversations=(chosen.conversation, rejected.conversation),
                good=1,
                where=chosen.where,
                strength=chosen.strength,
            )


def _ratings(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """A response and columns of ratings; the responses to one prompt are one item."""
    rows = [(row, reader.rated(row)) for row in _rows(benchmark, source, reader, dropped)]
    names = _rating_names([row for row, _ in rows])
    if rows and not names:
        raise UserError(
            f"{rows[0][0].where}: no rating; expected columns with numbers, or null, in every row"
        )
    reader.used.update(names)
    by_prompt: dict[str, list[tuple[Row, Conversation]]] = {}
    for row, conversation in rows:
        if conversation.is_empty:
            dropped[EMPTY] += 1
        else:
            by_prompt.setdefault(prompt_key([conversation]), []).append((row, conversation))
    for number, members in enumerate(by_prompt.values(), start=1):
        ratings = (
            {name: rating_field(row.fields, name, row.where) for name in names}
            for row, _ in members
        )
        yield Item(
            id=str(number),
            subset="",
            conversations=tuple(conversation for _, conversation in members),
            good=0,
            where=members[0][0].where,
            ratings=tuple({k: v for k, v in r.items() if not math.isnan(v)} for r in ratings),
        )


def _rating_names(rows: Sequence[Row]) -> list[str]:
    """Columns that hold numbers, or nothing, in every row.

    Raises:
      UserError: one that decides, if nobody says which, holds something else in a row.
    """
    numeric: dict[str, bool] = {}
    for row in rows:
        for name, value in row.fields.items():
            if value is not None:
                numeric[name] = is_number(value) and numeric.get(name, True)
    for row, name in itertools.product(rows, _DECIDING):
        if name in row.fields and numeric.get(name) is False:
            rating_field(row.fields, name, row.where)  # says in which row it is not
    return [name for name, ever in numeric.items() if ever and name not in _NOT_RATINGS]


_READERS: dict[str, Reader] = {
    "choices": _choices,
    "judgements": _judgements,
    "llmbar": _llmbar,
    "pairs": _pairs,
    "ratings": _ratings,
}


def _rows(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Row]:
    """The rows of a source; RM-Bench's directory has a file for each domain."""
    root = find_path(source) if benchmark.name == "rm-bench" else None
    domains = sorted(root.glob("*_filtered.json")) if root else []
    pairs = {"pairs": True, "ratings": False}.get(benchmark.row_format)
    for part in map(str, domains) if domains else [source]:
        opened = open_source(part, benchmark.split, pairs)
        reader.used.update(opened.split_columns)
        yield from opened
        dropped.update(opened.skipped)


def _subset(benchmark: Benchmark, row: Row) -> str:
    """Of RM-Bench the domain: a field, or the name of the domain's file."""
    if benchmark.name != "rm-bench":
        found = row.fields.get("subset")
        return "" if found is None else str(found)
    named = str(row.fields.get("domain") or Path(row.where.rpartition(" row ")[0]).stem)
    words = named.removeprefix("rm_bench_").replace("_", "-").split("-")
    return words[0]


def _responses(reader: RowReader, row: Row, field: str) -> list[Conversation]:
    """The conversations of a field that holds one response or a list of them."""
    value = row.fields[field]
    if isinstance(value, list) and _is_list_of_responses(value):
        if not value:
            raise UserError(f"{row.where}: field {field!r} is empty")
        parts = enumerate(value, start=1)
        wheres = [(f"{row.where}, {field} {number}", part) for number, part in parts]
        return [reader.conversation(row.fields, field, w, "prompt", part) for w, part in wheres]
    return [reader.conversation(row.fields, field, row.where, "prompt")]


def _is_list_of_responses(values: list[Any]) -> bool:
    """Texts, lists of messages, or several of the assistant's; others are one conversation."""
    if any(isinstance(value, dict) for value in values):
        roles = {v.get("role", v.get("from")) for v in values if isinstance(v, dict)}
        return len(values) > 1 and roles <= {"assistant", "gpt"}
    return True


def _id(row: Row, field: str = "id") -> str:
    found = row.fields.get(field)
    return str(row.number if found is None else found)
