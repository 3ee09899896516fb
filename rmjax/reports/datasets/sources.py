"""Finds the ratings and the pairs of a data set, and the columns that are ratings."""

import re
from pathlib import Path

from rmjax.data.file_formats import SUFFIXES
from rmjax.data.readers import GENERATED, open_source
from rmjax.data.records import describe
from rmjax.errors import UserError

# Columns of numbers that are not ratings.
_NOT_RATINGS = ("id", "idx", "index", "row", "seed", "turn", "turns", "split", "fold")


def find_sources(source: str, split: str, ratings: str = "") -> tuple[str, str]:
    """The sources of ratings and of pairs; empty for none.

    Args:
      source: a directory in HelpSteer2's layout, which can hold both, or a source of one of them.
      split: `train` or `validation`.
      ratings: another source of ratings, for the pairs of `source`.

    Raises:
      UserError: there is nothing, or it holds something else.
    """
    rated = source if _kind(source, split, False) == "ratings" else ""
    paired = source if _kind(source, split, True) == "pairs" else ""
    if not (rated or paired):
        open_source(source, split)  # says what is wrong
        raise UserError(f"{source}: neither ratings nor pairs; name a file, or another --split")
    if ratings:
        if not paired:
            raise UserError(f"--ratings={ratings}: {source} holds no pairs to compare them with")
        rated = ratings
        if describe(rated, split, False)[0] != "ratings":
            raise UserError(f"--ratings={ratings}: there are pairs in it, not ratings")
    return rated, paired


def _kind(source: str, split: str, pairs: bool) -> str:
    """What a source holds where pairs, or ratings, are looked for; empty if there is nothing."""
    try:
        open_source(source, split, pairs)
    except UserError:
        return ""
    return describe(source, split, pairs)[0]


def find_attributes(source: str, split: str) -> tuple[str, ...]:
    """The columns that are ratings: those with numbers, without ids and the like.

    Raises:
      UserError: there is none.
    """
    names = tuple(
        name
        for name in describe(source, split, False)[1]
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
    for suffix in SUFFIXES[::-1]:
        last = last.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "data"
