"""Requests a second and their latency: `rmjax serve`, and transformers behind the same server.

    python benchmarks/serve.py GGUF topical_chat_ratings.jsonl

Clients ask one after the other, each when it has its reply: 1, 8 and 64 of them, for the score of
one conversation, or of 16 responses to a prompt. Both servers have the same weights in float32, the
same tokens, line and batches. transformers gets a batch sorted by length, in parts of the best of
several sizes, which is looked for first; `--sizes=` leaves it out. `--vllm=PYTHON`, of an
environment with vLLM (docs/exports.md), measures vLLM's own server as well, by texts to /classify;
it finds out by itself what texts have in common. A server is stopped while another is measured.
Clients compute on the same cores. A request that takes longer than the server's time-out, 600 s, is
not answered, which is said in place of figures. Scores are compared: more than 1e-4 apart is an
error.
"""

import argparse
import asyncio
import atexit
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from material import Answered, best_of, make_model, read_dialogues
from rich.console import Console
from timing import load_average

_TOLERANCE = 1e-4
_THEIRS = "--transformers"
Body = dict[str, Any]


def bodies(groups: Sequence[Answered], together: bool) -> list[Body]:
    """Requests of all responses to a prompt, or of one conversation each."""
    if together:
        return [{"prompt": prompt, "responses": responses} for prompt, responses in groups]
    return [{"prompt": prompt, "responses": [responses[0]]} for prompt, responses in groups]


class Measured(NamedTuple):
    """What clients saw.

    Attributes:
      seconds: from the first request to the last reply.
      latencies: seconds, one a request.
      scores: by request.
      refused: what requests were told that were not answered, one each.
    """

    seconds: float
    latencies: list[float]
    scores: list[list[float]]
    refused: list[str]


class Form(NamedTuple):
    """How a server is asked, and how it says that it is ready.

    Attributes:
      path: of the endpoint.
      body: from a prompt with its responses to what is sent.
      scores: from a reply.
      ready: what a line of its output has in it.
    """

    path: str
    body: Callable[[Body], Body]
    scores: Callable[[Any], list[float]]
    ready: str


_OURS = Form(
    "/v1/rewards",
    lambda body: body,
    lambda reply: [item["value"] for item in reply["data"]],
    "ready after",
)


class Server:
    """A server in processes of its own, which are stopped while it is not asked."""

    def __init__(self, command: list[str], cores: set[int], form: Form = _OURS, port: int = 0):
        self._form = form
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        atexit.register(self._signal, signal.SIGKILL)
        url, lines = f"http://127.0.0.1:{port}" if port else "", []
        for line in self._process.stdout or ():
            lines.append(line)
            if found := re.search(r"http://127[\d.:]+", line):
                url = found[0]
            if form.ready in line:
                break
        else:
            raise SystemExit(f"the server did not start: {''.join(lines[-20:])}")
        self.url = url
        # Whatever else it writes is read, so that it need not wait.
        threading.Thread(target=lambda: list(self._process.stdout or ()), daemon=True).start()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __call__(self, asked: Sequence[Body], clients: int) -> Measured:
        """Asks everything, by so many clients at once."""
        self._signal(signal.SIGCONT)
        try:
            return asyncio.run(ask(self.url, self._form, asked, clients))
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends it."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        self._process.wait()


async def ask(url: str, form: Form, asked: Sequence[Body], clients: int) -> Measured:
    """Clients that share the requests, each asking when it has its last reply."""
    import httpx

    line = iter(enumerate(map(form.body, asked)))
    latencies, scores = [0.0] * len(asked), [[0.0]] * len(asked)
    refused: list[str] = []

    async def client(session: httpx.AsyncClient) -> None:
        for number, body in line:
            began = time.perf_counter()
            reply = await session.post(form.path, json=body)
            latencies[number] = time.perf_counter() - began
            if reply.status_code != 200:
                refused.append(reply.text)
                continue
            scores[number] = form.scores(reply.json())

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return Measured(time.perf_counter() - began, latencies, scores, refused)


def serve_transformers(model: str, size: int) -> None:
    """The same server, whose batches transformers computes."""
    import torch
    import transformers

    import rmjax.serve as command
    from rmjax.inference.scorer import Scorer
    from rmjax.inference.scores import Score
    from rmjax.serving.service import Limits

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32
    ).eval()

    @torch.inference_mode()
    def score_encoded(scorer: Scorer, encoded: Sequence[Any]) -> list[Score]:
        values = np.empty(len(encoded))
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].tokens))
        for start in range(0, len(order), size):
            members = order[start : start + size]
            ids = [encoded[i].tokens.tolist() for i in members]
            batch = scorer.tokenizer.pad(
                {"input_ids": ids}, padding_side="right", return_tensors="pt"
            )
            values[members] = network(**batch, use_cache=False).logits[:, 0].numpy()
        name = scorer.rule.name
        return [
            Score({name: float(v)}, float(v), name, len(e.tokens)) for v, e in zip(values, encoded)
        ]

    Scorer.score_encoded = score_encoded  # pyright: ignore[reportAttributeAccessIssue]
    Scorer.compile_shapes = lambda self: []  # pyright: ignore[reportAttributeAccessIssue]
    limits = Limits()
    command.serve(model, host="127.0.0.1", port=0, name="", key="", max_length=0, limits=limits)


