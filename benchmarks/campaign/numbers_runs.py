"""Runs whose numbers go to their edges: labels, learning rates, rewards, features.

A run either ends with checkpoints in which all is finite, or stops before it saves anything else.
"""

import contextlib
import functools
import json
import math
import os
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from campaign import good
from campaign.numbers_case import Case
from campaign.numbers_models import Change, changed, put, times, write_policy

_TRAIN = """
from rmjax.config import Config, DataConfig, LoraConfig, OptimizerConfig, PreferenceConfig

def get_config(arg=None):
    return Config(
        workdir="out", init={init!r}, objective={objective!r}, dtype="float32", remat="none",
        data=DataConfig(train="rows.jsonl", validation={held!r}, attributes={attributes!r},
                        max_length=64, row_length=128, label_range={limits}),
        preference=PreferenceConfig({preference}),
        optimizer=OptimizerConfig({optimizer}), {more}
        steps=3, batch_size=4, rows_per_device=2,
    )
"""
_ALIGN = """
from rmjax.config import (
    AlignConfig, CriticConfig, DataConfig, OptimizerConfig, PolicyGradientConfig, RewardConfig,
    RolloutConfig, ShapingConfig,
)

def get_config(arg=None):
    return AlignConfig(
        workdir="out", init="policy", objective={objective!r}, dtype="float32", remat="none",
        data=DataConfig(train="prompts.jsonl", validation={held!r}, attributes=(),
                        max_length=48, row_length=64),
        rollout=RolloutConfig(n=2, max_tokens=4, rows=4), rewards={{"r": RewardConfig({reward})}},
        policy_gradient=PolicyGradientConfig({gradient}), {more}
        batch_size=4, steps=2, rows_per_device=4,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
    )
"""
_STOPPED = r"step \d: |held-out samples"
_OF_PAIRS = ("bradley_terry", "margin_bradley_terry", "scaled_bradley_terry", "general_preference")
_OF_POLICIES = ("sft", "dpo", "ipo", "simpo", "rpo_bwd_kl", "rpo_sq")


def _train(
    directory: Path,
    label: str = "1",
    objective: str = "regression",
    change: Change | None = None,
    held: str = "",
    **fields: Any,
) -> None:
    """Writes `tiny.py` and what it names; `label` stands in the first row."""
    policy, pairs = objective in _OF_POLICIES, objective not in ("regression", "ordinal")
    if policy:
        write_policy(directory / "model", change)
    else:
        changed(change)(directory)
    known = {
        "limits": "(0.0, 4.0)",
        "preference": "",
        "optimizer": "learning_rate=1e-3",
        "more": "",
    }
    attributes = () if policy else ("wit", "care")
    config = _TRAIN.format(
        **{**known, **fields}, init="model", objective=objective, held=held, attributes=attributes
    )
    (directory / "tiny.py").write_text(config)
    for name, own in (("rows.jsonl", label), ("held.jsonl", label if held else "1")):
        rows: list[dict[str, Any]] = [
            {"prompt": f"{name} {n}?", "wit": n % 5, "care": 1} for n in range(8)
        ]
        said = {"chosen": "Yes.", "rejected": "No", "margin": 2}
        for n, row in enumerate(rows):
            row |= said if pairs and objective != "sft" else {"response": f"It is {n}."}
        rows[0]["margin" if "margin" in rows[0] else "wit"] = "HERE"
        if name == "rows.jsonl" and held:
            own = "1"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / name).write_text(text.replace('"HERE"', own))


_RUN = ["train", "--config=tiny.py"]


def label_cases() -> Iterator[Case]:
    """Labels and margins of training."""
    for text, stops in (
        ("4", ""), ("0", ""), ("-0.0", ""), ("1e-300", ""), ("null", ""), ("NaN", ""), ("-100", ""),
        ("4.0000001", "row 1: field 'wit'"), ("-1e-9", "row 1: field 'wit'"),
        ("Infinity", "row 1: field 'wit'"), ("1e400", "row 1: field 'wit'"),
        ("1" + "0" * 400, "row 1: field 'wit'"), ('"3"', "row 1: field 'wit'"),
        ("true", "row 1: field 'wit'"), ("[3]", "row 1: field 'wit'"),
    ):  # fmt: skip
        yield Case(f"a label of {text[:20]}", functools.partial(_train, label=text), _RUN, stops)
    endless = "(0.0, float('inf'))"
    for text, stops in (("1e39", "row 1: field 'wit'"), ("1e300", "row 1: field 'wit'"),
                        ("1e30", _STOPPED), ("1e15", "")):  # fmt: skip
        make = functools.partial(_train, label=text, limits=endless)
        yield Case(f"a label of {text} where there is no limit", make, _RUN, stops)
    make = functools.partial(_train, label="1e30", limits=endless, held="held.jsonl")
    yield Case("a held-out label of 1e30", make, _RUN, "held-out samples")
    for text, stops in (("0", ""), ("1e-300", ""), ("1e30", _STOPPED), ("-1", "margin"),
                        ("NaN", "margin"), ("Infinity", "margin"), ("1e39", "margin"),
                        ('"1"', "margin"), ("true", "margin")):  # fmt: skip
        make = functools.partial(_train, label=text, objective="scaled_bradley_terry")
        yield Case(f"a margin of {text}", make, _RUN, stops)


