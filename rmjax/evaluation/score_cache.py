"""Scores of a benchmark's responses: computed once, kept on disk, or read from a file."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.progress import Progress, TimeElapsedColumn

from rmjax.data.tokenizer import Message
from rmjax.errors import UserError
from rmjax.evaluation.items import Data, Item, text_key
from rmjax.inference.scorer import Scorer
from rmjax.models.rewards.aggregation import Rule, scalar_rule

_AT_ONCE = 128  # conversations for each shard of rows, after which what is known is written down
LENGTH = "baseline:length"


@dataclasses.dataclass(frozen=True)
class ItemScores:
    """Of one item's responses, in their order.

    Attributes:
      scores: float64, one row a response, one column an attribute.
      tokens: of the conversations; 0 where nobody counted.
      cut: whether tokens were left out of one of them.
    """

    scores: Float[np.ndarray, "n A"]
    tokens: Int[np.ndarray, "n"]
    cut: Bool[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model's scores of all data.

    Attributes:
      name: of the model, as the user gave it.
      attributes: the scores' columns.
      rule: how they become one value.
      facts: what a report says of the model and the settings, by name.
      work: texts and tokens, computed and spared; empty where nothing was computed.
      items: one list for each of the data.
    """

    name: str
    attributes: tuple[str, ...]
    rule: Rule
    facts: dict[str, Any]
    work: dict[str, float]
    items: list[list[ItemScores]]


