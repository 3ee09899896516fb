"""A server as an engine, against one on this machine that speaks the protocol and can fail."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import rmjax
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer, encode
from rmjax.errors import UserError
from rmjax.generation import http_json
from rmjax.generation.server import open_server, request_seed
from rmjax.sample import sample

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
SECRET = "sk-very-secret"


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Server(ThreadingHTTPServer):
    """Answers as vLLM, unless its fields say otherwise.

    A sample is the request's seed in words. `failures` are what it does first, one a request: a
    status, with headers if it is a tuple, or a number of seconds to say nothing.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.owner, self.models, self.length = "vllm", ["m"], 400
        self.before = []  # what it puts before a text
        self.asked, self.keys, self.failures = [], [], []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        self.change = lambda reply: reply  # of what it answers
        self.says = lambda body: f"seed {body['seed']}"

    def handle_error(self, request, client_address):
        """Whoever asked does not wait any more."""

    def cards(self):
        extra = {"max_model_len": self.length} if self.length else {}
        return {"data": [{"id": name, "owned_by": self.owner, **extra} for name in self.models]}

    def complete(self, body):
        text, why = self.says(body), "stop"
        tokens = [*ids(text), END]
        for stop in body.get("stop", ()):
            if stop in text:
                tokens = ids(text[: text.index(stop) + len(stop)])
                text = text[: text.index(stop)]
        if len(tokens) > body["max_tokens"]:
            tokens, why = tokens[: body["max_tokens"]], "length"
            text = TOKENIZER.decode(tokens)
        prompt = body["prompt"]
        read = prompt if isinstance(prompt, list) else [*self.before, *ids(prompt)]
        choice = {"index": 0, "text": text, "finish_reason": why}
        if self.owner == "vllm":
            choice["token_ids"] = tokens
            choice["logprobs"] = {
                "tokens": [f"?{token}" for token in tokens],
                "token_logprobs": [-0.5 * i for i in range(len(tokens))],
            }
        return {"choices": [choice], "usage": {"prompt_tokens": len(read)}}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def answer(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.keys.append(self.headers.get("Authorization"))
        if self.path != "/v1/models":
            return self.answer(404, {"detail": "Not Found"})
        return self.answer(200, self.server.cards())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            failure = server.failures.pop(0) if server.failures else None
            server.asked.append(body)
        try:
            if isinstance(failure, float):
                time.sleep(failure)
            elif failure:
                status, headers, said = failure if isinstance(failure, tuple) else (failure, {}, "")
                return self.answer(status, {"error": {"message": said}}, headers)
            return self.answer(200, server.change(server.complete(body)))
        finally:
            with server.lock:
                server.under_way -= 1


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_json, "_PAUSE", 0.01)
    monkeypatch.setattr(http_json, "_LONGEST_PAUSE", 1.5)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def opened(server, directory):
    return lambda **options: open_server(server.url, tokenizer=directory, **options)


def test_a_prompt_is_written_here_and_tokens_come_back(server, opened):
    engine = opened()
    assert (engine.model_name, engine.context, engine.kind.name) == ("m", 400, "vLLM")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]
    found = engine.sample([turns], n=2, seed=7, keys=[3], temperature=0.5, top_p=0.9, top_k=4)
    expected = encode(TOKENIZER, Conversation(turns), asking=True).tolist()
    for number, completion in enumerate(found[0]):
        text = f"seed {request_seed(7, 3, number)}"
        assert completion.text == text and completion.reason == "end"
        assert completion.tokens.tolist() == [*ids(text), END]
        np.testing.assert_array_equal(
            completion.log_probabilities, np.arange(len(text) + 1) * np.float32(-0.5)
        )
    asked = sorted(server.asked, key=lambda body: body["seed"])
    for body in asked:
        assert body["prompt"] == expected and body["model"] == "m"
        assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 0.9, 4)
        # What a server would else take from the model's own defaults, or leave out.
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
        assert body["return_token_ids"] is True and body["stop_token_ids"] == [END]
        assert body["max_tokens"] == 256
    assert len({body["seed"] for body in asked}) == 2


def test_samples_depend_on_seed_key_and_number_alone(server, opened):
    engine = opened()
    together = engine.sample(["a", "b", "c"], n=3, keys=[5, 6, 7], seed=1)
    alone = engine.sample(["b"], n=2, keys=[6], seed=1)
    assert [c.text for c in alone[0]] == [c.text for c in together[1]][:2]
    seeds = {request_seed(s, k, n) for s in range(5) for k in range(20) for n in range(20)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**31 for seed in seeds)


