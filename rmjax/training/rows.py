"""The shapes of a run's rows: as the config says, or as the data choose them."""

from collections.abc import Sequence

import numpy as np

from rmjax.config import Config
from rmjax.data.planning import longest_atom, row_shape
from rmjax.data.row_choice import RowLimits, ShapeOf, choose_shapes
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.models.attention.dispatch import alignment, check_length, computed_share, row_multiple
from rmjax.models.flops import pair_cost
from rmjax.models.model import Model
from rmjax.runtime.sharding import check_divisible
from rmjax.training.experiment import config_objective

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
    plan: Sequence[np.ndarray],
    recorded: Recorded | None = None,
) -> tuple[RowShape, ...]:
    """The shapes of a run's rows, everything fitting in the first; see `choose_shapes`.

    Args:
      config: of the run.
      model: that is trained.
      data: to train on.
      validation: held out, if anything is.
      plan: the training samples of each step.
      recorded: what the run chose when it began, if it did. It is chosen again if the mesh has
        changed so that it will not do.

    Raises:
      UserError: rows do not divide over the mesh, or the kernel cannot compute them.
    """
    share, packing, name = config.data.share_prompts, config.data.packing, model.options.attention

    def shape_of(rows: int, length: int) -> RowShape:
        align = alignment(name, length)
        return row_shape(data, rows=rows, length=length, packing=packing, share=share, align=align)

    sharding = model.options.sharding
    if config.data.row_length:
        rows, length = config.rows_per_device * sharding.row_shards, config.data.row_length
        placed = sharding.activation(("row", "length"))
        check_divisible("rows of config.data.row_length", (rows, length), placed)
        return (shape_of(rows, length),)
    limits = row_limits(config, model)
    align = alignment(name, 2 * longest_row(config))  # enough for whatever length is chosen
    longest = max(
        longest_atom(part, np.arange(len(part)), align, share)
        for part in (data, validation)
        if part is not None
    )
    shapes = recorded_shapes(recorded, limits, shape_of) or choose_shapes(
        data, plan, longest, limits, shape_of, packing=packing, share=share
    )
    check_length(name, shapes[0].length)
    return shapes


def recorded_shapes(
    recorded: Recorded | None, limits: RowLimits, shape_of: ShapeOf
) -> tuple[RowShape, ...]:
    """The shapes that a run has on record; none if it has none, or none for this mesh."""
    found = recorded or []
    if any(limits.length(length) != length for _, length in found):
        return ()
    return tuple(shape_of(rows * limits.shards, length) for rows, length in found)


def record_of(shapes: Sequence[RowShape], limits: RowLimits) -> Recorded:
    """What a run puts on record of its shapes."""
    return [[shape.rows // limits.shards, shape.length] for shape in shapes]
