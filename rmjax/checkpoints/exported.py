"""Weights in memory as a Hugging Face directory, for a server that reads them at once.

What is kept is converted slice by slice and verified (`conversion/`). This is a tensor at a time,
from the devices, and thrown away when the next weights come.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape, to_hf
from rmjax.checkpoints.model_files import write_model_files
from rmjax.checkpoints.safetensors_file import file_layout
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import write_errors
from rmjax.models.heads import model_parameters, model_sizes
from rmjax.models.lora import merge_block
from rmjax.models.model import Model
from rmjax.models.parameters import ADAPTERS, Parameter, Params, flatten
from rmjax.runtime.files import PARTIAL


def export_policy(
    directory: Path, params: Params, model: Model, tokenizer: Tokenizer, ends: Sequence[int]
) -> None:
    """Writes a language model, whole or not at all; adapters are merged into its weights.

    Args:
      directory: replaced if it is there.
      params: of this process's devices; written in the dtype of the computation.
      model: whose they are.
      tokenizer: its.
      ends: tokens that end an answer.

    Raises:
      UserError: the disk is full, or refuses.
    """
    dtype: Any = np.dtype(model.options.dtype)
    sizes = model_sizes(model.config, model.head, model.lora)
    rows = model_parameters(model.config, model.head)
    shapes = [
        (key, hf_shape(row, sizes), dtype) for row in rows for key in hf_keys(row, model.config)
    ]
    layout = file_layout(shapes)
    partial = directory.with_name(directory.name + PARTIAL)
    with write_errors(str(directory)):
        for old in (partial, directory):
            shutil.rmtree(old, ignore_errors=True)
        write_model_files(partial, model.config, tokenizer, None, dtype=dtype.name, ends=ends)
        with open(partial / "model.safetensors", "wb") as file:
            file.write(layout.header)
            for row in rows:
                for block in _layers(row, flatten(params), model):
                    tensor = to_hf(row, block, sizes).astype(dtype, copy=False)
                    file.write(tensor.reshape(-1).view(np.uint8).data)
        partial.rename(directory)


def _layers(row: Parameter, leaves: dict[str, Any], model: Model) -> Iterator[np.ndarray]:
    """A parameter of each layer, or the only one, in the host's memory."""
    for layer in range(model.config.num_hidden_layers if row.stacked else 1):
        found = [
            np.asarray(leaves[path][layer] if row.stacked else leaves[path])
            for path in (row.path, *(_adapters(row) if model.lora.adapts(row.path) else ()))
        ]
        yield merge_block(found[0], found[1], found[2], model.lora.scale) if found[1:] else found[0]


def _adapters(row: Parameter) -> list[str]:
    return [adapter.path for adapter in ADAPTERS[row.path]]
