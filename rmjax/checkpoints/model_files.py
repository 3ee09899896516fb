"""The files of a model besides its weights: `config.json`, the tokenizer's and `rmjax.json`.

A run, a converted Orbax model and an exported Hugging Face directory have the same files.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.data.tokenizer import Tokenizer, pad_token_id
from rmjax.errors import UserError, shortened
from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.hf_config import config_to_hf
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.models.rewards.ordinal import OrdinalScale
from rmjax.models.rewards.spec import RewardSpec, Temperature, is_weight
from rmjax.runtime.files import read_json, replace_file

FORMAT_VERSION = "0.1"
_MOST_LABELS = 65_536
MODEL_CONFIG = "config.json"  # Hugging Face's
GENERATION_CONFIG = "generation_config.json"  # likewise
SPEC_FILE = "rmjax.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
JOURNAL = "journal.jsonl"  # of a conversion that is not finished, see conversion/journal.py


def write_model_files(
    directory: Path,
    decoder: DecoderConfig,
    tokenizer: Tokenizer,
    spec: RewardSpec | None,
    dtype: str = "float32",
    ends: Sequence[int] = (),
) -> None:
    """Writes the tokenizer with its frozen template, `rmjax.json` and, whole, `config.json`.

    `config.json` is that of the family's plain classification model, such as
    `LlamaForSequenceClassification`, or without a spec that of its plain language model, such as
    `LlamaForCausalLM`, which has no `rmjax.json`. It is written last: where it is, all are.

    Args:
      directory: made if it is not there.
      decoder: the decoder.
      tokenizer: its.
      spec: of a reward model; None for a language model.
      dtype: of the weights.
      ends: tokens that end a language model's answer, for `generation_config.json`. There may be
        several, and `config.json` and the tokenizer name one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pad = pad_token_id(tokenizer)
    _save_tokenizer(directory, tokenizer, pad)
    if spec is not None:
        _write_spec(directory, spec)
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": pad}
    if ends:
        _write_json(directory / GENERATION_CONFIG, {"eos_token_id": [*ends], **special})
    config = {
        "architectures": [decoder.row.classification if spec else decoder.row.causal],
        **config_to_hf(decoder),
        **(_classification(spec) if spec else {}),
        **special,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": dtype,  # its name in transformers 4
        "dtype": dtype,
    }
    replace_file(directory / MODEL_CONFIG, _json(config))


def _write_spec(directory: Path, spec: RewardSpec) -> None:
    """Writes `rmjax.json`; a `UserError` if `read_spec` would refuse it."""
    try:
        _check_spec(spec)
    except ValueError as error:
        raise UserError(f"{SPEC_FILE} of what is written: {error}") from error
    fields = {"format": "rmjax", "format_version": FORMAT_VERSION} | dataclasses.asdict(spec)
    if not spec.lora.rank:
        del fields["lora"]
    optional = {"offset", "ordinal", "general_preference", "temperature", "suffix_turn", "folded"}
    fields = {name: x for name, x in fields.items() if x or name not in optional}
    _write_json(directory / SPEC_FILE, fields)


def _classification(spec: RewardSpec) -> dict[str, Any]:
    """The fields of a classification model's config.

    `problem_type` makes servers return raw numbers; without it they return the softmax of labels.
    """
    names = dict(enumerate(spec.attributes))
    return {
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
        "problem_type": "regression",
    }


