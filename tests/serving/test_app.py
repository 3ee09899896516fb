"""The HTTP side: keys, bodies of every size and speed, clients that go away, a full line."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from helpers.paths import ROOT
from helpers.serving import make_service, one_device, running, variant
from rmjax.errors import UserError
from rmjax.serving import connections
from rmjax.serving.endpoints import ENDPOINTS
from rmjax.serving.openapi import document
from rmjax.serving.service import Limits

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
BODY = {"messages": TALK}
TOKENS = 7  # of it
PATHS = [path for endpoint in ENDPOINTS for path in endpoint.paths]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    llama = tiny_llama(max_position_embeddings=256, num_hidden_layers=1)
    return one_device(save_hf(tmp_path_factory.mktemp("hf"), llama, names=("a", "b")))


class Held:
    """Scores when it is let go, and remembers how many conversations each batch had."""

    def __init__(self, scorer):
        self.score, self.sizes = scorer.score_encoded, []
        self.began, self.free = threading.Event(), threading.Event()

    def __call__(self, encoded):
        self.sizes.append(len(encoded))
        self.began.set()
        assert self.free.wait(60)
        return self.score(encoded)


@pytest.fixture
def held(scorer):
    return Held(scorer)


def serve(scorer, held=None, key="", **limits):
    """A server of its own limits, which scores when `held` lets it."""
    service = make_service(variant(scorer), **limits)
    if held:
        service.batcher._score = held
    return running(service, key)


def ask(url, body=BODY, path="/classify", **options):
    return httpx.post(url + path, json=body, timeout=60, **options)


def in_thread(*args, **options):
    """A request that is answered later; its replies."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ask(*args, **options)))
    thread.start()
    return thread, found


def raw(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_health_is_said_when_all_is_compiled(scorer):
    service = make_service(variant(scorer))
    compile_shapes, go = service.batcher._warm_up, threading.Event()
    service.batcher._warm_up = lambda: go.wait(60) and compile_shapes()
    with running(service, wait=False) as url:
        reply = httpx.get(url + "/health")
        assert reply.status_code == 503 and reply.json() == {"status": "warming up"}
        thread, found = in_thread(url)  # waits, and is answered
        go.set()
        thread.join(60)
        assert found[0].status_code == httpx.get(url + "/health").status_code == 200


def test_a_key_is_needed_where_there_is_one(scorer):
    with serve(scorer, key="sesame ö") as url:
        for header in (None, "Bearer sesame", "Basic sesame ö", "sesame ö", "Bearer"):
            headers = httpx.Headers({b"Authorization": header.encode()} if header else None)
            for reply in (ask(url, headers=headers), httpx.get(url + "/version", headers=headers)):
                assert reply.status_code == 401 and "sesame" not in reply.text
                assert reply.json()["error"]["type"] == "AuthenticationError"
        assert ask(url, headers={"Authorization": "Bearer sesame ö".encode()}).status_code == 200
        for path in ("/health", "/metrics"):
            assert httpx.get(url + path).status_code == 200


def test_what_it_is_not_asked_for(scorer):
    with serve(scorer) as url:
        for reply, status in (
            (httpx.get(url + "/nothing"), 404),
            (httpx.get(url + "/classify"), 405),
            (httpx.post(url + "/classify", content=b"a=b"), 415),
            (ask(url, headers={"Content-Encoding": "gzip"}), 415),
        ):
            assert reply.status_code == status and reply.json()["error"]["code"] == status
        text = httpx.get(url + "/metrics").text
        assert 'rmjax_requests_total{path="other",status="404"} 1' in text
        assert "rmjax_ready 1" in text


def test_bodies_that_are_too_large_or_too_slow(scorer):
    with serve(scorer, body_bytes=20_000, body_seconds=0.3) as url:
        large = {"messages": [{"role": "user", "content": "x" * 3_000_000}, TALK[1]]}
        reply = ask(url, large)  # told before, and after it was read to its end
        assert reply.status_code == 413 and "more than 20,000 bytes" in reply.text
        chunks = (b"x" * 1000 for _ in range(3000))  # nobody says before how long it is
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(url + "/classify", content=chunks, headers=headers)
        assert reply.status_code == 413
        slow = raw(url)
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b"Content-Length: 500\r\n\r\n{")
        assert b"408" in slow.recv(100)
        waits = raw(url)
        waits.sendall(head + b"Content-Length: 50000\r\nExpect: 100-continue\r\n\r\n")
        assert waits.recv(100).startswith(b"HTTP/1.1 413")  # and not 100
        assert ask(url).status_code == 200


