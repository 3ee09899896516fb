"""A server samples for a run: one on this machine that loads what it is sent, as others do."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import rmjax
import rmjax.align
from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from helpers.runs import metrics, on_one_device
from rmjax.align import align
from rmjax.alignment import experiment
from rmjax.config import AlignConfig, DataConfig, OptimizerConfig, RewardConfig, RolloutConfig
from rmjax.errors import UserError
from rmjax.generation import http_json
from rmjax.models.decoder_config import LoraConfig


class Server(ThreadingHTTPServer):
    """Samples from the weights that it was told to load; `replies` are what it says instead."""

    daemon_threads = True

    def __init__(self, owner, directory):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.owner, self.policy = owner, rmjax.load_policy(directory, rows=1)
        self.loaded, self.replies, self.lock = [], {}, threading.Lock()

    def load(self, directory):
        self.loaded.append(Path(directory).name)
        self.policy.params = rmjax.load_policy(directory).params
        return {"success": True, "results": [None]}

    def complete(self, body):
        settings = dict(max_tokens=body["max_tokens"], temperature=body["temperature"])
        asked = np.asarray(body["prompt"], np.int32)
        [[found]] = self.policy.sample([asked], seed=body["seed"], **settings)
        tokens = found.tokens.tolist()
        logs = {"tokens": tokens, "token_logprobs": found.log_probabilities.tolist()}
        choice = {"text": found.text, "token_ids": tokens, "logprobs": logs}
        choice["finish_reason"] = "stop" if found.ended else "length"
        return {"choices": [choice], "usage": {"prompt_tokens": len(asked)}}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        card = {"id": "m", "owned_by": self.server.owner, "max_model_len": 64}
        self.answer(200, {"data": [card]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            if self.path in server.replies:
                return self.answer(*server.replies[self.path])
            if self.path == "/v1/completions":
                return self.answer(200, server.complete(body))
            if self.path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                return self.answer(200, server.load(body["kwargs"]["weights_path"]))
            if self.path == "/update_weights_from_disk":
                return self.answer(200, server.load(body["model_path"]))
            return self.answer(200, {"success": True})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A policy, prompts and a reward."""
    directory = tmp_path_factory.mktemp("files")
    decoder = tiny_llama(num_hidden_layers=2, max_position_embeddings=64)
    save_hf(directory / "policy", decoder, causal=True)
    rows = "".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "b", "c", "d"))
    (directory / "train.jsonl").write_text(rows)
    (directory / "f.py").write_text("def f(p, r):\n    return [float(len(x)) for x in r]\n")
    return directory


@pytest.fixture
def started(files, monkeypatch):
    monkeypatch.setattr(http_json, "_PAUSE", 0.001)
    monkeypatch.setattr(experiment, "make_mesh", on_one_device)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = []

    def start(owner):
        server = Server(owner, files / "policy")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        made.append((server, thread))
        return server

    yield start
    for server, thread in made:
        server.shutdown()
        server.server_close()
        thread.join()


def config_of(files, workdir, url, push_every=1, steps=3, **changes) -> AlignConfig:
    return AlignConfig(
        workdir=str(workdir),
        data=DataConfig(str(files / "train.jsonl"), attributes=(), max_length=48, row_length=64),
        init=str(files / "policy"),
        objective="rloo",
        rollout=RolloutConfig(n=2, max_tokens=8, server=url, push_every=push_every),
        rewards={"length": RewardConfig(function=f"{files / 'f.py'}:f")},
        batch_size=4,
        steps=steps,
        rows_per_device=2,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=1),
        **changes,
    )


@pytest.mark.slow
def test_adapters_are_merged_into_what_is_sent(started, files, tmp_path):
    """What the server says of its tokens is what the trainer says, if it has the weights of now."""
    server = started("vllm")
    align(config_of(files, tmp_path / "run", server.url, lora=LoraConfig(rank=2), steps=2))
    assert server.loaded == ["step-000000", "step-000001"]
    found = metrics(tmp_path / "run")
    assert [line["stale_steps"] for line in found] == [0, 0] and found[1]["kl"] != 0
    assert max(line["sampler_gap_largest"] for line in found) < 1e-4
    assert [path.name for path in (tmp_path / "run/sent").iterdir()] == ["step-000001"]


@pytest.mark.slow
def test_old_weights_are_counted_and_held_out_prompts_have_new_ones(started, files, tmp_path):
    server = started("sglang")
    config = config_of(files, tmp_path / "run", server.url, push_every=2, eval_every=3)
    config.data.validation = config.data.train
    align(config)
    assert server.loaded == ["step-000000", "step-000002", "step-000003"]
    found = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["stale_steps"] for line in found] == [0, 1, 0]
    gaps = [line["sampler_gap_largest"] for line in found]
    assert gaps[1] > 1e-3 and max(gaps[0], gaps[2]) < 1e-4
    rows = (tmp_path / "run/rollouts/step-000002.jsonl").read_text().splitlines()
    assert [json.loads(row)["weights"] for row in rows] == [0, 0]


@pytest.mark.parametrize(
    ("owner", "path", "reply", "said"),
    [
        ("vllm", "/collective_rpc", (404, {"detail": "Not Found"}), "VLLM_SERVER_DEV_MODE=1"),
        ("vllm", "/reset_prefix_cache", (200, {"success": False}), "did not load the new weights"),
        ("sglang", "/update_weights_from_disk", (400, {"message": "no way"}), "400.: no way"),
        ("me", "", None, "llama-cpp-python cannot be told to load other weights; vLLM and SGLang"),
    ],
)
def test_a_server_that_does_not_load_weights(owner, path, reply, said, started, files, tmp_path):
    server = started(owner)
    server.replies[path] = reply
    with pytest.raises(UserError, match=said):
        align(config_of(files, tmp_path / "run", server.url))
