"""Scores of conversations, each scored once and kept on disk."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.progress import Progress, TimeElapsedColumn

from rmjax.data.conversation import Conversation
from rmjax.data.prefix_groups import prefix_groups
from rmjax.errors import UserError, write_errors
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.items import Item
from rmjax.runtime.files import BAD_JSON, append, check_readable, lock_file

if TYPE_CHECKING:  # heavy to import
    from rmjax.inference.encoded import Encoded
    from rmjax.inference.scorer import Scorer
    from rmjax.inference.scores import Score

_MOST_BYTES = 8 << 30  # of a file, which is read whole
_AT_ONCE = 128  # conversations for each shard of rows, after which their scores are written


@dataclasses.dataclass(frozen=True)
class ItemScores:
    """The scores of one item's responses, in their order.

    Attributes:
      scores: float64, a row for each response, a column for each attribute.
      keys: fingerprints of the conversations' tokens; empty if they are not known.
      tokens: in each conversation; 0 if that is not known.
      cut: whether tokens were cut off.
    """

    scores: Float[np.ndarray, "n A"]
    tokens: Int[np.ndarray, "n"]
    cut: Bool[np.ndarray, "n"]
    keys: tuple[str, ...] = ()

    def without(self, which: Bool[np.ndarray, "n"]) -> "ItemScores":
        """The scores without those of some responses."""
        keys = tuple(key for key, out in zip(self.keys, which) if not out)
        return ItemScores(self.scores[~which], self.tokens[~which], self.cut[~which], keys)


class ScoreCache:
    """Scores by tokens, in a file of JSON lines to which whole lines are appended.

    A line has the conversations that were scored together, since how a score is rounded depends on
    them. If the process is killed while it writes, the last line is incomplete; it is dropped, and
    its conversations are scored again. The file is locked while it is read and while lines are
    added, so that two evaluations at once do not take each other's lines for such ones.
    """

    def __init__(self, path: Path, attributes: Sequence[str]):
        """Reads the file, if there is one.

        Raises:
          UserError: the file holds something else, or cannot be written.
        """
        self.path, self.attributes = path, tuple(attributes)
        self.known: dict[str, tuple[list[float], int, int]] = {}
        with write_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                check_readable(path, _MOST_BYTES)
            with open(path, "a+b", buffering=0) as file:
                lock_file(file, wait=True)
                complete = 0
                for line in path.read_bytes().splitlines(keepends=True):
                    if not line.endswith(b"\n"):
                        break
                    self._read(line)
                    complete += len(line)
                os.truncate(path, complete)

    def _read(self, line: bytes) -> None:
        try:
            for row in json.loads(line):
                key, scores = row["key"], [float(row["scores"][name]) for name in self.attributes]
                if not all(map(math.isfinite, scores)):
                    raise ValueError("a score is not finite")
                self.known[key] = (scores, int(row["tokens"]), int(row["cut"]))
        except BAD_JSON as error:
            raise UserError(
                f"{self.path}: not a line of this program's ({line[:80]!r}); delete the file"
            ) from error

    def add(self, keys: Sequence[str], scores: Sequence["Score"]) -> None:
        """Appends a line of scores, and waits until it is on the disk.

        Raises:
          UserError: the file cannot be written.
        """
        rows = []
        for key, score in zip(keys, scores):
            row = {"key": key, "scores": score.attributes, "tokens": score.tokens}
            rows.append(row | {"cut": score.cut})
            self.known[key] = (list(score.attributes.values()), score.tokens, score.cut)
        with write_errors(str(self.path)), open(self.path, "ab", buffering=0) as file:
            lock_file(file, wait=True)
            append(file, (json.dumps(rows, allow_nan=False) + "\n").encode())

    def of(self, keys: Sequence[str]) -> ItemScores:
        """The scores of the conversations with these keys."""
        scores, tokens, cut = zip(*(self.known[key] for key in keys))
        return ItemScores(
            np.asarray(scores, np.float64),
            np.asarray(tokens),
            np.asarray(cut, np.int64) > 0,
            tuple(keys),
        )


def score_items(
    scorer: "Scorer", data: Sequence[BenchmarkData], cache: ScoreCache
) -> list[list[ItemScores]]:
    """Scores every conversation of every item, each different one once.

    The longest come first: if memory is too small, that shows at once.

    Raises:
      UserError: the chat template refuses a conversation, or shows nothing of its response.
    """
    encoded: dict[str, Encoded] = {}
    keys: list[list[list[str]]] = []
    for part in data:
        keys.append([])
        for item in part.items:
            found = [_encoded(scorer, conversation, item) for conversation in item.conversations]
            keys[-1].append([_key(e.tokens) for e in found])
            encoded |= zip(keys[-1][-1], found)
    missing = {key: e for key, e in encoded.items() if key not in cache.known}
    at_once = _AT_ONCE * scorer.model.options.sharding.row_shards
    with Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), disable=len(missing) < at_once
    ) as progress:
        bar = progress.add_task("scoring", total=len(missing))
        for part in _portions(missing, at_once):
            cache.add(part, scorer.score_encoded([encoded[key] for key in part]))
            progress.advance(bar, len(part))
    return [[cache.of(responses) for responses in items] for items in keys]


def _encoded(scorer: "Scorer", conversation: Conversation, item: Item) -> "Encoded":
    found = scorer.encode(conversation, item.where)
    if not scorer.encoder.shows_response(conversation):
        raise UserError(
            f"{item.where}: the model's chat template shows nothing of the response, so its score "
            "would be the prompt's; leave the item out, or name another --chat-template"
        )
    return found


def _key(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:32]


def _portions(encoded: Mapping[str, "Encoded"], at_once: int) -> Iterator[list[str]]:
    """Keys about `at_once` at a time: longest first, those that share a prefix together."""
    keys, tokens = list(encoded), [e.tokens for e in encoded.values()]
    portion: list[str] = []
    groups = prefix_groups(tokens)
    for group in sorted(groups, key=lambda group: max(len(tokens[i]) for i in group), reverse=True):
        for start in range(0, len(group), at_once):
            portion += [keys[i] for i in group[start : start + at_once]]
            if len(portion) >= at_once:
                yield portion
                portion = []
    if portion:
        yield portion