def write_adapter_config(directory: Path, lora: LoraConfig, base: str, reward: bool) -> None:
    """Writes `adapter_config.json`, as PEFT 0.21 reads it, for `adapter_model.safetensors`.

    A language model has no `rmjax.json`, so that a run of one keeps its adapters' settings in this
    file; see `read_adapter_config`.

    Args:
      directory: where to.
      lora: the adapters.
      base: the model that they were trained beside.
      reward: whether that is a reward model, whose head was trained as well.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [f"{target}_proj" for target in lora.targets],
        "modules_to_save": ["score"] if reward else None,
        "bias": "none",
        "inference_mode": True,
    }
    _write_json(directory / ADAPTER_CONFIG, config)


def read_adapter_config(directory: Path) -> tuple[LoraConfig, str]:
    """The adapters of a language model's run and what they were trained beside.

    No adapters where there is no such file.

    Raises:
      UserError: the file is broken.
    """
    file = directory / ADAPTER_CONFIG
    if not file.exists():
        return NO_LORA, ""
    raw = read_json(file)
    try:
        targets = tuple(name.removesuffix("_proj") for name in raw["target_modules"])
        lora = LoraConfig(raw["r"], raw["lora_alpha"], raw["lora_dropout"], targets)
        return lora, raw["base_model_name_or_path"]
    except KeyError as error:
        raise UserError(f"{file}: field {error} is missing") from error


def _save_tokenizer(directory: Path, tokenizer: Tokenizer, pad: int) -> None:
    """Saves a tokenizer as servers need it.

    They pad with the tokenizer's pad token and find the end by the config's, so the two must be the
    same. And transformers 4 does not know a class and a field that transformers 5 renamed.
    """
    if tokenizer.pad_token_id != pad:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(directory)
    fields = read_json(directory / "tokenizer_config.json")
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    _write_json(directory / "tokenizer_config.json", fields)


def read_spec(directory: Path) -> RewardSpec:
    """Reads `rmjax.json`.

    Raises:
      UserError: it is missing, broken, or of another format version.
    """
    raw = read_json(directory / SPEC_FILE)
    if raw.pop("format", None) != "rmjax" or raw.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(
            f"{directory / SPEC_FILE}: not of format version {FORMAT_VERSION}, the one that this "
            "version of rmjax reads"
        )
    try:
        lora = LoraConfig(**raw.pop("lora", {}))
        lora = dataclasses.replace(lora, targets=tuple(lora.targets))
        ordinal = _read_scale(raw.pop("ordinal", None))
        if "general_preference" in raw:
            raw["general_preference"] = GeneralPreference(**raw["general_preference"])
        if "temperature" in raw:
            raw["temperature"] = Temperature(**raw["temperature"])
        spec = RewardSpec(**raw, lora=lora, ordinal=ordinal)
        _check_spec(spec)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{directory / SPEC_FILE}: {shortened(str(error), 300)}") from error
    return dataclasses.replace(spec, attributes=tuple(spec.attributes))


def _check_spec(spec: RewardSpec) -> None:
    """Raises a `ValueError` unless the fields are of their types, and their numbers finite."""

    def is_whole(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def are_weights(value: object) -> bool:
        return isinstance(value, dict) and all(is_weight(x) for x in value.values())

    def is_above_0(value: Any) -> bool:
        return is_weight(value) and value > 0

    names, temperature = spec.attributes, spec.temperature
    good = {
        "attributes": isinstance(names, list | tuple)
        and 0 < len(names) == len({name for name in names if isinstance(name, str)}),
        "scalar": are_weights(spec.scalar),
        "max_length": is_whole(spec.max_length),
        "seed": spec.seed is None or is_whole(spec.seed),
        "source": isinstance(spec.source, str),
        "data": isinstance(spec.data, str),
        "lora": is_whole(spec.lora.rank) and are_weights({"alpha": spec.lora.alpha}),
        "offset": spec.offset is None or are_weights(spec.offset),
        "ordinal": spec.ordinal is None or _is_scale(spec.ordinal),
        "general_preference": spec.general_preference is None
        or is_above_0(spec.general_preference.beta),
        "temperature": temperature is None or is_above_0(temperature.value),
        "suffix_turn": isinstance(spec.suffix_turn, str),
        "folded": spec.folded is None or are_weights(spec.folded),
    }
    for field, is_good in good.items():
        if not is_good:
            value = getattr(spec, field)
            raise ValueError(f"field {field!r} is {value!r}, which it cannot be")


def _is_scale(scale: OrdinalScale) -> bool:
    """Whether levels are whole numbers, and thresholds numbers that do not fall."""
    whole = type(scale.lowest) is int and type(scale.highest) is int
    rows = [np.asarray(row) for row in scale.thresholds]
    rising = all(np.isfinite(row).all() and (np.diff(row) >= 0).all() for row in rows)
    return whole and scale.lowest < scale.highest and rising


def _read_scale(raw: dict[str, Any] | None) -> OrdinalScale | None:
    if raw is None:
        return None
    scale = OrdinalScale(**raw)
    rows = tuple(tuple(map(float, row)) for row in scale.thresholds)
    if rows and [len(row) for row in rows] != [scale.count] * len(scale.attributes):
        raise ValueError(f"'ordinal' must have {scale.count} thresholds for each attribute")
    return dataclasses.replace(scale, attributes=tuple(scale.attributes), thresholds=rows)


def hf_attributes(raw: dict[str, Any], where: Path, rows: int = 2) -> tuple[str, ...]:
    """The names of the labels in a classification model's `config.json`, in order.

    Args:
      raw: the parsed file.
      where: its path, for messages.
      rows: how many labels there are if the file does not say; transformers leaves it out where
        they are 2.

    Raises:
      UserError: the names are not one for each label.
    """
    labels, count = raw.get("id2label"), raw.get("num_labels")
    if count is not None and (type(count) is not int or not 0 < count <= _MOST_LABELS):
        raise UserError(
            f"{where}: field 'num_labels' is {shortened(repr(count))}, expected a whole number "
            f"from 1 to {_MOST_LABELS:,}"
        )
    if not isinstance(labels, dict):
        labels = {str(i): f"LABEL_{i}" for i in range(rows if count is None else count)}
    elif count not in (None, len(labels)):
        raise UserError(
            f"{where}: field 'num_labels' is {count}, but 'id2label' names {len(labels)} labels"
        )
    try:
        names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    except KeyError as error:
        raise UserError(f"{where}: field 'id2label' has no label {error}") from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"{where}: fields 'id2label' and 'num_labels' must give names, each once")
    return names


def hf_scalar(raw: dict[str, Any], attributes: tuple[str, ...]) -> dict[str, float]:
    """The scalar rule of a classification model's `config.json`: the first label, or none.

    With `problem_type: regression` labels are attributes, and so is one label alone. Other labels
    are classes, such as bad and good, and no field says which of them is the reward.
    """
    if len(attributes) == 1 or raw.get("problem_type") == "regression":
        return {attributes[0]: 1.0}
    return {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(_json(value))


def _json(value: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"the model's files would have numbers that are none ({error})") from error
    return (text + "\n").encode()
