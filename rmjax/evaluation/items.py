"""The items of a benchmark: responses to one prompt, some of them better than others."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.conversation import parse_prompt, parse_response
from rmjax.data.readers import read_rows
from rmjax.data.records import check_fields, number_field, pair_of_row
from rmjax.data.tokenizer import Message
from rmjax.errors import UserError
from rmjax.evaluation.benchmarks import BENCHMARKS, JUDGE_BENCH_SOURCES, Benchmark

_DECIDING = ("helpfulness", "overall")  # which rating decides, if the user does not say
_NOT_RATINGS = ("id", "row", "index", "seed")  # columns of numbers that are not ratings


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt with the responses that are compared.

    Attributes:
      id: from the data, or the row's number.
      subset: from the data, or empty.
      prompt: the conversation up to the responses.
      responses: the good ones first.
      good: how many of them are good; 0 if they have ratings instead.
      where: file and row, for messages.
      strength: of a pair's preference; 0 for a tie, NaN if the data do not say.
      gold: what each response is worth: 1 if good and 0 if not, or the deciding rating, NaN where
        that is missing.
      ratings: for each response, its ratings by name; empty without ratings.
    """

    id: str
    subset: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    good: int
    where: str
    strength: float = float("nan")
    gold: tuple[float, ...] = ()
    ratings: tuple[Mapping[str, float], ...] = ()

    def conversations(self) -> list[list[Message]]:
        """The whole conversation of each response."""
        return [[*self.prompt, {"role": "assistant", "content": r}] for r in self.responses]


class BenchmarkData:
    """The items of one benchmark, and how many rows were dropped.

    Attributes:
      benchmark: the row of the table.
      label: its name in reports: the benchmark's name, or that with the user's file.
      source: where the rows come from.
      items: in the order of the rows.
      dropped: how many rows were left out, by reason.
      gold: the rating that decides; empty where responses are good or bad.
    """

    def __init__(self, benchmark: Benchmark, source: str = "", label: str = "", gold: str = ""):
        """Reads and checks all rows.

        Args:
          benchmark: a row of the table.
          source: a file (`.jsonl`, `.jsonl.gz`, `.json`, `.parquet`), a directory in the hub's
            layout or a hub id; empty for the benchmark's own source.
          label: see above; empty for the benchmark's name.
          gold: which of several ratings decides; empty for helpfulness, overall, or the first
            column.

        Raises:
          UserError: a bad row, with its file and field; or no item is left.
        """
        self.benchmark, self.label = benchmark, label or benchmark.name
        self.source = source or benchmark.source
        self.dropped: Counter[str] = Counter()
        items = list(_READERS[benchmark.row_format](benchmark, self.source))
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
        if not all(text.strip() for text in item.responses):
            reason = "an empty response"
        elif item.strength == 0:
            reason = "a tie of the people who judged"
        elif self.benchmark.row_format == "pairs" and len(set(item.responses)) == 1:
            reason = "chosen equals rejected"
        self.dropped.update([reason] if reason else [])
        return bool(reason)

    @property
    def key(self) -> str:
        """A fingerprint of the items."""
        digest = hashlib.sha256()
        for item in self.items:
            parts = [item.id, item.subset, item.prompt, item.responses, item.good]
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
    return (known or names or [""])[0]


