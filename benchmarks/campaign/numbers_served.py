"""Scores over HTTP whose numbers are at their edges: replies are JSON, or say why there is none."""

import base64
import contextlib
import http.client
import json
import math
import os
import signal
import socket
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from campaign import forks
from campaign.numbers_case import strict
from campaign.numbers_models import Change, changed, put, times

_SAID = {"prompt": "Name a prime.", "responses": ["Seven.", "Nine."]}
_CHAT = [{"role": "user", "content": "A prime?"}, {"role": "assistant", "content": "Seven."}]
_TEXT = "<|im_start|>user\nA prime?<|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n"
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/rewards": _SAID,
    "/get_reward": {"query": [_TEXT]},
    "/classify": {"messages": _CHAT},
    "/pooling": {"messages": _CHAT},
    "/pooling as base64": {"messages": _CHAT, "encoding_format": "base64"},
    "/score": {"queries": "A prime?", "documents": ["Seven.", "Nine."]},
    "/rerank": {"query": "A prime?", "documents": ["Nine.", "Seven."]},
    "/v1/chat/completions": {"messages": _CHAT},
}
_BROKEN = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1.5", "1e300", '"1"')


def replies(scratch: Path) -> Generator[tuple[str, str], None, None]:
    """What was asked of servers of four models, and what was wrong with each reply, if anything."""
    large = ["--value", '{"wit": 1e29}']
    directory = scratch / "served numbers"
    for name, change, more, status in (
        ("scores of 1e37", times("score", 1e37), [], 200),
        ("values of 1e66", times("score", 1e37), large, 200),
        ("weights that are NaN", put("score", 0, math.nan), [], 500),
    ):
        with _served(directory, change, more) as port:
            for path, body in _BODIES.items():
                # Float32, which is packed, does not have such values.
                wanted = 400 if more and "base64" in path else status
                fault = _fault(port, path.split()[0], json.dumps(body), wanted)
                yield f"{name}: {path}", fault
            yield f"{name}: /metrics", _fault(port, "/metrics", "", 200)
    with _served(directory, None, []) as port:
        for text in _BROKEN:
            body = json.dumps(_BODIES["/rerank"])[:-1] + f', "top_n": {text}}}'
            status = 200 if text == "1e300" else 400
            yield f"top_n of {text}", _fault(port, "/rerank", body, status)
            yield f"a token of {text}", _fault(port, "/pooling", f'{{"input": [1, {text}]}}', 400)
            body = json.dumps(_SAID)[:-1] + f', "unknown": {{"a": [{text}]}}}}'
            status = 200 if text in ("1.5", "1e300", '"1"') else 400
            yield f"an unknown field of {text}", _fault(port, "/v1/rewards", body, status)


@contextlib.contextmanager
def _served(directory: Path, change: Change | None, more: list[str]) -> Iterator[int]:
    """The port of a server of a changed model."""
    directory.mkdir(exist_ok=True)
    changed(change)(directory)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    log = directory / "server.txt"
    server = forks.start(["serve", "model", f"--port={port}", *more], directory, log)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if _asked(port, "/health", "")[0] == 200:
                    break
            time.sleep(0.05)
        yield port
    finally:
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)


def _asked(port: int, path: str, body: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        kind = {"Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, body or None, kind)
        reply = connection.getresponse()
        return reply.status, reply.read()


def _fault(port: int, path: str, body: str, status: int) -> str:
    """What is wrong with a reply."""
    found, text = _asked(port, path, body)
    said = text.decode(errors="replace")
    if found != status:
        return f"status {found}, expected {status}: {said[:200]!r}"
    if path == "/metrics":
        lines = [line for line in said.splitlines() if not line.startswith("#")]
        values = [line.rpartition(" ")[2] for line in lines]
        return "" if all(math.isfinite(float(v)) for v in values) else said[-200:]
    try:
        reply = strict(text)
    except ValueError as error:
        return f"no JSON ({error}): {said[:200]!r}"
    if status != 200:
        message = reply.get("error", {}).get("message", "")
        return "" if message and "its log" not in message else f"does not say why: {said[:200]!r}"
    for item in reply.get("data", ()) if path == "/pooling" else ():
        values = item["data"]
        if isinstance(values, str):
            values = np.frombuffer(base64.b64decode(values), "<f4")
        if not np.isfinite(values).all():
            return f"packs {values}"
    return ""
