"""Heads: what reads the hidden states of a decoder. Values beside it, of which it knows nothing.

B row, P position, D embed, A attribute, V vocab
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from rmjax.models.attention.mask import soft_capped
from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.inputs import Rows
from rmjax.models.parameters import (
    HEAD,
    LM_HEAD,
    Parameter,
    Params,
    axis_sizes,
    decoder_parameters,
)


@dataclasses.dataclass(frozen=True)
class RewardHead:
    """A vector of attributes at the last token of each sample.

    Attributes:
      attributes: how many.
      everywhere: whether it reads every token instead, as a critic does.
    """

    attributes: int
    everywhere: bool = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its rows of the table."""
        return (HEAD,)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes that the decoder does not have."""
        return {"attribute": self.attributes}

    def positions(self, rows: Rows) -> Int32[Array, "B P"] | None:
        """Where it reads; None for every token."""
        return None if self.everywhere else rows.last_token_index

    def __call__(self, params: Params, hidden: Float[Array, "B P D"]) -> Float32[Array, "B P A"]:
        """The scores of hidden states; of the parameters it takes its own."""
        # Full float32: accelerators otherwise round the factors to bfloat16 or tf32.
        return jnp.einsum(
            "bpd,da->bpa",
            hidden.astype(jnp.float32),
            params[HEAD.path].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )


@dataclasses.dataclass(frozen=True)
class LanguageModelHead:
    """The logits of the next token.

    Attributes:
      tied: whether the embedding is the matrix (`tie_word_embeddings`).
      soft_cap: logits x become c tanh(x / c), where it is c (`final_logit_softcapping`).
    """

    tied: bool
    soft_cap: float | None = None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its rows of the table."""
        return () if self.tied else (LM_HEAD,)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes that the decoder does not have."""
        return {}

    def positions(self, rows: Rows) -> Int32[Array, "B P"] | None:
        """Where it reads; None for every token."""
        return None

    def __call__(self, params: Params, hidden: Float[Array, "B P D"]) -> Float32[Array, "B P V"]:
        """The logits of hidden states, a product in their dtype that is summed in float32."""
        logits = jnp.einsum(
            "bpd,dv->bpv",
            hidden,
            self.matrix(params).astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return soft_capped(logits, self.soft_cap)

    def matrix(self, params: Params) -> Float[Array, "D V"]:
        """From hidden states to logits."""
        return params["embed"].T if self.tied else params[LM_HEAD.path]


Head = RewardHead | LanguageModelHead


def language_model_head(config: DecoderConfig) -> LanguageModelHead:
    """The head of a language model with such a decoder."""
    return LanguageModelHead(config.tie_word_embeddings, config.final_logit_softcapping)


def model_parameters(
    config: DecoderConfig, head: Head, lora: LoraConfig = NO_LORA
) -> tuple[Parameter, ...]:
    """The rows of the table that a decoder and a head have."""
    return (*decoder_parameters(config, lora), *head.parameters)


def head_outputs(config: DecoderConfig, head: Head) -> int:
    """Numbers that a head gives at each place that it reads."""
    return head.attributes if isinstance(head, RewardHead) else config.vocab_size


def model_sizes(config: DecoderConfig, head: Head, lora: LoraConfig = NO_LORA) -> dict[str, int]:
    """The size of every axis of `model_parameters`."""
    return axis_sizes(config, lora) | head.sizes
