"""The two formats of PPE's rows: votes of people, and samples that are right or wrong."""

import math
from collections import Counter
from collections.abc import Iterator

from rmjax.data.fields import check_fields
from rmjax.data.readers import Row
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError
from rmjax.evaluation.benchmark_rows import benchmark_rows, labelled_pair, row_id, row_subset
from rmjax.evaluation.benchmarks import Benchmark
from rmjax.evaluation.items import Item

_SAME_SCORE = "a pair of equal scores"


def votes(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """Human preferences: `prompt`, `response_1`, `response_2`, `winner`.

    The winner is `model_a`, `model_b`, or one of several ties, of which nothing is asked.
    """
    fields = {"model_a": "response_1", "model_b": "response_2"}
    for row, _ in benchmark_rows(benchmark, source, reader, dropped):
        tie = str(row.fields.get("winner")).startswith("tie")
        label = {"winner": "model_a"} if tie else {}
        told = row._replace(fields=row.fields | label)
        yield Item(
            id=row_id(row, "question_id"),
            subset="",
            conversations=labelled_pair(reader, told, "prompt", fields, "winner"),
            good=1,
            where=row.where,
            strength=0.0 if tie else math.nan,
        )


def graded(
    benchmark: Benchmark, source: str, reader: RowReader, dropped: Counter[str]
) -> Iterator[Item]:
    """Correctness: `prompt`, samples `response_1` and so on, and `scores`: 1 if right, or 0.

    `sampled_conflict_pairs` has the numbers, from 0, of the pairs that are compared.
    """
    names = ("question_id", "model_name")  # a question may have been asked of several models
    for row, place in benchmark_rows(benchmark, source, reader, dropped):
        check_fields(row.fields, ("prompt", "scores", "sampled_conflict_pairs"), row.where)
        scores = _binary_scores(row)
        fields = [f"response_{number}" for number in range(1, len(scores) + 1)]
        check_fields(row.fields, fields, row.where)
        reader.see(row.fields, ["prompt", *fields, "scores", "sampled_conflict_pairs", *names])
        order = sorted(range(len(scores)), key=lambda i: -scores[i])  # the right ones first
        place_of = {sample: number for number, sample in enumerate(order)}
        pairs = []
        for one, other in _index_pairs(row, len(scores)):
            if scores[one] == scores[other]:
                dropped[_SAME_SCORE] += 1
            else:
                better, worse = (one, other) if scores[one] > scores[other] else (other, one)
                pairs.append((place_of[better], place_of[worse]))
        yield Item(
            id="/".join(str(row.fields[name]) for name in names if row.fields.get(name) is not None)
            or str(row.number),
            subset=row_subset(benchmark, row, place),
            conversations=tuple(
                reader.conversation(row.fields, fields[i], row.where, "prompt") for i in order
            ),
            good=int(sum(scores)),
            where=row.where,
            pairs=tuple(pairs),
        )


def _binary_scores(row: Row) -> list[float]:
    values = row.fields["scores"] if isinstance(row.fields["scores"], list) else []
    scores = [float(v) if isinstance(v, bool | int | float) else math.nan for v in values]
    if len(scores) < 2 or any(score not in (0.0, 1.0) for score in scores):
        raise UserError(
            f"{row.where}: field 'scores' is not a list of 0 and 1, or false and true, one for "
            "each response"
        )
    return scores


def _index_pairs(row: Row, count: int) -> list[tuple[int, int]]:
    pairs = row.fields["sampled_conflict_pairs"]
    numbers = range(count)
    if not isinstance(pairs, list) or any(
        not isinstance(pair, list) or len(pair) != 2 or any(i not in numbers for i in pair)
        for pair in pairs
    ):
        raise UserError(
            f"{row.where}: field 'sampled_conflict_pairs' is not a list of pairs of numbers from 0 "
            f"to {count - 1}"
        )
    return [(int(one), int(other)) for one, other in pairs]
