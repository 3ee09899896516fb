"""Opens a model on disk, whatever its form; `loading` reads its parameters onto a mesh."""

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
    Weights,
    check_tensors,
)
from rmjax.checkpoints.hub import local_path
from rmjax.checkpoints.model_files import (
    ADAPTER_CONFIG,
    JOURNAL,
    SPEC_FILE,
    hf_attributes,
    hf_scalar,
    read_adapter_config,
    read_spec,
)
from rmjax.checkpoints.orbax_arrays import array_paths, read_array
from rmjax.checkpoints.value_head import find_value_head, refuse_layered_head
from rmjax.data.tokenizer import Tokenizer, load_tokenizer
from rmjax.errors import UserError
from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.heads import Head, RewardHead, language_model_head, model_parameters
from rmjax.models.hf_config import config_from_hf
from rmjax.models.parameters import THRESHOLDS
from rmjax.models.rewards.spec import RewardSpec, Temperature
from rmjax.runtime.files import read_json

_HEADER_BYTES = 1 << 20  # read of each file of weights: more than any header has
WEIGHTS = "checkpoint"  # a converted model's Orbax checkpoint, inside its directory


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on disk.

    Attributes:
      name: as the user gave it.
      files: where `config.json` and the tokenizer are (a GGUF file is its own).
      decoder: the architecture.
      spec: names of the reward head's outputs and more; None for a causal model.
      weights: tensors by HF key, or the Orbax checkpoint that holds `params`.
      lora: adapters that are stored beside the weights and belong to the model.
      base: the model that these were trained beside; empty if that began from random weights.
      unused: tensors that a reward model does not need.
      value_head: where a causal model's value head is; see `find_value_head`.
      chat_template: which of several named templates to use; see `tokenizer.load_tokenizer`.
      run: the directory of a run, with its records; None for other forms.
      variant: what makes it another model than its files; see `causal_heads.with_head`.
    """

    name: str
    files: Path
    decoder: DecoderConfig
    spec: RewardSpec | None
    weights: Weights | Path
    lora: LoraConfig = NO_LORA
    base: str = ""
    unused: tuple[str, ...] = ()
    value_head: Path | None = None
    chat_template: str = ""
    variant: str = ""
    run: Path | None = None

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, with one template, its date frozen."""
        return load_tokenizer(self.files, self.decoder.vocab_size, self.chat_template)

    @property
    def head(self) -> Head:
        """What reads the decoder: a reward head, or a causal model's own."""
        if self.spec:
            return RewardHead(len(self.spec.attributes))
        return language_model_head(self.decoder)

    def reward_spec(self) -> RewardSpec:
        """The spec; or a `UserError` that says how a causal model becomes a reward model."""
        if self.spec:
            return self.spec
        sample = (
            "To sample from it, use `rmjax.load_policy`; to score with its log-probabilities, "
            "value='log_probability' (--value=log_probability)"
        )
        if isinstance(self.weights, Path):
            raise UserError(
                f"{self.name}: a language model without a reward head. {sample}; for a reward "
                "model, train one from it"
            )
        beside = f", with a value head ({self.value_head})" if self.value_head else ""
        raise UserError(
            f"{self.name}: a language model without a reward head{beside}. If it is a published "
            "reward model, say where its reward is, with head of `rmjax.load` or --head of "
            "`rmjax convert hf-to-orbax`: value_head, a value head beside it; "
            '{"reward": {"0": 1}}, a token\'s logit, as of NVIDIA\'s '
            'Llama-3.1-Nemotron-70B-Reward-HF; {"Yes": 1, "No": -1} with suffix_turn '
            "(--suffix-turn), the difference of two after a question, as of models that follow a "
            "principle. If it is none, train a reward model from it, or give it a fresh head with "
            f"hf-to-orbax. {sample}"
        )

    def state(self) -> str:
        """A fingerprint of the files: their names, sizes, times, and headers of weights.

        The chat template is part of it, and so is a head that was said to be its.
        """
        digest = xxhash.xxh3_64((self.chat_template + self.variant).encode())
        files = [file for file in self.files.glob("*") if file.is_file()]
        files += self.files.glob("*/*.jinja")
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
        """The same model without its head, so that `load_params` makes a new one."""
        return dataclasses.replace(self, spec=None)


