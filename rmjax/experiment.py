"""From a config to the parts of a run: model, tokenizer, data, first weights."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.config import Config
from rmjax.data.batches import Batches, unit_places
from rmjax.data.tokenise import TokenizedData, hold_out, join, load_tokenized, subset
from rmjax.errors import UserError
from rmjax.kernels import choose
from rmjax.llama import LlamaConfig
from rmjax.model import ModelOptions, RewardModel
from rmjax.objectives import Objective, make_objective
from rmjax.parameters import Params
from rmjax.pretrained import Pretrained, load_params
from rmjax.sharding import Sharding
from rmjax.step import random_params
from rmjax.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer


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
    dtype = compute_dtype(config.dtype)
    kernel = choose(config.attention, llama, sharding, dtype, config.row_length)
    options = ModelOptions(sharding, dtype=dtype, remat=config.remat, attention=kernel)
    return new_model(config, llama, options)


def new_model(config: Config, llama: LlamaConfig, options: ModelOptions) -> RewardModel:
    """The model that a config trains: its head, its adapters, its objective's thresholds."""
    count, thresholds = len(config.data.attributes), config_objective(config).thresholds
    return RewardModel(llama, options, count, config.lora, thresholds=thresholds)


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


def load_data(
    config: Config, tokenizer: Tokenizer, share: bool, align: int = 1
) -> tuple[TokenizedData, TokenizedData | None]:
    """Training and validation samples, tokenised; None where the config names no validation.

    Where the objective learns from ratings and pairs, the ratings come first in both.

    Args:
      config: of the run.
      tokenizer: of the model.
      share: whether a row holds what the samples of a prompt begin with once.
      align: see `RowShape`.

    Raises:
      UserError: bad data, naming file, row and field.
    """
    data, objective = config.data, config_objective(config)
    trained, held = [], []
    if objective.ratings:
        trained.append(_load(config, tokenizer, data.train, "train", pairs=False))
        if data.validation:
            held.append(_load(config, tokenizer, data.validation, "validation", pairs=False))
    if objective.pairs:
        train = data.pairs or data.train
        validation = data.validation_pairs or data.validation
        for source, split, parts in (train, "train", trained), (validation, "validation", held):
            if source:
                found = _load(config, tokenizer, source, split, pairs=True)
                parts.append(fit_pairs(found, config, share, align))
    if data.hold_out:
        trained, held = map(list, zip(*(hold_out(part, data.hold_out) for part in trained)))
    return functools.reduce(join, trained), functools.reduce(join, held) if held else None


def config_objective(config: Config) -> Objective:
    """The objective that a config names."""
    data = config.data
    return make_objective(config.objective, data.attributes, config.preference, data.label_range)


def _load(
    config: Config, tokenizer: Tokenizer, source: str, split: str, pairs: bool
) -> TokenizedData:
    data = config.data
    # The reward that pairs train need not be rated as well.
    unrated = config.preference.attribute if data.pairs else ""
    found = load_tokenized(
        source,
        split,
        tokenizer,
        attributes=data.attributes,
        label_range=data.label_range,
        max_length=data.max_length,
        over_long=data.over_long,
        pairs=pairs,
        compare=data.compare if pairs else "",
        ties=config.preference.ties,
        unrated=unrated,
    )
    objective = config_objective(config)
    if objective.levels and not pairs:
        _check_levels(found)
    if pairs and objective.strengths:
        unknown = np.flatnonzero(np.isnan(found.strengths))
        if len(unknown):
            raise UserError(
                f"{found.where(int(unknown[0]))}: config.objective = {config.objective!r} needs to "
                "know how much better the chosen response is: a field 'preference_strength', "
                "'margin' or 'strength'"
            )
    for name, labels in zip(data.attributes, found.labels.T):
        if split == "train" and not pairs and name != unrated and np.isnan(labels).all():
            raise UserError(f"{found.source}: attribute {name!r} has no label in any sample")
    return found


def _check_levels(data: TokenizedData) -> None:
    """Raises a `UserError` if a rating is between two levels."""
    between = np.argwhere(~np.isnan(data.labels) & (data.labels != np.round(data.labels)))
    if len(between):
        sample, column = between[0].tolist()
        raise UserError(
            f"{data.where(sample)}: {data.attributes[column]!r} is rated "
            f"{data.labels[sample, column]:g}, and the levels of config.objective 'ordinal' are "
            "whole numbers; round the ratings, or use 'regression'"
        )


def fit_pairs(data: TokenizedData, config: Config, share: bool, align: int = 1) -> TokenizedData:
    """Without the pairs that do not fit in a row; `data.over_long` says whether that is an error.

    Raises:
      UserError: one does not fit, and must not be dropped.
    """
    found = np.arange(len(data)).reshape(-1, 2)
    taken = np.asarray([unit_places(data, pair, align, share) for pair in found])
    long = np.flatnonzero(taken > config.row_length)
    if not len(long):
        return data
    if config.data.over_long != "drop":
        raise UserError(
            f"{data.where(2 * int(long[0]))}: the pair takes {taken[long[0]]} places, a row has "
            f"{config.row_length}: raise config.data.row_length (twice data.max_length is always "
            "enough), or let data.over_long be 'drop'"
        )
    kept = subset(data, np.delete(found, long, axis=0).ravel())
    counts = data.counts | {
        "dropped: too long for a row": len(long),
        "kept": len(kept) // 2,
        "prompts": kept.counts["prompts"],
    }
    return dataclasses.replace(kept, counts=counts)


def shares_prompts(config: Config, llama: LlamaConfig) -> bool:
    """Whether rows hold what the responses to a prompt begin with once.

    Not with dynamic RoPE, where a sample's own length changes what its first tokens become.
    """
    return config.data.share_prompts and llama.rope.type != "dynamic"


def first_params(
    config: Config, source: Pretrained | None, model: RewardModel
) -> tuple[Params, str]:
    """The weights before the first step, and what to say about them."""
    if source is None:
        return random_params(model, config.seed), f"random weights, seed {config.seed}"
    source, origin = with_first_head(config, source)
    dtype = model.options.dtype if model.lora.rank else jnp.float32
    return load_params(source, model, seed=config.seed, dtype=dtype), origin


def with_first_head(config: Config, source: Pretrained) -> tuple[Pretrained, str]:
    """`source`, without its head if a fresh one is to be made; and what to say about both."""
    head = f"a fresh head, seed {config.seed}"
    if source.card and source.card.attributes == config.data.attributes:
        head = "its head"
    elif source.card:
        # A head for other attributes cannot be continued; say so, and start a new one.
        head += f" (its own is for {', '.join(source.card.attributes)})"
        source = source.without_head()
    return source, f"{source.name} with {head}"


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
