"""The uvicorn server that the application runs in."""

import os
import signal
import sys
from types import FrameType

import uvicorn

from rmjax.serving.app import make_app
from rmjax.serving.connections import Connection, check_uvicorn, in_connections
from rmjax.serving.service import Service

_KEEP_ALIVE = 75  # seconds: longer than clients keep idle connections, so that they close them


class _Server(uvicorn.Server):
    """Ends in good order at the first signal, and at once at the second.

    uvicorn itself takes a second SIGTERM for nothing, and at a second Ctrl-C cancels what it
    answers, with a traceback of each.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            return super().handle_exit(sig, frame)
        if sig != signal.SIGINT:
            signal.signal(sig, signal.SIG_DFL)
            return signal.raise_signal(sig)
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)


def make_server(service: Service, version: str, key: str = "") -> uvicorn.Server:
    """A server that is not started; it is given the socket it listens on.

    Args:
      service: what answers; it is started and stopped with the server.
      version: of rmjax.
      key: that requests must have; empty for none.

    Raises:
      UserError: uvicorn is another one than this is made for.
    """
    check_uvicorn()
    config = uvicorn.Config(
        in_connections(make_app(service, version, key)),
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(service.limits.seconds) + 1,
    )
    return _Server(config)
