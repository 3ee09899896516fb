"""The parts of a server's reply, none of which is taken on trust."""

import sys
from typing import Any

from rmjax.data.fields import is_number
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError, shortened
from rmjax.generation.stopping import decode

_LETTER_IN_PART = "\ufffd"


def one_choice(reply: dict[str, Any], where: str) -> dict[str, Any]:
    """The only sample of a reply.

    Raises:
      UserError: there is none, or more than one.
    """
    choices = field_of(reply, "choices", list, where)
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise UserError(f"{where}: 'choices' has {len(choices)} samples, expected 1")
    return choices[0]


def field_of(found: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a reply, of the type that it must have.

    Raises:
      UserError: it is missing, or of another type.
    """
    value = found.get(name)
    if type(value) is not kind or (isinstance(value, str) and not _is_unicode(value)):
        raise UserError(
            f"{where}: field {name!r} is {shortened(repr(value))}, expected {kind.__name__}"
        )
    return value


def _is_unicode(text: str) -> bool:
    """Whether no half of a letter (a lone surrogate) is in it, which no tokenizer reads."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def named_log_probabilities(
    found: Any, tokenizer: Tokenizer, tokens: list[int]
) -> list[float] | None:
    """Values of a reply that names the token of each, if they are these tokens."""
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list):  # llama.cpp's form
        parts = [part for part in found["content"] if isinstance(part, dict)]
        found = {name: [part.get(name) for part in parts] for name in ("id", "logprob")}
        return numbers_of(found, "logprob", len(tokens)) if found["id"] == tokens else None
    if found.get("tokens") != [decode(tokenizer, [token]) for token in tokens]:
        return None
    return numbers_of(found, "token_logprobs", len(tokens))


def numbers_of(found: Any, name: str, length: int) -> list[float] | None:
    """A field's numbers, if it has so many and nothing else."""
    values = found.get(name) if isinstance(found, dict) else None
    if not isinstance(values, list) or len(values) != length:
        return None
    numbers = [float(x) for x in values if is_number(x) and abs(x) <= sys.float_info.max]
    return numbers if len(numbers) == length else None


def visible(text: str) -> str:
    """A text less what servers write in several ways: spaces, and letters that are not whole."""
    return "".join(text.replace(_LETTER_IN_PART, "").split())
