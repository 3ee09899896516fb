"""Connections of which a reply has so many seconds in all, and not from each byte to the next.

A time-out of a socket begins again with every byte. A server that sends one byte at a time, by
mistake or to hold whoever asks, would never be timed out.
"""

import contextlib
import socket
import threading
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


class _Deadline:
    """What both kinds of connection have; a class to be mixed in."""

    sock: Any
    timeout: float | None

    def getresponse(self) -> HTTPResponse:
        """The reply with its body, all of it within the time-out of a read.

        Raises:
          TimeoutError: it is not whole by then; urllib3 makes its own error of it.
        """
        seconds, sock = self.timeout, self.sock
        if not seconds or sock is None:
            return super().getresponse()  # pyright: ignore[reportAttributeAccessIssue]
        expired = threading.Event()

        def end() -> None:
            expired.set()
            with contextlib.suppress(OSError):
                # Whoever reads gets the end of the stream; the other class would wait for TLS.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            reply = super().getresponse()  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:
            if expired.is_set():
                raise TimeoutError("timed out") from error
            raise
        finally:
            timer.cancel()
        if expired.is_set():  # a reply without a length ends with its connection
            raise TimeoutError("timed out")
        return reply


class _Plain(_Deadline, HTTPConnection):
    pass


class _Secure(_Deadline, HTTPSConnection):
    pass


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain  # pyright: ignore[reportAssignmentType]


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _Secure  # pyright: ignore[reportAssignmentType]


POOLS = {"http": _PlainPool, "https": _SecurePool}  # as a `PoolManager` wants them
