"""Tensors in Hugging Face's naming, read one at a time: safetensors files or a GGUF file.

Nothing here runs code from a file: PyTorch's pickled `.bin` files are refused.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open

from rmjax.errors import UserError
from rmjax.llama import LlamaConfig
from rmjax.parameters import PARAMETERS, Parameter, axis_sizes, model_parameters

# Tensors that a Llama checkpoint may carry and a reward model has no use for.
_UNUSED = re.compile(r"lm_head\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Weights(Protocol):
    """Named tensors of one checkpoint; only the one asked for is read."""

    where: Path

    def keys(self) -> set[str]:
        """The Hugging Face names of all tensors."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape, from the file's header."""
        ...

    def dtype(self, key: str) -> np.dtype:
        """The dtype that `read` will give."""
        ...

    def read(self, key: str) -> np.ndarray:
        """The tensor, in memory."""
        ...


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsWeights:
    """One or many `.safetensors` files of a directory, with or without an index."""

    def __init__(self, directory: Path):
        self.where = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
                raise UserError(f"{index}: field 'weight_map' does not map tensors to files")
            names = sorted(set(places.values()))
            missing = [name for name in names if not (directory / name).exists()]
            if missing:
                raise UserError(f"{index}: {missing[0]} is named there but is not in the directory")
        else:
            names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            pickled = list(directory.glob("*.bin")) + list(directory.glob("*.pth"))
            raise UserError(
                f"{directory}: there is no .safetensors file"
                + (
                    f"; {pickled[0].name} is a pickle, which can run code when it is read: "
                    "convert it to safetensors first"
                    if pickled
                    else ""
                )
            )
        self._files = {}
        for name in names:
            try:
                file = safe_open(directory / name, framework="np")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{directory / name}: truncated or damaged ({error})") from error
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                if key in self._files:
                    raise UserError(f"{directory / name}: tensor {key!r} is in two files")
                self._files[key] = file

    def keys(self) -> set[str]:
        return set(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> np.dtype:
        name = self._files[key].get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise UserError(f"{self.where}: tensor {key!r} is {name}; supported: {list(_DTYPES)}")
        return np.dtype(_DTYPES[name])

    def read(self, key: str) -> np.ndarray:
        return self._files[key].get_tensor(key)


class GGUFWeights:
    """A GGUF file of a Llama, de-quantised to float32 one tensor at a time."""

    def __init__(self, path: Path):
        gguf = _import_gguf(path)
        self.where, self._gguf = path, gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error})") from error
        self.config = _gguf_config(self)
        ours = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config["num_hidden_layers"])
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if "rope_freqs.weight" in tensors:
            raise UserError(
                f"{path}: its RoPE frequencies are scaled (rope_freqs.weight, as from Llama 3.1 "
                "on), and the file does not say by what; use the Hugging Face directory"
            )
        self._tensors = {}
        for key in _candidate_keys(self.config["num_hidden_layers"]):
            name = ours.get_name(key, try_suffixes=(".weight", ".bias"))
            if name in tensors:
                self._tensors[key] = tensors.pop(name)
        # What no key claims keeps its own name, so that the key check reports it.
        self._tensors |= tensors

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value of the file."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[key].shape))

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, key: str) -> np.ndarray:
        tensor = self._tensors[key]
        try:
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.where}: tensor {key!r} is {tensor.tensor_type.name}, which the package "
                "gguf cannot de-quantise"
            ) from error
        values = np.asarray(values, np.float32).reshape(self.shape(key))
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        for name, count in heads.items():
            if f".{name}." in key:
                # llama.cpp interleaves each head's rotary pairs; HF keeps the halves apart.
                pattern = "(n half pair) ... -> (n pair half) ..."
                values = rearrange(values, pattern, n=count, pair=2)
        return values


def _import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF needs `pip install 'rmjax[gguf]'`") from error
    return gguf


def _candidate_keys(layers: int) -> Iterator[str]:
    yield "lm_head.weight"
    for row in PARAMETERS:
        if row.path != "head":
            yield from (row.hf_key.format(layer) for layer in range(layers if row.stacked else 1))


