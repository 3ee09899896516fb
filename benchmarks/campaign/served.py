"""A served load whose server is disturbed and begun anew: in the end all is answered, and rightly.

A client that has no reply asks again, as docs/serving.md says. A reply is acknowledged when its
client has written it down.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from campaign import forks, good

CLIENTS = 4
REQUESTS = 160
_ALIKE = 1e-5  # docs/serving.md: whatever the load
_SECONDS = 120.0  # that all of it may take


class Load:
    """Requests whose right scores are known: those of a server that nothing happened to."""

    def __init__(self, scratch: Path):
        """Asks for all of them once.

        Args:
          scratch: a directory.
        """
        self.directory = scratch / "served"
        self.directory.mkdir()
        self.model = good.write_huggingface(self.directory / "model")
        self.wanted: dict[str, float] = {}
        with self.served() as server:
            fault = server.result()
        self.wanted, _ = server.replies()
        if fault or len(self.wanted) != REQUESTS:
            raise SystemExit(f"serving fails undisturbed: {fault} {len(self.wanted)}")

    @contextlib.contextmanager
    def served(self) -> "Iterator[Server]":
        """A server that clients ask; what is left of either at the end is killed."""
        server = Server(self)
        try:
            yield server
        finally:
            server.kill()


class Server:
    """A server, its clients, and what they were given.

    Attributes:
      port: it listens on.
      directory: of its log, and of the replies.
    """

    def __init__(self, load: Load):
        """Begins both."""
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.arguments = ["serve", str(load.model), f"--port={self.port}"]
        self.directory, self._load = load.directory, load
        self._log, self._replies = load.directory / "server.txt", load.directory / "replies.jsonl"
        self._replies.unlink(missing_ok=True)
        self._until = time.monotonic() + _SECONDS
        self.begin()
        self._clients = os.fork()
        if not self._clients:
            _ask(self.port, self._replies)

    def begin(self) -> None:
        """Begins a server, where none is any more."""
        self._process = forks.start(self.arguments, self.directory, self._log)

    def wait_for(self, rng: random.Random) -> int:
        """Until a random number of requests is answered, not the last of them: how many."""
        answered = rng.randrange(REQUESTS * 3 // 4)  # so that there is work for the next one, too
        while self.answered() < answered and time.monotonic() < self._until:
            time.sleep(0.005)
        return answered

    def answered(self) -> int:
        """How many requests are."""
        return self._replies.read_bytes().count(b"\n") if self._replies.exists() else 0

    def signal(self, number: int) -> None:
        """Sends the server a signal."""
        os.kill(self._process, number)

    def end(self, seconds: float = 60.0) -> int | None:
        """Waits for the server's end: its status, or None if it had to be killed after so long."""
        until = time.monotonic() + seconds
        while not (ended := os.waitpid(self._process, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
                self._process = 0
                return None
            time.sleep(0.01)
        self._process = 0
        return os.waitstatus_to_exitcode(ended[1])

    def said(self) -> str:
        """What the server that was begun last has printed."""
        return self._log.read_text(errors="replace")

    def result(self) -> str:
        """Waits until all is answered, and ends the server; what went wrong, if anything did."""
        while not (ended := os.waitpid(self._clients, os.WNOHANG))[0]:
            if time.monotonic() > self._until:
                return f"{self.answered()} of {REQUESTS} answered after {_SECONDS:g} s"
            time.sleep(0.01)
        self._clients = 0
        self.signal(signal.SIGTERM)
        status, text = self.end(), self.said()
        if ended[1]:
            return "a client was given something else than a reply"
        if status or "Traceback" in text:
            return f"the server ended with status {status}: {text[-300:]!r}"
        (found, twice), wanted = self.replies(), self._load.wanted
        wrong = [n for n in wanted if abs(found.get(n, 1e9) - wanted[n]) > _ALIKE]
        if not wrong and not twice:
            return ""
        return f"{len(wrong)} replies of {REQUESTS} are wrong or missing, {twice} twice"

    def replies(self) -> tuple[dict[str, float], int]:
        """The scores that clients have written down, and how many of them twice."""
        pairs = [
            pair
            for line in self._replies.read_text().splitlines()
            for pair in json.loads(line).items()
        ]
        return dict(pairs), len(pairs) - len(dict(pairs))

    def kill(self) -> None:
        """Ends what still runs."""
        for process in (self._process, self._clients):
            if process:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _ask(port: int, replies: Path) -> None:
    """In a process of its own: asks for every score until each is there."""
    numbers, lock, failed = iter(range(REQUESTS)), threading.Lock(), threading.Event()

    def client() -> None:
        while not failed.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                value = _score(port, number)
            except (KeyError, TypeError, ValueError):
                failed.set()
                return
            with lock, open(replies, "a") as file:
                file.write(json.dumps({str(number): value}) + "\n")

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(failed.is_set())


def _score(port: int, number: int) -> float:
    """The score of a conversation, asked for until there is one."""
    words = "word " * (1 + number % 20)
    body = {"prompt": f"Question {number}?", "responses": [f"{words} {number}"]}
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(
                "POST", "/v1/rewards", json.dumps(body), {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            text = reply.read()
            if reply.status == 200:
                return float(json.loads(text)["data"][0]["value"])
            if reply.status != 503:
                raise ValueError(f"status {reply.status}")
        except (OSError, http.client.HTTPException):  # nobody is there: ask again
            pass
        finally:
            connection.close()
        time.sleep(0.02)
