"""Entries with their tokens, in order: while some are tokenized, the next ones are read.

Tokenizers of Hugging Face work on many texts at once, on all cores and without Python's lock. So
they get texts by the hundred, in a thread, and this one reads rows and writes templates meanwhile.
A policy's conversations are tokenized one by one, since where a turn ends is asked of each.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import Conversation
from rmjax.data.records import EMPTY, TIE, Entry
from rmjax.data.row_reader import Sample

_CONVERSATIONS, _CHARACTERS = 256, 1 << 20  # tokenized at once
_AHEAD = 3  # portions that wait or are tokenized while the next one is read

Found = tuple[np.ndarray, np.ndarray | None]  # tokens, and which are the assistant's, if asked


class EncodedEntry(NamedTuple):
    """An entry, and its samples in tokens.

    Attributes:
      entry: as it was read.
      reason: why nothing can be learned from it; empty if something can.
      found: of each sample the tokens, and for a policy which of them the assistant says; empty if
        there is a reason.
    """

    entry: Entry
    reason: str
    found: list[Found]


class _Portion:
    """Entries that are tokenized together; a conversation that several have, once."""

    def __init__(self) -> None:
        self.entries: list[tuple[Entry, str]] = []
        self.numbers: dict[int, int] = {}  # of conversations, which the entries keep alive
        self.characters = 0
        self.texts: list[str] = []
        self.wheres: list[str] = []
        self.spoken: list[Found] = []

    def has(self, entry: Entry) -> bool:
        """Whether some conversation of an entry is here already, so that it belongs here."""
        return any(id(sample.conversation) in self.numbers for sample in entry)

    @property
    def is_full(self) -> bool:
        return len(self.numbers) >= _CONVERSATIONS or self.characters >= _CHARACTERS


def encoded_entries(
    entries: Iterable[Entry],
    encoder: ChatEncoder,
    *,
    drop_ties: bool,
    policy: bool,
    every_turn: bool,
) -> Iterator[EncodedEntry]:
    """All entries, in their order.

    Args:
      entries: as they are read; those with the same conversations follow each other.
      encoder: makes the tokens.
      drop_ties: whether nothing is learned from a pair without a preference.
      policy: whether it is asked which tokens the assistant says.
      every_turn: whether the assistant's earlier turns count, too.

    Raises:
      UserError: a row is broken, or the template refuses a conversation; with file and row.
    """
    waiting: collections.deque[tuple[_Portion, Future[list[np.ndarray]]]] = collections.deque()
    with ThreadPoolExecutor(1, "tokenize") as pool:
        for portion in _portions(entries, encoder, drop_ties, policy, every_turn):
            tokens = pool.submit(encoder.encode_texts, portion.texts, portion.wheres)
            waiting.append((portion, tokens))
            if len(waiting) > _AHEAD:
                yield from _encoded(*waiting.popleft(), encoder, every_turn)
        while waiting:
            yield from _encoded(*waiting.popleft(), encoder, every_turn)


def _portions(
    entries: Iterable[Entry],
    encoder: ChatEncoder,
    drop_ties: bool,
    policy: bool,
    every_turn: bool,
) -> Iterator[_Portion]:
    portion = _Portion()
    for entry in entries:
        if portion.is_full and not portion.has(entry):
            yield portion
            portion = _Portion()
        reason = _reason_to_drop(entry, drop_ties)
        portion.entries.append((entry, reason))
        for sample in () if reason else entry:
            if id(sample.conversation) in portion.numbers:
                continue
            portion.numbers[id(sample.conversation)] = len(portion.numbers)
            if policy:
                found = encoder.encode_spoken(sample.conversation, sample.where, every_turn)
                portion.spoken.append(found)
            else:
                portion.texts.append(encoder.text(sample.conversation, sample.where))
                portion.wheres.append(sample.where)
                portion.characters += len(portion.texts[-1])
    if portion.entries:
        yield portion


def _encoded(
    portion: _Portion, tokens: Future[list[np.ndarray]], encoder: ChatEncoder, every_turn: bool
) -> Iterator[EncodedEntry]:
    found: Sequence[Found] = portion.spoken or [(t, None) for t in tokens.result()]
    for entry, reason in portion.entries:
        conversations: list[Conversation] = [sample.conversation for sample in entry]
        if not reason and not all(encoder.shows_response(c, every_turn) for c in conversations):
            reason = EMPTY
        numbers = [] if reason else [portion.numbers[id(c)] for c in conversations]
        yield EncodedEntry(entry, reason, [found[number] for number in numbers])


def _reason_to_drop(entry: Sequence[Sample], drop_ties: bool) -> str:
    """Why nothing can be learned from a sample or a pair; empty if something can."""
    if any(sample.conversation.is_empty for sample in entry):
        return EMPTY
    if len(entry) == 1:
        labels = entry[0].labels
        return "no label" if labels and all(map(np.isnan, labels)) else ""
    return TIE if drop_ties and entry[0].strength == 0 else ""
