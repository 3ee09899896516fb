"""The tokens that end a language model's answer, as its files and its template say."""

from pathlib import Path
from typing import Any

from rmjax.checkpoints.model_files import GENERATION_CONFIG, MODEL_CONFIG
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.runtime.files import read_json

_ANSWER = "Yes."


def end_tokens(files: Path | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer, ascending.

    They are those that transformers ends with: `eos_token_id` of `generation_config.json`, a number
    or several; without such a file that of `config.json`; and without these the tokenizer's. To
    them comes the special token with which the template ends the assistant's turn: a model that
    learned to write turns says nothing else at their end, whatever its files name.

    Args:
      files: the model's directory, or a GGUF file; None for a model that has none yet.
      tokenizer: its own.

    Raises:
      UserError: there is none at all.
    """
    found: set[int] = set()
    for name in (GENERATION_CONFIG, MODEL_CONFIG):
        if files and not found and (files / name).is_file():
            found |= _numbers(read_json(files / name).get("eos_token_id"), files / name)
    if not found and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    found |= _turn_end(tokenizer)
    if not found:
        raise UserError(
            f"{files or 'the model'}: no token ends an answer; give 'eos_token_id' in "
            f"{GENERATION_CONFIG}"
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
