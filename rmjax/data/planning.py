"""Which samples a training step has, and the rows they need.

Samples that must or should stand in one row are a prompt group: the responses to one prompt that
share its tokens, else the two responses of a preference pair, else one sample. A response that is
in several pairs of a group is computed once.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from rmjax.data.packing import pack
from rmjax.data.row_layout import RowShape, Segment, segment_length
from rmjax.data.tokenized import TokenizedData

PromptGroup = np.ndarray  # samples that stand in one row, in ascending order
Row = list[PromptGroup]


class PlannedRows(NamedTuple):
    """The rows of a step, small: a run has those of all its steps in memory.

    Attributes:
      samples: of all groups, one after the other.
      groups: how many samples each group has.
      rows: how many groups each row has.
    """

    samples: Int32[np.ndarray, "n"]
    groups: Int32[np.ndarray, "g"]
    rows: Int32[np.ndarray, "r"]

    def unpacked(self) -> list[Row]:
        """The prompt groups of each row."""
        groups = iter(np.split(self.samples.astype(np.int64), np.cumsum(self.groups)[:-1]))
        return [list(itertools.islice(groups, count)) for count in self.rows.tolist()]


def packed(rows: Sequence[Row]) -> PlannedRows:
    """The same rows, small."""
    groups = [group for row in rows for group in row]
    return PlannedRows(
        np.concatenate([*groups, np.zeros(0, np.int64)]).astype(np.int32),
        np.asarray(list(map(len, groups)), np.int32),
        np.asarray(list(map(len, rows)), np.int32),
    )


_SLOTS_MULTIPLE = 4


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
    begins = np.flatnonzero(np.diff(data.prompt_ids, prepend=-1))
    ends = np.append(begins[1:], len(data))
    plan: list[np.ndarray] = []
    batch: list[int] = []
    taken = epoch = 0
    while True:
        order = np.random.Generator(np.random.Philox([seed, epoch])).permutation(len(begins))
        for prompt in order:
            first, end = int(begins[prompt]), int(ends[prompt])
            for begin in range(first, end, batch_size):
                part = range(begin, min(begin + batch_size, end))
                if len(batch) + len(part) > batch_size:
                    plan.append(np.asarray(batch, np.int64))
                    batch = []
                if steps and len(plan) == steps:
                    return plan
                batch.extend(part)
                taken += len(part)
                if not steps and taken >= budget:
                    return [*plan, np.asarray(batch, np.int64)]
        epoch += 1


def row_shape(
    data: TokenizedData,
    *,
    rows: int,
    length: int,
    packing: bool = True,
    share: bool = True,
    align: int = 1,
) -> RowShape:
    """The shape of rows for `data`, with nearly as many slots as short samples could make use of.

    Args:
      data: the samples.
      rows: see `RowShape`, as `length` and `align`.
      length: token positions of a row.
      packing: whether a row may hold more than one prompt group.
      share: whether the samples of a prompt share their prefix.
      align: of a segment's parts.
    """
    together = data.samples_together
    if not packing:
        prompts = _split_by_prompt(data, np.arange(len(data)))
        most = max(slots_of(data, samples) for samples in prompts)
        return RowShape(rows, length, max(together, most if share else 1), align)
    tokens, own = data.lengths.sum(), data.lengths
    if share:
        first = np.diff(data.prompt_ids, prepend=-1) != 0
        tokens, own = tokens - data.shared[~first].sum(), own - data.shared
    slots = slots_for(length, float(tokens / len(data)))
    fit = length // max(1, int(own.min()))
    return RowShape(rows, length, together * max(1, min(slots, fit) // together), align)


def slots_for(length: int, mean: float) -> int:
    """Slots of a row of `length` token positions for samples that take `mean` of them.

    Twice the mean fill is enough for all but runs of very short samples, which then start a new
    row; a slot costs little, but a hundred of them would not be free.
    """
    return int(np.ceil(2 * length / max(1.0, mean) / _SLOTS_MULTIPLE)) * _SLOTS_MULTIPLE


def plan_rows(
    data: TokenizedData, samples: np.ndarray, shape: RowShape, *, packing: bool, share: bool
) -> list[Row]:
    """The prompt groups of each row; see `prompt_groups`, and `row_shape` for `packing`."""
    groups, lengths = prompt_groups(data, samples, shape, share)
    if not packing:
        return [[group] for group in groups]
    rows = pack(lengths, shape.length, shape.slots, [slots_of(data, group) for group in groups])
    return [[groups[i] for i in row] for row in rows]


def prompt_groups(
    data: TokenizedData, samples: np.ndarray, shape: RowShape, share: bool
) -> tuple[list[PromptGroup], list[int]]:
    """The prompt groups of samples, and the token positions that each takes.

    With sharing these are the responses to one prompt, or as many of them as fit in a row; else
    single samples, or the two of a pair. Nothing is checked: a group that cannot be divided may be
    longer than a row.

    Args:
      data: the samples.
      samples: the chosen ones; responses to one prompt follow each other.
      shape: of the rows.
      share: whether the samples of a group share their prefix.
    """
    groups: list[PromptGroup] = []
    lengths: list[int] = []
    for responses in _split_by_prompt(data, samples):
        for i, atom in enumerate(_separated(data, responses)):
            joined = np.concatenate([groups[-1], atom]) if share and i else atom
            if share and i and slots_of(data, joined) <= shape.slots:
                length = group_length(data, joined, shape.align, share)
                if length <= shape.length:
                    groups[-1], lengths[-1] = joined, length
                    continue
            groups.append(atom)
            lengths.append(group_length(data, atom, shape.align, share))
    return groups, lengths


def longest_atom(data: TokenizedData, samples: np.ndarray, align: int, share: bool) -> int:
    """Token positions of the longest of the samples that cannot be separated.

    Those are the two of each pair, and every other sample alone.
    """
    first = data.chosen[samples]
    pairs, paired = samples[first], first | np.roll(first, 1)
    single = data.lengths[samples[~paired]]
    return int(
        max(
            (-(-single // align) * align).max(initial=0),
            pair_lengths(data, pairs, align, share).max(initial=0),
        )
    )


def pair_lengths(
    data: TokenizedData, chosen: Int64[np.ndarray, "P"], align: int, share: bool
) -> Int64[np.ndarray, "P"]:
    """Token positions that each pair takes in a row, see `group_length`; all at once.

    Args:
      data: the samples; the two of a pair have different tokens.
      chosen: the preferred ones.
      align: of a segment's parts.
      share: whether the two share their prefix.
    """
    one, other = data.lengths[chosen], data.lengths[chosen + 1]
    shared = data.shared[chosen].astype(np.int64) // align * align * share
    rest = -(-(one - shared) // align) - (-(other - shared) // align)
    return shared + rest * align


def group_length(data: TokenizedData, group: PromptGroup, align: int, share: bool) -> int:
    """Token positions that a prompt group takes in a row, the gaps of alignment included."""
    lengths = data.lengths[distinct(data, group)[0]]
    if share:
        return segment_length(lengths, int(data.shared[group[0]]), align)
    return sum(segment_length([length], 0, align) for length in lengths)


def distinct(data: TokenizedData, group: PromptGroup) -> tuple[PromptGroup, Int64[np.ndarray, "n"]]:
    """The samples of a prompt group that are computed, and which of them each of its samples is.

    A response that is in several pairs of the group is one of them.
    """
    if not data.chosen[group].any():
        return group, np.arange(len(group))
    _, first, which = np.unique(data.computed_as[group], return_index=True, return_inverse=True)
    order = np.argsort(first)
    return group[first[order]], np.argsort(order)[which]


def slots_of(data: TokenizedData, group: PromptGroup) -> int:
    """How many slots of a row a prompt group takes."""
    return len(distinct(data, group)[0])


def make_segments(data: TokenizedData, group: PromptGroup, share: bool) -> list[Segment]:
    """The segments of a prompt group: one, or without sharing one for each sample."""
    sequences = [data.sequence(sample) for sample in distinct(data, group)[0]]
    if share:
        return [Segment(sequences, int(data.shared[group[0]]))]
    return [Segment([sequence]) for sequence in sequences]


def _split_by_prompt(data: TokenizedData, samples: np.ndarray) -> list[np.ndarray]:
    """Runs of samples that follow each other and answer one prompt."""
    breaks = (np.diff(samples) != 1) | (np.diff(data.prompt_ids[samples]) != 0)
    return np.split(samples, np.flatnonzero(breaks) + 1)


def _separated(data: TokenizedData, responses: np.ndarray) -> list[PromptGroup]:
    """The responses to one prompt, those of a pair together."""
    together = 2 if data.chosen[responses[0]] else 1
    return np.split(responses, range(together, len(responses), together))