class Store:
    """Scores by text in a file of JSON lines, to which only whole lines are added.

    A line that a kill cut short is the last one; it is dropped and scored again.
    """

    def __init__(self, path: Path, attributes: Sequence[str]):
        """Reads what is there.

        Raises:
          UserError: the file holds something else.
        """
        self.path, self.attributes = path, tuple(attributes)
        self.known: dict[str, tuple[list[float], int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        complete = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self._read(line)
                complete += len(line)
            os.truncate(path, complete)

    def _read(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            key, scores = row["key"], [float(row["scores"][name]) for name in self.attributes]
            self.known[key] = (scores, int(row["tokens"]), int(row["cut"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: not a line of this program's ({line[:80]!r}); delete the file"
            ) from error

    def add(self, keys: Sequence[str], scores: Sequence[Any]) -> None:
        """Appends scores of `api.Score` and waits until they are on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            for key, score in zip(keys, scores):
                row = {"key": key, "scores": score.attributes, "tokens": score.tokens}
                file.write(json.dumps(row | {"cut": score.cut}) + "\n")
                self.known[key] = (list(score.attributes.values()), score.tokens, score.cut)
            file.flush()
            os.fsync(file.fileno())


def score_data(scorer: Scorer, data: Sequence[Data], store: Store) -> list[list[ItemScores]]:
    """Scores every response of every item; a text that is known, or there twice, once.

    The longest come first, so that whatever does not fit in memory shows at once.
    """
    wanted: dict[str, list[Message]] = {}
    keys: list[list[list[str]]] = []
    for part in data:
        keys.append([])
        for item in part.items:
            conversations = item.conversations()
            keys[-1].append([text_key(c) for c in conversations])
            wanted |= zip(keys[-1][-1], conversations)
    missing = [key for key in wanted if key not in store.known]
    at_once = _AT_ONCE * scorer.model.options.sharding.row_shards
    with Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), disable=len(missing) < at_once
    ) as progress:
        bar = progress.add_task("scoring", total=len(missing))
        for part in _portions(missing, wanted, at_once):
            store.add(part, scorer.score_many([wanted[key] for key in part]))
            progress.advance(bar, len(part))
    return [[_of_keys(store, responses) for responses in items] for items in keys]


def _of_keys(store: Store, keys: Sequence[str]) -> ItemScores:
    scores, tokens, cut = zip(*(store.known[key] for key in keys))
    return ItemScores(
        np.asarray(scores, np.float64), np.asarray(tokens), np.asarray(cut, np.int64) > 0
    )


def _portions(
    keys: Iterable[str], texts: dict[str, list[Message]], at_once: int
) -> Iterable[list[str]]:
    """Keys about `at_once` at a time, the longest conversations first, siblings together."""
    prompts: dict[str, list[str]] = {}
    for key in keys:
        prompts.setdefault(text_key(texts[key][:-1]), []).append(key)

    def size(members: list[str]) -> int:
        return max(sum(len(m["content"]) for m in texts[key]) for key in members)

    portion: list[str] = []
    for members in sorted(prompts.values(), key=size, reverse=True):
        portion += members
        if len(portion) >= at_once:
            yield portion
            portion = []
    if portion:
        yield portion


# ---- without a model ----------------------------------------------------------------------------


def length_scores(data: Sequence[Data]) -> Scored:
    """Of the baseline that likes the longer response: characters."""
    items = [
        [_unknown_tokens(np.asarray([[len(text)] for text in item.responses])) for item in d.items]
        for d in data
    ]
    rule = scalar_rule("characters", ("characters",))
    return Scored(LENGTH, ("characters",), rule, {"kind": "the response's characters"}, {}, items)


def _unknown_tokens(scores: np.ndarray) -> ItemScores:
    count = len(scores)
    return ItemScores(scores.astype(np.float64), np.zeros(count, int), np.zeros(count, bool))


def read_scores(path: Path, data: Sequence[Data], value: Any = None) -> Scored:
    """Scores from a file of JSON lines, such as the `samples.jsonl` of another evaluation.

    A row has `id`, `scores` (one a response, the good ones first, each a number or a mapping from
    attributes to numbers), and where ids are not unique `benchmark` and `subset`.

    Args:
      path: the file.
      data: what was scored; every item must be there.
      value: a scalar rule; the first attribute if None.

    Raises:
      UserError: naming file and row, or an item without scores.
    """
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            row = _score_row(line, f"{path} row {number}")
            for key in _names(row):
                rows.setdefault(key, []).append(row)  # several: ambiguous, if it is asked for
    if not rows:
        raise UserError(f"{path}: there is no row in it")
    attributes = tuple(next(iter(rows.values()))[0]["scores"][0])
    items = [
        [_of_file(rows, part.label, item, attributes, path) for item in part.items] for part in data
    ]
    rule = scalar_rule(attributes[0] if value is None else value, attributes)
    return Scored(str(path), attributes, rule, {"kind": "a file of scores"}, {}, items)


def _names(row: dict[str, Any]) -> set[tuple[str, str, str]]:
    """What a row may be asked for by: with less than it says of itself, too."""
    benchmark, subset, name = (str(row.get(f, "")) for f in ("benchmark", "subset", "id"))
    return {(benchmark, subset, name), ("", subset, name), ("", "", name)}


def _score_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        scores = [s if isinstance(s, dict) else {"score": s} for s in row["scores"]]
        row["scores"] = [{str(k): float(v) for k, v in score.items()} for score in scores]
        row["id"] = str(row["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: expected an object with 'id' and 'scores', a list with a number or a "
            f"mapping for each response ({error!r})"
        ) from error
    if not row["scores"] or any(set(s) != set(row["scores"][0]) for s in row["scores"]):
        raise UserError(f"{where}: field 'scores' is empty, or its responses differ in attributes")
    return row


def _of_file(
    rows: dict[tuple[str, str, str], list[Any]],
    label: str,
    item: Item,
    attributes: tuple[str, ...],
    path: Path,
) -> ItemScores:
    keys = ((label, item.subset, item.id), ("", item.subset, item.id), ("", "", item.id))
    found = next((rows[key] for key in keys if len(rows.get(key, ())) == 1), None)
    if found is None:
        many = max(len(rows.get(key, ())) for key in keys)
        raise UserError(
            f"{path}: {many or 'no'} rows for {item.where} (benchmark {label!r}, subset "
            f"{item.subset!r}, id {item.id!r})"
        )
    scores = found[0]["scores"]
    if len(scores) != len(item.responses) or tuple(scores[0]) != attributes:
        raise UserError(
            f"{path}: id {item.id!r} has {len(scores)} scores of {', '.join(scores[0])}; expected "
            f"{len(item.responses)} of {', '.join(attributes)}"
        )
    return _unknown_tokens(np.asarray([[s[name] for name in attributes] for s in scores]))
