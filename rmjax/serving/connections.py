"""Connections on which nothing comes, or byte by byte, are closed.

uvicorn closes a connection that is idle between two requests. One that never says what it wants, or
stops in the middle of a request's head, would stay open for ever. Bodies have a limit in `app.py`.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0


class Connection(H11Protocol):
    """uvicorn's connection, with a time in which a request's head must have come."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Goes on waiting, from when it began, unless a request is there."""
        super().data_received(data)
        if self._is_waiting():
            self._wait()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self._stop()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if self._is_waiting():
            self.transport.close()
