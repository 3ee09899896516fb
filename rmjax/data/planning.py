"""Which samples a step has, and the rows they need."""

import numpy as np
from jaxtyping import Int64

from rmjax.data.row_layout import Group, RowShape, places
from rmjax.data.tokenized import TokenizedData

_SLOTS_MULTIPLE = 4


Unit = np.ndarray  # samples that must stand in one row, in ascending order


def row_shape(
    data: TokenizedData,
    *,
    rows: int,
    length: int,
    packing: bool = True,
    share: bool = True,
    align: int = 1,
) -> RowShape:
    """A row's shape for `data`: as many slots as short samples could ever make use of, nearly."""
    together = data.samples_together
    if not packing:
        most = max(map(len, _siblings(data, np.arange(len(data)))))
        return RowShape(rows, length, max(together, most if share else 1), align)
    taken = data.lengths.sum() - (_spared(data) if share else 0)
    slots = slots_for(length, float(taken / len(data)))
    own = data.lengths - (data.shared if share else 0)
    fit = length // max(1, int(own.min()))
    return RowShape(rows, length, together * max(1, min(slots, fit) // together), align)


def _spared(data: TokenizedData) -> int:
    """Tokens that need no place of their own when all siblings share what they begin with."""
    first = np.diff(data.groups, prepend=-1) != 0
    return int(data.shared[~first].sum())


def slots_for(length: int, mean: float) -> int:
    """Slots of a row of `length` places for samples that take `mean` of them.

    Twice the mean fill is enough for all but runs of very short samples, which then start a new
    row; a slot costs little, but a hundred of them would not be free.
    """
    return int(np.ceil(2 * length / max(1.0, mean) / _SLOTS_MULTIPLE)) * _SLOTS_MULTIPLE


def epoch_order(data: TokenizedData, seed: int, epoch: int) -> list[Int64[np.ndarray, "..."]]:
    """The samples of each prompt, the prompts in this epoch's order."""
    groups = np.split(np.arange(len(data)), np.flatnonzero(np.diff(data.groups)) + 1)
    order = np.random.Generator(np.random.Philox([seed, epoch])).permutation(len(groups))
    return [groups[i] for i in order]


def plan_steps(
    data: TokenizedData, *, batch_size: int, seed: int, steps: int = 0, epochs: float = 0.0
) -> list[Int64[np.ndarray, "..."]]:
    """The samples of each step of a run.

    Prompts keep their responses together: a step takes prompts until the next one would exceed
    `batch_size` responses. Only a prompt with more responses than that is split. Epochs follow
    each other without a gap; with `epochs`, the last step holds what is left.

    Args:
      data: the samples.
      batch_size: responses a step, at most; a multiple of the samples that stay together.
      seed: of the order.
      steps: how many steps; or
      epochs: how often to see the data, perhaps a fraction. The other is 0.
    """
    budget = round(epochs * len(data))
    plan: list[np.ndarray] = []
    batch: list[np.ndarray] = []
    filled = taken = epoch = 0
    while True:
        for group in epoch_order(data, seed, epoch):
            for part in np.split(group, range(batch_size, len(group), batch_size)):
                if filled + len(part) > batch_size:
                    plan.append(np.concatenate(batch))
                    batch, filled = [], 0
                if steps and len(plan) == steps:
                    return plan
                batch.append(part)
                filled += len(part)
                taken += len(part)
                if not steps and taken >= budget:
                    return [*plan, np.concatenate(batch)]
        epoch += 1


def _siblings(data: TokenizedData, samples: np.ndarray) -> list[np.ndarray]:
    """Runs of samples that follow each other and answer one prompt."""
    breaks = (np.diff(samples) != 1) | (np.diff(data.groups[samples]) != 0)
    return np.split(samples, np.flatnonzero(breaks) + 1)


def units(
    data: TokenizedData, samples: np.ndarray, shape: RowShape, share: bool
) -> tuple[list[Unit], list[int]]:
    """What stands in one row together, and the places it takes.

    Sharing, that is the responses to one prompt, or as many of them as fit in a row; else single
    samples, or the two of a pair.

    Args:
      data: the samples.
      samples: those of a step; siblings follow each other.
      shape: of the rows.
      share: whether siblings share what they begin with.

    Raises:
      ValueError: something that cannot be divided is longer than a row.
    """
    found: list[Unit] = []
    taken: list[int] = []
    for run in _siblings(data, samples):
        together = 2 if data.chosen[run[0]] else 1
        atoms = np.split(run, range(together, len(run), together))
        for i, atom in enumerate(atoms):
            if share and i and len(found[-1]) + together <= shape.slots:
                joined = np.concatenate([found[-1], atom])
                size = unit_places(data, joined, shape.align, share)
                if size <= shape.length:
                    found[-1], taken[-1] = joined, size
                    continue
            found.append(atom)
            taken.append(unit_places(data, atom, shape.align, share))
    return found, taken


def unit_places(data: TokenizedData, unit: Unit, align: int, share: bool) -> int:
    """Token places that the samples of a unit take in a row."""
    lengths = data.lengths[unit]
    if share:
        return places(lengths, int(data.shared[unit[0]]), align)
    return sum(places([length], 0, align) for length in lengths)


def unit_groups(data: TokenizedData, unit: Unit, share: bool) -> list[Group]:
    """How a unit's samples are laid out: as one group, or each by itself."""
    sequences = [data.sequence(sample) for sample in unit]
    if share:
        return [Group(sequences, int(data.shared[unit[0]]))]
    return [Group([sequence]) for sequence in sequences]
