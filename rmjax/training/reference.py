"""What the policy said before its first step: the reference that pairs hold it to.

The reference never changes, so each response's log-probability is computed once, before training,
and no second model is in memory during it. A run that is continued finds the numbers in the cache,
or computes them again from where it began.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from rich.console import Console

from rmjax.checkpoints.pretrained import Pretrained
from rmjax.config import Config
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData, subset, with_reference
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import ScoreFn, score_batches
from rmjax.models.model import Model
from rmjax.training.experiment import first_params
from rmjax.training.features import Compute, cached_values, describe_model, fingerprint_weights


def with_references(
    config: Config,
    source: Pretrained | None,
    model: Model,
    score: ScoreFn,
    data: TokenizedData,
    validation: TokenizedData | None,
    plan: Sequence[np.ndarray],
    shape: RowShape,
    console: Console,
) -> tuple[TokenizedData, TokenizedData | None]:
    """Training and validation samples with their log-probabilities by the first weights.

    Training samples that no step has get none: a short run on much data need not wait for them.
    The weights are read only if one is missing, and are not kept.

    Args:
      config: of the run.
      source: of its first weights; None for random ones.
      model: the policy.
      score: from `make_score`.
      data: to train on.
      validation: held out, if anything is.
      plan: the training samples of each step.
      shape: of the run's rows.
      console: to say on how far it is.

    Raises:
      UserError: a log-probability is not finite, or the cache cannot be written.
    """
    weights = fingerprint_weights(source) if source else f"random, seed {config.seed}"
    made_by = describe_model(model, weights, source) | {"head": repr(model.head)}

    @functools.cache
    def load() -> Compute:
        params, _ = first_params(config, source, model)
        return lambda batches: score_batches(score, params, batches, model.options.sharding)

    def known(whole: TokenizedData, wanted: Int[np.ndarray, "n"]) -> TokenizedData:
        settings = config.data
        part = whole if len(wanted) == len(whole) else subset(whole, wanted)
        batches = evaluation_batches(
            part, shape, packing=settings.packing, share=settings.share_prompts
        )
        values = np.full(len(whole), np.nan, np.float32)
        values[wanted] = cached_values("references", batches, made_by, 1, load, console)[:, 0]
        return with_reference(whole, values)

    held_out = known(validation, np.arange(len(validation))) if validation is not None else None
    return known(data, np.unique(np.concatenate(plan))), held_out
