"""The files in a run's `rollouts/`: answers with their rewards, and scores by other judges."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.data.messages import message_text
from rmjax.runtime.files import BAD_JSON


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers to one prompt.

    Attributes:
      prompt: its messages, as text.
      tools: how many tools it offers.
      texts: of the answers.
      ended: whether each came to an end by itself.
      lengths: the tokens of each.
      rewards: of each; NaN where there is none.
      attributes: of each, by name, where its reward has some.
    """

    prompt: str
    tools: int
    texts: tuple[str, ...]
    ended: tuple[bool, ...]
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]
    attributes: tuple[dict[str, float], ...]

    @property
    def asked(self) -> tuple[str, int]:
        """What tells prompts apart."""
        return self.prompt, self.tools


def by_prompt(rows: Sequence[Sequence[float]]) -> Float[np.ndarray, "P"]:
    """The mean over each prompt's answers, of those that have a value; NaN if none has."""
    known = [np.asarray(row, float) for row in rows]
    known = [row[np.isfinite(row)] for row in known]
    return np.asarray([row.mean() if len(row) else np.nan for row in known], float)


def read_answers(path: Path) -> list[Answers]:
    """The rows of a file of samples, as `alignment.rollouts.write_rollout` writes it.

    A file that did not change is not read again, so that a page can be drawn often.

    Raises:
      ValueError: it is damaged.
      OSError: it cannot be read.
    """
    stat = path.stat()
    return list(_answers(path, stat.st_mtime_ns, stat.st_size))


def read_scores(path: Path, answers: Sequence[Answers]) -> list[list[float]]:
    """A judge's scores of some answers, as `rmjax.score` writes them; NaN where there is none.

    Raises:
      ValueError: it is damaged, or of other answers.
      OSError: it cannot be read.
    """
    found = read_answers(path)
    if [(x.asked, x.texts) for x in found] != [(x.asked, x.texts) for x in answers]:
        raise ValueError("it is of other answers")
    return [list(row.rewards) for row in found]


@functools.cache
def _answers(path: Path, changed: int, size: int) -> tuple[Answers, ...]:
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found.append(_row(json.loads(line)))
            except BAD_JSON as error:
                raise ValueError(f"row {number}: {type(error).__name__}: {error}") from error
    if not found:
        raise ValueError("there is no row in it")
    return tuple(found)


def _row(row: Any) -> Answers:
    texts = tuple(map(str, row["responses"]))
    columns = [row["ended"], row["token_ids"], row["scores"]]
    attributes = row.get("attributes") or [None] * len(texts)
    if {len(column) for column in (*columns, attributes)} != {len(texts)} or not texts:
        raise ValueError("fields of different lengths")
    ended, tokens, scores = columns
    return Answers(
        _prompt_text(row["prompt"]),
        len(row.get("tools") or ()),
        texts,
        tuple(map(bool, ended)),
        tuple(map(len, tokens)),
        tuple(map(_number, scores)),
        tuple({str(k): _number(v) for k, v in (x or {}).items()} for x in attributes),
    )


def _prompt_text(messages: Sequence[dict[str, Any]]) -> str:
    """A single message is its text; of several each begins with who says it."""
    if len(messages) == 1:
        return message_text(messages[0])
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in messages)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
