"""An item of a benchmark: conversations that are compared, some of them better than others."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from rmjax.data.conversation import Conversation, shared_messages
from rmjax.data.messages import Message, message_text


@dataclasses.dataclass(frozen=True)
class Item:
    """Conversations that are compared.

    Attributes:
      id: from the data, or the row's number.
      subset: from the data, or empty.
      conversations: the good ones first. They may differ anywhere.
      good: how many of them are good; 0 if they have ratings instead.
      where: file and row, for messages.
      strength: of a pair's preference; 0 for a tie, NaN if the data do not say.
      gold: what each response is worth: 1 if good and 0 if not, or the deciding rating, NaN where
        that is missing.
      ratings: for each response, its ratings by name; empty without ratings.
      pairs: the pairs of responses that count, by number, the better one first; empty for all.
    """

    id: str
    subset: str
    conversations: tuple[Conversation, ...]
    good: int
    where: str
    strength: float = float("nan")
    gold: tuple[float, ...] = ()
    ratings: tuple[Mapping[str, float], ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def prompt(self) -> list[Message]:
        """The messages that all conversations begin with."""
        return self.conversations[0].messages[: shared_messages(self.conversations)]

    def without(self, which: Bool[np.ndarray, "n"]) -> "Item":
        """The item without some of its responses."""
        kept = np.flatnonzero(~which)
        parts = {
            name: tuple(getattr(self, name)[i] for i in kept)
            for name in ("conversations", "gold", "ratings")
        }
        return dataclasses.replace(self, **parts)

    @property
    def is_same(self) -> bool:
        """Whether all conversations are the same, message by message and field by field."""
        return all(other == self.conversations[0] for other in self.conversations)

    @property
    def responses(self) -> tuple[str, ...]:
        """What each conversation says after the prompt."""
        begin = shared_messages(self.conversations)
        return tuple(_said(c.messages[begin:]) for c in self.conversations)


def _said(messages: Sequence[Message]) -> str:
    """The text of a response, or of several turns, each with its role."""
    if len(messages) == 1:
        return message_text(messages[0])
    return "\n\n".join(f"{m['role']}: {message_text(m)}" for m in messages)
