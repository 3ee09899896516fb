"""Lengths of texts, in characters and tokens, and their summary statistics."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Real

from rmjax.data.messages import message_text
from rmjax.data.row_reader import Sample
from rmjax.data.tokenizer import Tokenizer, byte_tokenizer, encode, load_tokenizer
from rmjax.errors import UserError


def prompt_characters(samples: Sequence[Sample]) -> Int[np.ndarray, "N"]:
    """Characters of all turns before the response."""
    prompts = (sample.conversation.prompt for sample in samples)
    return np.array([sum(len(message_text(m)) for m in prompt) for prompt in prompts], int)


def response_characters(samples: Sequence[Sample]) -> Int[np.ndarray, "N"]:
    """Characters of the response."""
    return np.array([len(s.conversation.response) for s in samples], int)


def response_tokens(samples: Sequence[Sample], tokenizer: Tokenizer) -> Int[np.ndarray, "N"]:
    """Tokens of the response alone, without the chat template."""
    texts = (sample.conversation.response for sample in samples)
    return np.array([len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts], int)


def sample_tokens(samples: Sequence[Sample], tokenizer: Tokenizer) -> Int[np.ndarray, "N"]:
    """Tokens of the templated conversation, as in training.

    Raises:
      UserError: the template does not take a conversation; it names file and row.
    """
    counts = []
    for sample in samples:
        try:
            counts.append(len(encode(tokenizer, sample.conversation)))
        except UserError as error:
            raise UserError(f"{sample.where}: {error}") from error
    return np.array(counts, int)


def turn_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many samples have how many messages before the response."""
    return count_values(len(sample.conversation.prompt) for sample in samples)


def count_values(values: Iterable[int]) -> dict[str, int]:
    """How often each whole number occurs, in order."""
    return {str(value): number for value, number in sorted(collections.Counter(values).items())}


def summary_statistics(values: Real[np.ndarray, "N"]) -> dict[str, float]:
    """Mean, standard deviation (of the numbers themselves) and percentiles."""
    values = np.asarray(values, float)
    if not len(values):
        return dict.fromkeys(("mean", "sd", "min", "p5", "median", "p95", "max"), np.nan)
    low, p5, median, p95, high = np.percentile(values, (0, 5, 50, 95, 100)).tolist()
    return {
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "min": low,
        "p5": p5,
        "median": median,
        "p95": p95,
        "max": high,
    }


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a directory, a run, a GGUF file, or `bytes`.

    Raises:
      UserError: there is no tokenizer.
    """
    if name == "bytes":
        return byte_tokenizer()
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"--tokenizer={name}: there is no such directory or file; name one with a tokenizer, "
            "a run, a .gguf file, or `bytes`"
        )
    return load_tokenizer(path / "model" if (path / "model").is_dir() else path)
