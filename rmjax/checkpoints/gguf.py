"""Tensors of a GGUF file (llama.cpp's format), de-quantised, under Hugging Face's names."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.errors import UserError
from rmjax.models.parameters import PARAMETERS


class GGUFWeights:
    """The tensors of a Llama's GGUF file, de-quantised to float32 block by block."""

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
        # The rest keep their own names, so that `check_tensors` reports them.
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

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        tensor = self._tensors[key]
        rows, *columns = [*index, *[slice(None)] * (len(self.shape(key)) - len(index))]
        try:
            values = self._gguf.quants.dequantize(
                tensor.data[self._file_rows(key, rows)], tensor.tensor_type
            )
        except NotImplementedError as error:
            raise UserError(
                f"{self.where}: tensor {key!r} is {tensor.tensor_type.name}, which the package "
                "gguf cannot de-quantise"
            ) from error
        return np.asarray(values, np.float32)[(slice(None), *columns)]

    def _file_rows(self, key: str, rows: slice) -> Any:
        """The rows of the file's tensor that are `rows` of HF's.

        llama.cpp interleaves each head's rotary pairs; HF keeps the halves apart.
        """
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        for name, count in heads.items():
            if f".{name}." in key:
                numbers = np.arange(self.shape(key)[0])
                return numbers.reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)[rows]
        return rows

    def files(self) -> list[Path]:
        return [self.where]


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
    """The file's metadata as the fields of a `config.json`."""
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
        # GGUF stores a float32; its shortest decimal is what the model's maker wrote.
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
