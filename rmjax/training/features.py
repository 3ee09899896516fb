"""What a model computes of every sample, once, and kept on disk: features, log-probabilities.

A cache's entry is a directory of parts, each the values of a few micro-batches and put there
whole, so an extraction that was killed goes on where it was.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from jaxtyping import Float32
from rich.console import Console

from rmjax.checkpoints.pretrained import Pretrained
from rmjax.data.batch import Batch
from rmjax.data.batches import Batches
from rmjax.errors import UserError
from rmjax.models.decoder_config import NO_LORA
from rmjax.models.model import Model
from rmjax.runtime.cache import cache_directory, cache_errors
from rmjax.runtime.files import remove_abandoned, replace_file

# From batches of one micro-batch to each one's samples and their values, in the order of its slots.
Compute = Callable[[Iterable[Batch]], Iterator[tuple[np.ndarray, np.ndarray]]]
_VERSION = 1  # of this module's result; part of the cache's key
_PART = 16  # micro-batches of a part
_CHUNK_BYTES = 16 << 20  # read at once for a fingerprint
_THREADS = 4
_CHECKSUM_BYTES = 16  # XXH3 of a part's other bytes, behind them


def fingerprint_weights(source: Pretrained) -> str:
    """Of every byte of a model's weights: a name, a size and a date would not say enough."""
    if isinstance(source.weights, Path):
        root = source.weights / "params"
        files = {str(f.relative_to(root)): f for f in root.rglob("*") if f.is_file()}
    else:
        files = {file.name: file for file in source.weights.files()}
    names = sorted(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_fingerprint_file, [files[name] for name in names])
        return xxhash.xxh3_128_hexdigest(json.dumps(list(zip(names, digests))).encode())


def _fingerprint_file(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def describe_model(model: Model, weights: str, source: Pretrained | None) -> dict[str, Any]:
    """What the decoder computes of given rows depends on, in JSON's types.

    Args:
      model: what computes them.
      weights: their fingerprint.
      source: of the weights, if they are not new.
    """
    options = model.options
    device = jax.devices()[0]
    return {
        "version": _VERSION,
        "weights": weights,
        "adapters": repr(source.lora if source else NO_LORA),
        "architecture": repr(model.config),
        "dtype": options.dtype.name,
        # None of these changes more than how numbers are rounded.
        "attention": options.attention,
        "mesh": dict(options.sharding.mesh.shape),
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
    }


def cached_values(
    what: str,
    batches: Batches,
    made_by: dict[str, Any],
    width: int,
    load: Callable[[], Compute],
    console: Console,
) -> Float32[np.ndarray, "N D"]:
    """Values of every sample of `batches`, in the data's order, from the cache if it can.

    Args:
      what: they are, one word; the cache is a directory of that name in that of `runtime.cache`.
      batches: from `data.batches.evaluation_batches`, which hold each sample once.
      made_by: what computes them, see `describe_model`; the data and their rows are added to it.
      width: how many values a sample has.
      load: gives the function that computes them; not called if nothing is missing.
      console: to say on how far it is.

    Raises:
      UserError: a value is not finite, or the cache cannot be written.
    """
    data, shape = batches.data, batches.shape
    made_by = made_by | {"data": data.key, "rows": repr(shape), "share": batches.share}
    layout = xxhash.xxh3_128()  # which sample is where
    for step in range(len(batches)):
        layout.update(f"{step}".encode() + batches.computed(step).astype(np.int64).tobytes())
    made_by |= {"layout": layout.hexdigest()}
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache_directory(what) / key
    values = np.empty((len(data), width), np.float32)
    compute: Compute | None = None
    for number, start in enumerate(range(0, len(batches), _PART)):
        steps = range(start, min(start + _PART, len(batches)))
        samples = np.concatenate([batches.computed(step) for step in steps])
        file = entry / f"{number:05d}.npy"
        part = _read(file, (len(samples), width))
        if not _everywhere(part is not None) or part is None:
            compute = compute or load()
            part = _compute(compute, batches, steps)
            _check_finite(what, part, samples, batches)
            _write(file, part, made_by)
            console.print(f"{what:<11} {data.source}: {steps.stop} of {len(batches)} micro-batches")
        values[samples] = part
    return values[data.computed_as]


def _everywhere(found: bool) -> bool:
    """Whether every process has found something: what is missing, all must compute together."""
    if jax.process_count() == 1:
        return found
    return bool(np.all(multihost_utils.process_allgather(np.asarray(found))))


def _compute(compute: Compute, batches: Batches, steps: range) -> Float32[np.ndarray, "n D"]:
    return np.concatenate([values for _, values in compute(batches[step] for step in steps)])


def _check_finite(what: str, part: np.ndarray, samples: np.ndarray, batches: Batches) -> None:
    bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
    if len(bad):
        raise UserError(
            f"the {what} of {batches.data.where(int(samples[bad[0]]))} are not finite: the "
            "weights are damaged, or config.dtype is too small for them"
        )


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A part, or None if it is not there, not whole, or not what was written."""
    try:
        if file.parent.is_symlink() or file.is_symlink() or not file.is_file():
            return None
        content = file.read_bytes()
        values, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if xxhash.xxh3_128_digest(values) != checksum:
            return None
        part = np.load(io.BytesIO(values), allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    whole = part.shape == shape and part.dtype == np.float32
    return part if whole and np.isfinite(part).all() else None


def _write(file: Path, part: np.ndarray, made_by: dict[str, Any]) -> None:
    """Writes a part, and beside the first one what it was made by, for people who look."""
    content = io.BytesIO()
    np.save(content, part, allow_pickle=False)
    content.write(xxhash.xxh3_128_digest(content.getvalue()))  # which `np.load` does not look at
    with cache_errors():
        if file.parent.is_symlink():
            raise OSError(f"{file.parent} is a link")
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(file.parent)
        described = file.parent / "made_by.json"
        if not described.exists():
            described.write_text(json.dumps(made_by, indent=2) + "\n")
        replace_file(file, content.getbuffer())
