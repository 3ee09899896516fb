"""Prompts as tokens."""

import numpy as np
from jaxtyping import Int32

from rmjax.data.conversation import Conversation, parse_prompt
from rmjax.data.tokenizer import Tokenizer, encode
from rmjax.errors import UserError
from rmjax.generation.completions import Prompt


def prompt_tokens(
    tokenizer: Tokenizer, prompt: Prompt, number: int, vocab_size: int
) -> Int32[np.ndarray, "L"]:
    """The tokens of a prompt, up to where the answer begins.

    Args:
      tokenizer: its template says how messages are written.
      prompt: a text (HelpSteer2's turn markers are understood), messages, or tokens as they are.
      number: of the prompt, for messages.
      vocab_size: tokens must be smaller.

    Raises:
      UserError: it is none of these, or the template refuses it.
    """
    where = f"prompt {number}"
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer) or not len(prompt):
            raise UserError(
                f"{where}: an array of shape {prompt.shape} and type {prompt.dtype}; tokens are "
                "whole numbers in one row, at least one"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise UserError(
                f"{where}: tokens from {prompt.min()} to {prompt.max()}, and the model has 0 to "
                f"{vocab_size - 1}"
            )
        return prompt.astype(np.int32)
    try:
        messages = parse_prompt(list(prompt) if isinstance(prompt, tuple) else prompt)
    except ValueError as error:
        raise UserError(f"{where} {error}") from error
    try:
        return encode(tokenizer, Conversation(messages), asking=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
