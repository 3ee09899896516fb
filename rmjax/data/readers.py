"""The rows of a data source: local files, the Hugging Face hub, or generated ones.

Which rows are of the wanted split is decided from what all of them say, before the first one is
handed out: a file may name one split or five, and the rows of another one may come last. So rows
are read twice, which takes little beside making tokens of them.

datasets takes seconds to import and most sources do not need it: it is imported where it is used.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rmjax.data.directories import find_files
from rmjax.data.file_formats import SUFFIXES, arrow_rows, read_file, suffix_of
from rmjax.data.generated import generate
from rmjax.data.splits import (
    Choice,
    SplitNames,
    Wanted,
    choose,
    find_place,
    split_of,
    standard_name,
)
from rmjax.errors import UserError

GENERATED = "generated:"


class Row(NamedTuple):
    """A row of a split.

    Attributes:
      where: "FILE row 3", for messages; the row is counted in the file.
      number: in the whole source, from 1; rows of other splits count.
      fields: as they are written.
    """

    where: str
    number: int
    fields: dict[str, Any]


class Part(NamedTuple):
    """A file of a source, or all there is of another kind of source.

    Attributes:
      name: what messages call it.
      rows: gives all its rows, as often as it is called.
      digest: gives what changes with its bytes.
    """

    name: str
    rows: Callable[[], Iterator[dict[str, Any]]]
    digest: Callable[[], str]


@dataclasses.dataclass
class Source:
    """The rows of one split of a source, which can be iterated as often as wanted.

    Attributes:
      name: what messages call it: the file, the directory and the split, or the hub id and the
        split.
      skipped: how many rows were left out, by reason; of the last iteration.
      parts: where the rows stand, in order.
      wanted: the split.
      address: what a split is named behind, as ADDRESS:NAME.
    """

    name: str
    parts: Sequence[Part]
    wanted: Wanted
    address: str
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)

    def __iter__(self) -> Iterator[Row]:
        """The rows of the split.

        Raises:
          UserError: a file cannot be read, there is no row of the split, or it cannot be told
            which rows are; naming file and row.
        """
        choice = self._choice
        self.skipped.clear()
        for row in self._all_rows():
            name = split_of(row.fields, choice.column) if choice else ""
            if choice is None or name in choice.names:
                yield row
            else:
                self.skipped[f"of another split ({name or 'none named'})"] += 1

    @property
    def whole(self) -> bool:
        """Whether the rows are the same whatever split is asked for.

        A file without a column of splits is. The rows are read for it, once.

        Raises:
          UserError: as iterating does.
        """
        return self._choice is None and not self.wanted.found

    def fingerprint(self) -> str:
        """Changes when the bytes behind the source change, or the split does.

        Raises:
          UserError: a file cannot be read.
        """
        parts = [
            repr((self.wanted.name, self.wanted.found)),
            *(part.digest() for part in self.parts),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _all_rows(self) -> Iterator[Row]:
        count = 0
        for part in self.parts:
            for number, fields in enumerate(part.rows(), start=1):
                count += 1
                yield Row(f"{part.name} row {number}", count, fields)

    @functools.cached_property
    def _choice(self) -> Choice | None:
        seen, count = SplitNames(), 0
        for row in self._all_rows():
            seen.add(row.fields, row.where)
            count = row.number
        if not count:
            raise UserError(f"{self.name}: there is no row in it")
        return choose(seen, self.wanted, self.address)


def open_source(source: str, split: str, pairs: bool | None = None) -> Source:
    """The rows of one split of a source.

    Args:
      source: one of
        - a file with one of `SUFFIXES`;
        - a directory with files `<split>` of these kinds, in one piece or in shards as
          `train-00000-of-00003.parquet`, in it or in its `data`; or with one file `preference`
          whose rows name their split; or what `save_to_disk` of datasets wrote;
        - a hub id, `owner/name`, or with one of its directories, `owner/name/directory`;
        - `generated:COUNT`: ratings that follow from the text;
        and behind all but the last perhaps `:NAME`, the split to take instead of `split`.
      split: `train`, `validation`, `test`, or another that the source has; empty for all rows,
        whatever split they name.
      pairs: whether pairs are wanted, or ratings: a directory in HelpSteer2's layout can hold both.
        None for the ones that are there.

    Raises:
      UserError: there is no such source, or not this split of it.
    """
    if source.startswith(GENERATED):
        return _generated(source, split)
    address, name = _divided(source)
    wanted = Wanted(name or split, named=bool(name))
    path = Path(address).expanduser()
    if path.is_dir():
        files, wanted = find_files(path, wanted, pairs)
        said = str(files[0]) if len(files) == 1 else f"{path} {wanted.name}".rstrip()
        return Source(said, [*map(_file_part, files)], wanted, str(path))
    if path.is_file():
        if not suffix_of(path):
            raise UserError(f"{path}: unknown kind of file; supported: {', '.join(SUFFIXES)}")
        return Source(str(path), [_file_part(path)], wanted, str(path))
    if address.startswith((".", "/", "~")) or suffix_of(path) or address.count("/") not in (1, 2):
        raise UserError(f"{address}: there is no such file or directory")
    return _from_hub(address, wanted)


def _divided(source: str) -> tuple[str, str]:
    """A source and the split that it names itself; empty if it names none."""
    address, _, name = source.rpartition(":")
    if not (address and name) or "/" in name or Path(source).expanduser().exists():
        return source, ""
    return address, name


def _file_part(path: Path) -> Part:
    def digest() -> str:
        try:
            with open(path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error

    return Part(str(path), functools.partial(read_file, path), digest)


def _from_hub(address: str, wanted: Wanted) -> Source:
    import datasets

    datasets.disable_progress_bars()
    owner, name, *directory = address.split("/")
    data_dir = directory[0] if directory else None
    try:
        # All splits: that is what datasets downloads anyway, and only their names say what is what.
        splits = datasets.load_dataset(f"{owner}/{name}", data_dir=data_dir)
    except Exception as error:  # no network, no such data set: datasets says which
        raise UserError(
            f"{address}: not a local path, and the hub does not give it ({error})"
        ) from error
    tables = {str(name): split.data for name, split in splits.items()}
    place, wanted = find_place(wanted, {name: name for name in tables}, address)
    table = tables[place]

    def digest() -> str:
        digest = hashlib.sha256(f"{address} {place}".encode())
        for batch in table.to_batches():
            digest.update(batch.serialize())
        return digest.hexdigest()

    said = f"{address} {place}"
    return Source(
        said, [Part(said, lambda: arrow_rows(table.to_batches()), digest)], wanted, address
    )


def _generated(source: str, split: str) -> Source:
    count = source.removeprefix(GENERATED)
    if not count.isdecimal() or int(count) < 2:
        raise UserError(f"{source}: expected generated:COUNT with COUNT at least 2")
    split = standard_name(split) or split
    said = f"{source} {split}"
    part = Part(said, lambda: generate(int(count), split), lambda: said)
    return Source(said, [part], Wanted(split, found=True), source)
