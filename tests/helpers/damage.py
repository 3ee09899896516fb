"""Damaged models, and what is said of each."""

import json
import os
import pickle
import shutil
from pathlib import Path

import torch

from helpers.hf_models import (
    NAMES,
    edit_json,
    edit_tensors,
)
from rmjax.data.tokenizer import byte_tokenizer


def remove_tensor(d):
    edit_tensors(d, **{"model.layers.1.mlp.up_proj.weight": None})


def add_tensor(d):
    edit_tensors(d, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})


def add_layer(d):
    edit_tensors(d, **{"model.layers.3.input_layernorm.weight": torch.ones(32)})


def wrong_shape(d):
    edit_tensors(d, **{"model.norm.weight": torch.ones(31)})


def transposed(d):
    edit_tensors(d, **{"model.layers.0.mlp.up_proj.weight": torch.ones(32, 64)})


def wrong_dtype(d):
    edit_tensors(d, **{"model.norm.weight": torch.ones(32, dtype=torch.int32)})


def wrong_labels(d):
    edit_json(d / "config.json", id2label={"0": "a", "1": "b"})


def same_labels(d):
    edit_json(d / "config.json", id2label={str(i): "a" for i in range(5)})


def gap_in_labels(d):
    edit_json(d / "config.json", id2label={str(i + 1): NAMES[i] for i in range(5)})


def headless(d):
    edit_tensors(d, **{"score.weight": None})


def causal_with_head(d):
    edit_json(d / "config.json", architectures=["LlamaForCausalLM"])


def truncated_file(d):
    file = d / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncated_header(d):
    (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:50])


def empty_file(d):
    (d / "model.safetensors").write_bytes(b"")


def absent_shard(d):
    there, absent = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    (d / "model.safetensors").rename(d / there)
    files = {"model.norm.weight": there, "score.weight": absent}
    (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def broken_index(d):
    (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))


def tensor_twice(d):
    shutil.copy(d / "model.safetensors", d / "other.safetensors")


class Bomb:
    def __reduce__(self):
        return os._exit, (77,)


def only_pickles(d):
    (d / "model.safetensors").unlink()
    (d / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def no_weights(d):
    (d / "model.safetensors").unlink()


def no_config(d):
    (d / "config.json").unlink()


def broken_config(d):
    (d / "config.json").write_text('{"model_type": "llama", ')


def list_config(d):
    (d / "config.json").write_text("[1]")


def other_model(d):
    edit_json(d / "config.json", model_type="mixtral")


def no_hidden_size(d):
    edit_json(d / "config.json", hidden_size=None)


def no_tokenizer(d):
    (d / "tokenizer.json").unlink()


def broken_tokenizer(d):
    (d / "tokenizer.json").write_text('{"version": ')


def no_template(d):
    (d / "chat_template.jinja").unlink()


def large_tokenizer(d):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|one|>", "<|too|>", "<|many|>"])
    tokenizer.save_pretrained(d)


def no_pad(d):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(d)


def other_names_in_card(d):
    spec = {"attributes": ["x"], "scalar": {"x": 1.0}, "format": "rmjax", "format_version": "0.1"}
    (d / "rmjax.json").write_text(json.dumps(spec))


def nothing_at_all(d):
    shutil.rmtree(d)
    d.mkdir()


def not_there(d):
    shutil.rmtree(d)


BAD_HF = {
    remove_tensor: r"1 tensor\(s\) missing: model.layers.1.mlp.up_proj.weight",
    add_tensor: r"not part of this model: model.layers.0.self_attn.q_norm.weight",
    add_layer: r"not part of this model: model.layers.3.input_layernorm.weight",
    wrong_shape: r"'model.norm.weight' has shape \(31,\), but config.json calls for \(32,\)",
    transposed: r"has shape \(32, 64\), but config.json calls for \(64, 32\)",
    wrong_dtype: r"'model.norm.weight' is I32; supported",
    wrong_labels: r"'score.weight' has shape \(5, 32\), but config.json calls for \(2, 32\)",
    same_labels: "id2label",
    gap_in_labels: "'id2label' has no label '0'",
    headless: "head 'score.weight' is missing",
    causal_with_head: "'score.weight' is there, but config.json",
    truncated_file: "model.safetensors: truncated or damaged",
    truncated_header: "model.safetensors: truncated or damaged",
    empty_file: "model.safetensors: truncated or damaged",
    absent_shard: "model-00002-of-00002.safetensors is named there but is not in the directory",
    broken_index: "model.safetensors.index.json: field 'weight_map'",
    tensor_twice: "is in two files",
    only_pickles: "pytorch_model.bin is a pickle, which can run code",
    no_weights: "there is no .safetensors file$",
    no_config: "no model here. Looked for config.json",
    broken_config: "config.json: not readable as JSON",
    list_config: "config.json: expected a JSON object, found list",
    other_model: "'model_type' is 'mixtral'",
    no_hidden_size: "'hidden_size' is missing",
    no_tokenizer: "no tokenizer here",
    broken_tokenizer: "the tokenizer cannot be read",
    no_template: "no chat template",
    large_tokenizer: "need 265 rows but the model's embedding has only 262",
    no_pad: "no special token free to serve as padding",
    other_names_in_card: "rmjax.json and config.json name other attributes",
    nothing_at_all: "no model here",
    not_there: "there is no such file or directory",
}


def params_of(d: Path) -> Path:
    return d / "checkpoint" / "params"


def no_metadata(d):
    (params_of(d) / "_METADATA").unlink()


def broken_metadata(d):
    (params_of(d) / "_METADATA").write_text("{}")


def no_chunk(d):
    (params_of(d) / "layers.up" / "c" / "1" / "0" / "0").unlink()


def truncated_chunk(d):
    chunk = params_of(d) / "layers.up" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-100])


