"""How long texts are, in characters and tokens, and how numbers are spread."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rmjax.data.records import Sample
from rmjax.data.tokenizer import Tokenizer, byte_tokenizer, encode, load_tokenizer
from rmjax.errors import UserError


def prompt_key(sample: Sample) -> str:
    """The same for the same prompt, and for no other."""
    return json.dumps(sample.prompt, sort_keys=True)


def prompt_characters(samples: Sequence[Sample]) -> Int[np.ndarray, "N"]:
    """Characters of all turns before the response."""
    return np.array([sum(len(m["content"]) for m in s.prompt) for s in samples], int)


def response_characters(samples: Sequence[Sample]) -> Int[np.ndarray, "N"]:
    """Characters of the response."""
    return np.array([len(s.response) for s in samples], int)


def response_tokens(samples: Sequence[Sample], tokenizer: Tokenizer) -> Int[np.ndarray, "N"]:
    """Tokens of the response by itself, without the template's."""
    return np.array(
        [len(tokenizer(s.response, add_special_tokens=False)["input_ids"]) for s in samples], int
    )


def sample_tokens(samples: Sequence[Sample], tokenizer: Tokenizer) -> Int[np.ndarray, "N"]:
    """Tokens of the templated conversation, as training sees it.

    Raises:
      UserError: the template refuses one; it names file and row.
    """
    found = []
    for sample in samples:
        messages = [*sample.prompt, {"role": "assistant", "content": sample.response}]
        try:
            found.append(len(encode(tokenizer, messages)))
        except UserError as error:
            raise UserError(f"{sample.where}: {error}") from error
    return np.array(found, int)


def turn_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many samples have so many messages before the response."""
    return tally(len(sample.prompt) for sample in samples)


def tally(values: Any) -> dict[str, int]:
    """How often each whole number occurs, in order."""
    return {str(value): number for value, number in sorted(collections.Counter(values).items())}


def spread(values: Float[np.ndarray, "N"] | Int[np.ndarray, "N"]) -> dict[str, float]:
    """Mean, standard deviation (of these numbers, not estimated for others) and percentiles."""
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
      UserError: there is none.
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
