import contextlib
import socket
import threading
import time

import pytest

from rmjax.errors import UserError
from rmjax.generation.http_json import JsonServer

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
REPLIES = {
    "a body": HEAD + b"Content-Length: 9000\r\n\r\n" + b" " * 9000,
    "a body without a length": HEAD + b"Connection: close\r\n\r\n" + b" " * 9000,
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 9000,
    "a head": HEAD + b"X: " + b"x" * 9000,
}


@contextlib.contextmanager
def dripping(reply: bytes, pause: float):
    """The port of a server that sends a byte, and another one after a pause."""
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.recv(1 << 16)
            for byte in reply:
                connection.sendall(bytes([byte]))
                if over.wait(pause):
                    break
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening.getsockname()[1]
    over.set()
    listening.close()
    thread.join()


@pytest.mark.parametrize("what", REPLIES)
def test_a_reply_that_drips_is_timed_out(what):
    with dripping(REPLIES[what], 0.01) as port:
        server = JsonServer(f"http://127.0.0.1:{port}", "", 0.4, 0, 1)
        began = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer within 0\.4 s"):
            server.post("/v1/completions", {}, "a sample")
        assert time.monotonic() - began < 5


def test_a_reply_in_pieces_is_read():
    body = b'{"a": 1}'
    reply = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with dripping(reply, 0.0) as port:
        assert JsonServer(f"http://127.0.0.1:{port}", "", 20, 0, 1).get("/x", "x") == {"a": 1}