def text_key(messages: Sequence[Message]) -> str:
    """A fingerprint of a conversation."""
    said = [(m["role"], m["content"]) for m in messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


# ---- a reader for each row format ---------------------------------------------------------------


def _choices(benchmark: Benchmark, source: str) -> Iterator[Item]:
    """`prompt`, `chosen` and `rejected`; the latter two are a response or a list of responses."""
    for number, row, where in _rows(benchmark, source):
        prompt = _prompt(row, "prompt", where)
        good, bad = (_responses(row, field, prompt, where) for field in ("chosen", "rejected"))
        yield Item(
            id=str(row.get("id", number)),
            subset=_subset(benchmark, row, where),
            prompt=prompt,
            responses=(*good, *bad),
            good=len(good),
            where=where,
        )


def _judgements(benchmark: Benchmark, source: str) -> Iterator[Item]:
    """JudgeBench: `question`, `response_A`, `response_B`, `label` "A>B" or "B>A", `source`."""
    for number, row, where in _rows(benchmark, source):
        responses = _labelled_pair(row, {"A>B": "response_A", "B>A": "response_B"}, where)
        part = _text(row, "source", where)
        subsets = [name for start, name in JUDGE_BENCH_SOURCES.items() if part.startswith(start)]
        yield Item(
            id=str(row.get("pair_id", number)),
            subset=subsets[0] if subsets else part,
            prompt=_prompt(row, "question", where),
            responses=responses,
            good=1,
            where=where,
        )


def _llmbar(benchmark: Benchmark, source: str) -> Iterator[Item]:
    """LLMBar: `input`, `output_1`, `output_2`, `label` 1 or 2; each `dataset.json` is a subset."""
    root = Path(source).expanduser()
    files = sorted(root.rglob("dataset.json")) if root.is_dir() else [root]
    if not files or not root.exists():
        raise UserError(
            f"{source}: LLMBar is read from the directory Dataset/LLMBar of a clone of its "
            "repository (princeton-nlp/LLMBar); on the hub it is a program, which is not run here"
        )
    for file in files:
        for number, row, where in _rows(benchmark, str(file)):
            responses = _labelled_pair(row, {1: "output_1", 2: "output_2"}, where)
            yield Item(
                id=str(number),
                subset=file.parent.name,
                prompt=_prompt(row, "input", where),
                responses=responses,
                good=1,
                where=where,
            )


def _labelled_pair(
    row: Mapping[str, Any], fields: Mapping[Any, str], where: str
) -> tuple[str, str]:
    """The response that the label chooses and the other one; `fields` are by the label's value."""
    first, second = (_text(row, field, where) for field in fields.values())
    labels, label = [*fields], row.get("label")
    if label not in labels:
        expected = " or ".join(map(repr, labels))
        raise UserError(f"{where}: field 'label' is {label!r}, expected {expected}")
    return (first, second) if label == labels[0] else (second, first)


def _pairs(benchmark: Benchmark, source: str) -> Iterator[Item]:
    """Preference pairs in any form that training reads."""
    for number, row, where in _rows(benchmark, source):
        pair = pair_of_row(row, where, number, benchmark.split)
        if pair is None:  # of another split
            continue
        chosen, rejected = pair
        yield Item(
            id=str(row.get("id", number)),
            subset=_subset(benchmark, row, where),
            prompt=tuple(chosen.prompt),
            responses=(chosen.response, rejected.response),
            good=1,
            where=where,
            strength=chosen.strength,
        )


def _ratings(benchmark: Benchmark, source: str) -> Iterator[Item]:
    """`prompt`, `response` and columns of ratings; the responses to one prompt are one item."""
    by_prompt: dict[str, list[tuple[tuple[Message, ...], str, dict[str, float], str]]] = {}
    for _, row, where in _rows(benchmark, source):
        prompt = _prompt(row, "prompt", where)
        ratings = {
            name: number_field(row, name, where)
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
            if name not in _NOT_RATINGS
        }
        if not ratings:
            raise UserError(f"{where}: no rating; expected columns of numbers")
        key = json.dumps(prompt, sort_keys=True)
        by_prompt.setdefault(key, []).append(
            (prompt, _text(row, "response", where), ratings, where)
        )
    for number, members in enumerate(by_prompt.values(), start=1):
        prompts, responses, ratings, wheres = zip(*members)
        yield Item(
            id=str(number),
            subset="",
            prompt=prompts[0],
            responses=responses,
            good=0,
            where=wheres[0],
            ratings=ratings,
        )


_READERS = {
    "choices": _choices,
    "judgements": _judgements,
    "llmbar": _llmbar,
    "pairs": _pairs,
    "ratings": _ratings,
}


def _rows(benchmark: Benchmark, source: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The rows of a source with their numbers; RM-Bench's directory has a file for each domain."""
    domains = sorted(Path(source).expanduser().glob("*_filtered.json"))
    for part in map(str, domains) if domains and benchmark.name == "rm-bench" else [source]:
        name, rows = read_rows(part, benchmark.split)
        for number, row in enumerate(rows, start=1):
            yield number, row, f"{name} row {number}"


def _subset(benchmark: Benchmark, row: Mapping[str, Any], where: str) -> str:
    """Of RM-Bench the domain: a field, or the name of the domain's file."""
    if benchmark.name != "rm-bench":
        return str(row.get("subset") or "")
    named = str(row.get("domain") or Path(where.rpartition(" row ")[0]).stem)
    words = named.removeprefix("rm_bench_").replace("_", "-").split("-")
    return words[0]


def _prompt(row: Mapping[str, Any], field: str, where: str) -> tuple[Message, ...]:
    check_fields(row, [field], where)
    try:
        return tuple(parse_prompt(row[field]))
    except ValueError as error:
        raise UserError(f"{where}: field {field!r} {error}") from error


def _responses(
    row: Mapping[str, Any], field: str, prompt: Sequence[Message], where: str
) -> list[str]:
    check_fields(row, [field], where)
    value = row[field]
    texts = value if isinstance(value, list) and all(isinstance(v, str) for v in value) else [value]
    if not texts:
        raise UserError(f"{where}: field {field!r} is empty")
    try:
        return [parse_response(list(prompt), text)[1] for text in texts]
    except ValueError as error:
        raise UserError(f"{where}: field {field!r} {error}") from error


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    check_fields(row, [field], where)
    if not isinstance(row[field], str):
        raise UserError(
            f"{where}: field {field!r} is {type(row[field]).__name__}, expected a string"
        )
    return row[field]
