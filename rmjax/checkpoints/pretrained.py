"""Finding a model on disk, whatever its form, and reading its parameters onto a mesh."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from rmjax.checkpoints import manager
from rmjax.checkpoints.gguf import GGUFWeights
from rmjax.checkpoints.hf_weights import (
    SafetensorsWeights,
    TensorCheck,
    Weights,
    check_tensors,
    read_json,
)
from rmjax.checkpoints.hub import local_path
from rmjax.checkpoints.model_files import ADAPTER_CONFIG, FILE, PLAN, hf_attributes, read_spec
from rmjax.checkpoints.orbax_arrays import array_paths, read_array
from rmjax.data.tokenizer import Tokenizer, load_tokenizer
from rmjax.errors import UserError
from rmjax.models.config import NO_LORA, LlamaConfig, LoraConfig
from rmjax.models.heads import RewardHead, model_parameters
from rmjax.models.hf_config import llama_config_from_hf
from rmjax.models.parameters import (
    THRESHOLDS,
)
from rmjax.models.rewards.spec import RewardSpec, Temperature

_HEADER_BYTES = 1 << 20  # of a file of weights: more than any header
WEIGHTS = "checkpoint"  # a converted model's Orbax checkpoint, inside its directory


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on disk.

    Attributes:
      name: as the user gave it.
      files: where `config.json` and the tokenizer are (a GGUF file is its own).
      llama: the architecture.
      spec: names of the head's outputs and more; None for a causal model without a head.
      weights: tensors by HF key, or the Orbax checkpoint that holds `params`.
      check: what was found out about tensors in HF's naming.
      lora: adapters that are beside the weights and belong to the model.
    """

    name: str
    files: Path
    llama: LlamaConfig
    spec: RewardSpec | None
    weights: Weights | Path
    check: TensorCheck | None
    lora: LoraConfig = NO_LORA

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, its date frozen."""
        return load_tokenizer(self.files, self.llama.vocab_size)

    @property
    def has_head(self) -> bool:
        """Whether `load_params` finds a head, or makes one."""
        return self.spec is not None

    def state(self) -> str:
        """What changes when a file does: names, sizes, times, and headers of weights."""
        digest = xxhash.xxh3_64()
        files = [file for file in self.files.glob("*") if file.is_file()]
        if isinstance(self.weights, Path):
            files += [file for file in self.weights.rglob("*") if file.is_file()]
        else:
            files += self.weights.files()
            for file in self.weights.files():
                with open(file, "rb") as opened:
                    digest.update(opened.read(_HEADER_BYTES))
        for file in sorted(set(files)):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def without_head(self) -> "Pretrained":
        """The same model, whose head is to be a fresh one."""
        return dataclasses.replace(self, spec=None)


def public_name(name: str) -> str:
    """What an exported model says of its source: a hub id, or the last part of a local path."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def open_pretrained(name: str) -> Pretrained:
    """Opens a Hugging Face directory or hub id, a GGUF file, an Orbax model or a run.

    A run stands for its checkpoint with the lowest validation loss.

    Raises:
      UserError: nothing of the kind, or something incomplete; it says what.
    """
    path = local_path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a file, but not a .gguf one; name the model's directory")
        weights = GGUFWeights(path)
        llama = llama_config_from_hf(weights.config, str(path))
        return Pretrained(name, path, llama, None, weights, check_tensors(weights, llama, 1))
    if (path / manager.DIRECTORY).is_dir():
        files = path / "model"
        weights, evaluation = manager.best_checkpoint(path)
        return _open_orbax(name, files, weights, evaluation)
    if (path / WEIGHTS).is_dir():
        return _open_orbax(name, path, path / WEIGHTS)
    if (path / PLAN).exists():
        raise UserError(f"{path}: an unfinished conversion; give the same command again to end it")
    if (path / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{path}: an adapter in PEFT's format, which is not read here; name the run it was "
            "made from, or merge it into its base with PEFT"
        )
    if not (path / "config.json").exists():
        raise UserError(
            f"{path}: no model here. Looked for config.json (Hugging Face), {WEIGHTS}/ (a "
            f"converted model) and {manager.DIRECTORY}/ (a run)"
        )
    return _open_huggingface(name, path)


def _open_huggingface(name: str, path: Path) -> Pretrained:
    raw = read_json(path / "config.json")
    llama = llama_config_from_hf(raw, str(path / "config.json"))
    weights = SafetensorsWeights(path)
    architectures = raw.get("architectures") or []
    spec = None
    if "LlamaForSequenceClassification" in architectures:
        attributes = hf_attributes(raw, path / "config.json")
        if (path / FILE).exists():
            spec = read_spec(path)
            if spec.attributes != attributes:
                raise UserError(f"{path}: {FILE} and config.json name other attributes")
        else:
            spec = RewardSpec(attributes, {attributes[0]: 1.0}, source=public_name(name))
    elif "score.weight" in weights.keys():  # noqa: SIM118  (not a mapping)
        raise UserError(
            f"{path}: 'score.weight' is there, but config.json's 'architectures' is "
            f"{architectures}, expected LlamaForSequenceClassification"
        )
    check = check_tensors(weights, llama, len(spec.attributes) if spec else 1)
    if spec and not check.has_head:
        raise UserError(f"{path}: a classification model whose head 'score.weight' is missing")
    return Pretrained(name, path, llama, spec, weights, check)


def _open_orbax(
    name: str, files: Path, weights: Path, evaluation: Mapping[str, Any] = MappingProxyType({})
) -> Pretrained:
    """Opens an Orbax model, or a run's checkpoint, whose spec gets what training found out."""
    spec = read_spec(files)
    if temperature := _temperature(evaluation):
        spec = dataclasses.replace(spec, temperature=temperature)
    where = files / "config.json"
    llama = llama_config_from_hf(read_json(where), str(where))
    paths = array_paths(weights / "params")
    # A converted model has them in its spec.
    trained = spec.ordinal.count if spec.ordinal and not spec.ordinal.thresholds else 0
    head = RewardHead(len(spec.attributes))
    expected = {row.path for row in model_parameters(llama, head, spec.lora)}
    expected |= {THRESHOLDS.path} if trained else set()
    if paths != expected:
        raise UserError(
            f"{weights}: parameters do not match config.json; missing: "
            f"{sorted(expected - paths) or 'none'}, unknown: {sorted(paths - expected) or 'none'}"
        )
    if spec.ordinal and trained:
        raw = read_array(weights / "params", THRESHOLDS.path)
        scale = spec.ordinal.with_raw(raw, spec.attributes)
        spec = dataclasses.replace(spec, ordinal=scale)
    return Pretrained(name, files, llama, spec, weights, None, spec.lora)


def _temperature(evaluation: Mapping[str, Any]) -> Temperature | None:
    """The one that an evaluation's pairs gave, if they gave any."""
    pairs = evaluation.get("pairs") or {}
    value = pairs.get("temperature")
    if value is None or not math.isfinite(value):
        return None
    return Temperature(value, pairs["attribute"], pairs["pairs"])
