"""From a config to the parts of a run: model, tokenizer, data, first weights."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.config import Config
from rmjax.data.batches import Batches, unit_places
from rmjax.data.tokenise import TokenizedData, hold_out, load_tokenized, subset
from rmjax.errors import UserError
from rmjax.kernels import choose
from rmjax.llama import LlamaConfig
from rmjax.model import ModelOptions, RewardModel
from rmjax.objectives import OBJECTIVES
from rmjax.parameters import Params
from rmjax.pretrained import Pretrained, load_params
from rmjax.rows import Pairs
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
    return RewardModel(llama, options, len(config.data.attributes), config.lora)


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

    Args:
      config: of the run.
      tokenizer: of the model.
      share: whether a row holds what the samples of a prompt begin with once.
      align: see `RowShape`.
    """
    data = config.data
    pairs = OBJECTIVES[config.objective].targets is Pairs

    def load(source: str, split: str) -> TokenizedData:
        loaded = load_tokenized(
            source,
            split,
            tokenizer,
            attributes=data.attributes,
            label_range=data.label_range,
            max_length=data.max_length,
            over_long=data.over_long,
            pairs=pairs,
        )
        return fit_pairs(loaded, config, share, align) if pairs else loaded

    train = load(data.train, "train")
    for name, labels in zip(data.attributes, train.labels.T):  # pairs have none
        if np.isnan(labels).all():
            raise UserError(f"{train.source}: attribute {name!r} has no label in any sample")
    if data.hold_out:
        return hold_out(train, data.hold_out)
    return train, load(data.validation, "validation") if data.validation else None


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
    head = f"a fresh head, seed {config.seed}"
    if source.card and source.card.attributes == config.data.attributes:
        head = "its head"
    elif source.card:
        # A head for other attributes cannot be continued; say so, and start a new one.
        head += f" (its own is for {', '.join(source.card.attributes)})"
        source = source.without_head()
    dtype = model.options.dtype if model.lora.rank else jnp.float32
    params = load_params(source, model, seed=config.seed, dtype=dtype)
    return params, f"{source.name} with {head}"


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
