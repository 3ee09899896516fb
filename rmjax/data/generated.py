"""Generated ratings in HelpSteer2's format, for a first run without any data.

The five attributes follow from the text by simple rules, so that a small model can learn them.
They only test the machinery, and say nothing about helpfulness.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_TOPICS = ["tea", "snow", "maps", "bees", "rain", "soap", "bread", "owls", "salt", "clay"]
_GOOD = ["it is so.", "that is true.", "we know it.", "it does work."]  # correct
_WRONG = ["it is a lie!", "2+2=5!", "pigs fly!"]  # not correct
_HARD = ["ergo xylem flux;", "per quantum vortex;", "via zygotic axioms;"]  # complex
_MUDDLE = ["uh um uh,", "er um hm,", "um so er,"]  # not coherent
_HELP = "do this:"
_LIMITS = (0, 4)


def generate(count: int, split: str) -> Iterator[dict[str, Any]]:
    """Yields `count` rows, two responses a prompt, with the five attributes of HelpSteer2.

    verbosity counts sentences, complexity the hard ones, correctness falls with false ones,
    coherence with muddled ones; helpfulness is correctness, less one without the advice.

    Args:
      count: number of rows.
      split: rows of different splits are different.
    """
    rng = np.random.default_rng(zlib.crc32(split.encode()))
    for number in range(0, count, 2):
        topic = str(rng.choice(_TOPICS))
        prompt = f"tell me about {topic} {number // 2}"
        for _ in range(min(2, count - number)):
            yield {"prompt": prompt, **_response(rng, topic)}


def _response(rng: np.random.Generator, topic: str) -> dict[str, Any]:
    wrong, muddled, hard, good = (int(rng.integers(0, top + 1)) for top in (4, 3, 4, 4))
    helps = bool(rng.integers(2))
    parts = [
        str(rng.choice(pool))
        for pool, n in ((_WRONG, wrong), (_MUDDLE, muddled), (_HARD, hard), (_GOOD, good))
        for _ in range(n)
    ]
    rng.shuffle(parts)
    text = " ".join([f"{topic}:", *([_HELP] if helps else []), *parts])
    correctness = 4 - wrong
    return {
        "response": text,
        "helpfulness": int(np.clip(correctness - (0 if helps else 1), *_LIMITS)),
        "correctness": correctness,
        "coherence": 4 - muddled,
        "complexity": hard,
        "verbosity": int(np.clip(len(parts) // 3, *_LIMITS)),
    }
