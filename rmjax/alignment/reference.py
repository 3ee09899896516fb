"""The policy before its first step, with which the policy that learns is compared."""

import dataclasses

import numpy as np
from jaxtyping import Float32

from rmjax.alignment.weights import copied, picked
from rmjax.data.batches import Batches
from rmjax.inference.score_step import make_token_scores, score_tokens
from rmjax.models.decoder_config import NO_LORA
from rmjax.models.model import Model
from rmjax.models.parameters import Params


class Reference:
    """What the policy was, in the dtype of the computation.

    LoRA's frozen weights are that, because its adapters begin with a product of 0: then nothing is
    kept beside the policy. Else it is a copy, sharded as the policy is.
    """

    def __init__(self, model: Model, first: Params | None):
        """Copies what it needs.

        Args:
          model: that is trained.
          first: the policy's parameters before its first step; None with LoRA.
        """
        self._model = dataclasses.replace(model, lora=NO_LORA)
        self._wanted = self._model.abstract(model.options.dtype)
        self._scores = make_token_scores(self._model)
        self._params = None if first is None else copied(first, self._wanted)

    def scores(self, params: Params, batches: Batches) -> Float32[np.ndarray, "T"]:
        """The log-probability of each of the data's tokens; see `score_tokens`.

        Args:
          params: the policy's as they are now.
          batches: of the samples.
        """
        kept = picked(params, self._wanted) if self._params is None else self._params
        return score_tokens(self._scores, kept, batches, self._model.options.sharding)[0]


def reference_shapes(model: Model) -> Params:
    """Shapes, dtypes and shardings of what is kept for the reference: nothing with LoRA."""
    return {} if model.lora.rank else model.abstract(model.options.dtype)
