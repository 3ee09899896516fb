"""Which rows are of a split: names that mean the same, and columns that name a row's split.

Two things say it: the place of a row, such as a file or a split of the hub (`find_place`), and a
column of the row (`choose`).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rmjax.errors import UserError, listed, shortened

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
COLUMN = "split"
# These name the split only where they hold a name of `SPLITS`: in most data they are other things.
# `subset` is not among them: it is the part of a benchmark, of which one may be called "test".
OTHER_COLUMNS = ("data_split", "dataset_split", "partition", "fold", "set")

_STANDARD = {name: split for split, names in SPLITS.items() for name in names}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The split that is asked for, and what is known of it before any row is read.

    Attributes:
      name: of the split; empty for all rows, whatever they say.
      named: whether the source says it, as SOURCE:NAME. Then rows that name no split, or one that
        nobody knows, are simply not of it.
      found: whether the place of the rows has this name.
      elsewhere: the name of the place, if it is another split. Then only a column can say that a
        row is wanted.
    """

    name: str
    named: bool = False
    found: bool = False
    elsewhere: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rows of a split: those whose column holds one of these names."""

    column: str
    names: frozenset[str]


def standard_name(name: str) -> str:
    """`train`, `validation` or `test` for one of their names; empty for any other name."""
    return _STANDARD.get(name.lower(), "")


def find_split(wanted: str, names: Iterable[str]) -> list[str]:
    """Those of some names that mean a split; several if they do not say which one.

    A name that is exactly the wanted one wins over one in other letters, and that over an alias.
    """
    names = [*names]
    forms: tuple[Callable[[str], str], ...] = (str, str.lower, standard_name)
    for form in forms:
        found = [name for name in names if form(name) and form(name) == form(wanted)]
        if found:
            return found
    return []


def find_place(wanted: Wanted, places: Mapping[str, str], source: str) -> tuple[str, Wanted]:
    """Which place holds a split, and what that says of its rows.

    Args:
      wanted: the split.
      places: names of splits, and what messages call each; at least one.
      source: what messages call all of them, and what a split is named behind, as SOURCE:NAME.

    Raises:
      UserError: none does, or several.
    """
    found = find_split(wanted.name, places)
    if not wanted.name and len(places) == 1:
        found = [*places]
    if len(found) == 1:
        return found[0], dataclasses.replace(wanted, found=True)
    if found:
        raise UserError(
            f"{source}: {' and '.join(places[name] for name in found)} both mean {wanted.name!r}; "
            f"name one as {source}:{found[0]}"
        )
    first, *others = places
    if not others and standard_name(first) == "train":
        # So the hub calls data without splits: a column may still say what is of another one.
        return first, dataclasses.replace(wanted, elsewhere=first)
    raise UserError(
        f"{source}: there is no split {wanted.name!r}; there are {listed(places.values())}; "
        f"name one as {source}:{first}"
    )


def split_of(row: Mapping[str, Any], column: str) -> str:
    """The name that a column gives a row's split; empty if it is null or missing."""
    value = row.get(column)
    if isinstance(value, list | dict):
        return type(value).__name__
    return "" if value is None else str(value).strip()