def empty_chunk(d):
    (params_of(d) / "layers.up" / "c" / "1" / "0" / "0").write_bytes(b"")


def garbled_chunk(d):
    chunk = params_of(d) / "layers.up" / "c" / "1" / "0" / "0"
    chunk.write_bytes(b"\0" * len(chunk.read_bytes()))


def no_parameter(d):
    shutil.rmtree(params_of(d) / "layers.up")


def broken_parameter(d):
    (params_of(d) / "layers.up" / "zarr.json").write_text("{")


def unnamed_parameter(d):
    """As if converted without biases, and then told that there are some."""
    edit_json(d / "config.json", mlp_bias=True)


def other_shape(d):
    edit_json(d / "config.json", intermediate_size=96)


def no_params(d):
    shutil.rmtree(params_of(d))


def no_card(d):
    (d / "rmjax.json").unlink()


def future_card(d):
    edit_json(d / "rmjax.json", format_version="7.0")


def unknown_field_in_card(d):
    edit_json(d / "rmjax.json", flavour="sweet")


def foreign_card(d):
    edit_json(d / "rmjax.json", format="other")


BAD_ORBAX = {
    no_metadata: "not a complete Orbax checkpoint",
    broken_metadata: "not a complete Orbax checkpoint",
    no_chunk: "'layers/up' has 2 of its 3 files",
    truncated_chunk: "'layers/up' is damaged",
    empty_chunk: "'layers/up' is damaged",
    garbled_chunk: "'layers/up' is damaged",
    no_parameter: "'layers/up' is missing or damaged",
    broken_parameter: "'layers/up' is missing or damaged",
    unnamed_parameter: r"missing: \['layers/down_bias', 'layers/gate_bias', 'layers/up_bias'\]",
    other_shape: r"'layers/gate' has shape \(3, 32, 64\), but config.json calls for \(3, 32, 96\)",
    no_params: "not a complete Orbax checkpoint",
    no_card: "rmjax.json: there is no such file",
    future_card: "not of format version 0.1",
    unknown_field_in_card: "flavour",
    foreign_card: "not of format version 0.1",
    no_config: "config.json: there is no such file",
    broken_config: "config.json: not readable as JSON",
    no_tokenizer: "no tokenizer here",
    no_template: "no chat template",
    large_tokenizer: "the model's embedding has only 262",
}
