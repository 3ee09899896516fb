"""The shapes of a run's rows: as the config says, or as the data choose them."""

from collections.abc import Sequence

import numpy as np

from rmjax.config import Config
from rmjax.data.planning import longest_atom, plan_steps, row_shape
from rmjax.data.row_choice import RowLimits, ShapeOf, choose_shapes
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.models.attention.dispatch import alignment, check_length, computed_share, row_multiple
from rmjax.models.flops import pair_cost
from rmjax.models.model import Model
from rmjax.runtime.sharding import check_divisible
from rmjax.training.experiment import config_objective

_SAMPLES = 8192  # in the steps for which rows are chosen

Recorded = list[list[int]]  # of each shape the rows of a shard and their length


def longest_row(config: Config) -> int:
    """Token positions of a row; where the data choose them, those with which memory is planned.

    That is `max_length`, and with pairs, the two of which stand in one row, twice that. So many
    rows of that length as `rows_per_device` says are the most that is computed at once.
    """
    data = config.data
    return data.row_length or data.max_length * (2 if config_objective(config).pairs else 1)


def row_limits(config: Config, model: Model, part: int = 2) -> RowLimits:
    """What rows a run may have whose data choose them, `part` of its places at once at least."""
    name, sharding = model.options.attention, model.options.sharding
    places = config.rows_per_device * longest_row(config)
    return RowLimits(
        places=places,
        least=-(-places // part),
        shards=sharding.row_shards,
        multiple=row_multiple(name, sharding),
        attention=computed_share(name) * pair_cost(model.config),
    )


def run_shapes(
    config: Config,
    model: Model,
    data: TokenizedData,
    validation: TokenizedData | None,
    recorded: Recorded | None = None,
) -> tuple[RowShape, ...]:
    """The shapes of a run's rows, everything fitting in the first; see `choose_shapes`.

    They are chosen for steps of the data's first epoch, whatever the number of steps, so that a run
    that is made longer computes the same.

    Args:
      config: of the run.
      model: that is trained.
      data: to train on.
      validation: held out, if anything is.
      recorded: what the run chose when it began, if it did. It is chosen again if it will not do
        any more: on another mesh, or with fewer `rows_per_device`.

    Raises:
      UserError: rows do not divide over the mesh, or the kernel cannot compute them.
    """
    share, packing, name = config.data.share_prompts, config.data.packing, model.options.attention

    def shape_of(rows: int, length: int) -> RowShape:
        align = alignment(name, length, model.config)
        return row_shape(data, rows=rows, length=length, packing=packing, share=share, align=align)

    sharding = model.options.sharding
    if config.data.row_length:
        rows, length = config.rows_per_device * sharding.row_shards, config.data.row_length
        placed = sharding.activation(("row", "length"))
        check_divisible("rows of config.data.row_length", (rows, length), placed)
        return (shape_of(rows, length),)
    limits = row_limits(config, model)
    align = alignment(
        name, 2 * longest_row(config), model.config
    )  # enough for whatever length is chosen
    longest = max(
        longest_atom(part, np.arange(len(part)), align, share)
        for part in (data, validation)
        if part is not None
    )
    shapes = recorded_shapes(recorded, longest, limits, shape_of)
    if not shapes:
        count = -(-min(len(data), _SAMPLES) // config.batch_size)
        steps = plan_steps(data, batch_size=config.batch_size, seed=config.seed, steps=count)
        shapes = choose_shapes(data, steps, longest, limits, shape_of, packing=packing, share=share)
    check_length(name, shapes[0].length)
    return shapes


def recorded_shapes(
    recorded: Recorded | None, longest: int, limits: RowLimits, shape_of: ShapeOf
) -> tuple[RowShape, ...]:
    """The shapes that a run has on record; none if it has none, or none within these limits."""
    found = recorded or []
    if not found or found[0][1] < longest:
        return ()
    for rows, length in found:
        if limits.length(length) != length or (rows > 1 and rows * length > limits.places):
            return ()
    return tuple(shape_of(rows * limits.shards, length) for rows, length in found)


def record_of(shapes: Sequence[RowShape], limits: RowLimits) -> Recorded:
    """What a run puts on record of its shapes."""
    return [[shape.rows // limits.shards, shape.length] for shape in shapes]
