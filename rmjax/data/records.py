"""All samples or pairs of a data source, and what of it was not used."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from rmjax.data.conversation import prompt_key
from rmjax.data.fields import check_fields, is_number, rating_field
from rmjax.data.layouts import find_layout, is_pairs_alone
from rmjax.data.readers import GENERATED, Row, open_source
from rmjax.data.row_reader import RowReader, Sample
from rmjax.errors import UserError

# Why a sample or a pair is left out; training and evaluation count the same.
EMPTY, TIE, EQUAL = "an empty response", "a tie", "chosen equals rejected"


@dataclasses.dataclass(frozen=True)
class Records:
    """All of a source's samples or pairs.

    Attributes:
      source: what messages call it.
      entries: each one sample, or the two of a pair.
      skipped: rows that were left out, by reason.
      notes: what was not used, for people.
    """

    source: str
    entries: list[tuple[Sample, ...]]
    skipped: Mapping[str, int]
    notes: tuple[str, ...]


def read_samples(
    source: str,
    split: str,
    attributes: Sequence[str],
    label_range: tuple[float, float],
    unrated: str = "",
) -> Records:
    """All rated responses of a source, checked.

    Args:
      source: see `open_source`.
      split: `train` or `validation`.
      attributes: the columns that hold the ratings.
      label_range: the lowest and highest rating there may be.
      unrated: one of the attributes, whose column may be missing.

    Raises:
      UserError: naming file, row and field.
    """
    reader = RowReader(used=attributes)

    def read(row: Row) -> list[tuple[Sample, ...]]:
        if unrated:
            row.fields.setdefault(unrated, None)
        conversation = reader.rated(row)
        check_fields(row.fields, attributes, row.where, "; where there is no rating, write null")
        labels = tuple(rating_field(row.fields, a, row.where, label_range) for a in attributes)
        return [(Sample(conversation, labels, row.where, row.number),)]

    return _read(source, split, False, reader, read)


def read_responses(source: str, split: str) -> Records:
    """All conversations of a source, checked, whose response a policy learns to say.

    Args:
      source: see `open_source`.
      split: `train` or `validation`.

    Raises:
      UserError: naming file, row and field.
    """
    reader = RowReader()

    def read(row: Row) -> list[tuple[Sample, ...]]:
        if is_pairs_alone(row.fields):
            raise UserError(
                f"{row.where}: responses that are compared ({', '.join(sorted(row.fields))}), and "
                "config.objective 'sft' learns from single ones: use 'dpo', or give rows with "
                "'messages', or with 'prompt' and 'response'"
            )
        return [(Sample(reader.rated(row), (), row.where, row.number),)]

    return _read(source, split, False, reader, read)


def read_pairs(source: str, split: str) -> Records:
    """All preference pairs of a source, checked, in any layout of pairs or rankings.

    Args:
      source: see `open_source`; not a generated one.
      split: `train` or `validation`.

    Raises:
      UserError: naming file, row and field.
    """
    if source.startswith(GENERATED):
        raise UserError(
            f"{source}: there are generated ratings only, no pairs; config.data.compare = "
            "'helpfulness' makes pairs of them"
        )
    reader = RowReader()
    return _read(source, split, True, reader, reader.pairs)


def _read(
    source: str,
    split: str,
    pairs: bool,
    reader: RowReader,
    read: Callable[[Row], Sequence[tuple[Sample, ...]]],
) -> Records:
    opened = open_source(source, split, pairs)
    entries = [entry for row in opened for entry in read(row)]
    if not entries:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in reader.skipped.items())
        raise UserError(f"{opened.name}: there is nothing to read in it ({reasons or 'no row'})")
    reader.used.update(opened.split_columns)
    return Records(opened.name, entries, opened.skipped + reader.skipped, reader.notes())


def pairs_of_ratings(records: Records, attribute: str) -> Records:
    """Every two responses to one prompt, the one with the higher rating first.

    Their strength is the difference of the ratings. Responses without the rating make none.

    Args:
      records: samples with this rating alone.
      attribute: its name, for messages.

    Raises:
      UserError: there is no pair.
    """
    prompts: dict[str, list[Sample]] = {}
    for (sample,) in records.entries:
        if not math.isnan(sample.labels[0]):
            prompts.setdefault(prompt_key([sample.conversation]), []).append(sample)
    pairs = []
    for responses in prompts.values():
        for first, second in itertools.combinations(responses, 2):
            better = max(first, second, key=lambda sample: sample.labels[0])
            other = second if better is first else first
            strength = better.labels[0] - other.labels[0]
            pairs.append(tuple(dataclasses.replace(s, strength=strength) for s in (better, other)))
    if not pairs:
        raise UserError(
            f"{records.source}: no prompt has two responses with a rating of {attribute!r} to "
            "compare"
        )
    return dataclasses.replace(records, entries=pairs)


def describe(source: str, split: str, pairs: bool | None = None) -> tuple[str, tuple[str, ...]]:
    """What a source holds, and the columns that may be ratings.

    Args:
      source: see `open_source`.
      split: likewise.
      pairs: likewise.

    Returns:
      `pairs` or `ratings`, by the first row's fields, and of ratings the columns in which every
      row has a number or nothing, and some row a number.

    Raises:
      UserError: the rows are neither; or a file is broken.
    """
    numeric: dict[str, bool] = {}  # whether a field ever holds a number
    refused: set[str] = set()  # fields that hold something else
    opened = open_source(source, split, pairs)
    for index, row in enumerate(opened):
        if index == 0 and find_layout(row.fields, row.where).kind != "ratings":
            return "pairs", ()
        for field, value in row.fields.items():
            number = is_number(value)
            numeric[field] = numeric.get(field, False) or number
            if not number and value is not None:
                refused.add(field)
    if not numeric:
        raise UserError(f"{opened.name}: there is no row in it")
    return "ratings", tuple(field for field, n in numeric.items() if n and field not in refused)
