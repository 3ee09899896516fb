"""Samples that are over: by an end token, by a text, or because there is no more room."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax.data.tokenizer import Tokenizer
from rmjax.generation.completions import Completion


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens as it is: special tokens stay, and no space is tidied up."""
    return tokenizer.decode(
        list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def find_stop(
    tokenizer: Tokenizer, tokens: Sequence[int], checked: int, stop: Sequence[str]
) -> tuple[int, str] | None:
    """Where one of the texts `stop` is complete for the first time.

    Args:
      tokenizer: makes the text.
      tokens: of a sample, without an end token.
      checked: the first so many tokens are known to have none of the texts.
      stop: the texts.

    Returns:
      How many tokens there are then, and which text; None if there is none.
    """
    if not stop or not any(text in decode(tokenizer, tokens) for text in stop):
        return None
    for count in range(checked + 1, len(tokens) + 1):
        said = decode(tokenizer, tokens[:count])
        places = {text: said.find(text) for text in stop if text in said}
        if places:
            return count, min(places, key=lambda text: (places[text], -len(text)))
    return None


def make_completion(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    log_probabilities: Sequence[float],
    ends: Sequence[int],
    stopped: tuple[int, str] | None,
) -> Completion:
    """A sample that is over.

    Args:
      tokenizer: makes its text.
      tokens: all that were sampled.
      log_probabilities: of each.
      ends: tokens that end a sample.
      stopped: from `find_stop`.
    """
    fields: dict[str, Any] = dict(reason="length", stop="")
    count = len(tokens)
    if stopped:
        count, fields["stop"] = stopped
        fields["reason"] = "stop"
        text = decode(tokenizer, tokens[:count]).partition(fields["stop"])[0]
    elif tokens[-1] in ends:
        fields["reason"] = "end"
        text = decode(tokenizer, tokens[:-1])
    else:
        text = decode(tokenizer, tokens)
    return Completion(
        np.asarray(tokens[:count], np.int32),
        text,
        log_probabilities=np.asarray(log_probabilities[:count], np.float32),
        **fields,
    )
