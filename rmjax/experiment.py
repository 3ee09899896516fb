"""From a config to the parts of a run: directory, model, tokenizer, data, first weights."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax import checkpoint
from rmjax.config import Config, as_flat_dict, check_continues
from rmjax.data.batches import Batches
from rmjax.data.tokenise import TokenizedData, hold_out, load_tokenized
from rmjax.errors import UserError, disk_errors
from rmjax.llama import LlamaConfig
from rmjax.model import ModelOptions, RewardModel
from rmjax.modelfiles import FILE, FORMAT_VERSION, ModelCard, write_model_files
from rmjax.parameters import Params
from rmjax.pretrained import Pretrained, load_params, public_name
from rmjax.sharding import Sharding
from rmjax.step import random_params
from rmjax.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from rmjax.weights import read_json

MODEL_DIRECTORY = "model"
RECORD = "config.json"
_PARTIAL = ".partial"


def open_workdir(config: Config) -> Path:
    """The run's directory: new, empty, or of a run that this config continues.

    Raises:
      UserError: something else is there, or a run that this config cannot continue.
    """
    workdir = Path(config.workdir).expanduser()
    if (workdir / RECORD).exists():
        before = read_json(workdir / RECORD)
        if before.get("format") != "rmjax-run" or not isinstance(before.get("config"), dict):
            raise UserError(f"{workdir / RECORD}: not of an rmjax run; choose another workdir")
        check_continues(before["config"], config)
    elif "[" in str(workdir.absolute()):  # Orbax would fail to save there, without saying so
        raise UserError(f"{workdir}: Orbax cannot save under a path with '['; choose another")
    elif workdir.exists() and not _is_free(workdir):
        raise UserError(
            f"{workdir}: not empty, and not an rmjax run; choose another --config.workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be created ({error.strerror})") from error
    return workdir


def _is_free(workdir: Path) -> bool:
    """Whether nothing is there but what a run leaves that failed before it was recorded."""
    leavings = (checkpoint.DIRECTORY, RECORD + _PARTIAL)
    return workdir.is_dir() and all(
        path.name in leavings and not (path.is_dir() and any(path.iterdir()))
        for path in workdir.iterdir()
    )


def make_model(config: Config, source: Pretrained | None, sharding: Sharding) -> RewardModel:
    """The model to train: the architecture of `source`, else the one the config states.

    Raises:
      UserError: both are there and differ.
    """
    llama = source.llama if source else config.model
    assert llama is not None  # validated
    if source and config.model is not None and config.model != llama:
        raise UserError(
            f"config.model is not the architecture of config.init = {config.init!r}: "
            + _differences(config.model, llama)
        )
    if config.data.max_length > llama.max_position_embeddings and llama.rope.type != "dynamic":
        raise UserError(
            f"config.data.max_length = {config.data.max_length}: the model was made for up to "
            f"{llama.max_position_embeddings} tokens (max_position_embeddings)"
        )
    options = ModelOptions(sharding, dtype=compute_dtype(config.dtype), remat=config.remat)
    return RewardModel(llama, options, len(config.data.attributes))


def _differences(stated: LlamaConfig, found: LlamaConfig) -> str:
    return ", ".join(
        f"{name} is stated as {value!r} but is {getattr(found, name)!r}"
        for name, value in vars(stated).items()
        if value != getattr(found, name)
    )


def compute_dtype(name: str) -> Any:
    """`auto` is bfloat16 on accelerators and float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def pick_tokenizer(config: Config, source: Pretrained | None, vocab_size: int) -> Tokenizer:
    """The tokenizer the config names, else the one of `source`."""
    if config.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
        if len(tokenizer) > vocab_size:
            raise UserError(
                f"config.model.vocab_size = {vocab_size}: the tokenizer `bytes` has "
                f"{len(tokenizer)} tokens"
            )
        return tokenizer
    if config.tokenizer:
        return load_tokenizer(Path(config.tokenizer), vocab_size)
    assert source is not None  # validated
    return source.tokenizer()


def load_data(config: Config, tokenizer: Tokenizer) -> tuple[TokenizedData, TokenizedData | None]:
    """Training and validation samples, tokenised; None where the config names no validation."""
    data = config.data

    def load(source: str, split: str) -> TokenizedData:
        return load_tokenized(
            source,
            split,
            tokenizer,
            attributes=data.attributes,
            label_range=data.label_range,
            max_length=data.max_length,
            over_long=data.over_long,
        )

    train = load(data.train, "train")
    for name, labels in zip(data.attributes, train.labels.T):
        if np.isnan(labels).all():
            raise UserError(f"{train.source}: attribute {name!r} has no label in any sample")
    if data.hold_out:
        return hold_out(train, data.hold_out)
    return train, load(data.validation, "validation") if data.validation else None


