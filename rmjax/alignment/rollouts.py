"""A step's samples with their rewards: made, written before they are learned from, read again.

The file of a step has a row for each prompt, as `rmjax.sample` and `rmjax.score` write it, so that
people can look at it and the other commands read it. It is written twice, each time whole or not at
all: when the samples are there, and when their rewards are. What rewards may fail, and then nothing
is sampled again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int64

from rmjax.alignment.prompts import Prompts
from rmjax.data.tokenized import TokenizedData, in_memory
from rmjax.errors import UserError, write_errors
from rmjax.generation.completions import Completion
from rmjax.runtime.files import BAD_JSON, replace_file
from rmjax.runtime.processes import barrier, from_first

DIRECTORY = "rollouts"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The samples of a step.

    Attributes:
      numbers: of the prompts.
      completions: the samples of each, as many of every one.
      rewards: NaN where there is none.
      attributes: by name, where the reward has some.
      rewarded: whether the rewards were asked for.
      weights: how many steps had made the weights that sampled.
    """

    numbers: Int64[np.ndarray, "P"]
    completions: list[list[Completion]]
    rewards: Float64[np.ndarray, "P n"]
    attributes: list[list[dict[str, float] | None]] | None = None
    rewarded: bool = True
    weights: int | None = None

    @property
    def ended(self) -> Bool[np.ndarray, "P n"]:
        """Which samples came to an end by themselves."""
        return np.asarray([[c.ended for c in samples] for samples in self.completions])

    @property
    def lengths(self) -> Float64[np.ndarray, "P n"]:
        """Tokens of each sample."""
        return np.asarray([[float(len(c.tokens)) for c in s] for s in self.completions])

    def of_prompts(self, which: Int64[np.ndarray, "p"]) -> "Rollout":
        """The samples of some of the step's prompts."""
        rows = which.tolist()
        return Rollout(
            self.numbers[which],
            [self.completions[i] for i in rows],
            self.rewards[which],
            self.attributes and [self.attributes[i] for i in rows],
        )

    def data(self, prompts: Prompts) -> TokenizedData:
        """The samples as tokens, prompt after prompt."""
        tokens, of, spoken = [], [], []
        for number, samples in zip(self.numbers.tolist(), self.completions):
            asked = prompts.tokens[number]
            for completion in samples:
                tokens.append(np.concatenate([asked, completion.tokens]).astype(np.int32))
                spoken.append(np.arange(len(tokens[-1])) >= len(asked))
                of.append(number)
        return in_memory(tokens, of, spoken)[0]

    def sampled_log_probabilities(self, data: TokenizedData) -> np.ndarray:
        """What the sampler said of each of the data's tokens; 0 of the prompts'."""
        values = np.zeros(len(data.tokens), np.float32)
        samples = [completion for samples in self.completions for completion in samples]
        for completion, end in zip(samples, data.offsets[1:]):
            values[end - len(completion.tokens) : end] = completion.log_probabilities
        return values


def rollout_file(workdir: Path, step: int) -> Path:
    """Where the samples of a step are."""
    return workdir / DIRECTORY / f"step-{step:06d}.jsonl"


def held_out_file(workdir: Path, step: int) -> Path:
    """Where the samples of held-out prompts after a step are."""
    return workdir / DIRECTORY / f"held-out-{step:06d}.jsonl"


def write_rollout(path: Path, rollout: Rollout, prompts: Prompts, made_by: dict[str, Any]) -> None:
    """Writes samples with their rewards, whole or not at all; process 0 does."""
    if jax.process_index() != 0:
        return
    lines = []
    for row, number in enumerate(rollout.numbers.tolist()):
        samples, asked = rollout.completions[row], prompts.conversations[number]
        rewards = rollout.rewards[row].tolist()
        fields: dict[str, Any] = {"prompt": asked.messages, "number": number} | made_by
        fields["weights"] = rollout.weights
        if asked.tools:
            fields["tools"] = asked.tools
        fields |= {
            "responses": [c.text for c in samples],
            "ended": [c.ended for c in samples],
            "reasons": [c.reason for c in samples],
            "stops": [c.stop for c in samples],
            "token_ids": [c.tokens.tolist() for c in samples],
            # The shortest decimals that read back as the same float32.
            "log_probabilities": [
                [float(str(x)) for x in np.asarray(c.log_probabilities, np.float32)]
                for c in samples
            ],
        }
        if rollout.rewarded:
            fields["scores"] = [None if np.isnan(value) else value for value in rewards]
        if rollout.attributes:
            fields["attributes"] = rollout.attributes[row]
        lines.append(json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n")
    with write_errors(str(path)):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, "".join(lines).encode())


def read_rollout(path: Path, made_by: dict[str, Any], numbers: Sequence[int]) -> Rollout | None:
    """The samples that a killed step left; None if there are none. Every process must ask.

    Raises:
      UserError: the file is of other prompts or another seed, or damaged; or a process does not see
        there what process 0 does.
    """
    text = path.read_bytes() if path.exists() else b""
    digest = hashlib.sha256(text).hexdigest()
    if digest != from_first("samples", lambda: digest):
        raise UserError(
            f"{path}: not what process 0 reads there; config.workdir must be on a file system that "
            "all processes share"
        )
    barrier(f"{path.name} is read")  # process 0 may write it again as soon as it knows rewards
    if not text:
        return None
    try:
        # Not `splitlines`: samples may hold other characters that end lines, such as U+0085.
        rows = [json.loads(line) for line in text.decode().removesuffix("\n").split("\n")]
        found = [row["number"] for row in rows]
        if found != [*numbers] or any(row.get(k) != v for row in rows for k, v in made_by.items()):
            raise UserError(f"{path}: not of this step of this run; remove it")
        completions = [
            [
                Completion(
                    np.asarray(tokens, np.int32), text, np.asarray(logs, np.float32), reason, stop
                )
                for tokens, text, logs, reason, stop in zip(
                    *(row["token_ids"], row["responses"], row["log_probabilities"]),
                    *(row["reasons"], row["stops"]),
                    strict=True,
                )
            ]
            for row in rows
        ]
        rewarded = any("scores" in row for row in rows)
        unknown = [[None] * len(samples) for samples in completions]
        scores = [row["scores"] for row in rows] if rewarded else unknown
        rewards, weights = np.asarray(scores, np.float64), rows[0]["weights"]
        if np.isinf(rewards).any():
            raise ValueError("a score is not finite")
        attributes = [row["attributes"] for row in rows] if "attributes" in rows[0] else None
        _check_sizes(completions, rewards, attributes)
    except BAD_JSON as error:
        raise UserError(
            f"{path}: damaged ({error}); remove it, and the step is made again"
        ) from error
    return Rollout(np.asarray(found, np.int64), completions, rewards, attributes, rewarded, weights)


def _check_sizes(
    completions: list[list[Completion]], rewards: np.ndarray, attributes: list[Any] | None
) -> None:
    """Raises a `ValueError` unless every token has its number, and every sample its reward."""
    for samples in completions:
        for one in samples:
            if not len(one.tokens) or one.log_probabilities.shape != one.tokens.shape:
                raise ValueError("a sample has other numbers of tokens and of log_probabilities")
    sizes = [len(samples) for samples in completions]
    if len(set(sizes)) > 1 or rewards.shape != (len(sizes), sizes[0]):
        raise ValueError("prompts have other numbers of responses and of scores")
    if attributes and [len(found) for found in attributes] != sizes:
        raise ValueError("prompts have other numbers of responses and of attributes")
