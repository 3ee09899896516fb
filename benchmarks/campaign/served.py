"""A served load whose server is killed and begun anew: in the end all is answered, and rightly.

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
from collections.abc import Callable, Generator
from pathlib import Path

from campaign import forks, good

_CLIENTS = 4
_REQUESTS = 160
_ALIKE = 1e-5  # docs/serving.md: whatever the load
_SECONDS = 120.0  # that all of it may take


def served_load(
    scratch: Path, rng: random.Random, show: Callable[[str], None]
) -> Generator[str, None, None]:
    """For each kill of a server under load, what went wrong, if anything did."""
    directory = scratch / "served"
    directory.mkdir()
    model = good.write_huggingface(directory / "model")
    wanted: dict[str, float] = {}
    while True:
        replies = directory / "replies.jsonl"
        replies.unlink(missing_ok=True)
        fault = _once(directory, model, replies, 1 if wanted else 0, rng)
        found: dict[str, float] = {}
        twice = 0
        for line in replies.read_text().splitlines():
            [(number, value)] = json.loads(line).items()
            twice += number in found
            found[number] = value
        if not wanted:  # the first one is not killed
            if fault or len(found) != _REQUESTS:
                raise SystemExit(f"serving fails undisturbed: {fault} {len(found)}")
            wanted = found
            continue
        wrong = [n for n in wanted if abs(found.get(n, 1e9) - wanted[n]) > _ALIKE]
        if not fault and (wrong or twice):
            fault = f"{len(wrong)} replies of {_REQUESTS} are wrong or missing, {twice} twice"
        show(f"a served load: {fault or 'all answered'}")
        yield fault


def _once(directory: Path, model: Path, replies: Path, kills: int, rng: random.Random) -> str:
    """Serves until all requests are answered, the server killed meanwhile; what went wrong."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    arguments = ["serve", str(model), f"--port={port}"]
    log = directory / "server.txt"
    server = forks.start(arguments, directory, log)
    clients = os.fork()
    if not clients:
        _ask(port, replies)
    until = time.monotonic() + _SECONDS
    try:
        while kills:
            answered = rng.randrange(_REQUESTS * 3 // 4)  # so that the next one has work, too
            while _count(replies) < answered and time.monotonic() < until:
                time.sleep(0.005)
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            server = forks.start(arguments, directory, log)
            kills -= 1
        while not (ended := os.waitpid(clients, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(clients, signal.SIGKILL)
                ended = os.waitpid(clients, 0)
                return f"{_count(replies)} of {_REQUESTS} answered after {_SECONDS:g} s"
            time.sleep(0.01)
        if ended[1]:
            return "a client was given something else than a reply"
    finally:
        os.kill(server, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    text = log.read_text()
    if status or "Traceback" in text:
        return f"the server ended with status {status}: {text[-300:]!r}"
    return ""


def _count(replies: Path) -> int:
    return replies.read_bytes().count(b"\n") if replies.exists() else 0


def _ask(port: int, replies: Path) -> None:
    """In a process of its own: asks for every score until each is there."""
    numbers, lock, failed = iter(range(_REQUESTS)), threading.Lock(), threading.Event()

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

    threads = [threading.Thread(target=client) for _ in range(_CLIENTS)]
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