def _gguf_config(file: GGUFWeights) -> dict[str, Any]:
    """The `config.json` fields that the file's metadata stand for."""
    architecture = file.field("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{file.where}: field 'general.architecture' is {architecture!r}; supported: 'llama'"
        )

    def field(name: str, default: Any = None) -> Any:
        value = file.field(f"llama.{name}", default)
        if value is None:
            raise UserError(f"{file.where}: field 'llama.{name}' is missing")
        return value

    if field("expert_count", 0):
        raise UserError(f"{file.where}: field 'llama.expert_count' is set; experts: not supported")
    scaling = field("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UserError(f"{file.where}: field 'llama.rope.scaling.type' is {scaling!r}")
    names = {tensor.name for tensor in file._reader.tensors}
    tokens = file._reader.get_field("tokenizer.ggml.tokens")
    heads = field("attention.head_count")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": field("vocab_size", len(tokens.data) if tokens else None),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", field("embedding_length") // heads),
        "max_position_embeddings": field("context_length"),
        # GGUF stores a float32; the shortest decimal that gives it is what the model's maker wrote.
        "rms_norm_eps": float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "rope_scaling": (
            {"rope_type": "linear", "factor": float(field("rope.scaling.factor"))}
            if scaling == "linear"
            else None
        ),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; anything else is a `UserError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class TensorCheck:
    """What `check_tensors` found out about a checkpoint that fits."""

    has_head: bool
    unused: tuple[str, ...]


def check_tensors(weights: Weights, config: LlamaConfig, attributes: int) -> TensorCheck:
    """Compares a checkpoint's keys and shapes with the table, exactly.

    Args:
      weights: the checkpoint.
      config: its model's config.
      attributes: rows its `score.weight` must have, if there is one.

    Raises:
      UserError: a tensor is missing, unknown or of another shape.
    """
    found = weights.keys()
    expected: dict[str, tuple[int, ...]] = {}
    sizes = axis_sizes(config, attributes)
    for row in model_parameters(config):
        if row.path == "head" and row.hf_key not in found:
            continue
        for key in hf_keys(row, config):
            expected[key] = hf_shape(row, sizes)
    unused = {key for key in found - set(expected) if _UNUSED.fullmatch(key)}
    missing, extra = sorted(set(expected) - found), sorted(found - set(expected) - unused)
    for problem, keys in (("missing", missing), ("not part of this model", extra)):
        if keys:
            raise UserError(
                f"{weights.where}: {len(keys)} tensor(s) {problem}: "
                + ", ".join(keys[:4])
                + (", ..." if len(keys) > 4 else "")
            )
    for key, shape in expected.items():
        if weights.shape(key) != shape:
            raise UserError(
                f"{weights.where}: tensor {key!r} has shape {weights.shape(key)}, but config.json "
                f"calls for {shape}"
            )
    return TensorCheck("score.weight" in found, tuple(sorted(unused)))


def hf_keys(row: Parameter, config: LlamaConfig) -> list[str]:
    """The HF keys of a parameter, in the order of the layers."""
    return [row.hf_key.format(n) for n in range(config.num_hidden_layers if row.stacked else 1)]


def hf_shape(row: Parameter, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a parameter's HF tensor (of one layer, where it is stacked)."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", row.hf_axes)
    return tuple(int(np.prod([sizes[a] for a in (g or single).split()])) for g, single in groups)


def from_hf(row: Parameter, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """An HF tensor in our axes; a view where numpy can, never a change of value."""
    names = row.axes.split()
    return rearrange(tensor, f"{row.hf_axes} -> {row.axes}", **{n: sizes[n] for n in names})


def to_hf(row: Parameter, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """Our array (one layer's, where it is stacked) in the axes of its HF tensor."""
    names = row.axes.split()
    return rearrange(array, f"{row.axes} -> {row.hf_axes}", **{n: sizes[n] for n in names})
