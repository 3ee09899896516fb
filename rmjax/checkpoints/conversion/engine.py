"""One conversion, chunk by chunk: written, read back and compared, continued."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from rmjax.checkpoints.chunks import Piece
from rmjax.checkpoints.conversion.journal import Share, Unfinished, unfinished
from rmjax.checkpoints.conversion.parallel import for_each_piece
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.errors import UserError


class _Work(Protocol):
    """One direction: how a piece is read, written and read back; the bytes are HF's each time."""

    @property
    def pieces(self) -> Sequence[Piece]: ...
    def read(self, piece: Piece) -> np.ndarray: ...
    def write(self, model: Path, piece: Piece, block: np.ndarray) -> None: ...
    def read_back(self, model: Path, piece: Piece) -> np.ndarray: ...
    def complete(self, model: Path) -> None: ...


def convert_pieces(
    work: _Work,
    sources: Sequence[Pretrained],
    dst: str,
    plan: dict[str, Any],
    prepare: Callable[[Path, Path], None],
    share: Share,
) -> list[str]:
    """Converts this process's share of the pieces; returns what there is to say.

    Args:
      work: how a piece is read, written and read back.
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
        "pieces": xxhash.xxh3_64_hexdigest(repr(work.pieces).encode()),
    }
    mine, notes = work.pieces[share.process :: share.processes], []
    with unfinished(dst, plan, prepare, share) as under_way:
        if under_way.dropped:
            other = ", ".join(under_way.dropped)
            notes.append(f"begun anew: the unfinished conversion had other {other}")
        records = under_way.records()
        if done := sum(piece.nbytes for piece in mine if piece.number in records):
            notes.append(f"continued: {done / 1e9:.3f} GB were converted already")

        def copy(piece: Piece) -> None:
            block = work.read(piece)
            checksum = _checksum(block)
            work.write(under_way.model, piece, block)
            under_way.record(piece.number, checksum)

        for_each_piece([p for p in mine if p.number not in records], copy, plan["command"])
        records = under_way.records()
        written = [p for p in mine if not records[p.number].verified]
        for_each_piece(
            written, lambda p: _verify(work, under_way, p, records[p.number].checksum), "verifying"
        )
        if not under_way.finish(len(work.pieces), work.complete):
            left = len(work.pieces) - sum(r.verified for r in under_way.records().values())
            return [
                *notes,
                f"share {share.process} of {share.processes} is done; {left} pieces of "
                "the model are left to other processes",
            ]
    return [*notes, f"verified: {len({piece.key for piece in work.pieces})} tensors"]


def _verify(work: _Work, under_way: Unfinished, piece: Piece, checksum: str) -> None:
    """Reads a written piece back and compares it with what the source gave."""
    why = "its bytes are not those that the source gave"
    try:
        if _checksum(work.read_back(under_way.model, piece)) == checksum:
            under_way.record(piece.number, checksum, verified=True)
            return
    except UserError as error:
        why = str(error)
    under_way.record(piece.number, None)  # so that the next run writes it again
    raise UserError(
        f"tensor {piece.key!r} read back from {under_way.model} is not what was written ({why}): "
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