def test_ends_by_a_text_and_by_room(server, opened):
    server.says = lambda body: "one END two"
    engine = opened()
    [[stopped]] = engine.sample(["a"], stop=["END"])
    assert (stopped.text, stopped.reason, stopped.stop) == ("one ", "stop", "END")
    assert stopped.tokens.tolist() == ids("one END")
    [[cut]] = engine.sample(["a"], max_tokens=5)
    assert (cut.text, cut.reason, len(cut.tokens)) == ("one E", "length", 5)


def test_room_in_the_context(server, opened):
    server.length = 30
    engine = opened()
    engine.sample(["abc"])
    assert server.asked[0]["max_tokens"] == 30 - len(server.asked[0]["prompt"])
    with pytest.raises(UserError, match=r"prompt 1: .* the model's context on the server has 30"):
        engine.sample(["abc", "long" * 10])
    server.length = None  # then the server has to say it
    server.failures = [(400, {}, "the prompt is longer than 30 tokens")]
    with pytest.raises(UserError, match=r"prompt 0: .*status 400.*longer than 30 tokens"):
        opened().sample(["long" * 10])


@pytest.mark.parametrize("owner", ["llamacpp", "me", "openai"])
def test_servers_that_give_text(server, opened, owner):
    """Tokens are those of the text, the end token is added, and stop texts are found here."""
    server.owner = owner
    server.says = lambda body: "one END two"
    engine = opened()
    [[whole]] = engine.sample(["Why?"])
    assert whole.tokens.tolist() == [*ids("one END two"), END] and whole.reason == "end"
    assert np.isnan(whole.log_probabilities).all()
    [[stopped]] = engine.sample(["Why?"], stop=["END"])
    assert (stopped.text, stopped.reason) == ("one ", "stop")
    assert stopped.tokens.tolist() == ids("one END")
    [[cut]] = engine.sample(["Why?"], max_tokens=3)
    assert (cut.text, cut.reason) == ("one", "length")
    expected = encode(
        TOKENIZER, Conversation([{"role": "user", "content": "Why?"}]), asking=True
    ).tolist()
    for body in server.asked:
        assert "stop" not in body and "return_token_ids" not in body
        if owner == "llamacpp":
            assert body["prompt"] == expected and body["top_k"] == 0
        else:
            assert body["prompt"] == TOKENIZER.decode(expected)
    if owner == "openai":
        with pytest.raises(UserError, match=r"top_k = 3: .* has no such setting"):
            engine.sample(["Why?"], top_k=3)


def test_there_is_one_bos(server, opened, tmp_path):
    """A text goes without it where the tokenizer puts one before any text, as a server then does.

    Whatever the server does, it says how many tokens it read.
    """
    server.owner, server.before = "openai", [TOKENIZER.bos_token_id]
    with pytest.raises(UserError, match=r"it read the prompt as 9 tokens, and here it has 8.*BOS"):
        opened().sample(["Why?"])
    adding = byte_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", TOKENIZER.bos_token_id)]
    )
    adding.save_pretrained(tmp_path)
    engine = open_server(server.url, tokenizer=tmp_path)
    assert engine.sample(["Why?"])[0][0].ended
    assert server.asked[-1]["prompt"] == "<|user|>Why?<|end|><|assistant|>"
    server.before = []
    with pytest.raises(UserError, match="it read the prompt as 7 tokens, and here it has 8"):
        engine.sample(["Why?"])


def test_log_probabilities_that_line_up_are_taken(server, opened):
    server.owner, server.says = "llamacpp", lambda body: "ab"

    def listed(reply, tokens):
        content = [{"id": token, "logprob": -i / 4} for i, token in enumerate(tokens)]
        reply["choices"][0]["logprobs"] = {"content": content}
        return reply

    server.change = lambda reply: listed(reply, [*ids("ab"), END])
    engine = opened()
    assert engine.sample(["a"])[0][0].log_probabilities.tolist() == [0.0, -0.25, -0.5]
    server.change = lambda reply: listed(reply, [*ids("ba"), END])
    assert np.isnan(engine.sample(["a"])[0][0].log_probabilities).all()


