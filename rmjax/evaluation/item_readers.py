"""From rows to items: a reader for each format of rows that benchmarks have."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.conversation import Conversation, prompt_key
from rmjax.data.fields import check_fields, is_number, rating_field
from rmjax.data.readers import Row
from rmjax.data.records import EMPTY
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError
from rmjax.evaluation.benchmark_rows import benchmark_rows, labelled_pair, row_id, row_subset
from rmjax.evaluation.benchmarks import JUDGE_BENCH_SOURCES, Benchmark
from rmjax.evaluation.items import Item
from rmjax.evaluation.ppe_readers import graded, votes

DECIDING = ("helpfulness", "overall")  # which rating decides, if the user does not say
# Columns of numbers that are not ratings.
_NOT_RATINGS = ("id", "row", "index", "seed", "split", "fold")

Reader = Callable[[Benchmark, str, RowReader, Counter[str]], Iterator[Item]]


def _choices(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """`prompt`, `chosen` and `rejected`; the latter two are a response or a list of responses."""
    for row, place in benchmark_rows(benchmark, source, reader, dropped):
        fields = ("prompt", "chosen", "rejected")
        check_fields(row.fields, fields, row.where)
        reader.see(row.fields, [*fields, "domain"] if benchmark.name == "rm-bench" else fields)
        good, bad = (_responses(reader, row, field) for field in fields[1:])
        yield Item(
            id=row_id(row),
            subset=row_subset(benchmark, row, place),
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
    for row, _ in benchmark_rows(benchmark, source, reader, dropped):
        check_fields(row.fields, ["source"], row.where)
        part = str(row.fields["source"])
        subsets = [name for start, name in JUDGE_BENCH_SOURCES.items() if part.startswith(start)]
        yield Item(
            id=row_id(row, "pair_id"),
            subset=subsets[0] if subsets else part,
            conversations=labelled_pair(reader, row, "question", fields),
            good=1,
            where=row.where,
        )


def _llmbar(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """LLMBar: `input`, `output_1`, `output_2`, `label` 1 or 2; each `dataset.json` is a subset."""
    for row, place in benchmark_rows(benchmark, source, reader, dropped):
        yield Item(
            id=str(row.number),
            subset=Path(place).parent.name,
            conversations=labelled_pair(reader, row, "input", {1: "output_1", 2: "output_2"}),
            good=1,
            where=row.where,
        )


def _rmb(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """RMB: `conversation_input`, and `chosen` and `reject`, or `bon_best` and `loser_list`.

    A response is a mapping with its `answer`. `category_path` says the goal and the scenario.
    """
    prompt, path = "conversation_input", "category_path"
    for row, _ in benchmark_rows(benchmark, source, reader, dropped):
        best, others, id = ("chosen", "reject", "pair_uid")
        if "bon_best" in row.fields:
            best, others, id = ("bon_best", "loser_list", "bon_uid")
        check_fields(row.fields, (prompt, path, best, others), row.where)
        reader.see(row.fields, (prompt, path, best, others, id))
        turns = _turns(row.fields[prompt])
        if (
            turns
            and isinstance(turns[-1], dict)
            and not str(turns[-1].get("content") or "").strip()
        ):
            dropped["an empty prompt"] += 1  # five rows have one, which no model can answer
            continue
        losers = row.fields[others]
        responses = [(best, row.fields[best])]
        responses += [(others, one) for one in (losers if isinstance(losers, list) else [losers])]
        asked = {prompt: turns}
        yield Item(
            id=row_id(row, id),
            subset=_rmb_class(str(row.fields[path])),
            conversations=tuple(
                reader.conversation(asked, field, row.where, prompt, _answer(value, field, row))
                for field, value in responses
            ),
            good=1,
            where=row.where,
        )


def _rmb_class(path: str) -> str:
    """`Pairwise_set/Helpfulness/Code/Documentation` is of the subset `Pairwise/Code`."""
    part, _, name = [*path.split("/"), "", ""][:3]
    return f"{part.removesuffix('_set')}/{name}"


def _turns(messages: Any) -> Any:
    """Messages without what RMB notes beside them, such as their language."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return messages  # which is an error of its own
    return [{name: m[name] for name in ("role", "content") if name in m} for m in messages]


def _answer(value: Any, field: str, row: Row) -> Any:
    check_fields(value if isinstance(value, dict) else {}, ("answer",), f"{row.where}, {field}")
    return value["answer"]


def _pairs(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """Preference pairs in any layout that training reads."""
    for row, place in benchmark_rows(benchmark, source, reader, dropped):
        pairs = reader.pairs(row)
        for number, (chosen, rejected) in enumerate(pairs, start=1):
            id = row_id(row)
            yield Item(
                id=f"{id}.{number}" if len(pairs) > 1 else id,
                subset=row_subset(benchmark, row, place),
                conversations=(chosen.conversation, rejected.conversation),
                good=1,
                where=chosen.where,
                strength=chosen.strength,
            )


def _ratings(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """A response and columns of ratings; the responses to one prompt are one item."""
    found = benchmark_rows(benchmark, source, reader, dropped)
    rows = [(row, reader.rated(row)) for row, _ in found]
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
    for row, name in itertools.product(rows, DECIDING):
        if name in row.fields and numeric.get(name) is False:
            rating_field(row.fields, name, row.where)  # says in which row it is not
    return [name for name, ever in numeric.items() if ever and name not in _NOT_RATINGS]


READERS: dict[str, Reader] = {
    "choices": _choices,
    "judgements": _judgements,
    "votes": votes,
    "graded": graded,
    "rmb": _rmb,
    "llmbar": _llmbar,
    "pairs": _pairs,
    "ratings": _ratings,
}


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
