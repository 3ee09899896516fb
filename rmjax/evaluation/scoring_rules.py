"""From values to credits: what each item of a benchmark earns.

Every rule gives a table, one row a unit (an item, or for ties a prompt) and one column a part,
NaN where the part is not defined. A subset's score is the weighted sum of the columns' means, so
that units can be drawn again for intervals, and compared one by one between models.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rmjax.errors import UserError
from rmjax.evaluation.items import Item

Values = Sequence[Float[np.ndarray, "n"]]


class Credits(NamedTuple):
    """What units earned.

    Attributes:
      parts: names of the columns.
      weights: of the columns in the score.
      table: float64, one row a unit; NaN where a part is not defined.
      units: for each row the numbers of the items it is made of.
    """

    parts: tuple[str, ...]
    weights: tuple[float, ...]
    table: Float[np.ndarray, "U C"]
    units: tuple[tuple[int, ...], ...]

    @property
    def score(self) -> float:
        """Of all units; NaN without any."""
        return float(weighted_mean(self.table[None], self.weights)[0])

    @property
    def by_unit(self) -> Float[np.ndarray, "U"]:
        """Each unit's own contribution; parts that are not defined count 0."""
        return np.nan_to_num(self.table) @ np.asarray(self.weights)


def weighted_mean(
    tables: Float[np.ndarray, "B U C"], weights: Sequence[float]
) -> Float[np.ndarray, "B"]:
    """Sum over columns of weight x mean of what is defined; a column without anything is 0."""
    if not tables.shape[1]:
        return np.full(len(tables), np.nan)
    defined = ~np.isnan(tables)
    sums = np.where(defined, tables, 0.0).sum(axis=1)
    means = sums / np.maximum(defined.sum(axis=1), 1)
    return means @ np.asarray(weights)


def pairs(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """1 where each good response has a higher value than each bad one, `ties` for the lowest tie.

    Strict as RewardBench and JudgeBench have it with `ties` 0; the metrics of runs take one half.
    """
    table = []
    for item, value in zip(items, values):
        gap = value[: item.good].min() - value[item.good :].max()
        table.append([1.0 if gap > 0 else ties if gap == 0 else 0.0])
    return Credits(("accuracy",), (1.0,), _table(table, 1), _each(items))


def best_of(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """1 / (responses tied at the maximum) if a good one is among them, else 0 (RewardBench 2).

    Where several good ones are tied with bad ones, the chance that one drawn from the tie is good.
    """
    table = []
    for item, value in zip(items, values):
        top = value == value.max()
        table.append([top[: item.good].sum() / top.sum()])
    return Credits(("accuracy",), (1.0,), _table(table, 1), _each(items))


def styles(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """RM-Bench: chosen i against rejected j, styles from concise (0) to markdown (2).

    Easy: the chosen one is in the richer style (lower triangle); normal: the same; hard: a plainer.
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

    The gap is that of the worst right answer over the best wrong one, the spread that between the
    best and the worst right answer.
    """
    found: dict[str, dict[str, int]] = {}
    for number, item in enumerate(items):
        kind, _, prompt = item.id.partition(":")
        if kind not in ("ref", "tied") or not prompt:
            raise UserError(f"{item.where}: id {item.id!r}, expected 'ref:N' or 'tied:N'")
        if kind in found.setdefault(prompt, {}):
            raise UserError(f"{item.where}: id {item.id!r} is there twice")
        found[prompt][kind] = number
    table, units = [], []
    for kinds in found.values():
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
    """The columns of one prompt, from its gaps; a kind that is missing is None."""
    parts = [np.nan if gap is None else float(gap > 0) for gap in (tied, ref)]
    if tied is None or ref is None or np.isnan(spread):
        return [*parts, np.nan, np.nan, np.nan]
    both = min(tied, ref)
    margin = np.tanh(both / spread - 1) if spread > 0 else np.nan
    return [*parts, float(tied > spread), float(both > spread), margin]


def ratings(items: Sequence[Item], values: Values, ties: float) -> Credits:
    """By prompt, the share of pairs of responses with different ratings that values order alike.

    Equal values count one half. A prompt without such a pair is not defined.
    """
    table = []
    for item, value in zip(items, values):
        better, worse = ordered(item)
        right = (1 + np.sign(value[better] - value[worse])) / 2
        table.append([right.mean() if len(right) else np.nan])
    return Credits(("accuracy",), (1.0,), _table(table, 1), _each(items))


def ordered(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Every two responses of which the first is worth more than the second, as two index arrays."""
    gold = np.asarray(item.gold)
    better, worse = np.nonzero(gold[:, None] > gold[None, :])
    return better, worse


def _table(rows: list[list[float]], columns: int) -> Float[np.ndarray, "U C"]:
    return np.asarray(rows, np.float64).reshape(-1, columns)


def _each(items: Sequence[Item]) -> tuple[tuple[int, ...], ...]:
    return tuple((number,) for number in range(len(items)))


Rule = Callable[[Sequence[Item], Values, float], Credits]
RULES: dict[str, Rule] = {
    "pairs": pairs,
    "best_of": best_of,
    "styles": styles,
    "ties": ties,
    "ratings": ratings,
}