def test_tempered_log_probabilities_are_not_taken(server, opened):
    def as_sglang(reply):
        text = reply["choices"][0]["text"]
        tokens = [*ids(text), END]
        logprobs = {"token_logprobs": [-1.0] * len(tokens)}
        reply["choices"][0] |= {"token_ids": tokens, "logprobs": logprobs}
        return reply

    server.owner, server.change = "sglang", as_sglang
    engine = opened()
    for temperature, there in ((0.0, True), (1.0, True), (0.7, False)):
        [[one]] = engine.sample(["a"], temperature=temperature)
        assert np.isnan(one.log_probabilities).all() != there


def test_what_passes_is_tried_again(server, opened):
    server.failures = [503, 429, (503, {"Retry-After": "1"}, "busy")]
    began = time.monotonic()
    [[found]] = opened().sample(["a"])
    assert found.reason == "end" and len(server.asked) == 4
    assert time.monotonic() - began > 1  # as the server wanted
    assert len({body["seed"] for body in server.asked}) == 1
    for unknown in ("soon", "9" * 400):
        server.failures = [(503, {"Retry-After": unknown}, "busy")]
        assert opened(retries=1).sample(["a"])[0][0].ended
    server.failures = [500] * 3
    with pytest.raises(UserError, match=r"prompt 0: .* status 500 after 3 tries"):
        opened(retries=2).sample(["a"])


def test_a_server_that_says_nothing(server, opened):
    server.failures = [5.0, 5.0]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"prompt 0: .* does not answer within 0\.2 s"):
        opened(timeout=0.2, retries=1).sample(["a"])
    assert time.monotonic() - began < 4 and len(server.asked) == 2
    server.failures = [5.0]
    assert opened(timeout=0.2, retries=1).sample(["a"])[0][0].ended


def test_so_many_are_under_way_at_once(server, opened):
    server.says = lambda body: time.sleep(0.02) or "x"
    opened(concurrency=3).sample(["a"] * 6, n=4)
    assert len(server.asked) == 24 and 2 <= server.most <= 3


def test_the_first_failure_ends_all(server, opened):
    server.failures = [(400, {}, "no")]
    with pytest.raises(UserError, match="status 400"):
        opened(concurrency=1).sample(["a"] * 50)
    time.sleep(0.1)
    assert len(server.asked) < 10


def changed(**fields):
    def change(reply):
        reply["choices"][0] |= fields
        return reply

    return change


def more(token_ids=(), logprobs=0.0):
    """More tokens than the sample had, and greater log-probabilities."""

    def change(reply):
        choice = reply["choices"][0]
        choice["token_ids"] = [*choice["token_ids"], *token_ids]
        choice["logprobs"]["token_logprobs"] = [logprobs] * len(choice["token_ids"])
        return reply

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda reply: b'{"choices": [', 'no JSON object: {"choices": \\['),
        (lambda reply: [1], "no JSON object"),
        (lambda reply: reply | {"choices": []}, "'choices' has 0 samples, expected 1"),
        (lambda reply: reply | {"choices": [None]}, "'choices' has 1 samples"),
        (lambda reply: reply | {"choices": "x"}, "field 'choices' is 'x', expected list"),
        (lambda reply: {"choices": reply["choices"]}, "field 'usage' is None, expected dict"),
        (changed(text=None), "field 'text' is None, expected str"),
        (changed(finish_reason="abort"), "'finish_reason' is 'abort'"),
        (changed(token_ids=None), "'token_ids' is None.*too old"),
        (changed(token_ids=[1.5]), r"'token_ids' is \[1\.5\]"),
        (changed(token_ids=[True]), r"'token_ids' is \[True\]"),
        (changed(token_ids=[10**6]), "a token beyond the tokenizer's"),
        (changed(token_ids=[], text=""), "there is no token in it"),
        (changed(text="other words"), "'other words', the tokenizer as 'seed"),
        (changed(token_ids=ids("seed"), text="seed"), "ended with token .* no end token here"),
        (more(token_ids=[END]), f"it goes on after token {END}, which ends a sample"),
        (changed(token_ids=ids("seed") * 99, text="seed"), "tokens, and 256 were asked for at"),
        (more(logprobs=0.5), r"a log-probability of 0\.5, which is more than 0"),
        (changed(text="\ud83d"), r"field 'text' is '\\ud83d', expected str"),
        (lambda reply: b"[" * 10**5, "no JSON object"),
        (lambda reply: b"\x1b[2J", r"no JSON object: \\x1b\[2J"),
    ],
)
def test_a_reply_is_not_trusted(server, opened, change, words):
    server.change = change
    with pytest.raises(UserError, match=f"(?s)prompt 0.*{words}"):
        opened(retries=0).sample(["a"])


