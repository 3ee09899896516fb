"""The loop of every conversion: slices are copied, read back and compared, and continued."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from rmjax.checkpoints.conversion.journal import Journal, open_journal
from rmjax.checkpoints.conversion.parallel import for_each_slice
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.checkpoints.tensor_slices import TensorSlice
from rmjax.errors import UserError

# Bits that are all set where a number is not finite.
_EXPONENTS = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


class _Work(Protocol):
    """One direction: how a slice is read, written and read back; each time in HF's bytes."""

    @property
    def slices(self) -> Sequence[TensorSlice]: ...
    def prepare(self, files: Path, model: Path) -> None: ...
    def read(self, part: TensorSlice) -> np.ndarray: ...
    def write(self, model: Path, part: TensorSlice, block: np.ndarray) -> None: ...
    def read_back(self, model: Path, part: TensorSlice) -> np.ndarray: ...
    def complete(self, model: Path) -> None: ...


def convert_slices(
    work: _Work,
    sources: Sequence[Pretrained],
    dst: str,
    plan: dict[str, Any],
    write_files: Callable[[Path], None],
) -> list[str]:
    """Converts all slices; returns lines to print about it.

    Args:
      work: how a slice is read, written and read back.
      sources: what it reads; a conversion of files that changed since is not continued.
      dst: directory to make; must not exist or be empty.
      plan: with `command`, what else must be the same for a conversion to be continued.
      write_files: writes the model's other files into a directory.

    Raises:
      UserError: see `journal.open_journal`; or what was written is not what is read back.
    """
    _check_apart(sources, dst)
    plan |= {
        "files of the source": "-".join(source.state() for source in sources),
        "slices": xxhash.xxh3_64_hexdigest(repr(work.slices).encode()),
    }
    notes = []

    def prepare(files: Path, model: Path) -> None:
        # First, so that a tokenizer that cannot be exported is noticed before weights are copied.
        write_files(files)
        work.prepare(files, model)

    with open_journal(dst, plan, prepare) as journal:
        if journal.replaced:
            other = ", ".join(journal.replaced)
            notes.append(f"begun anew: the unfinished conversion had other {other}")
        missing = [part for part in work.slices if part.number not in journal.records]
        if done := sum(part.nbytes for part in work.slices if part.number in journal.records):
            notes.append(f"continued: {done / 1e9:.3f} GB were converted already")

        def copy(part: TensorSlice) -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # which the next line tells
                block = work.read(part)
            _check_finite(part, block)
            checksum = _checksum(block)
            work.write(journal.model, part, block)
            journal.record(part.number, checksum)

        for_each_slice(missing, copy, plan["command"])
        written = [part for part in work.slices if not journal.records[part.number].verified]
        for_each_slice(written, lambda part: _verify(work, journal, part), "verifying")
        journal.finish(work.complete)
    return [*notes, f"verified: {len({part.key for part in work.slices})} tensors"]


def _check_finite(part: TensorSlice, block: np.ndarray) -> None:
    """Raises a `UserError` if a weight is NaN or infinite: a model of it says nothing."""
    kind, exponent = _EXPONENTS.get(block.dtype.name, (None, 0))
    if kind:  # many times as fast as the function
        bad = int(np.count_nonzero((block.view(kind) & exponent) == exponent))
    else:
        bad = block.size - int(np.isfinite(block).sum())
    if bad:
        raise UserError(
            f"tensor {part.key!r}: {bad:,} of {block.size:,} weights are not finite in "
            f"{block.dtype}: the source is damaged, or the dtype is too small for it"
        )


def _verify(work: _Work, journal: Journal, part: TensorSlice) -> None:
    """Reads a written slice back and compares it with what the source gave."""
    checksum = journal.records[part.number].checksum
    why = "its bytes are not those that the source gave"
    try:
        if _checksum(work.read_back(journal.model, part)) == checksum:
            journal.record(part.number, checksum, verified=True)
            return
    except UserError as error:
        why = str(error)
    journal.record(part.number, None)  # so that the next run writes it again
    raise UserError(
        f"tensor {part.key!r} read back from {journal.model} is not what was written ({why}): "
        "suspect the disk or the memory"
    )


def _checksum(block: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def _check_apart(sources: Sequence[Pretrained], dst: str) -> None:
    """Raises a `UserError` if the target would be written into a source."""
    target = Path(dst).expanduser().resolve()
    for source in sources:
        for place in (source.files, source.weights):
            if isinstance(place, Path) and place.resolve() in target.parents:
                raise UserError(f"{target}: inside of the source {place}; choose another target")