def public_name(name: str) -> str:
    """The name of a source in files that others see: a hub id, or a local path's last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def open_pretrained(name: str, chat_template: str = "") -> Pretrained:
    """Opens a Hugging Face directory or hub id, a GGUF file, an Orbax model or a run.

    A run stands for its checkpoint with the lowest validation loss.

    Args:
      name: see above.
      chat_template: which of a tokenizer's named templates to use; empty for its default.

    Raises:
      UserError: nothing of the kind, or something incomplete; it says what.
    """
    return dataclasses.replace(_open(name, local_path(name)), chat_template=chat_template)


def _open(name: str, path: Path) -> Pretrained:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a file, but not a .gguf one; name the model's directory")
        weights = GGUFWeights(path)
        decoder = config_from_hf(weights.config, str(path))
        unused = check_tensors(weights, decoder, RewardHead(1))
        return Pretrained(name, path, decoder, None, weights, unused=unused)
    if _is_run(path):
        files = path / "model"
        weights, evaluation = manager.best_checkpoint(path)
        return dataclasses.replace(_open_orbax(name, files, weights, evaluation), run=path)
    if _is_orbax(path):
        return _open_orbax(name, path, path / WEIGHTS)
    if (path / JOURNAL).exists():
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


def _is_run(path: Path) -> bool:
    """Whether a directory is a run: others may have a directory `checkpoints` as well."""
    if not (path / manager.DIRECTORY).is_dir():
        return False
    record = path / "config.json"  # of a run what it was asked to do, not a model's config
    return not record.exists() or read_json(record).get("format") == manager.RUN_FORMAT


def _is_orbax(path: Path) -> bool:
    """Whether a directory is a converted model: others may have a directory `checkpoint` as well.

    Raises:
      UserError: it could be one and a Hugging Face model.
    """
    if not (path / WEIGHTS).is_dir():
        return False
    theirs, ours = any(path.glob("*.safetensors")), (path / WEIGHTS / "params").is_dir()
    if theirs and ours:
        raise UserError(
            f"{path}: two models, an Orbax one in {WEIGHTS}/ and a Hugging Face one in "
            ".safetensors files; move one of them elsewhere"
        )
    return not theirs


def _open_huggingface(name: str, path: Path) -> Pretrained:
    raw = read_json(path / "config.json")
    decoder = config_from_hf(raw, str(path / "config.json"))
    weights = SafetensorsWeights(path)
    architectures, keys = raw.get("architectures") or [], weights.keys()
    spec, has_head = None, "score.weight" in keys
    # A decoder alone, of transformers' `AutoModel`, to which somebody added a head.
    classification = decoder.row.classification
    bare = architectures == [decoder.row.bare] and has_head
    if bare or classification in architectures:
        rows = weights.shape("score.weight")[0] if bare else 2
        attributes = hf_attributes(raw, path / "config.json", rows)
        if (path / SPEC_FILE).exists():
            spec = read_spec(path)
            if spec.attributes != attributes:
                raise UserError(f"{path}: {SPEC_FILE} and config.json name other attributes")
        else:
            spec = RewardSpec(attributes, hf_scalar(raw, attributes), source=public_name(name))
    elif has_head:
        raise UserError(
            f"{path}: 'score.weight' is there, but config.json's 'architectures' is "
            f"{architectures}, expected {classification}"
        )
    refuse_layered_head(path, keys)
    head = RewardHead(len(spec.attributes) if spec else 1)
    unused = check_tensors(weights, decoder, head)
    if spec and not has_head:
        raise UserError(f"{path}: a classification model whose head 'score.weight' is missing")
    value_head = find_value_head(path, keys)
    if spec and value_head:
        raise UserError(
            f"{path}: two heads, 'score.weight' and the value head in {value_head}; remove the one "
            "that is not meant"
        )
    return Pretrained(name, path, decoder, spec, weights, unused=unused, value_head=value_head)


def _open_orbax(
    name: str, files: Path, weights: Path, evaluation: Mapping[str, Any] = MappingProxyType({})
) -> Pretrained:
    """Opens an Orbax model, or a run's checkpoint: then the spec gets what training learned."""
    where = files / "config.json"
    raw = read_json(where)
    decoder = config_from_hf(raw, str(where))
    if raw.get("architectures") == [decoder.row.causal]:
        source = Pretrained(name, files, decoder, None, weights, *read_adapter_config(files))
        _check_paths(source, set())
        return source
    spec = read_spec(files)
    if temperature := _temperature(evaluation):
        spec = dataclasses.replace(spec, temperature=temperature)
    # A converted model has its thresholds in the spec, a run among its parameters.
    trained = spec.ordinal.count if spec.ordinal and not spec.ordinal.thresholds else 0
    source = Pretrained(name, files, decoder, spec, weights, spec.lora, spec.source)
    _check_paths(source, {THRESHOLDS.path} if trained else set())
    if spec.ordinal and trained:
        scale = spec.ordinal.with_raw(
            read_array(weights / "params", THRESHOLDS.path), spec.attributes
        )
        return dataclasses.replace(source, spec=dataclasses.replace(spec, ordinal=scale))
    return source


def _check_paths(source: Pretrained, own: set[str]) -> None:
    """Raises a `UserError` unless the arrays are the model's and those of `own`."""
    assert isinstance(source.weights, Path)
    paths = array_paths(source.weights / "params")
    rows = model_parameters(source.decoder, source.head, source.lora)
    expected = {row.path for row in rows} | own
    if paths != expected:
        raise UserError(
            f"{source.weights}: parameters do not match config.json; missing: "
            f"{sorted(expected - paths) or 'none'}, unknown: {sorted(paths - expected) or 'none'}"
        )


def _temperature(evaluation: Mapping[str, Any]) -> Temperature | None:
    """The temperature that was fitted on an evaluation's pairs, if there is one."""
    pairs = evaluation.get("pairs") or {}
    value = pairs.get("temperature")
    if value is None or not math.isfinite(value):
        return None
    return Temperature(value, pairs["attribute"], pairs["pairs"])
