"""Conversion between Hugging Face's format and Orbax models, both ways and bit for bit.

    python -m rmjax.convert hf-to-orbax SRC DST [--attributes=a,b] [--seed=0]
    python -m rmjax.convert orbax-to-hf SRC DST [--dtype=bfloat16]

Both stream: no more than a few tensors are in memory at a time, whatever the model's size. The
target appears under its name only when it is complete.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 through it)
import numpy as np
from rich.progress import Progress, track

from rmjax.config import HELPSTEER2
from rmjax.errors import UserError, disk_errors, exit_with_message
from rmjax.llama import LlamaConfig
from rmjax.model import ModelOptions, RewardModel
from rmjax.modelfiles import FILE, ModelCard, write_model_files
from rmjax.parameters import Parameter, axis_sizes, model_parameters
from rmjax.pretrained import WEIGHTS, Pretrained, open_pretrained, public_name
from rmjax.sharding import MeshConfig, Sharding, make_mesh
from rmjax.step import random_head
from rmjax.store import create_array, open_array, read_array, write_metadata
from rmjax.weights import Weights, from_hf, hf_keys, hf_shape, to_hf

_CHUNK_BYTES = 16 << 20
_SHARD_BYTES = 5_000_000_000
# safetensors' names of the dtypes a model may have.
_SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def hf_to_orbax(
    src: str, dst: str, *, attributes: Sequence[str] = HELPSTEER2, seed: int = 0
) -> list[str]:
    """Converts a Hugging Face directory, hub id or GGUF file to an Orbax model.

    A classification model keeps its head and its names. A causal model gets a fresh head.

    Args:
      src: what to convert.
      dst: directory to make; must not exist or be empty.
      attributes: names of the fresh head's outputs.
      seed: of the fresh head.

    Returns:
      What there is to say about the conversion, a line each.

    Raises:
      UserError: the source does not match its config, or the target is not empty.
    """
    _check_names(attributes)
    source = open_pretrained(src)
    if isinstance(source.weights, Path):
        raise UserError(f"{src}: already an Orbax model or a run; the other way is orbax-to-hf")
    tokenizer, notes = source.tokenizer(), []
    if source.card:
        card = dataclasses.replace(source.card, source=public_name(src))
        notes.append(f"head kept: {', '.join(card.attributes)}")
    else:
        card = ModelCard(
            tuple(attributes), {attributes[0]: 1.0}, seed=seed, source=public_name(src)
        )
        notes.append(f"fresh head, seed {seed}: {', '.join(card.attributes)}")
    if source.check and source.check.unused:
        shown = ", ".join(source.check.unused[:3])
        notes.append(f"left out, a reward model has no use for them: {shown}")

    rows = list(model_parameters(source.llama))
    sizes = axis_sizes(source.llama, len(card.attributes))
    shapes = {row.path: [sizes[axis] for axis in row.all_axes] for row in rows}
    with new_directory(dst) as partial:
        # First, so that a tokenizer that cannot be exported is known before the weights are copied.
        write_model_files(partial, source.llama, tokenizer, card)
        params = partial / WEIGHTS / "params"
        for row in track(rows, description="hf-to-orbax"):
            if row.path == "head" and not source.has_head:
                head = _fresh_head(source.llama, len(card.attributes), seed)
                target = create_array(params, row.path, head.shape, head.dtype, head.shape)
                target.write(head).result()
            else:
                _write_stacked(source, source.weights, row, shapes[row.path], sizes, params)
        write_metadata(partial / WEIGHTS, shapes)
    return notes


def _check_names(attributes: Sequence[str]) -> None:
    """Raises a `UserError` unless every output can be told by its name."""
    if not attributes or not all(name.strip() == name != "" for name in attributes):
        raise UserError(f"attributes {list(attributes)}: expected names, separated by a comma each")
    if len(set(attributes)) < len(attributes):
        raise UserError(f"attributes {list(attributes)}: a name is there twice")


def _fresh_head(llama: LlamaConfig, attributes: int, seed: int) -> np.ndarray:
    """The head that training from the same source with the same seed would start from."""
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    return np.asarray(random_head(RewardModel(llama, ModelOptions(sharding), attributes), seed))


def _write_stacked(
    source: Pretrained,
    weights: Weights,
    row: Parameter,
    shape: Sequence[int],
    sizes: dict[str, int],
    params: Path,
) -> None:
    keys = hf_keys(row, source.llama)
    # Layers of unequal precision share the widest, which holds each one's values exactly.
    dtypes = {weights.dtype(key) for key in keys}
    dtype = dtypes.pop() if len(dtypes) == 1 else _widest(dtypes)
    target = create_array(params, row.path, shape, dtype, chunk_shape(row, shape, dtype))
    for layer, key in enumerate(keys):
        array = from_hf(row, weights.read(key), sizes).astype(dtype, copy=False)
        (target[layer] if row.stacked else target).write(np.ascontiguousarray(array)).result()


def _widest(dtypes: set[np.dtype]) -> np.dtype:
    # float16 and bfloat16 hold each other's values only as float32, which numpy would not pick.
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def chunk_shape(row: Parameter, shape: Sequence[int], dtype: np.dtype) -> list[int]:
    """One layer a chunk, halved along its longest axis until a chunk has at most 16 MiB.

    Small enough that a host of any mesh reads little beyond its own shards, large enough that a
    70B model is some ten thousand files.
    """
    chunk = [1, *shape[1:]] if row.stacked else list(shape)
    while int(np.prod(chunk)) * dtype.itemsize > _CHUNK_BYTES:
        longest = int(np.argmax(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def orbax_to_hf(
    src: str, dst: str, *, dtype: str | None = None, shard_bytes: int = _SHARD_BYTES
) -> list[str]:
    """Exports an Orbax model, or a run's best checkpoint, as `LlamaForSequenceClassification`.

    Args:
      src: an Orbax model or a run.
      dst: directory to make; must not exist or be empty.
      dtype: of the weights, the head excepted; what is stored if not given.
      shard_bytes: most bytes of one safetensors file.

    Returns:
      What there is to say about the conversion, a line each.

    Raises:
      UserError: the source is incomplete, or the target is not empty.
    """
    if dtype is not None and dtype not in _SAFETENSORS:
        raise UserError(f"dtype = {dtype!r}: there are {', '.join(_SAFETENSORS)}")
    source = open_pretrained(src)
    if not isinstance(source.weights, Path) or source.card is None:
        raise UserError(f"{src}: not an Orbax model and not a run; the other way is hf-to-orbax")
    tokenizer = source.tokenizer()
    tensors = list(_hf_tensors(source, source.weights / "params", dtype))
    main = max(tensors, key=lambda tensor: tensor.bytes).dtype
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    with new_directory(dst) as partial:
        write_model_files(partial, source.llama, tokenizer, source.card, dtype=main.name)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
                "weight_map": {t.key: n for n, shard in zip(names, shards) for t in shard},
            }
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        with Progress() as progress:
            task = progress.add_task("orbax-to-hf", total=len(tensors))
            for name, shard in zip(names, shards):
                written = _write_safetensors(
                    partial / name, shard, source, source.weights / "params"
                )
                for _ in written:
                    progress.advance(task)
    kept = ", ".join(source.card.attributes)
    return [f"{main.name}, {len(tensors)} tensors in {len(shards)} file(s); head: {kept}"]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    key: str
    row: Parameter
    layer: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _hf_tensors(source: Pretrained, params: Path, dtype: str | None) -> Iterator[_Tensor]:
    assert source.card is not None
    sizes = axis_sizes(source.llama, len(source.card.attributes))
    for row in model_parameters(source.llama):
        array = open_array(params, row.path)
        shape = tuple(sizes[axis] for axis in row.all_axes)
        if tuple(array.shape) != shape:
            raise UserError(
                f"{params}: parameter {row.path!r} has shape {tuple(array.shape)}, but config.json "
                f"calls for {shape}"
            )
        stored = array.dtype.numpy_dtype
        wanted = stored if dtype is None or row.path == "head" else np.dtype(dtype)
        for layer, key in enumerate(hf_keys(row, source.llama)):
            yield _Tensor(key, row, layer, hf_shape(row, sizes), wanted)


def _write_safetensors(
    path: Path, tensors: Sequence[_Tensor], source: Pretrained, params: Path
) -> Iterator[None]:
    """Writes one file tensor by tensor; the library's own writer wants all of them in memory.

    Yields after each tensor. The format, from safetensors' documentation: 8 bytes of header
    length, a JSON header padded to 8 bytes, the tensors' bytes in order.
    """
    assert source.card is not None
    sizes = axis_sizes(source.llama, len(source.card.attributes))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": _SAFETENSORS[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = read_array(params, tensor.row.path, tensor.layer if tensor.row.stacked else ...)
            array = to_hf(tensor.row, array, sizes).astype(tensor.dtype, copy=False)
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            yield


@contextlib.contextmanager
def new_directory(dst: str) -> Iterator[Path]:
    """A directory to fill, which becomes `dst` when all went well and is removed when not.

    Raises:
      UserError: `dst` is there and not empty, or cannot be made, or the disk is full.
    """
    final = Path(dst).expanduser().resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final}: already exists and is not empty; choose another target")
    if final.is_mount():
        raise UserError(f"{final}: a mount point, which cannot be replaced; name a directory in it")
    partial = final.with_name(final.name + ".partial")
    if partial.exists() and not _is_leaving(partial):
        raise UserError(f"{partial}: in the way, and not of an interrupted conversion; move it")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be created ({error.strerror})") from error
    try:
        with disk_errors(str(final)):
            yield partial
            if final.exists():
                final.rmdir()
            partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_leaving(partial: Path) -> bool:
    """Whether a killed conversion left this: the model's files are the first it writes."""
    return partial.is_dir() and ((partial / FILE).exists() or not any(partial.iterdir()))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rmjax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_orbax = commands.add_parser("hf-to-orbax", help="a Hugging Face model to an Orbax model")
    to_orbax.add_argument(
        "--attributes", default=",".join(HELPSTEER2), help="outputs of a fresh head"
    )
    to_orbax.add_argument("--seed", type=int, default=0, help="of a fresh head")
    to_hf = commands.add_parser("orbax-to-hf", help="an Orbax model or a run to Hugging Face")
    to_hf.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
    for command in (to_orbax, to_hf):
        command.add_argument("src")
        command.add_argument("dst")
    args = parser.parse_args()
    if args.command == "hf-to-orbax":
        attributes = tuple(args.attributes.split(","))
        notes = hf_to_orbax(args.src, args.dst, attributes=attributes, seed=args.seed)
    else:
        notes = orbax_to_hf(args.src, args.dst, dtype=args.dtype)
    print("\n".join([*notes, f"written: {args.dst}"]))


if __name__ == "__main__":
    exit_with_message(_main)