def vllm_server(python: str, model: str, cores: set[int]) -> Server:
    """vLLM's own, which is given texts by the model's chat template."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def body(asked: Body) -> Body:
        texts = [
            tokenizer.apply_chat_template(
                [*asked["prompt"], {"role": "assistant", "content": response}], tokenize=False
            )
            for response in asked["responses"]
        ]
        return {
            "model": "rm",
            "input": texts,
            "add_special_tokens": False,
            "use_activation": False,
        }

    def scores(reply: Any) -> list[float]:
        return [item["probs"][-1] for item in reply["data"]]

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    command += ["--served-model-name=rm", "--runner=pooling", "--dtype=float32"]
    command += ["--max-model-len=2048", "--host=127.0.0.1", f"--port={port}"]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    form = Form("/classify", body, scores, "Application startup complete")
    return Server(command, cores, form, port)


def main() -> None:
    """Looks for transformers' best batch, then measures both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("weights", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", type=Path, help="the dialogues")
    parser.add_argument("--clients", default="1,8,64", help="that ask for one conversation")
    parser.add_argument("--group-clients", default="1,8,64", help="that ask for 16 responses")
    parser.add_argument("--sizes", default="4,8,16", help="batches of transformers")
    parser.add_argument("--vllm", default="", help="the Python of an environment with vLLM")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    sys.exit(not run(args))


def run(args: argparse.Namespace) -> bool:
    """The benchmark; whether the scores agree."""
    groups = best_of(read_dialogues(args.data), 16)
    model = str(make_model(args.weights, ["reward"], args.workdir))
    cores, console = set(sorted(os.sched_getaffinity(0))[-args.cores :]), Console(highlight=False)

    def theirs(size: int) -> list[str]:
        return [sys.executable, __file__, _THEIRS, model, str(size)]

    tried = {}
    for size in map(int, filter(None, args.sizes.split(","))):
        server = Server(theirs(size), cores)
        tried[size] = server(bodies(groups[:2], True), 1).seconds
        server.close()
    print({size: round(seconds, 2) for size, seconds in tried.items()})
    ours = [sys.executable, "-m", "rmjax.serve", model, "--port=0"]
    servers = {"rmjax": Server(ours, cores)}
    if tried:
        best = min(tried, key=lambda size: tried[size])
        servers[f"transformers, batches of {best}"] = Server(theirs(best), cores)
    if args.vllm:
        servers["vLLM"] = vllm_server(args.vllm, model, cores)
    plan = [(False, int(n)) for n in args.clients.split(",") if n]
    plan += [(True, int(n)) for n in args.group_clients.split(",") if n]
    console.print(f"{args.cores} cores; load average {load_average()}")
    apart = 0.0
    for together, clients in plan:
        count = max(clients, 4 if together else 16)
        # Different prompts, as far as there are; the 60 dialogues begin again after that.
        asked = bodies(list(itertools.islice(itertools.cycle(groups), count)), together)
        found = {name: server(asked, clients) for name, server in servers.items()}
        ours = found["rmjax"]
        console.print(f"{clients} clients, {'16 responses' if together else 'a conversation'}:")
        for name, m in found.items():  # at once, since all of it takes long
            if m.refused:
                console.print(f"  {name}: {len(m.refused)} of {len(asked)}: {m.refused[0]}")
                continue
            p50, p99 = np.percentile(m.latencies, [50, 99])
            console.print(
                f"  {name}: {len(asked) / m.seconds:.2f} requests/s, {p50:.2f} s (p50), "
                f"{p99:.2f} s (p99); {m.seconds / ours.seconds:.2f} times as long"
            )
            for one, other in zip(ours.scores, m.scores) if not ours.refused else ():
                apart = max(apart, float(np.abs(np.subtract(one, other)).max()))
    for server in servers.values():
        server.close()
    console.print(f"scores at most {apart:.1e} apart")
    console.print(f"{args.cores} cores; load average {load_average()}")
    return apart < _TOLERANCE


if __name__ == "__main__":
    if sys.argv[1:2] == [_THEIRS]:
        serve_transformers(sys.argv[2], int(sys.argv[3]))
    else:
        main()
