"""Tokenized samples as they come, kept on the disk, and then ordered by their prompts.

Of a sample a few numbers are in memory, in arrays and not as objects; its tokens are not. So a
million samples take some hundred megabytes, however long they are.
"""

import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from rmjax.data.portion import Found
from rmjax.data.records import Entry
from rmjax.data.tokenized import shared_prefixes
from rmjax.runtime.cache import cache_errors

_BLOCK = 1 << 22  # tokens copied at once
_DIGEST = 16  # bytes that stand for a sample's tokens


class TokenFiles:
    """What is kept of a source's samples; a context, at whose end the disk is free again.

    Attributes:
      kept: entries: samples, or pairs of them.
      prompts: how many they have.
    """

    def __init__(self, directory: Path, columns: int):
        """Nothing is kept yet; what is goes to files without names in a directory."""
        self.kept, self._columns, self._paired = 0, columns, False
        self._prompts: dict[bytes, int] = {}  # by a digest of what is said in them
        self._pairs: Counter[bytes] = Counter()  # by digests of both samples' tokens
        self._lengths, self._numbers, self._rows = array("q"), array("i"), array("i")
        self._labels, self._strengths = array("f"), array("f")
        with cache_errors():
            directory.mkdir(parents=True, exist_ok=True)
            self._tokens = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
            self._spoken = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115

    def __enter__(self) -> "TokenFiles":
        """The files are open already."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Their space is given back."""
        self._tokens.close()
        self._spoken.close()

    @property
    def prompts(self) -> int:
        """How many different ones there are."""
        return len(self._prompts)

    def add(self, prompt: bytes, entry: Entry, found: list[Found]) -> None:
        """Keeps an entry.

        Args:
          prompt: a digest that is the same for all entries that belong together.
          entry: as it was read.
          found: each sample's tokens, and which of them the assistant says.
        """
        number = self._prompts.setdefault(prompt, len(self._prompts))
        self.kept += 1
        self._paired = len(entry) == 2
        for sample, (tokens, spoken) in zip(entry, found):
            self._lengths.append(len(tokens))
            self._numbers.append(number)
            self._rows.append(sample.row)
            self._strengths.append(sample.strength)
            self._labels.extend((np.nan,) * self._columns if self._paired else sample.labels)
            _append(self._tokens, tokens)
            if spoken is not None:
                _append(self._spoken, spoken)
        if self._paired:
            self._pairs[b"".join(_digest(tokens) for tokens, _ in found)] += 1

    def repetitions(self) -> dict[str, int]:
        """How many of the pairs that were kept repeat another one, or say its opposite."""
        repeated = self._pairs.total() - len(self._pairs)
        opposed = sum(
            count
            for pair, count in self._pairs.items()
            if pair[_DIGEST:] + pair[:_DIGEST] in self._pairs
        )
        counts = {"of these repeat another": repeated, "of these contradict another": opposed}
        return {reason: count for reason, count in counts.items() if count}

    def write(self, directory: Path) -> None:
        """Writes the arrays of `TokenizedData`, those of one prompt next to each other."""
        numbers, lengths = _numpy(self._numbers, np.int32), _numpy(self._lengths, np.int64)
        order = np.argsort(numbers, kind="stable")
        prompt_ids = numbers[order]
        begins = np.cumsum(lengths) - lengths
        tokens = _gathered(
            directory / "tokens.npy", _raw(self._tokens, np.int32), begins, lengths, order
        )
        offsets = np.cumsum(np.concatenate([[0], lengths[order]]), dtype=np.int64)
        spoken = _raw(self._spoken, np.bool_)
        if len(spoken):
            spoken = _gathered(directory / "spoken.npy", spoken, begins, lengths, order)
        hashes = np.frombuffer(b"".join(key[:8] for key in self._prompts), ">i8").astype(np.int64)
        samples = np.arange(len(order))
        arrays = {
            "offsets": offsets,
            "labels": _numpy(self._labels, np.float32).reshape(len(order), self._columns)[order],
            "prompt_ids": prompt_ids,
            "prompt_hashes": hashes[prompt_ids],
            "shared": shared_prefixes(
                _of(tokens, offsets), prompt_ids, _of(spoken, offsets) if len(spoken) else None
            ),
            "rows": _numpy(self._rows, np.int32)[order],
            "chosen": (samples % 2 == 0) & self._paired,
            "strengths": _numpy(self._strengths, np.float32)[order],
        }
        for name, values in arrays.items():
            with open(directory / f"{name}.npy", "wb") as file:
                _write_header(file, values)
                file.write(np.ascontiguousarray(values).tobytes())


def _append(file: IO[bytes], values: np.ndarray) -> None:
    try:
        file.write(values.tobytes())
    except OSError:
        with cache_errors():
            raise


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=_DIGEST).digest()


def _numpy(values: array, dtype: Any) -> np.ndarray:
    return np.frombuffer(values, dtype)


def _raw(file: IO[bytes], dtype: Any) -> np.ndarray:
    """What was written to a file, mapped."""
    with cache_errors():
        file.flush()
    size = file.tell()
    return np.asarray(np.memmap(file, dtype, "r")) if size else np.zeros(0, dtype)


def _gathered(
    path: Path, raw: np.ndarray, begins: np.ndarray, lengths: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """The samples of a file in another order, as an array in a file."""
    with open(path, "wb") as file:
        _write_header(file, raw)
        if np.array_equal(order, np.arange(len(order))):
            for at in range(0, len(raw), _BLOCK):
                file.write(raw[at : at + _BLOCK].tobytes())
        else:
            for begin, length in zip(begins[order].tolist(), lengths[order].tolist()):
                file.write(raw[begin : begin + length].tobytes())
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_header(file: IO[bytes], values: np.ndarray) -> None:
    """Of `np.save`, which says of a full disk only how many numbers were written."""
    header = np.lib.format.header_data_from_array_1_0(values)
    np.lib.format.write_array_header_1_0(file, header)


def _of(values: np.ndarray, offsets: np.ndarray) -> Callable[[int], np.ndarray]:
    return lambda sample: values[offsets[sample] : offsets[sample + 1]]
