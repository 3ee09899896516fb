"""Entries with their tokens, in order: by other processes while this one reads on.

Of few, this process makes the tokens itself: others take a second or two to begin.
"""

import collections
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rmjax.data.conversation import Conversation
from rmjax.data.portion import Encoded, Found, PortionEncoder, Said
from rmjax.data.records import EMPTY, TIE, Entry
from rmjax.data.row_reader import Sample
from rmjax.data.token_workers import Workers, begun_workers
from rmjax.errors import UserError

_CONVERSATIONS, _CHARACTERS = 256, 1 << 20  # tokenized at once
_FEW = 4096  # conversations that are tokenized before others help
_AHEAD = 2  # portions that each process has before it, the one that it works at among them


class EncodedEntry(NamedTuple):
    """An entry, and its samples in tokens.

    Attributes:
      entry: as it was read.
      reason: why nothing can be learned from it; empty if something can.
      prompt: a digest that is the same for all entries that belong together; none if there is a
        reason.
      found: of each sample the tokens, and for a policy which of them the assistant says; empty if
        there is a reason.
    """

    entry: Entry
    reason: str
    prompt: bytes
    found: list[Found]


class _Portion:
    """Entries that are tokenized together; a conversation that several have, once.

    Attributes:
      entries: and why nothing can be learned from each; empty if something can.
      error: what was wrong with the row behind them.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Entry, str]] = []
        self.error: UserError | None = None
        self.characters = 0
        self._known: set[int] = set()  # conversations, which the entries keep alive

    def __len__(self) -> int:
        return len(self._known)

    def add(self, entry: Entry, reason: str) -> None:
        self.entries.append((entry, reason))
        for sample in () if reason else entry:
            if id(sample.conversation) not in self._known:
                self._known.add(id(sample.conversation))
                self.characters += _characters(sample.conversation)

    def has(self, entry: Entry) -> bool:
        """Whether some conversation of an entry is here already, so that it belongs here."""
        return any(id(sample.conversation) in self._known for sample in entry)

    @property
    def is_full(self) -> bool:
        return len(self) >= _CONVERSATIONS or self.characters >= _CHARACTERS

    @property
    def said(self) -> list[Said]:
        """What is made tokens of."""
        return [
            tuple((sample.conversation, sample.where) for sample in entry)
            for entry, reason in self.entries
            if not reason
        ]


def encoded_entries(
    entries: Iterable[Entry], encode: PortionEncoder, *, drop_ties: bool
) -> Generator[EncodedEntry, None, None]:
    """All entries, in their order.

    Args:
      entries: as they are read; those with the same conversations follow each other.
      encode: makes the tokens.
      drop_ties: whether nothing is learned from a pair without a preference.

    Raises:
      UserError: a row is broken, or the template refuses a conversation; with file and row. Of
        several errors it is that of the first portion, however far others are.
    """
    error: UserError | None = None
    for portion, encoded in _made(_portions(entries, drop_ties), encode):
        yield from _encoded(portion, encoded)
        error = portion.error
    if error:
        raise error


def _made(
    portions: Iterator[_Portion], encode: PortionEncoder
) -> Iterator[tuple[_Portion, list[Encoded]]]:
    """The portions with their tokens."""
    done = 0
    for portion in portions:
        yield portion, encode(portion.said)
        done += len(portion)
        if done >= _FEW:
            break
    else:
        return
    with begun_workers(encode) as workers:
        if workers:
            yield from _by_others(portions, workers)
        else:
            yield from ((portion, encode(portion.said)) for portion in portions)


def _by_others(
    portions: Iterator[_Portion], workers: Workers
) -> Iterator[tuple[_Portion, list[Encoded]]]:
    """The portions with their tokens, which other processes make."""
    waiting = collections.deque()
    for portion in portions:
        waiting.append((portion, workers.submit(portion.said)))
        if len(waiting) >= _AHEAD * workers.count:
            first, asked = waiting.popleft()
            yield first, workers.tokens(asked)
    while waiting:
        first, asked = waiting.popleft()
        yield first, workers.tokens(asked)


def _portions(entries: Iterable[Entry], drop_ties: bool) -> Iterator[_Portion]:
    """All entries; the last portion may have an error, which is for behind its entries."""
    portion = _Portion()
    try:
        for entry in entries:
            if portion.is_full and not portion.has(entry):
                yield portion
                portion = _Portion()
            portion.add(entry, _reason_to_drop(entry, drop_ties))
    except UserError as error:
        portion.error = error
    if portion.entries or portion.error:
        yield portion


def _encoded(portion: _Portion, encoded: Sequence[Encoded]) -> Iterator[EncodedEntry]:
    rest = iter(encoded)
    for entry, reason in portion.entries:
        if reason:
            yield EncodedEntry(entry, reason, b"", [])
            continue
        prompt, is_shown, found = next(rest)
        reason = "" if is_shown else EMPTY
        yield EncodedEntry(entry, reason, prompt, found if is_shown else [])


def _characters(conversation: Conversation) -> int:
    return sum(len(message.get("content") or "") for message in conversation.messages)


def _reason_to_drop(entry: Sequence[Sample], drop_ties: bool) -> str:
    """Why nothing can be learned from a sample or a pair; empty if something can."""
    if any(sample.conversation.is_empty for sample in entry):
        return EMPTY
    if len(entry) == 1:
        labels = entry[0].labels
        return "no label" if labels and all(map(np.isnan, labels)) else ""
    return TIE if drop_ties and entry[0].strength == 0 else ""
