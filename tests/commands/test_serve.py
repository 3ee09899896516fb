"""`python -m rmjax.serve` as a process: how it starts, ends, and is started again."""

import os
import re
import signal
import socket
import threading
import time

import httpx
import pytest

import rmjax
from helpers import forked
from helpers.checks import known
from helpers.hf_models import save_hf
from helpers.models import tiny_llama

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    llama = tiny_llama(max_position_embeddings=256, num_hidden_layers=1)
    return str(save_hf(tmp_path_factory.mktemp("hf"), llama, names=("a", "b")))


class Process:
    """A server in a process of its own."""

    def __init__(self, directory, model, *arguments, port=0, **environment):
        self.out = directory / f"out{time.monotonic_ns()}"
        arguments = ["-m", "rmjax.serve", model, f"--port={port}", *arguments]
        self.process = forked.start(arguments, out=self.out, err=self.out, environment=environment)

    def until(self, pattern):
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self.out.read_text() if self.out.exists() else "")):
            assert time.monotonic() < end and self.process.exitcode is None, self.out.read_text()
            time.sleep(0.02)
        return found

    @property
    def port(self):
        return int(self.until(r"http://127.0.0.1:(\d+)")[1])

    def signal(self, number):
        os.kill(known(self.process.pid), number)


@pytest.mark.slow
def test_it_ends_in_good_order_and_is_started_again_after_a_kill(model, tmp_path):
    """Nothing that was answered is lost, and whoever asks again is answered."""
    first = Process(tmp_path, model, "--value=b", RMJAX_API_KEY="sesame")
    first.until("ready after")
    url, stop = f"http://127.0.0.1:{first.port}", threading.Event()
    expected = rmjax.load(model, value="b").score(TALK).value
    scores, failed = [], []

    def client():
        """As OpenRLHF does: again and again until there is a reply."""
        headers = {"Authorization": "Bearer sesame"}
        while not stop.is_set():
            try:
                reply = httpx.post(
                    url + "/classify", json={"messages": TALK}, headers=headers, timeout=20
                )
            except httpx.TransportError as error:
                failed.append(error)
                time.sleep(0.02)
                continue
            assert reply.status_code == 200, reply.text
            scores.append(reply.json()["data"][0]["probs"][0])

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not scores:
        time.sleep(0.01)
    first.signal(signal.SIGKILL)
    forked.wait(first.process)
    before = len(scores)
    second = Process(tmp_path, model, "--value=b", port=first.port, RMJAX_API_KEY="sesame")
    second.until("ready after")
    while len(scores) < before + 20:
        time.sleep(0.01)
    stop.set()
    second.signal(signal.SIGTERM)
    assert forked.wait(second.process, 60) == 0
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert failed and all(abs(score - expected) < 1e-5 for score in scores)
    text = second.out.read_text()
    assert "Traceback" not in text and "value by b, up to 256 tokens" in text


@pytest.mark.slow
def test_it_ends_while_it_compiles(model, tmp_path):
    process = Process(tmp_path, model, JAX_COMPILATION_CACHE_DIR="")
    assert httpx.get(f"http://127.0.0.1:{process.port}/health").status_code == 503
    process.signal(signal.SIGTERM)
    assert forked.wait(process.process, 60) == 0
    assert "ready" not in process.out.read_text()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_second_signal_ends_it_at_once(number, code, model, tmp_path):
    """Whose first one waits for a body that is still coming, up to 30 s."""
    process = Process(tmp_path, model)
    with socket.create_connection(("127.0.0.1", process.port)) as client:
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
        client.sendall(head + b"\r\nContent-Length: 9\r\n\r\n{")
        httpx.get(f"http://127.0.0.1:{process.port}/health")  # it has begun with both
        process.signal(number)
        time.sleep(0.3)
        assert process.process.exitcode is None
        process.signal(number)
        assert forked.wait(process.process, 5) == code
    text = process.out.read_text()
    assert "Traceback" not in text and ("interrupted\n" in text) == (code == 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length=257"], "made for up to 256 tokens"),
        (["--value=c"], "neither an attribute"),
        (["--over-long=drop"], "over_long = 'drop': there are error, truncate_left"),
        (["--queue-tokens=0"], "--queue-tokens=0: expected more than 0"),
        (["--timeout=inf"], "--timeout=inf: expected more than 0"),
        (["--batch-wait=nan"], "--batch-wait=nan: expected 0 or more"),
        (["--host="], "--host is empty: 127.0.0.1 is this machine alone"),
        (["--port=-1"], "--port=-1: ports are 1 to 65535"),
        (["--port=65536"], "--port=65536: ports are 1 to 65535"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, model):
    done = forked.run(["-m", "rmjax.serve", model, "--port=0", *arguments])
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_port_that_is_taken(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = forked.run(["-m", "rmjax.serve", model, f"--port={port}"])
    assert done.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "another program listens there" in done.stderr


@pytest.mark.parametrize("key", ["", " \n"])
def test_a_key_that_says_nothing_is_not_no_key(key, model):
    """As a secret that was not found: whoever sets one does not mean to serve without."""
    done = forked.run(["-m", "rmjax.serve", model, "--port=0"], environment={"RMJAX_API_KEY": key})
    assert done.returncode == 1 and "RMJAX_API_KEY is empty" in done.stderr
