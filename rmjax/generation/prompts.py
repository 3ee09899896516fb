"""Prompts as tokens, and the tokens that end an answer."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from rmjax.data.conversation import Conversation, parse_prompt
from rmjax.data.tokenizer import Tokenizer, encode
from rmjax.errors import UserError
from rmjax.generation.completions import Prompt
from rmjax.runtime.files import read_json

_ANSWER = "Yes."


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


def end_tokens(files: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer, ascending.

    They are those that transformers ends with: `eos_token_id` of `generation_config.json`, a number
    or several; without such a file that of `config.json`; and without these the tokenizer's. To
    them comes the special token with which the template ends the assistant's turn: a model that
    learned to write turns says nothing else at their end, whatever its files name.

    Args:
      files: the model's directory, or a GGUF file.
      tokenizer: its own.

    Raises:
      UserError: there is none at all.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not found and (files / name).is_file():
            found |= _numbers(read_json(files / name).get("eos_token_id"), files / name)
    if not found and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    found |= _turn_end(tokenizer)
    if not found:
        raise UserError(
            f"{files}: no token ends an answer; give 'eos_token_id' in generation_config.json"
        )
    return tuple(sorted(found))


def _numbers(value: Any, where: Path) -> set[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in values):
        raise UserError(f"{where}: field 'eos_token_id' is {value!r}, expected numbers of tokens")
    return set(values)


def _turn_end(tokenizer: Tokenizer) -> set[int]:
    """The special token right behind an answer in the template, if there is one."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # the template's own complaints: it then says nothing about turns
        return set()
    behind = text[text.rfind(_ANSWER) + len(_ANSWER) :].lstrip()
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    return special & set(first)