def first_params(
    config: Config, source: Pretrained | None, model: RewardModel
) -> tuple[Params, str]:
    """The weights before the first step, and what to say about them."""
    if source is None:
        return random_params(model, config.seed), f"random weights, seed {config.seed}"
    head = f"a fresh head, seed {config.seed}"
    if source.card and source.card.attributes == config.data.attributes:
        head = "its head"
    elif source.card:
        # A head for other attributes cannot be continued; say so, and start a new one.
        head += f" (its own is for {', '.join(source.card.attributes)})"
        source = source.without_head()
    params = load_params(source, model, seed=config.seed, dtype=jnp.float32)
    return params, f"{source.name} with {head}"


def record_run(
    workdir: Path,
    config: Config,
    model: RewardModel,
    tokenizer: Tokenizer,
    data: TokenizedData,
    validation: TokenizedData | None,
) -> None:
    """Stores the resolved config, what the data came to, and the model's files with the run.

    The config comes first: it is what makes the directory a run, which any later failure leaves
    one. The model's files never change, so a run that is continued keeps those it has.
    """
    if jax.process_index() != 0:
        return
    packages = ("rmjax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    record = {
        "format": "rmjax-run",
        "format_version": FORMAT_VERSION,
        "config": as_flat_dict(config),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    card = ModelCard(
        attributes=config.data.attributes,
        scalar={config.data.attributes[0]: 1.0},
        max_length=config.data.max_length,
        seed=config.seed,
        source=public_name(config.init) if config.init else "",
        data=data.key,
    )
    described = {"train": describe_data(data)}
    if validation:
        described["validation"] = describe_data(validation)
    with disk_errors(f"the run's files in {workdir}"):
        _write(workdir / RECORD, record)
        _write(workdir / "data.json", described)
        if not (workdir / MODEL_DIRECTORY / FILE).exists():  # the last of them to be written
            write_model_files(workdir / MODEL_DIRECTORY, model.config, tokenizer, card)


def describe_data(data: TokenizedData) -> dict[str, Any]:
    """Counts by reason, lengths and label statistics, in JSON's types."""
    labels = data.labels.astype(np.float64)
    return {
        "source": data.source,
        "fingerprint": data.key,
        "samples": data.counts,
        "tokens": {
            "mean": float(data.lengths.mean()),
            "max": int(data.lengths.max()),
            "total": int(data.lengths.sum()),
        },
        "labels": {
            name: {
                "count": int((~np.isnan(labels[:, i])).sum()),
                "mean": float(np.nanmean(labels[:, i])),
                "sd": float(np.nanstd(labels[:, i])),
            }
            for i, name in enumerate(data.attributes)
            if not np.isnan(labels[:, i]).all()
        },
    }


def data_position(step: int, batches: Batches, validation: TokenizedData | None) -> dict[str, Any]:
    """Where a run is in its data after a step, and which data these are: part of a checkpoint."""
    return batches.position(step) | {"validation": validation.key if validation else ""}


def check_position(
    position: dict[str, Any], step: int, batches: Batches, validation: TokenizedData | None
) -> None:
    """Raises a `UserError` unless a checkpoint's data position is `step` of these very data."""
    now = data_position(step, batches, validation)
    for data, key in ((batches.data, "data"), (validation, "validation")):
        if position[key] != now[key]:
            raise UserError(
                f"{data.source if data else 'validation'}: the data, the tokenizer or their "
                "settings are not those the run was started with; give those back, or choose "
                "another --config.workdir"
            )
    if position["next_step"] != step:
        raise UserError(f"checkpoint {step} has its data at step {position['next_step']}")
    planned = now["samples"]
    if step <= len(batches) and position["samples"] != planned:
        raise UserError(
            f"after step {step} the run had seen {position['samples']} samples, its last step a "
            f"shorter one; with the new config.steps or config.epochs it would be {planned}. Use "
            "the old values, or another --config.workdir, so that no sample is left out"
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    """Replaces a file whole, so that a full disk or a kill leaves the old one."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
