"""Signals to a server under load, and a second one on its port: what was begun is answered.

Beside the load's own clients this asks for so many scores at once that they take a second, and
sends the signal when they wait in the server's line.
"""

import contextlib
import http.client
import json
import re
import signal
import time
from collections.abc import Callable, Iterator

from campaign import forks
from campaign.ledger import Row
from campaign.served import Load, Server
from campaign.tries import Tries
from campaign.victims import SERVED

_RESPONSES = 900
_IN_LINE = 10_000  # tokens in the line that only this request can have brought
_AT_ONCE = 3.0  # seconds in which a second signal ends a server
_START = 1.5  # seconds, about, that a server takes to begin


def rows(part: str) -> dict[str, Row]:
    """A row for each promise."""
    return {promise: Row(part, f"{promise}: {SERVED}") for promise in _TRIES}


def run(tries: Tries, load: Load, rows: dict[str, Row]) -> None:
    """Tries each promise once."""
    for promise, attempt in _TRIES.items():
        if tries.over():
            return
        with load.served() as server:
            try:
                moment, fault = attempt(tries, server)
                fault = fault or server.result()
            except (OSError, http.client.HTTPException) as error:
                moment, fault = "a request in flight", f"no reply: {error!r}"
        tries.count(rows[promise], moment, fault)


def _interrupted(tries: Tries, server: Server) -> tuple[str, str]:
    """Ctrl-C at any moment, while it starts as well."""
    moment = _any_moment(tries, server)
    server.signal(signal.SIGINT)
    fault = _ended(server, 130, seconds=60.0)
    server.begin()
    return moment, fault


def _terminated(tries: Tries, server: Server) -> tuple[str, str]:
    """SIGTERM while a request waits in the line: it is answered."""
    answered = server.wait_for(tries.rng)
    with _long_request(server) as reply:
        server.signal(signal.SIGTERM)
        values = reply()
    fault = "" if values == _RESPONSES else f"{values} of {_RESPONSES} values came"
    fault = fault or _ended(server, 0, seconds=60.0)
    server.begin()
    return f"after {answered} replies", fault


def _twice(number: int, status: int) -> Callable[[Tries, Server], tuple[str, str]]:
    def attempt(tries: Tries, server: Server) -> tuple[str, str]:
        answered = server.wait_for(tries.rng)
        with _long_request(server):
            server.signal(number)
            time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                server.signal(number)
            fault = _ended(server, status, seconds=_AT_ONCE)
        server.begin()
        return f"after {answered} replies", fault

    return attempt


def _stopped(tries: Tries, server: Server) -> tuple[str, str]:
    moment = _any_moment(tries, server)
    server.signal(signal.SIGSTOP)
    time.sleep(tries.rng.uniform(0.05, 1.0))
    server.signal(signal.SIGCONT)
    return moment, ""


def _second(tries: Tries, server: Server) -> tuple[str, str]:
    """Another server is told to listen on the same port."""
    moment = _any_moment(tries, server)
    log = server.directory / "second.txt"
    ended = forks.run(server.arguments, server.directory, log=log, seconds=60.0)
    lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    if ended.code != 1 or len(lines) != 1 or "another program listens there" not in lines[0]:
        return moment, f"the second: status {ended.code}: {ended.text[-300:]!r}"
    return moment, ""


_TRIES: dict[str, Callable[[Tries, Server], tuple[str, str]]] = {
    "Ctrl-C": _interrupted,
    "SIGTERM, a request in flight": _terminated,
    "SIGTERM twice": _twice(signal.SIGTERM, -signal.SIGTERM),
    "Ctrl-C twice": _twice(signal.SIGINT, 130),
    "SIGSTOP and SIGCONT": _stopped,
    "two at once": _second,
}


def _any_moment(tries: Tries, server: Server) -> str:
    """Waits for one: of the start every third time, else of the load."""
    if tries.rng.random() < 1 / 3:
        seconds = tries.rng.uniform(0.2, _START)
        time.sleep(seconds)
        return f"at {seconds:.2f} s"
    return f"after {server.wait_for(tries.rng)} replies"


def _ended(server: Server, status: int, seconds: float) -> str:
    """What is wrong with how a server ended after a signal."""
    found, text = server.end(seconds), server.said()
    if found is None:
        return f"not ended after {seconds:g} s: {text[-300:]!r}"
    lines = [line for line in text.splitlines() if line.startswith("interrupted")]
    if found != status or "Traceback" in text or len(lines) != (status == 130):
        return f"status {found}, expected {status}: {text[-400:]!r}"
    return ""


@contextlib.contextmanager
def _long_request(server: Server) -> Iterator[Callable[[], int]]:
    """Asks for many scores and waits until they stand in the line; gives what waits for them."""
    responses = [f"{number} " + "of many words " * 6 for number in range(_RESPONSES)]
    body = json.dumps({"prompt": "Which?", "responses": responses})
    kind = {"Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as asked:
        _until_ready(server)
        asked.request("POST", "/v1/rewards", body, kind)
        while _tokens_in_line(server) < _IN_LINE:
            time.sleep(0.002)

        def values() -> int:
            """How many scores came; of those that are left out none."""
            reply = asked.getresponse()
            text = reply.read()
            return len(json.loads(text)["data"]) if reply.status == 200 else -reply.status

        yield values


def _until_ready(server: Server) -> None:
    while "ready after" not in server.said():
        time.sleep(0.01)


def _tokens_in_line(server: Server) -> float:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as asked:
        asked.request("GET", "/metrics")
        found = re.search(r"^rmjax_queue_tokens (\S+)", asked.getresponse().read().decode(), re.M)
    return float(found[1]) if found else 0.0
