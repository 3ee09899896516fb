"""One conversion, chunk by chunk: written, read back and compared, continued."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from rmjax.checkpoints.conversion.journal import Share, Unfinished, unfinished
from rmjax.checkpoints.conversion.parallel import for_each_slice
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.checkpoints.tensor_slices import TensorSlice
from rmjax.errors import UserError


class _Work(Protocol):
    """One direction: how a part is read, written and read back; the bytes are HF's each time."""

    @property
    def slices(self) -> Sequence[TensorSlice]: ...
    def read(self, part: TensorSlice) -> np.ndarray: ...
    def write(self, model: Path, part: TensorSlice, block: np.ndarray) -> None: ...
    def read_back(self, model: Path, part: TensorSlice) -> np.ndarray: ...
    def complete(self, model: Path) -> None: ...


def convert_slices(
    work: _Work,
    sources: Sequence[Pretrained],
    dst: str,
    plan: dict[str, Any],
    prepare: Callable[[Path, Path], None],
    share: Share,
) -> list[str]:
    """Converts this process's share of the slices; returns what there is to say.

    Args:
      work: how a part is read, written and read back.
      sources: what it reads; a conversion of files that changed since is not continued.
      dst: directory to make; must not exist or be empty.
      plan: with `command`, what else must be the same for a conversion to be continued.
      prepare: see `unfinished.unfinished`.
      share: this process's.

    Raises:
      UserError: see `unfinished.unfinished`; or what was written is not what is read back.
    """
    _check_apart(sources, dst)
    plan |= {
        "files of the source": "-".join(source.state() for source in sources),
        "slices": xxhash.xxh3_64_hexdigest(repr(work.slices).encode()),
    }
    mine, notes = work.slices[share.process :: share.processes], []
    with unfinished(dst, plan, prepare, share) as under_way:
        if under_way.dropped:
            other = ", ".join(under_way.dropped)
            notes.append(f"begun anew: the unfinished conversion had other {other}")
        records = under_way.records()
        if done := sum(part.nbytes for part in mine if part.number in records):
            notes.append(f"continued: {done / 1e9:.3f} GB were converted already")

        def copy(part: TensorSlice) -> None:
            block = work.read(part)
            checksum = _checksum(block)
            work.write(under_way.model, part, block)
            under_way.record(part.number, checksum)

        for_each_slice([p for p in mine if p.number not in records], copy, plan["command"])
        records = under_way.records()
        written = [p for p in mine if not records[p.number].verified]
        for_each_slice(
            written, lambda p: _verify(work, under_way, p, records[p.number].checksum), "verifying"
        )
        if not under_way.finish(len(work.slices), work.complete):
            left = len(work.slices) - sum(r.verified for r in under_way.records().values())
            return [
                *notes,
                f"share {share.process} of {share.processes} is done; {left} slices of "
                "the model are left to other processes",
            ]
    return [*notes, f"verified: {len({part.key for part in work.slices})} tensors"]


def _verify(work: _Work, under_way: Unfinished, part: TensorSlice, checksum: str) -> None:
    """Reads a written part back and compares it with what the source gave."""
    why = "its bytes are not those that the source gave"
    try:
        if _checksum(work.read_back(under_way.model, part)) == checksum:
            under_way.record(part.number, checksum, verified=True)
            return
    except UserError as error:
        why = str(error)
    under_way.record(part.number, None)  # so that the next run writes it again
    raise UserError(
        f"tensor {part.key!r} read back from {under_way.model} is not what was written ({why}): "
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
