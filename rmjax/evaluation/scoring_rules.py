"""The scoring rules: from the values of responses to the credit that each benchmark item earns.

Every rule returns a table with one row for each unit (an item, or for Ties a prompt) and one column
for each part of the score, NaN where a part is not defined. A subset's score is the weighted sum of
the columns' means. So units can be drawn again for intervals, and compared between two models.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rmjax.errors import UserError
from rmjax.evaluation.items import Item
from rmjax.evaluation.metrics import pair_credits

Values = Sequence[Float[np.ndarray, "n"]]


class Credits(NamedTuple):
    """What the units of a subset earn.

    Attributes:
      parts: names of the columns.
      weights: of the columns in the score.
      table: float64, one row for each unit; NaN where a part is not defined.
      units: for each row, the numbers of its items.
    """

    parts: tuple[str, ...]
    weights: tuple[float, ...]
    table: Float[np.ndarray, "U C"]
    units: tuple[tuple[int, ...], ...]

    @property
    def score(self) -> float:
        """The subset's score; NaN if it is not defined for any unit."""
        return float(weighted_mean(self.table[None], self.weights)[0])

    @property
    def by_unit(self) -> Float[np.ndarray, "U"]:
        """Each unit's own credit; parts that are not defined count 0."""
        return np.nan_to_num(self.table) @ np.asarray(self.weights)


def weighted_mean(
    tables: Float[np.ndarray, "B U C"], weights: Sequence[float]
) -> Float[np.ndarray, "B"]:
    """Sum over columns of weight x mean of the defined entries; an empty column counts 0.

    NaN where no entry is defined at all.
    """
    means = column_means(tables)
    sums = np.nan_to_num(means) @ np.asarray(weights)
    return np.where(np.isnan(means).all(axis=-1), np.nan, sums)


