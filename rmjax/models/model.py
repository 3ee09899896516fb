"""A model: a decoder and a head beside it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rmjax.models.decoder import Decoder
from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.heads import Head, LanguageModelHead, model_parameters, model_sizes
from rmjax.models.inputs import Rows
from rmjax.models.layers import ModelOptions
from rmjax.models.log_probabilities import LogProbabilities, log_probabilities, next_tokens
from rmjax.models.parameters import Parameter, Params, abstract_params


@dataclasses.dataclass(frozen=True)
class Model:
    """What is computed, and how. A value: the parameters are apart.

    Attributes:
      config: of the decoder.
      options: how it is computed.
      head: what reads its hidden states.
      lora: the decoder's adapters.
    """

    config: DecoderConfig
    options: ModelOptions
    head: Head
    lora: LoraConfig = NO_LORA

    @property
    def decoder(self) -> Decoder:
        """The trunk."""
        return Decoder(self.config, self.options, self.lora)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The rows of the table that it has."""
        return model_parameters(self.config, self.head, self.lora)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis of its parameters."""
        return model_sizes(self.config, self.head, self.lora)

    def abstract(self, dtype: Any = jnp.float32) -> Params:
        """Shapes, dtypes and shardings of its parameters; see `parameters.abstract_params`."""
        return abstract_params(self.parameters, self.sizes, self.options.sharding, dtype)

    def hidden(
        self, params: Params, rows: Rows, dropout: jax.Array | None = None
    ) -> Float[Array, "B P D"]:
        """What the head reads, traced into whatever is being compiled; see `__call__`."""
        rngs = {} if dropout is None else {"dropout": dropout}
        positions = self.head.positions(rows)
        states: Any = self.decoder.apply({"params": params}, rows, positions, rngs=rngs)
        return states

    def __call__(
        self, params: Params, rows: Rows, dropout: jax.Array | None = None
    ) -> Float[Array, "B P ..."]:
        """What the head makes of rows, traced into whatever is being compiled.

        That is scores [B, S, A] of every sample slot, arbitrary finite numbers in slots without a
        sample; or logits [B, L, V] of every token.

        Args:
          params: the parameters.
          rows: the samples.
          dropout: the key of LoRA's dropout; None for none, as in scoring.
        """
        return self.head(params, self.hidden(params, rows, dropout))

    def log_probabilities(
        self,
        params: Params,
        rows: Rows,
        wanted: Bool[Array, "B L"],
        dropout: jax.Array | None = None,
    ) -> LogProbabilities:
        """What a language model says of the token behind each wanted place; see `__call__`.

        Args:
          params: the parameters.
          rows: the samples.
          wanted: the places; none that ends a sample, or a prefix that several share.
          dropout: the key of LoRA's dropout; None for none.
        """
        assert isinstance(self.head, LanguageModelHead)
        hidden, matrix = self.hidden(params, rows, dropout), self.head.matrix(params)
        return log_probabilities(
            hidden,
            matrix,
            next_tokens(rows),
            wanted,
            self.options.sharding,
            self.head.soft_cap,
        )


def compute_dtype(name: str) -> Any:
    """`auto` is bfloat16 on accelerators and float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
