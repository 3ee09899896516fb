"""From a config to the parts of a run: model, tokenizer, data, first weights."""

from pathlib import Path

import jax.numpy as jnp

from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.config import Config
from rmjax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from rmjax.errors import UserError, differing
from rmjax.models.attention.dispatch import choose
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import Head, RewardHead, language_model_head
from rmjax.models.init import random_params
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import Sharding
from rmjax.training.objectives.objective import Objective, is_policy, objective_of


def make_model(config: Config, source: Pretrained | None, sharding: Sharding) -> Model:
    """The model to train: the architecture of `source`, else the one the config states.

    Raises:
      UserError: both are there and differ; or a policy is to begin with a reward model.
    """
    if source and source.spec and is_policy(config.objective):
        raise UserError(
            f"config.init = {config.init!r}: a reward model, which has no language-model head, and "
            f"config.objective = {config.objective!r} trains a policy; name a language model"
        )
    decoder = source.decoder if source else config.model
    assert decoder is not None  # validated
    if source and config.model is not None and config.model != decoder:
        raise UserError(
            f"config.model is not the architecture of config.init = {config.init!r}: "
            + ", ".join(
                f"{name} is stated as {stated!r} but is {read!r}"
                for name, (stated, read) in differing(vars(config.model), vars(decoder)).items()
            )
        )
    if config.data.max_length > decoder.max_position_embeddings:
        raise UserError(
            f"config.data.max_length = {config.data.max_length}: the model was made for up to "
            f"{decoder.max_position_embeddings} tokens (max_position_embeddings)"
        )
    dtype = compute_dtype(config.dtype)
    kernel = choose(config.attention, decoder, sharding, dtype, config.data.row_length)
    options = ModelOptions(sharding, dtype=dtype, remat=config.remat, attention=kernel)
    return new_model(config, decoder, options)


def new_model(config: Config, decoder: DecoderConfig, options: ModelOptions) -> Model:
    """The model that a config trains: a decoder, its adapters, and a head."""
    return Model(decoder, options, new_head(config, decoder), config.lora)


def new_head(config: Config, decoder: DecoderConfig) -> Head:
    """The head that a config trains: a language model's for a policy, else a reward model's."""
    if is_policy(config.objective):
        return language_model_head(decoder)
    return RewardHead(len(config.data.attributes))


def pick_tokenizer(config: Config, source: Pretrained | None, vocab_size: int) -> Tokenizer:
    """The tokenizer the config names, else the one of `source`, which was opened for it."""
    if config.tokenizer == "bytes":
        if config.chat_template:
            raise UserError(
                f"config.chat_template = {config.chat_template!r}: the tokenizer `bytes` has one "
                "template; leave it empty"
            )
        tokenizer = byte_tokenizer()
        if len(tokenizer) > vocab_size:
            raise UserError(
                f"config.model.vocab_size = {vocab_size}: the tokenizer `bytes` has "
                f"{len(tokenizer)} tokens"
            )
        return tokenizer
    if config.tokenizer:
        return load_tokenizer(Path(config.tokenizer), vocab_size, config.chat_template)
    assert source is not None  # validated
    return source.tokenizer()


def config_objective(config: Config) -> Objective:
    """The objective that a config names."""
    return objective_of(config)


def first_params(config: Config, source: Pretrained | None, model: Model) -> tuple[Params, str]:
    """The model's parameters and the objective's own before the first step, and what to say."""
    if source is None:
        params, origin = random_params(model, config.seed), f"random weights, seed {config.seed}"
    else:
        origin = source.name
        if not is_policy(config.objective):
            source, origin = with_first_head(config, source)
        dtype = model.options.dtype if model.lora.rank else jnp.float32
        params = load_params(source, model, seed=config.seed, dtype=dtype)
    objective = config_objective(config)
    own = objective.abstract(model.sizes, model.options.sharding)
    return params | objective.first_params(own, source.spec if source else None), origin


def with_first_head(config: Config, source: Pretrained) -> tuple[Pretrained, str]:
    """`source`, without its head if a fresh one is to be made; and what to say about both."""
    head = f"a fresh head, seed {config.seed}"
    if source.spec and source.spec.attributes == config.data.attributes:
        if source.spec.suffix_turn:
            raise UserError(
                f"config.init = {source.name!r}: its head reads the answer to the question "
                f"{source.spec.suffix_turn!r}, which training does not ask; name other "
                "config.data.attributes for a fresh head, which is read at the response's end"
            )
        head = "its head"
        if source.spec.offset:
            head += " (without the constant that was added to its numbers)"
    elif source.spec:
        # A head for other attributes cannot be continued; say so, and start a new one.
        head += f" (its own is for {', '.join(source.spec.attributes)})"
        source = source.without_head()
    elif source.value_head:
        head += (
            " (its value head is left out; `rmjax.convert hf-to-orbax --head=value_head` takes it)"
        )
    return source, f"{source.name} with {head}"