class SplitNames:
    """What all the rows of a source say about their splits.

    Attributes:
      columns: those that some row has.
      values: for each column how many rows say what; "" where it is null or missing.
      first: the first row that says it, for messages.
    """

    def __init__(self) -> None:
        """Of no row yet."""
        self.columns: set[str] = set()
        self.values = {column: Counter[str]() for column in (COLUMN, *OTHER_COLUMNS)}
        self.first: dict[tuple[str, str], str] = {}

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Takes note of a row."""
        self.columns.update(column for column in self.values if column in row)
        for column, counts in self.values.items():
            name = split_of(row, column)
            counts[name] += 1
            self.first.setdefault((column, name), where)


def choose(seen: SplitNames, wanted: Wanted, source: str) -> Choice | None:
    """Which rows are of a split; None for all of them.

    Args:
      seen: what the rows say.
      wanted: the split.
      source: what messages call the rows, and what a split is named behind, as SOURCE:NAME.

    Raises:
      UserError: the columns contradict each other, or do not say what they must.
    """
    if not wanted.name:
        return None
    column = _split_column(seen, wanted, source)
    if not column:
        if wanted.elsewhere or (wanted.named and not wanted.found):
            place = wanted.elsewhere
            there = f"only {place!r} is there, and " if place else ""
            ask = f"; if it is the one that you want, name it as {source}:{place}" if place else ""
            raise UserError(
                f"{source}: there is no split {wanted.name!r}: {there}no column says that a row is "
                f"of it ({', '.join((COLUMN, *OTHER_COLUMNS))}){ask}"
            )
        return None
    counts = seen.values[column]
    names = _meaning(wanted.name, counts)
    if not names and wanted.found:
        # Splits such as "filtered" are not what a column of train and test is about, nor is a
        # split that the source names what a column of anything else is about.
        unrelated = wanted.named and not any(map(standard_name, counts))
        if unrelated or not standard_name(wanted.name):
            return None
    if standard_name(wanted.name) and not wanted.named:
        _check_names(seen, column, wanted, source)
    if not names:
        there = [f"{shortened(name)} ({counts[name]} rows)" for name in counts if name]
        ask = _name_that_works(counts, wanted)
        raise UserError(
            f"{source}: no row is of the split {wanted.name!r}; in the column {column!r} there are "
            f"{listed(there, 5) or 'none'}; "
            + (f"name one as {source}:{ask}" if ask else "rename it if it is not the split")
        )
    if len({name.lower() for name in names}) > 1:
        raise UserError(
            f"{source}: in the column {column!r}, {' and '.join(map(repr, names))} both mean "
            f"{wanted.name!r}; name one as {source}:{names[0]}"
        )
    return Choice(column, frozenset(names))


def _split_column(seen: SplitNames, wanted: Wanted, source: str) -> str:
    """The column that names the split; empty if there is none."""
    if COLUMN in seen.columns:
        return COLUMN
    columns = [column for column in OTHER_COLUMNS if _is_split(seen.values[column], wanted)]
    if len(columns) > 1:
        raise UserError(
            f"{source}: the columns {' and '.join(map(repr, columns))} both look like the split; "
            f"call the right one {COLUMN!r}"
        )
    return columns[0] if columns else ""


def _is_split(counts: Iterable[str], wanted: Wanted) -> bool:
    """Whether values are names of splits. Of a benchmark, "test" may be one subject of many."""
    names = [name.lower() for name in counts if name]
    known = [name for name in names if standard_name(name)]
    if standard_name(wanted.name):
        return bool(known)
    asked = wanted.named and not wanted.found and wanted.name.lower() in names
    return asked or (bool(known) and known == names)


def _meaning(wanted: str, names: Iterable[str]) -> list[str]:
    """Like `find_split`, but names that differ in capitals are one: such files were joined."""
    names = [*names]
    found = find_split(wanted.lower(), {name.lower(): None for name in names})
    return [name for name in names if name.lower() in found]


def _check_names(seen: SplitNames, column: str, wanted: Wanted, source: str) -> None:
    """Raises a `UserError` for a row of which nobody can say whether it is wanted."""
    counts = seen.values[column]
    for name in counts:
        if standard_name(name):
            continue
        known = ", ".join(_STANDARD)
        said = f"is {shortened(name)!r}, which is none of {known}" if name else "says nothing"
        ask = _name_that_works(counts, wanted, name)
        raise UserError(
            f"{seen.first[column, name]}: field {column!r} {said}; "
            + (f"name the split that you want, as {source}:{ask}, or " if ask else "")
            + "rename the column if it is not the split"
        )


def _name_that_works(counts: Iterable[str], wanted: Wanted, name: str = "") -> str:
    """A split that a source can name instead, such that `choose` finds rows; empty for none.

    Args:
      counts: what the column says.
      wanted: the split.
      name: what the column says in the row in question.
    """
    names = [name for name in counts if name]
    if wanted.found:
        # Behind the source stands then the name of the place, which is still looked up in the
        # column if that holds names of splits.
        works = _meaning(wanted.name, names) or not any(map(standard_name, names))
        return wanted.name if works and not wanted.named else ""
    found = [name, *_meaning(wanted.name, names), *names]
    return next((name for name in found if name and name == shortened(name)), "")
