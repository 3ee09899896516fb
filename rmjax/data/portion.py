"""Tokens of a portion of entries: one function, whichever process runs it."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import Conversation, prompt_key
from rmjax.errors import UserError

Found = tuple[np.ndarray, np.ndarray | None]  # tokens, and which are the assistant's, if asked
Said = tuple[tuple[Conversation, str], ...]  # an entry's conversations, and what messages call each


class Encoded(NamedTuple):
    """What is made of an entry.

    Attributes:
      prompt: a digest that is the same for all entries that belong together.
      is_shown: whether the template shows the responses.
      found: of each conversation.
    """

    prompt: bytes
    is_shown: bool
    found: list[Found]


class Answer(NamedTuple):
    """What a worker answers.

    Attributes:
      encoded: of the entries that it was given.
      unread: what the encoder counted meanwhile.
      error: what is wrong with the data.
      traceback: what is wrong with the program; empty for nothing.
    """

    encoded: list[Encoded]
    unread: Counter[str]
    error: UserError | None = None
    traceback: str = ""


@dataclasses.dataclass(frozen=True)
class PortionEncoder:
    """Makes tokens of entries.

    Attributes:
      encoder: makes those of a conversation.
      policy: whether it is asked which tokens the assistant says.
      every_turn: whether the assistant's earlier turns count, too.
    """

    encoder: ChatEncoder
    policy: bool
    every_turn: bool

    def __call__(self, entries: Sequence[Said]) -> list[Encoded]:
        """The tokens of each entry; of a conversation that several have they are made once.

        Raises:
          UserError: the template refuses a conversation; with file and row.
        """
        encoder, numbers = self.encoder, dict[int, int]()
        found: list[Found] = []
        texts: list[str] = []
        wheres: list[str] = []
        for conversation, where in (said for entry in entries for said in entry):
            if id(conversation) in numbers:
                continue
            numbers[id(conversation)] = len(numbers)
            if self.policy:
                found.append(encoder.encode_spoken(conversation, where, self.every_turn))
            else:
                texts.append(encoder.text(conversation, where))
                wheres.append(where)
        found = found or [(tokens, None) for tokens in encoder.encode_texts(texts, wheres)]
        return [
            Encoded(
                hashlib.sha256(prompt_key([c for c, _ in entry]).encode()).digest(),
                all(encoder.shows_response(c, self.every_turn) for c, _ in entry),
                [found[numbers[id(c)]] for c, _ in entry],
            )
            for entry in entries
        ]
