"""The data of a run: which data sets its config asks for, and where in them a checkpoint is."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax.config import Config
from rmjax.data.batches import Batches
from rmjax.data.planning import pair_lengths, plan_steps
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenized import TokenizedData, hold_out, join, subset
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.models.attention.dispatch import alignment
from rmjax.models.model import Model
from rmjax.training.experiment import config_objective
from rmjax.training.rows import Recorded, longest_row, run_shapes


def load_planned(
    config: Config, model: Model, tokenizer: Tokenizer, recorded: Recorded | None = None
) -> tuple[TokenizedData, TokenizedData | None, list[np.ndarray], tuple[RowShape, ...]]:
    """Training and validation samples, see `load_data`, a run's steps, and their rows.

    `recorded` is what the run has on record of its rows; see `run_shapes`.

    Raises:
      UserError: bad data, or rows that do not divide over the mesh.
    """
    align = alignment(model.options.attention, longest_row(config), model.config)
    data, validation = load_data(config, tokenizer, config.data.share_prompts, align)
    plan = plan_steps(
        data,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
        epochs=config.epochs,
    )
    return data, validation, plan, run_shapes(config, model, data, validation, recorded)


def load_data(
    config: Config, tokenizer: Tokenizer, share: bool, align: int = 1
) -> tuple[TokenizedData, TokenizedData | None]:
    """Training and validation samples, tokenized; None where the config names no validation.

    Where the objective learns from ratings and pairs, the ratings come first in both.

    Args:
      config: of the run.
      tokenizer: of the model.
      share: whether the samples of a prompt share their prefix in a row.
      align: see `RowShape`.

    Raises:
      UserError: bad data, naming file, row and field.
    """
    data, objective = config.data, config_objective(config)
    trained, held = [], []
    if objective.ratings or not objective.pairs:  # a policy's responses, if there are no pairs
        trained.append(_load(config, tokenizer, data.train, "train", pairs=False))
        if data.validation:
            held.append(_load(config, tokenizer, data.validation, "validation", pairs=False))
    if objective.pairs:
        train = data.pairs or data.train
        validation = data.validation_pairs or data.validation
        for source, split, parts in (train, "train", trained), (validation, "validation", held):
            if source:
                pairs = _load(config, tokenizer, source, split, pairs=True)
                parts.append(fit_pairs(pairs, config, share, align))
    _check_apart(trained, held)
    if data.hold_out:
        trained, held = hold_out(trained, data.hold_out)
    return functools.reduce(join, trained), functools.reduce(join, held) if held else None


def _check_apart(trained: Sequence[TokenizedData], held: Sequence[TokenizedData]) -> None:
    """Raises a `UserError` if the same rows are trained on and held out.

    What they hold is compared, and where they stand in their files: a path can be written in many
    ways, and a copy has another one.
    """
    for part, other in itertools.product(held, trained):
        if _are_same(part, other):
            again = f" (as {other.source})" if other.source != part.source else ""
            raise UserError(
                f"{part.source}: the same rows are there for training{again} and for validation; "
                "say in a column 'split' which are which, or let config.data.hold_out be a share "
                "of the prompts instead of config.data.validation"
            )


def _are_same(one: TokenizedData, other: TokenizedData) -> bool:
    """Whether two sets are of the same rows. Of most sets, their lengths say that they are not."""
    names = ("rows", "chosen", "offsets", "labels", "tokens")
    arrays = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in arrays)


def _load(
    config: Config, tokenizer: Tokenizer, source: str, split: str, pairs: bool
) -> TokenizedData:
    settings, objective = config.data, config_objective(config)
    # The reward that pairs train need not be rated as well.
    unrated = config.preference.attribute if settings.pairs else ""
    data = load_tokenized(
        source,
        split,
        tokenizer,
        attributes=() if objective.policy else settings.attributes,
        label_range=settings.label_range,
        max_length=settings.max_length,
        over_long=settings.over_long,
        pairs=pairs,
        compare=settings.compare if pairs else "",
        ties=config.preference.ties,
        unrated=unrated,
        policy=objective.policy,
        turns=settings.turns,
    )
    if objective.levels and not pairs:
        _check_levels(data)
    if pairs and objective.strengths:
        unknown = np.flatnonzero(np.isnan(data.strengths))
        if len(unknown):
            raise UserError(
                f"{data.where(int(unknown[0]))}: config.objective = {config.objective!r} needs to "
                "know how much better the chosen response is: a field 'preference_strength', "
                "'margin' or 'strength'"
            )
    for name, labels in zip(data.attributes, data.labels.T):
        if split == "train" and not pairs and name != unrated and np.isnan(labels).all():
            raise UserError(f"{data.source}: attribute {name!r} has no label in any sample")
    return data


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
    """The pairs that fit in a row; `config.data.over_long` says whether others are an error.

    Where the data choose the rows, all do.

    Raises:
      UserError: one does not fit, and must not be dropped.
    """
    if not config.data.row_length:
        return data
    pairs = np.arange(len(data)).reshape(-1, 2)
    lengths = pair_lengths(data, pairs[:, 0], align, share)
    long = np.flatnonzero(lengths > config.data.row_length)
    if not len(long):
        return data
    if config.data.over_long != "drop":
        raise UserError(
            f"{data.where(2 * int(long[0]))}: the pair takes {lengths[long[0]]} places, a row has "
            f"{config.data.row_length}: raise config.data.row_length (twice data.max_length is "
            "always enough), let it be 0, or let data.over_long be 'drop'"
        )
    kept = subset(data, np.delete(pairs, long, axis=0).ravel())
    counts = data.counts | {
        "dropped: too long for a row": len(long),
        "kept": len(kept) // 2,
        "prompts": kept.counts["prompts"],
    }
    return dataclasses.replace(kept, counts=counts)


def data_position(step: int, batches: Batches, validation: TokenizedData | None) -> dict[str, Any]:
    """Where a run is in its data after a step, and in which data: part of a checkpoint."""
    return batches.position(step) | {"validation": validation.key if validation else ""}


def check_position(
    position: dict[str, Any], step: int, batches: Batches, validation: TokenizedData | None
) -> None:
    """Raises a `UserError` unless a checkpoint's data position is `step` of the same data."""
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
