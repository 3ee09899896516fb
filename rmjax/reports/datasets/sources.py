"""Finds the ratings and the pairs of a data set, and the columns that are ratings."""

import re
from collections.abc import Sequence
from pathlib import Path

from rmjax.data.readers import GENERATED
from rmjax.data.records import describe
from rmjax.errors import UserError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Columns of numbers that are not ratings.
_NOT_RATINGS = ("id", "idx", "index", "row", "seed", "turn", "turns", "split")


def find_sources(source: str, split: str, ratings: str = "") -> tuple[str, str]:
    """The sources of ratings and of pairs; empty for none.

    Args:
      source: a directory in HelpSteer2's layout, which can hold both, or a source of one of them.
      split: `train` or `validation`.
      ratings: another source of ratings, for the pairs of `source`.

    Raises:
      UserError: there is nothing, or it holds something else.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        rated = _first(directory, [split])
        paired = _first(directory, ["preference", "preference/preference"])
        if rated and describe(rated, split)[0] == "pairs":
            rated, paired = "", paired or rated
        if not (rated or paired):
            raise UserError(
                f"{source}: neither {split} nor preference there, as "
                f"{', '.join(_SUFFIXES)}; name a file, or another --split"
            )
    else:
        kind = describe(source, split)[0]
        rated, paired = (source, "") if kind == "ratings" else ("", source)
    if ratings:
        if not paired:
            raise UserError(f"--ratings={ratings}: {source} holds no pairs to compare them with")
        beside = Path(ratings).expanduser()
        rated = (_first(beside, [split]) if beside.is_dir() else ratings) or ratings
        if describe(rated, split)[0] != "ratings":
            raise UserError(f"--ratings={ratings}: there are pairs in it, not ratings")
    return rated, paired


def _first(directory: Path, names: Sequence[str]) -> str:
    paths = [directory / f"{name}{suffix}" for name in names for suffix in _SUFFIXES]
    return next((str(path) for path in paths if path.exists()), "")


def find_attributes(source: str, split: str) -> tuple[str, ...]:
    """The columns that are ratings: those with numbers, without ids and the like.

    Raises:
      UserError: there is none.
    """
    names = tuple(
        name
        for name in describe(source, split)[1]
        if name.lower() not in _NOT_RATINGS and not name.endswith("_id")
    )
    if not names:
        raise UserError(
            f"{source}: no column holds numbers in every row; name the ratings with "
            "--attributes=a,b,c"
        )
    return names


def short_name(source: str) -> str:
    """A short name of the data, which can also name a directory."""
    last = source.replace(":", "-") if source.startswith(GENERATED) else Path(source).name
    for suffix in _SUFFIXES[::-1]:
        last = last.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "data"