def training_cases() -> Iterator[Case]:
    """Learning rates, settings and weights that a run does not survive."""

    def case(name: str, stops: str = _STOPPED, either: bool = False, **fields: Any) -> Case:
        make = functools.partial(_train, **fields)
        return Case(f"train: {name}", make, _RUN, stops, found=(lambda d: "") if either else None)

    fast = "learning_rate=1e38, warmup_steps=1"
    for objective in ("regression", "ordinal", *_OF_PAIRS, *_OF_POLICIES):
        yield case(f"{objective}, a learning rate of 1e38", objective=objective, optimizer=fast)
    for text in ("1e10", "1e19", "1e30"):
        optimizer = f"learning_rate={text}, warmup_steps=1"
        yield case(f"a learning rate of {text}", either=True, optimizer=optimizer)
    for text in ("eps=0.0", "eps=1e-45", "clip_norm=1e38", "weight_decay=1e38", "b1=0.0, b2=0.0",
                 "moments='bfloat16', clip_norm=1e30"):  # fmt: skip
        optimizer = f"learning_rate=1e-3, {text}"
        yield case(text, rf"{_STOPPED}|config\.optimizer", either=True, optimizer=optimizer)
    lora = "lora=LoraConfig(rank=2),"
    yield case("adapters, a learning rate of 1e38", optimizer=fast, more=lora)
    for key in ("score", "model.norm", "model.layers.0.mlp.up_proj"):
        yield case(f"{key} has NaN", change=put(key, 0, math.nan))
    unused = put("model.embed_tokens", (7, 3), math.nan)
    yield case("NaN that is not read", change=unused)
    yield case("NaN that is not trained", change=unused, more="trainable=('head',),")
    for factor, either in ((1e10, True), (1e18, True), (1e25, False), (1e37, False)):
        yield case(f"scores of {factor:g}", either=either, change=times("score", factor))
    for name, objective, setting in (
        ("beta 1e-46", "ipo", "beta=1e-46"), ("beta 1e-30", "ipo", "beta=1e-30"),
        ("beta 1e38", "dpo", "beta=1e38"), ("gamma 1e39", "simpo", "gamma=1e39"),
        ("centering by 1e39", "bradley_terry", "center_rewards_coefficient=1e39"),
        ("a strength of 1e39", "rpo_sq", "strength_scale=1e39"),
    ):  # fmt: skip
        yield case(
            name, rf"{_STOPPED}|config\.preference", True, objective=objective, preference=setting
        )
    held: dict[str, Any] = {
        "objective": "bradley_terry",
        "held": "held.jsonl",
        "optimizer": "learning_rate=1e-3",
    }
    yield case("metrics that are not defined", "", **held)


def _align(
    directory: Path,
    returns: str = "[len(r) / 10 for r in responses]",
    objective: str = "reinforce",
    change: Change | None = None,
    **fields: Any,
) -> None:
    """Writes `tiny.py`, a policy, prompts, a reward model and a function of rewards."""
    changed(change)(directory)
    write_policy(directory / "policy")
    good.write_rows(directory / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(4)])
    rows = [{"prompt": "a?", "response": "b" * n} for n in range(1, 5)]
    good.write_rows(directory / "rows.jsonl", rows)
    code = "import numpy as np\n\ndef reward(prompts, responses):\n    n = len(responses)\n"
    (directory / "judge.py").write_text(f"{code}    return {returns}\n")
    known = {"held": "", "reward": 'function="judge.py:reward"', "gradient": "", "more": ""}
    (directory / "tiny.py").write_text(_ALIGN.format(**{**known, **fields}, objective=objective))


