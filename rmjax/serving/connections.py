"""Connections on which nothing moves are closed.

uvicorn closes a connection that is idle between two requests. One that never says what it wants,
stops in the middle of a request's head, or does not read its reply would stay open for ever, and
the server could not end. Bodies have a limit in `app.py`.

Of uvicorn's class only asyncio's callbacks are used, and the `app_state` that it is made with,
which reaches the application as `scope["state"]`: so a connection learns when its requests begin
and end.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rmjax.errors import UserError

HEAD_SECONDS = 60.0  # in which the head of a request must have come; busy clients are slow
REPLY_SECONDS = 30.0  # in which a client must have read what it was sent
_STATE = "rmjax.connection"

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]


def check_uvicorn(protocol: type[asyncio.Protocol] = H11Protocol) -> None:
    """Raises a `UserError` unless connections can learn of their requests."""
    if "app_state" not in inspect.signature(protocol.__init__).parameters:
        raise UserError(
            f"uvicorn {uvicorn.__version__} hands no state to its connections, by which those are "
            "closed that send nothing; uvicorn 0.54 does: pip install 'uvicorn<=0.54'"
        )


def in_connections(app: _App) -> _App:
    """An application that tells connections when their requests begin and end."""

    async def told(scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        connection: Connection = scope["state"].pop(_STATE)
        connection.begin()
        try:
            await app(scope, receive, send)
        finally:
            connection.end()

    return told


class Connection(H11Protocol):
    """uvicorn's connection, with times in which a request's head and its reply must get through."""

    def __init__(self, *args: Any, app_state: dict[str, Any], **others: Any):
        """As uvicorn makes it."""
        super().__init__(*args, app_state={**app_state, _STATE: self}, **others)
        self._requests = 0  # that are being answered
        self._head: asyncio.TimerHandle | None = None
        self._reply: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A request is there."""
        self._requests += 1
        self._head = _cancelled(self._head)

    def end(self) -> None:
        """A request is over."""
        self._requests -= 1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whatever is not sent at once is waited for
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits for the rest of a head, from its first byte on."""
        if not self._requests:
            self._wait()
        super().data_received(data)

    def pause_writing(self) -> None:
        """Begins to wait for the client to read."""
        super().pause_writing()
        loop = asyncio.get_running_loop()
        self._reply = loop.call_later(REPLY_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """All was read."""
        self._reply = _cancelled(self._reply)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self._head, self._reply = _cancelled(self._head), _cancelled(self._reply)
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._head is None:
            self._head = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._close)

    def _close(self) -> None:
        self._head = None
        if not self._requests:
            self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