def test_bodies_of_all_have_a_limit_too(scorer, held):
    with serve(scorer, held, held_bytes=4000) as url:
        body = {"messages": [{"role": "system", "content": "x" * 200}, *TALK], "user": "x" * 2000}
        thread, found = in_thread(url, body)
        assert held.began.wait(60)
        reply = ask(url, body)
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
        held.free.set()
        thread.join(60)
        assert found[0].status_code == 200 and ask(url, body).status_code == 200


def test_connections_on_which_nothing_comes_are_closed(scorer, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with serve(scorer) as url:
        silent, stops, again = (raw(url) for _ in range(3))
        stops.sendall(b"POST /classify HT")
        again.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        reply = b""
        while not reply.endswith(b"}"):
            reply += again.recv(1000)
        again.sendall(b"GET /ver")
        for one in (silent, stops, again):
            assert one.recv(1000) == b""
        broken = raw(url)
        broken.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert broken.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_client_that_does_not_read_is_left(scorer, monkeypatch):
    """Otherwise it would hold its connection, and the server's end, for ever."""
    monkeypatch.setattr(connections, "REPLY_SECONDS", 0.2)
    with serve(scorer) as url:
        asks = raw(url)
        asks.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(ConnectionError):
            while True:
                asks.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        assert ask(url).status_code == 200


def test_requests_one_behind_the_other_on_a_connection(scorer, monkeypatch):
    """Each is answered, and a time for one does not begin with another."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with serve(scorer) as url:
        one = raw(url)
        sent = json.dumps(BODY).encode()
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = head + b"Content-Length: %d\r\n\r\n" % len(sent) + sent
        one.sendall(request * 20)
        found = b""
        while found.count(b'"probs"') < 20 or not found.endswith(b"}"):
            found += one.recv(1 << 16)
        time.sleep(0.5)  # idle, which is not half a head
        one.sendall(request)
        assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_uvicorn_that_tells_connections_nothing():
    class Other(asyncio.Protocol):
        def __init__(self, config):
            pass

    with pytest.raises(UserError, match="hands no state to its connections"):
        connections.check_uvicorn(Other)


def test_a_full_line_waits_and_then_says_so(scorer, held):
    with serve(scorer, held, queue_tokens=8, queue_seconds=0.2) as url:
        first, found = in_thread(url)
        assert held.began.wait(60)
        reply = ask(url)
        assert reply.status_code == 503 and 1 <= int(reply.headers["Retry-After"]) <= 60
        second, later = in_thread(url)  # this one waits no longer than it takes
        time.sleep(0.05)
        held.free.set()
        for thread in (first, second):
            thread.join(60)
        assert [found[0].status_code, later[0].status_code] == [200, 200]


def test_a_request_has_a_time(scorer, held):
    with serve(scorer, held, seconds=0.3) as url:
        reply = ask(url)
        assert reply.status_code == 504 and "within 0.3 s" in reply.text
        held.free.set()
        assert ask(url).status_code == 200


def test_a_client_that_goes_away_is_not_computed(scorer, held):
    service = make_service(variant(scorer))
    service.batcher._score = held
    with running(service) as url:
        first, found = in_thread(url)
        assert held.began.wait(60)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                url + "/classify", json={"text": ["\n\nHuman: q\n\nAssistant: a"] * 5}, timeout=0.2
            )
        until(lambda: not service.batcher._jobs)
        held.free.set()
        first.join(60)
        assert found[0].status_code == 200 and ask(url).status_code == 200
        assert held.sizes == [1, 1]
        assert "rmjax_requests_gone_total 1" in httpx.get(url + "/metrics").text
        assert "rmjax_queue_tokens 0" in httpx.get(url + "/metrics").text


def test_the_end_waits_for_what_has_begun(scorer, held):
    service = make_service(variant(scorer))
    service.batcher._score = held
    with running(service) as url:
        threads = [in_thread(url) for _ in range(3)]
        assert held.began.wait(60)
        until(lambda: service._admission.held == 3 * TOKENS)
        threading.Timer(0.3, held.free.set).start()
    for thread, found in threads:  # the server has ended
        thread.join(60)
        assert found[0].status_code == 200
    with pytest.raises(httpx.ConnectError):
        ask(url)


def test_what_fails_is_in_the_log_and_not_in_the_reply(scorer, caplog):
    service = make_service(variant(scorer))

    def fail(encoded):
        raise RuntimeError("at /home/secret")

    with running(service) as url:
        service.batcher._score = fail
        reply = ask(url)
        assert reply.status_code == 500 and "secret" not in reply.text
        assert reply.json()["error"]["message"] == "the server failed; its log says why"
    assert "/home/secret" in caplog.text
    caplog.clear()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAMES = sorted({name for endpoint in ENDPOINTS for name in endpoint.request["properties"]})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": st.text() | JSON}
)
FIELD = JSON | st.just(TALK) | st.lists(MESSAGE, max_size=3) | st.lists(st.text(max_size=3))
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), FIELD, max_size=4) | JSON


@pytest.fixture(scope="module")
def url(scorer):
    with serve(scorer) as url:
        yield url


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=BODIES, path=st.sampled_from(PATHS))
def test_whatever_is_sent_gets_a_reply(body, path, url):
    """200, or what is wrong with it; never a failure here."""
    headers = {"Content-Type": "application/json"}
    reply = CLIENT.post(url + path, content=json.dumps(body).encode(), headers=headers)
    assert reply.status_code in (200, 400, 404), (body, reply.text)
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


CLIENT = httpx.Client(timeout=60)


def test_the_document_has_every_endpoint(url):
    made = CLIENT.get(url + "/openapi.json").json()
    assert made == json.loads(json.dumps(document(ENDPOINTS, Limits(), "0", False)))
    assert set(made["paths"]) == {
        *PATHS,
        "/health",
        "/v1/models",
        "/version",
        "/metrics",
        "/openapi.json",
    }
    for endpoint in ENDPOINTS:  # its examples are answered
        assert CLIENT.post(url + endpoint.paths[0], json=endpoint.example).status_code == 200


@pytest.mark.slow
def test_memory_stays_flat(url):
    """Clients may name any fields, and send any sizes."""

    async def main(count, offset):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for start in range(0, count, 20):
                asked = [
                    client.post(
                        "/v1/rewards",
                        json={
                            "conversations": [
                                [
                                    {"role": "user", "content": "x" * (i % 90 + 1), f"f{i}": 1},
                                    TALK[1],
                                ]
                            ]
                        },
                    )
                    for i in range(offset + start, offset + start + 20)
                ]
                assert all(r.status_code == 200 for r in await asyncio.gather(*asked))

    def memory():
        lines = CLIENT.get(url + "/metrics").text.splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("process_resident"))

    asyncio.run(main(200, 0))
    before = memory()
    asyncio.run(main(400, 200))
    assert memory() - before < 16 << 20


def test_the_page_has_every_endpoint_and_option():
    page = (ROOT / "docs" / "serving.md").read_text()
    options = re.findall(r'add\("(--[\w-]+)"', (ROOT / "rmjax" / "serve.py").read_text())
    for name in (*PATHS, *options):
        assert f"`{name}`" in page, name
