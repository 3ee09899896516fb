"""The fit of a head: features extracted, the two ways to fit, and what they print."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32
from rich.console import Console

from rmjax.checkpoints.hf_mapping import from_hf
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.orbax_weights import named_weights
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.config import Config
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.evaluation.metrics import attribute_metrics, mean_ratings
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_features, score_batches
from rmjax.models.init import random_head
from rmjax.models.model import Model
from rmjax.models.parameters import HEAD
from rmjax.training.console import attribute_table, pair_table
from rmjax.training.experiment import config_objective, with_first_head
from rmjax.training.features import (
    Compute,
    cached_values,
    describe_model,
    fingerprint_weights,
)
from rmjax.training.probing.adamw import head_scores, train_head
from rmjax.training.probing.ridge import Ridge, fit_ridge
from rmjax.training.validation import ValidationMetrics, validation_metrics


@dataclasses.dataclass(frozen=True)
class Samples:
    """Tokenised samples and what the head reads of them."""

    data: TokenizedData
    features: Float32[np.ndarray, "N D"]


def extract(
    config: Config,
    source: Pretrained,
    model: Model,
    data: TokenizedData,
    validation: TokenizedData | None,
    shape: RowShape,
    console: Console,
) -> tuple[Samples, Samples | None]:
    """The samples with their features; the weights are read only if one is missing."""
    made_by = describe_model(model, fingerprint_weights(source), source)

    @functools.cache
    def load() -> Compute:
        # Not in float32 where products round them anyway: half the memory and the same numbers.
        read = with_first_head(config, source)[0]
        params = load_params(read, model, seed=config.seed, dtype=model.options.dtype)
        compute = make_features(model)
        return lambda batches: score_batches(compute, params, batches, model.options.sharding)

    def samples(data: TokenizedData) -> Samples:
        settings, width = config.data, model.config.hidden_size
        batches = evaluation_batches(
            data, shape, packing=settings.packing, share=settings.share_prompts
        )
        return Samples(data, cached_values("features", batches, made_by, width, load, console))

    return samples(data), samples(validation) if validation is not None else None


def show_ridge(
    config: Config, train: Samples, held: Samples | None, console: Console
) -> np.ndarray:
    """The head by ridge regression; prints how it was found and what it is worth."""
    data = train.data
    ridge = fit_ridge(train.features, data.labels, data.prompt_ids, data.attributes)
    for name, strength, freedom in zip(data.attributes, ridge.strengths, ridge.freedom):
        console.print(
            f"ridge       {name}: strength {strength:.1e} of the largest eigenvalue, "
            f"{freedom:.1f} degrees of freedom"
        )
    if held:
        evaluation = head_metrics(config, ridge.head, held, data)
        show_metrics(f"held-out data (loss {evaluation.loss:.4f})", evaluation, console)
    else:
        show_left_out(ridge, data, console)
    return ridge.head


def show_left_out(ridge: Ridge, data: TokenizedData, console: Console) -> None:
    """What the heads without a prompt say of it: what there is to see without held-out data."""
    rated = attribute_metrics(
        data.attributes, ridge.left_out, data.labels, data.prompt_ids, mean_ratings(data.labels)
    )
    console.print()
    console.print(attribute_table("training data, each prompt left out in turn", rated))
    console.print(
        "The strengths were chosen by these very errors, which makes them a little small."
    )


def show_training(
    config: Config,
    source: Pretrained,
    model: Model,
    train: Samples,
    held: Samples | None,
    console: Console,
) -> np.ndarray:
    """The head by AdamW; prints how it went and what it is worth."""
    found: dict[int, ValidationMetrics] = {}

    def validation_loss(step: int, head: np.ndarray) -> float:
        assert held is not None
        found[step] = head_metrics(config, head, held, train.data)
        console.print(f"step {step}: validation loss {found[step].loss:.4f}")
        return found[step].loss

    head, origin = first_head(config, source, model)
    console.print(f"weights     {origin}")
    trained = train_head(
        config, model, head, train.features, train.data, validation_loss if held else None
    )
    console.print(
        f"steps       {trained.steps}; training loss {trained.losses[0]:.4f} in the first, "
        f"{trained.losses[-1]:.4f} in the last"
    )
    if held:
        title = f"held-out data, step {trained.step} (best validation loss, "
        show_metrics(f"{title}{found[trained.step].loss:.4f})", found[trained.step], console)
    return trained.head


def first_head(config: Config, source: Pretrained, model: Model) -> tuple[np.ndarray, str]:
    """The head before the first step, that of `experiment.first_params`, and what to say of it."""
    source, origin = with_first_head(config, source)
    if source.spec is None:
        return np.asarray(random_head(model, config.seed)), origin
    tensor = named_weights(source).read(HEAD.hf_key)
    return from_hf(HEAD, tensor, model.sizes).astype(np.float32), origin


def head_metrics(
    config: Config, head: np.ndarray, held: Samples, train: TokenizedData
) -> ValidationMetrics:
    """The objective and the metrics of a head on held-out samples."""
    scores = head_scores(held.features, head)
    return validation_metrics(
        scores, held.data, mean_ratings(train.labels), config_objective(config)
    )


def show_metrics(title: str, evaluation: ValidationMetrics, console: Console) -> None:
    """Prints the tables of an evaluation."""
    console.print()
    if evaluation.attributes:
        console.print(attribute_table(title, evaluation.attributes))
    if evaluation.pairs:
        console.print(pair_table(title, evaluation.pairs))
