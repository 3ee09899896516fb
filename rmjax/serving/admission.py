"""How much may wait: a request waits for room in the line, and is sent away after a while."""

import asyncio
import collections


class Full(Exception):
    """There was no room for as long as one waits for it."""


class Admission:
    """A number of tokens that may be in the line at once; whoever came first gets room first.

    What is larger than all there is gets room when nothing else is in the line.

    Attributes:
      held: tokens in the line.
    """

    def __init__(self, most: int):
        """Takes the most tokens."""
        self._most, self.held = most, 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def waiting(self) -> int:
        """How many requests wait for room."""
        return len(self._waiting)

    async def acquire(self, tokens: int, seconds: float) -> None:
        """Waits for room for so many tokens.

        Raises:
          Full: it took longer than these seconds.
        """
        if not self._waiting and self._fits(tokens):
            self.held += tokens
            return
        room = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, room))
        try:
            await asyncio.wait({room}, timeout=seconds)
        except asyncio.CancelledError:
            self._withdraw(tokens, room)
            raise
        if not room.done():
            self._withdraw(tokens, room)
            raise Full

    def release(self, tokens: int) -> None:
        """Gives room back."""
        self.held -= tokens
        while self._waiting and self._fits(self._waiting[0][0]):
            wanted, room = self._waiting.popleft()
            self.held += wanted
            room.set_result(None)

    def _fits(self, tokens: int) -> bool:
        return not self.held or self.held + tokens <= self._most

    def _withdraw(self, tokens: int, room: "asyncio.Future[None]") -> None:
        if room.done():
            self.release(tokens)
        else:
            self._waiting.remove((tokens, room))
            self.release(0)  # who stood behind may fit
