"""Long runs: what a process holds when it has worked for long is what it held soon after its start.

20,000 conversations of mixed lengths are scored, 2,000 steps trained, 20,000 requests answered, by
a tiny model. Looked at are resident memory, file descriptors, threads, and how many programs were
compiled, from the first third of the work on.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from campaign import forks, good
from campaign.ledger import Row
from campaign.victims import TRAIN

CONVERSATIONS, STEPS, REQUESTS = 20_000, 2_000, 20_000
_LONGEST = 2048  # tokens
_EVERY = 0.25  # seconds between two looks
_WARM = 1 / 3  # of the time, after which nothing grows
# What the median of the last tenth may be above that of the tenth after the warm-up, and the most
# of the time's last third above the most of its second.
_GROWTH, _MORE_BYTES, _MORE_FILES = 1.05, 16 << 20, 2
_CLIENTS = 8


class Look(NamedTuple):
    """What a process holds."""

    seconds: float
    bytes: int
    files: int
    threads: int
    programs: int


def run(seed: int, minutes: float, scratch: Path, show: Callable[[str], None]) -> list[Row]:
    """Every kind of work, with a third of the minutes each; the work is cut to fit by its kill."""
    rows, limit = [], minutes * 60 / 3
    for name, work in {
        f"{CONVERSATIONS:,} conversations scored": _scored,
        f"{STEPS:,} steps trained": _trained,
        f"{REQUESTS:,} requests answered": _served,
    }.items():
        directory = scratch / name.split()[-1]
        directory.mkdir()
        looks: list[Look] = []
        fault = work(random.Random(seed), directory, looks, limit)
        fault = fault or _growth(looks)
        row = Row("length", name)
        row.count(fault)
        rows.append(row)
        first, last = looks[int(len(looks) * _WARM)], looks[-1]
        show(
            f"{name}: {last.seconds:.0f} s, {first.bytes / 2**20:.1f} MiB after a third, "
            f"{last.bytes / 2**20:.1f} at the end; {last.files} files, {last.threads} threads, "
            f"{last.programs} programs; {fault or 'flat'}"
        )
    return rows


def _growth(looks: Sequence[Look]) -> str:
    """What has grown, if anything has."""
    tenth = max(1, len(looks) // 10)
    begins = int(len(looks) * _WARM)
    early, late = looks[begins : begins + tenth], looks[-tenth:]

    before, after = (statistics.median(look.bytes for look in part) for part in (early, late))
    if after > max(before * _GROWTH, before + _MORE_BYTES):
        return f"memory grew from {before / 2**20:.1f} to {after / 2**20:.1f} MiB"
    # These go up and down with every save and every batch.
    half = (begins + len(looks)) // 2
    for field, most in (("files", _MORE_FILES), ("threads", _MORE_FILES), ("programs", 0)):
        before, after = (
            max((getattr(look, field) for look in part), default=0)
            for part in (looks[begins:half], looks[half:])
        )
        if after > before + most:
            return f"{field}: at most {before} in the middle of the time, then {after}"
    return ""


def _look(process: int, seconds: float) -> Look:
    status = Path(f"/proc/{process}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    compiled = Path(os.environ["RMJAX_CACHE"]) / "compiled"
    return Look(
        seconds,
        int(fields["VmRSS"].split()[0]) << 10,
        len(os.listdir(f"/proc/{process}/fd")),
        int(fields["Threads"]),
        sum(path.name.endswith("-cache") for path in compiled.glob("*")),
    )


def _keep_programs() -> None:
    """All of them, that they can be counted; those that compile within a second are not kept."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _watch(looks: list[Look]) -> Callable[[int, float], bool]:
    """For `forks.run`: looks at the process now and then, to its end."""

    def watch(process: int, seconds: float) -> bool:
        if not looks or seconds > looks[-1].seconds + _EVERY:
            with contextlib.suppress(OSError, KeyError):  # it is at its end
                looks.append(_look(process, seconds))
        return False

    return watch