def alignment_cases() -> Iterator[Case]:
    """Rewards of functions, servers and models; what is made of them."""
    run = ["align", "--config=tiny.py"]

    def case(name: str, stops: str = "", either: bool = False, **fields: Any) -> Case:
        make = functools.partial(_align, **fields)
        return Case(f"align: {name}", make, run, stops, found=(lambda d: "") if either else None)

    refused = r"judge\.py:reward"
    for value in (
        "float('nan')", "float('inf')", "-np.inf", "np.float32('nan')", "1e39", "10**400", "'0.5'",
        "1j", "np.complex64(1)", "[1.0]", "{}", "np.array([1.0])", "object()", "b'1'",
    ):  # fmt: skip
        yield case(f"a function gives {value}", refused, returns=f"[{value}] + [1.0] * (n - 1)")
    for text in ("[1.0] * (n + 1)", "[]", "'1' * n", "None", "1.0", "{0: 1.0}", "np.zeros((n, 2))"):
        yield case(f"a function returns {text}", refused, returns=text)
    yield case("a function gives None alone", "no response has a reward", returns="[None] * n")
    for value in ("True", "np.bool_(True)", "np.float64(0.5)", "np.int8(3)", "-0.0", "1e-320",
                  "None", "1e15"):  # fmt: skip
        yield case(f"a function gives {value}", returns=f"[{value}] + [1.0] * (n - 1)")
    far = "[3e38 * (-1) ** i for i in range(n)]"
    for objective in ("reinforce", "rloo", "grpo", "rejection_sampling", "online_dpo"):
        yield case(f"{objective}: 3e38 and -3e38", "step 1: ", True,
                   objective=objective, returns=far)  # fmt: skip
    ppo: dict[str, Any] = {"objective": "ppo", "more": 'critic=CriticConfig(init="model"),'}
    yield case("ppo: 3e38 and -3e38", "step 1: ", True, returns=far, **ppo)
    for weight in ("1e300", "-1e308"):
        reward = f'function="judge.py:reward", weight={weight}'
        yield case(
            f"a weight of {weight}", r"config\.rewards\.r", returns="[1e30] * n", reward=reward
        )
    for setting in ("length_penalty=1e308", "unended_penalty=1e308"):
        more = f"shaping=ShapingConfig({setting}),"
        yield case(setting, r"config\.shaping", more=more)
    yield case("kl of 1e38", r"step \d: ", True, gradient="kl=1e38")
    for returns, stops in (("[3e38] * n", "differ"), ("[1e-320 * i for i in range(n)]", "differ"),
                           ("[3e38 * (i % 2) for i in range(n)]", ""),
                           ("[float('nan')] * n", refused)):  # fmt: skip
        reward = 'function="judge.py:reward", standardize="rows.jsonl"'
        yield case(
            f"standardized: {returns}", stops, stops == "differ", reward=reward, returns=returns
        )
    model = 'model="model", value="wit"'
    yield case("a model that has NaN", "scores are", reward=model, change=put("score", 0, math.nan))
    yield case("a model's scores of 1e30", r"step \d: ", True, reward=model,
               change=times("score", 1e30))  # fmt: skip
    yield case(
        "a critic that has NaN", r"step 1: .*critic", change=put("score", 0, math.nan), **ppo
    )
    yield case("held-out rewards of 3e38", r"step \d: ", True, returns=far, held="prompts.jsonl",
               objective="grpo")  # fmt: skip
    for text in ("NaN", "Infinity", "1e400", '"0.3"', "null", "[1, NaN]", "1e39"):
        with _server(f'{{"rewards": [{text}]}}') as url:
            reward = f'server="{url}/get_reward", timeout=30.0'
            yield case(f"a server replies {text}", "get_reward", reward=reward)
    with _server('{"data": [{"probs": [0.5, NaN]}]}') as url:
        reward = f'server="{url}/classify", value="0", timeout=30.0'
        yield case("a server replies NaN beside the reward", "classify", reward=reward)


@contextlib.contextmanager
def _server(reply: str) -> Iterator[str]:
    """The URL of a server that replies this to whatever it is asked, in a process of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *unused: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        process = os.fork()
        if not process:
            server.serve_forever()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def probe_cases() -> Iterator[Case]:
    """Heads on features that are no numbers, or very large, or not to be told apart."""

    def case(name: str, stops: str = "", either: bool = False, *more: str, **fields: Any) -> Case:
        make = functools.partial(_train, more="", **fields)
        arguments = ["probe", "--config=tiny.py", "probed", *more]
        return Case(
            f"probe: {name}", make, arguments, stops, found=(lambda d: "") if either else None
        )

    yield case("NaN in a weight", "not finite", change=put("model.norm", 0, math.nan))
    for factor in (0, 1e-30, 1e-38, 1e30, 1e37):
        yield case(
            f"features times {factor:g}", "not finite", True, change=times("model.norm", factor)
        )
    yield case("embeddings of 1e25", "not finite", change=times("embed_tokens", 1e25))
    yield case("a label of 1e30", "", True, label="1e30", limits="(0.0, float('inf'))")
    for rate in ("1e30", "1e38"):
        yield case(f"a learning rate of {rate}", "not finite|step", True, "--fit=adamw",
                   optimizer=f"learning_rate={rate}")  # fmt: skip
