"""Which files of a directory are a split."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.file_formats import SUFFIXES, suffix_of
from rmjax.data.splits import Wanted, find_place, find_split, standard_name
from rmjax.errors import UserError, listed
from rmjax.runtime.json_object import unique_keys

PREFERENCE = "preference"  # HelpSteer2's pairs of both splits; its rows name their split
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?")
# What datasets writes beside data.
_METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
_STATE = "state.json"
_LIKE_DATA = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather)\b", re.IGNORECASE)

# By split, the files that hold it, in order. Several lists are several answers.
Files = list[Path]
Groups = Mapping[str, Sequence[Files]]


def find_files(directory: Path, wanted: Wanted, pairs: bool | None) -> tuple[Files, Wanted]:
    """The files that hold a split, in the order of the rows, and what their names say of it.

    Args:
      directory: see `open_source`.
      wanted: the split.
      pairs: whether pairs are wanted, or ratings; None for what there is.

    Raises:
      UserError: there are none, or several.
    """
    if (directory / _STATE).is_file():  # a single Dataset
        # It may call itself "train" although it is another split: what train_test_split makes does.
        return _listed_files(directory), wanted
    groups = _groups(directory)
    if not groups:
        there = [f"{path.name}{'/' * path.is_dir()}" for path in _visible(directory)]
        raise UserError(
            f"{directory}: there is no file of data in it ({', '.join(SUFFIXES)}); there is "
            f"{listed(there) or 'nothing'}"
        )
    places = {name: _described(directory, name, files) for name, (files, *_) in groups.items()}
    if PREFERENCE in groups:
        found = find_split(wanted.name, groups)
        if pairs is False:
            if len(groups) == 1:
                raise UserError(f"{directory}: there are no ratings, only {places[PREFERENCE]}")
            del places[PREFERENCE]
        elif not (found and wanted.named and not standard_name(wanted.name)):
            if found and pairs is None:
                names = f"{places[found[0]]} and {places[PREFERENCE]}"
                raise UserError(f"{directory}: {names} are both there; name one of the files")
            return _only(directory, PREFERENCE, groups), wanted
    if not find_split(wanted.name, places):
        _check_unread(directory, wanted.name)
    name, wanted = find_place(wanted, places, str(directory))
    return _only(directory, name, groups), wanted


def _only(directory: Path, name: str, groups: Groups) -> Files:
    if len(groups[name]) > 1:
        files = " and ".join(_described(directory, name, files) for files in groups[name])
        raise UserError(f"{directory}: {files} are both there; name a file, or keep one of them")
    return _complete(groups[name][0])


def _described(directory: Path, name: str, files: Files) -> str:
    """A split's files in a message."""
    first = str(files[0].relative_to(directory))
    return f"{name} ({first})" if len(files) == 1 else f"{name} ({first} and others)"


def _groups(directory: Path) -> Groups:
    """The files of each split."""
    saved = directory / "dataset_dict.json"
    if saved.is_file():
        return {name: [_listed_files(directory / name)] for name in _field(saved, "splits")}
    paths = _data_files(directory) + _data_files(directory / "data")
    if not any(_split_of(path) == PREFERENCE for path in paths):  # as in a clone of HelpSteer2
        inner = _data_files(directory / PREFERENCE)
        paths += [path for path in inner if _split_of(path) == PREFERENCE]
    groups: dict[str, dict[tuple[Path, str, str], Files]] = {}
    for path in paths:
        shard = _SHARD.fullmatch(_stem(path))
        suffix = path.name.removeprefix(_stem(path))  # as it is written
        group = (path.parent, shard["total"] if shard else "", suffix)
        groups.setdefault(_split_of(path), {}).setdefault(group, []).append(path)
    return {name: [*alternatives.values()] for name, alternatives in groups.items()}


def _data_files(directory: Path) -> Files:
    return [path for path in _visible(directory) if suffix_of(path) and path.is_file()]


def _visible(directory: Path) -> Files:
    """What is in a directory and may be data."""
    try:
        paths = sorted(directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error})") from error
    return [p for p in paths if p.name not in _METADATA and not p.name.startswith((".", "_"))]


def _check_unread(directory: Path, split: str) -> None:
    """Raises a `UserError` if there is a file of a split, such as `train.tsv`, that is not read.

    The split is then not missing, and is not searched for among the rows of another one.
    """
    for path in _visible(directory) + _visible(directory / "data"):
        stem = path.name.partition(".")[0]
        shard = _SHARD.fullmatch(stem)
        named = find_split(split, [shard["split"] if shard else stem])
        if named and _LIKE_DATA.search(path.name) and not suffix_of(path):
            raise UserError(
                f"{directory}: there is no split {split!r} in the kinds of files that are read "
                f"({', '.join(SUFFIXES)}); there is {path.relative_to(directory)}"
            )


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(suffix_of(path))]


def _split_of(path: Path) -> str:
    shard = _SHARD.fullmatch(_stem(path))
    return shard["split"] if shard else _stem(path)


def _complete(files: Files) -> Files:
    """The shards of a split in order, or its one file.

    Raises:
      UserError: one is missing, or there twice.
    """
    shards = [_SHARD.fullmatch(_stem(path)) for path in files]
    by_number: dict[int, Path] = {}
    for path, shard in zip(files, shards):
        if shard is None:
            return files
        other = by_number.setdefault(int(shard["number"]), path)
        if other is not path:
            raise UserError(f"{other} and {path.name} are the same shard; keep one of them")
    total = shards[0]["total"] if shards[0] else ""
    first = 0 if 0 in by_number or int(total) not in by_number else 1  # some count from one
    expected = range(first, first + int(total))
    missing = [number for number in expected if number not in by_number]
    if missing or len(by_number) > len(expected):
        width = len(shards[0]["number"]) if shards[0] else 0
        names = [f"{_split_of(files[0])}-{number:0{width}}-of-{total}" for number in missing]
        raise UserError(
            f"{files[0].parent}: of {total} shards there are {len(files)}; "
            f"missing: {listed(names) or 'none'}"
        )
    return [by_number[number] for number in expected]


def _listed_files(directory: Path) -> Files:
    """The Arrow files of a Dataset that `save_to_disk` wrote."""
    state = directory / _STATE
    try:
        files = [directory / entry["filename"] for entry in _field(state, "_data_files")]
    except (TypeError, KeyError) as error:
        raise UserError(f"{state}: cannot be read ({error!r})") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{state}: lists {listed(missing)}, which is not there")
    return files


def _field(path: Path, name: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique_keys)[name]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error!r})") from error
