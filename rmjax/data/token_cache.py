"""The cache's entries of tokenized data: written whole, and looked at before they are believed."""

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rmjax.data.token_files import TokenFiles
from rmjax.data.tokenized import TokenizedData
from rmjax.errors import UserError
from rmjax.runtime.files import read_json, remove_abandoned

_SUMMARY = "summary.json"
_BLOCK = 1 << 24  # bytes of a file that are read at once
_CHECKSUM = "checksum"  # a field of the summary
_PER_TOKEN = ("tokens", "spoken")


def is_whole(entry: Path) -> bool:
    """Whether the cache has this; what is damaged there is removed, and a warning says so.

    Every byte is read, once a run: a flipped bit would be another token, in every epoch.
    """
    if not (entry / _SUMMARY).exists():
        return False
    if _is_strange(entry):
        return True  # which `read_entry` refuses
    try:
        summary = json.loads((entry / _SUMMARY).read_text())
        if summary == with_checksum(entry, summary):
            return True
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    warnings.warn(f"{entry}: damaged, or of another version; it is made again", stacklevel=2)
    shutil.rmtree(entry, ignore_errors=True)
    return False


def _is_strange(entry: Path) -> bool:
    """Whether it is a link, or something else than files is there: a link, a pipe."""
    links = entry.is_symlink() or any(path.is_symlink() for path in entry.iterdir())
    return links or not all(path.is_file() for path in entry.iterdir())


def with_checksum(entry: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """A summary with the checksum of itself and of an entry's arrays."""
    rest = {name: value for name, value in summary.items() if name != _CHECKSUM}
    found = xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode())
    for file in sorted(entry.glob("*.npy")):
        found.update(file.name.encode())
        with open(file, "rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                found.update(block)
    return rest | {_CHECKSUM: found.hexdigest()}


def write_entry(entry: Path, files: TokenFiles, summary: dict[str, Any]) -> None:
    """Writes an entry, which has its name when it is whole."""
    remove_abandoned(entry.parent)
    # Not named by the process: its number may be the same on another host with the same disk.
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    try:
        files.write(partial)
        (partial / _SUMMARY).write_text(json.dumps(with_checksum(partial, summary)))
        partial.rename(entry)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Another process may have been first with the same result.
        if not (isinstance(error, OSError) and (entry / _SUMMARY).exists()):
            raise


def read_entry(entry: Path, attributes: tuple[str, ...], source: str, key: str) -> TokenizedData:
    """The data of an entry.

    Raises:
      UserError: it is not what `write_entry` writes.
    """
    try:
        if _is_strange(entry):
            raise ValueError("a link, or something else than a file")
        arrays = {
            file.stem: np.load(file, mmap_mode="r", allow_pickle=False)
            for file in entry.glob("*.npy")
        }
        # Tokens stay on the disk, and are read where they are needed.
        kept = {name: arrays.pop(name) for name in _PER_TOKEN if name in arrays}
        small: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
        summary = read_json(entry / _SUMMARY)
        data = TokenizedData(
            attributes=attributes,
            source=source,
            key=key,
            **kept,
            **small,
            counts={str(reason): int(count) for reason, count in summary["counts"].items()},
            notes=tuple(map(str, summary["notes"])),
        )
        _check(data)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{entry}: not what this program keeps there ({error}); delete it, and it is made again"
        ) from error
    return data


def _check(data: TokenizedData) -> None:
    """Raises a `ValueError` unless arrays from the disk are of one data set.

    What would lead a reader elsewhere is found; other numbers than were written are not.
    """
    count = len(data.prompt_ids)
    shapes = {
        "tokens": (np.int32, data.tokens.shape[:1]),
        "offsets": (np.int64, (count + 1,)),
        "labels": (np.float32, (count, len(data.attributes))),
        "prompt_ids": (np.int32, (count,)),
        "prompt_hashes": (np.int64, (count,)),
        "shared": (np.int32, (count,)),
        "rows": (np.int32, (count,)),
        "chosen": (np.bool_, (count,)),
        "strengths": (np.float32, (count,)),
    }
    if data.spoken is not None:
        shapes["spoken"] = (np.bool_, data.tokens.shape[:1])
    for name, (dtype, shape) in shapes.items():
        array = getattr(data, name)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    followed = data.chosen[:-1] & data.chosen[1:]
    if (
        not count
        or data.offsets[0] != 0
        or data.prompt_ids[0] != 0
        or data.offsets[-1] != len(data.tokens)
        or (data.lengths < 1).any()
        or (np.diff(data.prompt_ids, prepend=-1) // 2 != 0).any()
        or ((data.shared < 0) | (data.shared >= data.lengths)).any()
        or data.chosen[-1]
        or followed.any()
        or np.isinf(data.labels).any()
    ):
        raise ValueError("its numbers do not fit each other")