def test_who_is_there(server, directory, opened, monkeypatch):
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/v1/models cannot be reached"):
        open_server("http://127.0.0.1:1", tokenizer=directory)
    with pytest.raises(UserError, match=r"status 404.*Not Found"):
        open_server(f"{server.url}/elsewhere", tokenizer=directory)
    with pytest.raises(UserError, match="expected the URL of a server"):
        open_server("localhost:8000", tokenizer=directory)
    with pytest.raises(UserError, match="which tokenizer"):
        open_server(server.url, tokenizer="")
    with pytest.raises(UserError, match=r"no model 'x' .* there are: m"):
        opened(model_name="x")
    assert open_server(f"{server.url}/v1/", tokenizer=directory).model_name == "m"
    server.models = ["m", "n"]
    with pytest.raises(UserError, match=r"which model.* there are: m, n"):
        opened()
    assert opened(model_name="n").model_name == "n"
    server.failures = [(404, {}, "The model `n` does not exist.")]
    with pytest.raises(UserError, match=r"status 404.*The model `n` does not exist"):
        opened(model_name="n").sample(["a"])
    server.failures = [(307, {"Location": "http://127.0.0.1:1/"}, "")]
    with pytest.raises(UserError, match="sends elsewhere"):
        opened(model_name="n").sample(["a"])


def test_a_key_is_sent_and_nowhere_else(server, directory, opened, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    engine = opened()
    engine.sample(["a"])
    assert server.keys == [f"Bearer {SECRET}"]
    assert SECRET not in engine.state
    for status, words in ((401, "refuses the key in the environment variable"), (400, r"\*\*\*")):
        server.failures = [(status, {}, f"bad: {SECRET}")]
        with pytest.raises(UserError, match=words) as error:
            engine.sample(["a"])
        assert SECRET not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    server.failures = [401]
    with pytest.raises(UserError, match="wants a key: give it in"):
        opened().sample(["a"])
    with pytest.raises(UserError, match="a key belongs in the environment") as error:
        open_server(f"http://me:{SECRET}@127.0.0.1:1", tokenizer=directory)
    assert SECRET not in str(error.value) and SECRET not in "".join(capfd.readouterr())


def test_a_file_of_prompts(server, directory, tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.generation.sample_file._AT_ONCE", 4)  # two rows
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"p{i}", "id": i}) + "\n" for i in range(5)))
    settings = rmjax.SamplingSettings(n=2, seed=3)
    options = {"tokenizer": str(directory), "log_probabilities": True}
    server.failures = [0, 0, 0, 0, (400, {}, "no")]
    with pytest.raises(UserError, match=r"in\.jsonl row [34]: prompt [01]: .* \(status 400\)"):
        sample(server.url, str(source), str(out), settings, **options)
    made_by = json.loads((tmp_path / "out.jsonl.partial.json").read_text())
    assert made_by["model"].startswith(f"m at {server.url}, tokenizer ")
    lines = sample(server.url, str(source), str(out), settings, **options)
    assert lines[0] == "5 rows, 2 of them before"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for i, row in enumerate(rows):
        texts = [f"seed {request_seed(3, i + 1, number)}" for number in range(2)]
        assert row["id"] == i and row["responses"] == texts and row["ended"] == [True, True]
        assert row["token_ids"] == [[*ids(text), END] for text in texts]
        assert list(map(len, row["log_probabilities"])) == list(map(len, row["token_ids"]))


def test_what_a_file_cannot_have(server, directory, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "p"}\n')
    settings = rmjax.SamplingSettings()
    options: dict[str, Any] = {"tokenizer": str(directory)}
    with pytest.raises(UserError, match="--dtype is of a model in this process"):
        sample(server.url, str(source), str(out), settings, dtype="float32", **options)
    with pytest.raises(UserError, match="--tokenizer is of a server"):
        sample(str(directory), str(source), str(out), settings, **options)
    with pytest.raises(UserError, match="which tokenizer"):
        sample(server.url, str(source), str(out), settings)
    server.owner = "openai"
    with pytest.raises(UserError, match="row 1: the server gives no log-probabilities"):
        sample(server.url, str(source), str(out), settings, log_probabilities=True, **options)
