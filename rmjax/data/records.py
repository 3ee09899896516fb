"""All samples or pairs of a data source, and what of it was not used.

They are read one after the other, so that a million of them need not be in memory at once.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from rmjax.data.conversation import prompt_key
from rmjax.data.fields import check_fields, is_number, rating_field
from rmjax.data.layouts import find_layout, is_pairs_alone
from rmjax.data.readers import GENERATED, Row, Source, open_source
from rmjax.data.row_reader import RowReader, Sample
from rmjax.errors import UserError

# Why a sample or a pair is left out; training and evaluation count the same.
EMPTY, TIE, EQUAL = "an empty response", "a tie", "chosen equals rejected"

Entry = tuple[Sample, ...]  # one sample, or the two of a pair


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
    entries: list[Entry]
    skipped: Mapping[str, int]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Entry]:
        """The entries, as those of a `Reading`."""
        return iter(self.entries)


class Reading:
    """A source's samples or pairs, read as they are iterated; once.

    Attributes:
      source: what messages call it.
    """

    def __init__(
        self, opened: Source, reader: RowReader, read: Callable[[Row], Sequence[Entry]]
    ) -> None:
        """Reads nothing yet; `read` makes entries of a row by the methods of `reader`."""
        self.source = opened.name
        self._opened, self._reader, self._read = opened, reader, read

    def __iter__(self) -> Iterator[Entry]:
        """The entries.

        Raises:
          UserError: a row is broken, or there is nothing; naming file, row and field.
        """
        anything = False
        for row in self._opened:
            for entry in self._read(row):
                anything = True
                yield entry
        skipped = self._reader.skipped
        if not anything:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items())
            raise UserError(
                f"{self.source}: there is nothing to read in it ({reasons or 'no row'})"
            )
        self._reader.used.update(self._opened.split_columns)

    def decide(self, watched: Callable[[Iterator[Row]], Iterator[Row]]) -> None:
        """Finds out which rows are of the split; see `Source.decide`."""
        self._opened.decide(watched)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Rows that were left out, by reason, when all have been read."""
        return self._opened.skipped + self._reader.skipped

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not used, for people, when all have been read."""
        return self._reader.notes()

    def all(self) -> Records:
        """All of them at once.

        Raises:
          UserError: see `__iter__`.
        """
        entries = list(self)
        return Records(self.source, entries, self.skipped, self.notes)


def read_samples(
    source: str,
    split: str,
    attributes: Sequence[str],
    label_range: tuple[float, float],
    unrated: str = "",
) -> Reading:
    """All rated responses of a source, each checked when it is read.

    Args:
      source: see `open_source`.
      split: `train` or `validation`.
      attributes: the columns that hold the ratings.
      label_range: the lowest and highest rating there may be.
      unrated: one of the attributes, whose column may be missing.

    Raises:
      UserError: there is no such source.
    """
    reader = RowReader(used=attributes)

    def read(row: Row) -> list[Entry]:
        if unrated:
            row.fields.setdefault(unrated, None)
        conversation = reader.rated(row)
        check_fields(row.fields, attributes, row.where, "; where there is no rating, write null")
        labels = tuple(rating_field(row.fields, a, row.where, label_range) for a in attributes)
        return [(Sample(conversation, labels, row.where, row.number),)]

    return Reading(open_source(source, split, False), reader, read)


def read_responses(source: str, split: str) -> Reading:
    """All conversations of a source, each checked when it is read, for a policy to learn from.

    Args:
      source: see `open_source`.
      split: `train` or `validation`.

    Raises:
      UserError: there is no such source.
    """
    reader = RowReader()

    def read(row: Row) -> list[Entry]:
        if is_pairs_alone(row.fields):
            raise UserError(
                f"{row.where}: responses that are compared ({', '.join(sorted(row.fields))}), and "
                "config.objective 'sft' learns from single ones: use 'dpo', or give rows with "
                "'messages', or with 'prompt' and 'response'"
            )
        return [(Sample(reader.rated(row), (), row.where, row.number),)]

    return Reading(open_source(source, split, False), reader, read)


def read_pairs(source: str, split: str) -> Reading:
    """All preference pairs of a source, each checked when it is read, in any layout.

    Args:
      source: see `open_source`; not a generated one.
      split: `train` or `validation`.

    Raises:
      UserError: there is no such source, or it has no pairs.
    """
    if source.startswith(GENERATED):
        raise UserError(
            f"{source}: there are generated ratings only, no pairs; config.data.compare = "
            "'helpfulness' makes pairs of them"
        )
    reader = RowReader()
    return Reading(open_source(source, split, True), reader, reader.pairs)


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
