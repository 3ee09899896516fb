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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from rmjax.errors import UserError, shortened

GENERATED = "generated:"
_REASONS = 8  # a file may name a thousand other splits, and each is a line at the start of a run


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
        others: Counter[str] = Counter()
        for row in self._all_rows():
            name = split_of(row.fields, choice.column) if choice else ""
            if choice is None or name in choice.names:
                yield row
            else:
                others[name] += 1
        named = others if len(others) <= _REASONS else dict(others.most_common(_REASONS - 1))
        for name, count in named.items():
            self.skipped[f"of another split ({shortened(name) or 'none named'})"] += count
        if more := len(others) - len(named):
            self.skipped[f"of {more:,} more splits"] = others.total() - sum(named.values())

    @property
    def split_columns(self) -> tuple[str, ...]:
        """The column that said which rows are of the split; none if no column did.

        Raises:
          UserError: as iterating does.
        """
        return (self._choice.column,) if self._choice else ()

    def fingerprint(self) -> str:
        """Changes with all that decides which rows there are: the bytes, and what is asked for.

        Two ways to ask for the same rows may differ in it. Which rows they are would take reading
        them all, and the tokens of rows that have this fingerprint are there without.

        Raises:
          UserError: a file cannot be read.
        """
        parts = [repr(dataclasses.astuple(self.wanted)), *(part.digest() for part in self.parts)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _all_rows(self) -> Iterator[Row]:
        count = 0
        for part in self.parts:
            for number, fields in enumerate(part.rows(), start=1):
                count += 1
                yield Row(f"{part.name} row {number}", count, fields)

    def decide(self, watched: Callable[[Iterator[Row]], Iterator[Row]]) -> None:
        """Finds out which rows are of the split, which takes reading all of them.

        Args:
          watched: gives the rows on, and shows how many there were.

        Raises:
          UserError: as iterating does.
        """
        self.__dict__["_choice"] = self._chosen(watched(self._all_rows()))

    @functools.cached_property
    def _choice(self) -> Choice | None:
        return self._chosen(self._all_rows())

    def _chosen(self, rows: Iterable[Row]) -> Choice | None:
        seen, count = SplitNames(), 0
        for row in rows:
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
        and behind it perhaps `:NAME`, the split to take instead of `split`.
      split: `train`, `validation`, `test`, or another that the source has; empty for all rows,
        whatever split they name.
      pairs: whether pairs are wanted, or ratings: a directory in HelpSteer2's layout can hold both.
        None for the ones that are there.

    Raises:
      UserError: there is no such source, or not this split of it.
    """
    if source.startswith(GENERATED):
        return _generated(source, split)
    if not source:
        raise UserError("the source of data is empty: give a file, a directory or a hub id")
    path, address, name = divide_source(source)
    wanted = Wanted(name or split, named=bool(name))
    if path is None:
        names = map(suffix_of, map(Path, (address, source)))
        if address.startswith((".", "/", "~")) or any(names) or address.count("/") not in (1, 2):
            raise UserError(f"{source}: there is no such file or directory")
        return _from_hub(address, wanted)
    if path.is_dir():
        files, wanted = find_files(path, wanted, pairs)
        said = str(files[0]) if len(files) == 1 else f"{path} {wanted.name}".rstrip()
        return Source(said, [*map(_file_part, files)], wanted, str(path))
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a directory; rows are read more than once")
    if not suffix_of(path):
        raise UserError(f"{path}: unknown kind of file; supported: {', '.join(SUFFIXES)}")
    return Source(str(path), [_file_part(path)], wanted, str(path))


def divide_source(source: str) -> tuple[Path | None, str, str]:
    """The path of a local source, its address, and the split that it names; empty for none.

    Paths and names of splits may both have colons: the longest path that is there is taken. A hub
    id has none.
    """
    if path := find_path(source):
        return path, source, ""
    for end in reversed([place for place, letter in enumerate(source) if letter == ":"]):
        address, name = source[:end], source[end + 1 :]
        if name and (path := find_path(address)):
            return path, address, name
    address, _, name = source.partition(":")
    return (None, address, name) if name else (None, source, "")


def find_path(address: str) -> Path | None:
    """The local file or directory of this name; None if there is none.

    Raises:
      UserError: nobody may look.
    """
    try:
        path = Path(address).expanduser()
        path.stat()
    except PermissionError as error:
        raise UserError(f"{address}: cannot be read ({error})") from error
    except (OSError, RuntimeError, ValueError):  # also no such user, or no name for a file
        return None
    return path if address else None


def _file_part(path: Path) -> Part:
    def digest() -> str:
        try:
            with open(path, "rb") as stream:
                # The suffix says how the bytes are read.
                return suffix_of(path) + hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error

    return Part(str(path), functools.partial(read_file, path), digest)


def _from_hub(address: str, wanted: Wanted) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{address}: not a local path, and the hub's are read by `pip install datasets`"
        ) from error
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
        digest.update(table.schema.serialize())  # a batch has values, but not its columns' names
        for batch in table.to_batches():
            digest.update(batch.serialize())
        return digest.hexdigest()

    said = f"{address} {place}"
    part = Part(said, lambda: arrow_rows(table.to_batches(), said), digest)
    return Source(said, [part], wanted, address)


def _generated(source: str, split: str) -> Source:
    count, _, named = source.removeprefix(GENERATED).partition(":")
    if not count.isdecimal() or int(count) < 2:
        raise UserError(f"{source}: expected generated:COUNT with COUNT at least 2")
    split = standard_name(named or split) or named or split
    said = f"{GENERATED}{count} {split}"
    part = Part(said, lambda: generate(int(count), split), lambda: said)
    return Source(said, [part], Wanted(split, found=True), source)