def column_means(tables: Float[np.ndarray, "*B U C"]) -> Float[np.ndarray, "*B C"]:
    """Mean of each column's defined entries; NaN without any."""
    defined = ~np.isnan(tables)
    counts = defined.sum(axis=-2)
    sums = np.where(defined, tables, 0.0).sum(axis=-2)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def pairs(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """1 if all good responses have higher values than all bad ones, `ties` if the worst pair ties.

    RewardBench and JudgeBench count a tie as wrong (`ties` 0); a run's metrics count one half.
    """
    table = []
    for item, value in zip(items, values):
        gap = value[: item.good].min() - value[item.good :].max()
        table.append([1.0 if gap > 0 else ties if gap == 0 else 0.0])
    return Credits(("accuracy",), (1.0,), _table(table, 1), _each(items))


def best_of(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """The share of good responses among those with the highest value (RewardBench 2).

    With one good response: 1 / (responses tied at the maximum) if it is among them, else 0.
    """
    table = []
    for item, value in zip(items, values):
        top = value == value.max()
        table.append([top[: item.good].sum() / top.sum()])
    return Credits(("accuracy",), (1.0,), _table(table, 1), _each(items))


def styles(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """RM-Bench: each chosen response against each rejected one, in styles from concise to markdown.

    Easy: the chosen one has the richer style (lower triangle). Normal: both have the same style
    (diagonal). Hard: the chosen one has the plainer style.
    """
    table = []
    for item, value in zip(items, values):
        if item.good != 3 or len(value) != 6:
            raise UserError(
                f"{item.where}: {item.good} chosen and {len(value) - item.good} rejected "
                "responses; RM-Bench has three styles of each"
            )
        right = value[:3, None] > value[None, 3:]
        lower, upper = right[np.tril_indices(3, -1)], right[np.triu_indices(3, 1)]
        table.append([lower.mean(), np.diag(right).mean(), upper.mean()])
    return Credits(("easy", "normal", "hard"), (1 / 3,) * 3, _table(table, 3), _each(items))


_TIES = (
    ("tied accuracy", 0.3),
    ("reference accuracy", 0.3),
    ("gap", 0.2),
    ("gap of both", 0.2),
    ("margin", 0.01),
)


def ties(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """RewardBench 2's Ties: a prompt with one right answer (`ref:N`), one with several (`tied:N`).

    The gap is the worst right answer's value minus the best wrong one's. The spread is the best
    right answer's value minus the worst right one's.
    """
    numbers: dict[str, dict[str, int]] = {}
    for number, item in enumerate(items):
        kind, _, prompt = item.id.partition(":")
        if kind not in ("ref", "tied") or not prompt:
            raise UserError(f"{item.where}: id {item.id!r}, expected 'ref:N' or 'tied:N'")
        if kind in numbers.setdefault(prompt, {}):
            raise UserError(f"{item.where}: id {item.id!r} is there twice")
        numbers[prompt][kind] = number
    table, units = [], []
    for kinds in numbers.values():
        gaps, spread = {}, np.nan
        for kind, number in kinds.items():
            good, bad = np.split(values[number], [items[number].good])
            gaps[kind] = good.min() - bad.max()
            if kind == "tied" and len(good) > 1:
                spread = good.max() - good.min()
        table.append(_tie_parts(gaps.get("tied"), gaps.get("ref"), spread))
        units.append(tuple(kinds.values()))
    names, weights = tuple(name for name, _ in _TIES), tuple(weight for _, weight in _TIES)
    return Credits(names, weights, _table(table, len(_TIES)), tuple(units))


def _tie_parts(tied: float | None, ref: float | None, spread: float) -> list[float]:
    """The columns of one prompt from its gaps; None for a kind that is missing."""
    parts = [np.nan if gap is None else float(gap > 0) for gap in (tied, ref)]
    if tied is None or ref is None or np.isnan(spread):
        return [*parts, np.nan, np.nan, np.nan]
    both = min(tied, ref)
    margin = np.tanh(both / spread - 1) if spread > 0 else np.nan
    return [*parts, float(tied > spread), float(both > spread), margin]


def correctness(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """PPE's correctness: for each prompt, the share of its pairs that the values order rightly.

    `ties` is the credit of equal values. The second column, which has no weight, is PPE's end
    score: whether the response of the highest value is good, or the share of good ones among
    several of that value. The first is NaN without a pair.
    """
    table = []
    for item, value in zip(items, values):
        better, worse = np.asarray(item.pairs, int).reshape(-1, 2).T
        gaps = value[better] - value[worse]
        credit = np.where(gaps > 0, 1.0, np.where(gaps == 0, ties, 0.0))
        top = value == value.max()
        end = top[: item.good].sum() / top.sum()
        table.append([credit.mean() if len(credit) else np.nan, end])
    return Credits(("accuracy", "best of all"), (1.0, 0.0), _table(table, 2), _each(items))


def ratings(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """For each prompt, the share of pairs of responses that the values order as the ratings do.

    Pairs with equal ratings are left out; equal values count one half. NaN without such a pair.
    """
    table = []
    for item, value in zip(items, values):
        better, worse = ordered_pairs(item)
        right = pair_credits(value[better] - value[worse])
        table.append([right.mean() if len(right) else np.nan])
    return Credits(("accuracy",), (1.0,), _table(table, 1), _each(items))


def ordered_pairs(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the better and of the worse response, for every two of different gold."""
    gold = np.asarray(item.gold)
    better, worse = np.nonzero(gold[:, None] > gold[None, :])
    return better, worse


def _table(rows: list[list[float]], columns: int) -> Float[np.ndarray, "U C"]:
    return np.asarray(rows, np.float64).reshape(-1, columns)


def _each(items: Sequence[Item]) -> tuple[tuple[int, ...], ...]:
    return tuple((number,) for number in range(len(items)))


SCORING_RULES: dict[str, Callable[[Sequence[Item], Values, float], Credits]] = {
    "pairs": pairs,
    "best_of": best_of,
    "styles": styles,
    "ties": ties,
    "correctness": correctness,
    "ratings": ratings,
}