def _texts(rng: random.Random) -> tuple[str, str]:
    """A prompt and a response, of lengths that differ by two orders of magnitude."""
    prompt = "why? " * int(min(150, 1 + rng.expovariate(1 / 15)))
    return prompt, f"{rng.random()} " + "so. " * int(min(200, 1 + rng.expovariate(1 / 25)))


def _scored(rng: random.Random, directory: Path, looks: list[Look], limit: float) -> str:
    texts = (_texts(rng) for _ in range(CONVERSATIONS))
    rows = [{"prompt": prompt, "response": response} for prompt, response in texts]
    data = good.write_rows(directory / "rows.jsonl", rows)
    model = good.write_huggingface(directory / "model", _LONGEST)
    arguments = ["score", str(model), str(data), "out.jsonl"]
    ended = forks.run(
        arguments, directory, seconds=limit, when=_watch(looks), prepare=_keep_programs
    )
    if ended.code != 0:
        return f"ended by {ended.limit or ended.code}: {ended.text[-200:]}"
    count = (directory / "out.jsonl").read_bytes().count(b"\n")
    return "" if count == CONVERSATIONS else f"{count:,} rows of {CONVERSATIONS:,}"


def _trained(rng: random.Random, directory: Path, looks: list[Look], limit: float) -> str:
    more = [f"--config.steps={STEPS}", "--config.checkpoint_every=200", "--config.eval_every=200"]
    ended = forks.run(
        [*TRAIN, *more], directory, seconds=limit, when=_watch(looks), prepare=_keep_programs
    )
    if ended.code != 0:
        return f"ended by {ended.limit or ended.code}: {ended.text[-200:]}"
    lines = (directory / "out" / "metrics.jsonl").read_text().splitlines()
    steps = {json.loads(line)["step"] for line in lines}
    return "" if max(steps) == STEPS else f"step {max(steps)} of {STEPS:,}"


def _served(rng: random.Random, directory: Path, looks: list[Look], limit: float) -> str:
    model = good.write_huggingface(directory / "model", _LONGEST)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    log, began, watch = directory / "server.txt", time.monotonic(), _watch(looks)
    arguments = ["serve", str(model), f"--port={port}"]
    server = forks.start(arguments, directory, log, prepare=_keep_programs)
    clients = [_client(port, n, rng.random()) for n in range(_CLIENTS)]
    try:
        failed = 0
        while clients:
            for client in list(clients):
                ended, status = os.waitpid(client, os.WNOHANG)
                if ended:
                    clients.remove(client)
                    failed += status != 0
            seconds = time.monotonic() - began
            watch(server, seconds)
            if seconds > limit:
                return f"not answered within {limit:.0f} s"
            time.sleep(0.02)
        return f"{failed} of {_CLIENTS} clients had something else than a reply" if failed else ""
    finally:
        for client in clients:
            os.kill(client, signal.SIGKILL)
            os.waitpid(client, 0)
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)


def _client(port: int, number: int, seed: float) -> int:
    """A process that asks for its share of the requests, over one connection."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        rng = random.Random(seed)
        connection = _connected(port)
        for _ in range(REQUESTS // _CLIENTS):
            prompt, response = _texts(rng)
            several = [f"{response} {n}" for n in range(rng.choice((1, 1, 1, 4)))]
            body = json.dumps({"prompt": prompt, "responses": several})
            connection.request("POST", "/v1/rewards", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200 or len(json.loads(reply.read())["data"]) != len(several):
                os._exit(2)
        code = 0
    finally:
        os._exit(code)


def _connected(port: int) -> http.client.HTTPConnection:
    """A connection to a server that is ready."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with contextlib.suppress(OSError):
            connection.request("GET", "/health")
            reply = connection.getresponse()
            reply.read()
            if reply.status == 200:
                return connection
        connection.close()
        time.sleep(0.2)
