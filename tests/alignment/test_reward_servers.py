"""Reward servers, against one on this machine that speaks the protocols and can fail."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rmjax.alignment import reward_servers
from rmjax.alignment.reward_servers import ServerReward
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer, render
from rmjax.errors import UserError
from rmjax.generation import http_json

TOKENIZER = byte_tokenizer()
PROMPTS = [Conversation([{"role": "user", "content": word}]) for word in ("a", "b")]
TEXTS = [["x", "four"], [" ", "three"]]
EXPECTED = [[1, 4], [np.nan, 5]]


class Server(ThreadingHTTPServer):
    """A response is worth its length. `failures` are what it does first, one a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked, self.failures, self.lock = [], [], threading.Lock()
        self.always = None

    def handle_error(self, request, client_address):
        """Whoever asked does not wait any more."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            failures = self.server.failures
            failure = failures.pop(0) if failures else self.server.always
        status, reply = failure or (200, REPLIES[self.path](body))
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(abs(status))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status == -200:  # closed in the middle of the reply
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif status == -201:  # a byte now and then
            for byte in data * 100:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(data)


def said(body):
    return float(len(body["messages"][-1]["content"]))


REPLIES = {
    "/get_reward": lambda body: {"rewards": [float(body["query"][0].count("~"))]},
    "/classify": lambda body: {"data": [{"index": 0, "probs": [said(body)]}]},
    "/pooling": lambda body: {"data": [{"index": 0, "data": [[9.0], [said(body)]]}]},
    "/v2/classify": lambda body: {"data": [{"index": 0, "probs": [7.0, said(body)]}]},
}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_json, "_PAUSE", 0.001)
    monkeypatch.setattr(reward_servers, "_PAUSE", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def by(server, path="classify", value="", timeout=30.0):
    return ServerReward(
        f"{server.url}/{path}", value, timeout, TOKENIZER, "config.rewards.t.server"
    )


@pytest.mark.parametrize(
    ("path", "value"), [("classify", ""), ("pooling", ""), ("v2/classify", "1")]
)
def test_messages_are_sent_and_numbers_come_back(server, path, value):
    rewards, attributes = by(server, path, value)(PROMPTS, TEXTS)
    np.testing.assert_array_equal(rewards, EXPECTED)
    assert attributes is None
    assert len(server.asked) == 3  # nothing is asked of an empty response
    for body in server.asked:
        assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
        assert body["use_activation"] is False


def test_texts_are_written_by_the_template_of_the_policy(server):
    rewards, _ = by(server, "get_reward")(PROMPTS, [["~~", "~"], ["~", "~~~"]])
    np.testing.assert_array_equal(rewards, [[2, 1], [1, 3]])
    whole = Conversation([*PROMPTS[1].messages, {"role": "assistant", "content": "~~~"}])
    [body] = [body for body in server.asked if "~~~" in body["query"][0]]
    assert body == {
        "query": [render(TOKENIZER, whole)],
        "prompts": [render(TOKENIZER, PROMPTS[1], asking=True)],
        "labels": [""],
    }
    assert body["query"][0].startswith(body["prompts"][0])


FAULTS = {
    "two": (200, {"data": [{"probs": [1.0]}, {"probs": [2.0]}]}),
    "none": (200, {"data": []}),
    "null": (200, {"data": [{"probs": [None]}]}),
    "nan": (200, b'{"data": [{"probs": [NaN]}]}'),
    "text": (200, {"data": [{"probs": ["1.0"]}]}),
    "true": (200, {"data": [{"probs": True}]}),
    "list": (200, [1.0]),
    "html": (200, b"<html>Welcome</html>"),
    "error": (500, {"error": {"message": "out of memory"}}),
    "closed": (-200, {"data": [{"probs": [1.0]}]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_may_reply(server, fault):
    """Twice, and then well, is as if it had not been; always ends with what was found."""
    server.failures = [FAULTS[fault]] * 2
    np.testing.assert_array_equal(by(server)([PROMPTS[0]], [["four"]])[0], [[4]])
    assert len(server.asked) == 3
    server.always = FAULTS[fault]
    words = {
        "html": "answers what is no JSON object: <html>Welcome",
        "list": "answers what is no JSON object",
        "error": "answers status 500 after 6 tries: out of memory",
        "closed": "breaks the connection off",
    }.get(fault, "replies .*expected a number where vLLM's /classify has it")
    with pytest.raises(UserError, match=f"response 1: {server.url}/classify {words}"):
        by(server)([PROMPTS[0]], [["four"]])


def test_the_time_of_all_is_limited(server):
    server.always = (-201, {"data": [{"probs": [1.0]}]})
    began = time.monotonic()
    with pytest.raises(UserError, match=r"0 of 3 rewards were there after 0\.3 s"):
        by(server, timeout=0.3)(PROMPTS, TEXTS)
    assert time.monotonic() - began < 5


def test_what_is_wrong_with_the_config_or_the_prompts(server):
    with pytest.raises(UserError, match=r"t\.server = .*: expected a URL that ends .*/get_reward"):
        by(server, "v1/chat/completions")
    with pytest.raises(UserError, match="gives 2 numbers; say which"):
        by(server, "v2/classify")(PROMPTS, TEXTS)
    with pytest.raises(UserError, match="gives 2 numbers; say which"):
        by(server, "v2/classify", "2")(PROMPTS, TEXTS)
    with pytest.raises(UserError, match="cannot be told of a prompt's tools"):
        by(server)([Conversation(PROMPTS[0].messages, [{"name": "f"}])], [["a"]])
    server.always = (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="there is no such thing"):
        by(server)(PROMPTS, TEXTS)
    nobody = ServerReward("http://127.0.0.1:9/classify", "", 30.0, TOKENIZER, "x")
    with pytest.raises(UserError, match="cannot be reached"):
        nobody(PROMPTS, TEXTS)
