"""The pure parts of the benchmarks: what they count and what they are made of."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.layouts import dense, dense_gradients, make_layout
from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in ("aligners", "material", "timing", "trainers"):
        if name not in before:
            sys.modules.pop(name, None)


def test_ablation_counts_places_by_hand():
    script = runpy.run_path(str(BENCHMARKS / "ablation.py"))
    lengths = script["Lengths"]
    # Samples of 50, 70 | 100, 130; sharing the prompt: 80 | 150.
    groups = [lengths(40, (10, 30)), lengths(80, (20, 50))]
    ways = script["layouts"](groups, most=256, row=256, batch=2)
    assert ways["padded to the maximum"] == Counter({(2, 256): 2})
    assert ways["grouped by length"] == Counter({(2, 192): 1, (2, 128): 1})  # 130, 100 | 70, 50
    assert ways["packed"] == Counter({(1, 256): 2})  # 130 + 100 | 70 + 50
    assert ways["packed, prompt shared"] == Counter({(1, 256): 1})  # 150 + 80 = 230
    assert [script["places"](way) for way in ways.values()] == [1024, 640, 512, 256]


def test_ablation_takes_a_group_apart_that_fits_no_row():
    script = runpy.run_path(str(BENCHMARKS / "ablation.py"))
    groups = [script["Lengths"](100, (80, 90))]  # 270 shared; 180 and 190 alone
    ways = script["layouts"](groups, most=256, row=256, batch=2)
    assert ways["packed, prompt shared"] == Counter({(1, 256): 2})


def test_simulated_lengths_have_the_stated_means():
    script = runpy.run_path(str(BENCHMARKS / "ablation.py"))
    groups = script["simulated"](100_000, most=10**9)
    prompts = np.array([group.prompt for group in groups])
    responses = np.array([group.responses for group in groups])
    assert np.isclose(prompts.mean(), 347, rtol=0.02)
    assert np.isclose(np.median(prompts), 181, rtol=0.02)
    assert np.isclose(responses.mean(), 381, rtol=0.02)
    assert max(max(g.samples) for g in script["simulated"](1000)) <= 4096


def test_pairs_are_split_where_they_differ(tmp_path: Path):
    import gzip

    script = runpy.run_path(str(BENCHMARKS / "material.py"))
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [
        {"chosen": f"{shared} yes", "rejected": f"{shared} no"},
        {"chosen": f"{shared} yes", "rejected": f"{shared}"},  # no response
        {"chosen": f"{shared} yes", "rejected": "\n\nHuman: z\n\nAssistant: no"},  # another prompt
    ]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (pair,) = script["read_pairs"](path)
    assert [m["role"] for m in pair.prompt] == ["user", "assistant", "user"]
    assert [m["content"] for m in pair.prompt] == ["a", "b", "c"]
    assert pair.responses == ["yes", "no"]


def test_best_of_has_distinct_responses_and_keeps_the_prompts_own():
    script = runpy.run_path(str(BENCHMARKS / "material.py"))
    answered = script["Answered"]
    dialogues = [answered([], [f"{d}{i}" for i in range(3)] + [f"{d}0"]) for d in "abcdef"]
    made = script["best_of"](dialogues, 16)
    assert [len(set(one.responses)) for one in made] == [16] * 6
    assert all(set(one.responses) >= set(d.responses) for one, d in zip(made, dialogues))
    assert made == script["best_of"](dialogues, 16)


def test_curves_are_compared_by_hand():
    import argparse

    script = runpy.run_path(str(BENCHMARKS / "curves_vs_trl.py"))

    def side(losses: list[float], margins: list[float]) -> Any:
        norms, rates = [2.0] * len(losses), [1e-5] * len(losses)
        value = {"loss": losses, "grad_norm": norms, "learning_rate": rates}
        return script["Piece"](3.0, value | {"margins": np.array(margins)})

    ours = side([0.7] * 11 + [0.6], [1.0, -1.0, 0.5, 0.0])
    theirs = side([0.7] * 10 + [0.75, 0.6], [1.0, 1.0, 0.25, 0.0])
    found = script["compare"](ours.value, theirs.value)
    assert found["largest difference of the loss, first steps"] == 0  # the first ten
    assert found["largest difference of the loss, all steps"] == pytest.approx(0.05)
    assert found["largest difference of a held-out margin"] == 2
    assert found["held-out pairs decided differently"] == 1
    assert script["accuracy"](ours.value["margins"])[0] == 2.5 / 4
    settings = argparse.Namespace(steps=12, pairs=4, length=9, learning_rate=1e-5, micro=2, cores=1)
    record, table = script["report"]({"rmjax": ours, "TRL": theirs}, settings)
    assert json.loads(json.dumps(record))["sides"]["TRL"]["loss"][10] == 0.75
    assert "| 11 | 0.700000 | 0.750000 | -5.0e-02 |" in table.splitlines()
    assert "| rmjax | 0.625 (" in table


def test_a_policys_steps_are_cut_where_its_words_begin_and_end():
    """A pair as prompt and two responses, and a response as labels; the longest first."""
    from rmjax.data.tokenized import in_memory

    script = runpy.run_path(str(BENCHMARKS / "trainers.py"))
    prompts = [[5, 6, 7], [5, 6, 7], [5, 6, 8, 9], [5, 6, 8, 9]]
    said = [[1, 2], [3], [4, 1, 2], [2, 2]]
    tokens = [np.asarray([*p, *s, 0], np.int32) for p, s in zip(prompts, said)]
    spoken = [
        np.isin(np.arange(len(t)), range(len(p), len(t) - 1)) for p, t in zip(prompts, tokens)
    ]
    data, _ = in_memory(tokens, [str(p) for p in prompts], spoken)
    (step,) = script["policy_steps"]("dpo", data, [np.arange(4)])
    assert step == [
        {"prompt_ids": p, "chosen_ids": a, "rejected_ids": b}
        for p, a, b in ((prompts[2], said[2], said[3]), (prompts[0], said[0], said[1]))
    ]
    (step,) = script["policy_steps"]("sft", data, [np.asarray([0, 2])])
    assert step == [
        {"input_ids": [*p, *s], "labels": [-100] * len(p) + s}
        for p, s in ((prompts[2], said[2]), (prompts[0], said[0]))
    ]


def test_the_parts_of_a_step_are_what_was_watched(monkeypatch: pytest.MonkeyPatch):
    script = runpy.run_path(str(BENCHMARKS / "aligners.py"))
    now = 0.0

    def works(seconds: float, tokens: list[int]) -> list[int]:
        nonlocal now
        now += seconds
        return tokens

    monkeypatch.setitem(script["CLOCKS"], "wall", lambda: now)
    watch = script["Watch"]("wall")
    sample, score = watch.over("sampling", works, len), watch.over("scoring", works)
    assert sample(2.0, [7, 7, 7]) == [7, 7, 7]
    works(100.0, [])  # nobody watches
    score(0.5, [])
    score(0.25, [1, 2])
    first = watch.taken()
    assert first == {"seconds": {"sampling": 2.0, "scoring": 0.75}, "tokens": 3}
    assert watch.taken() == {"seconds": {"sampling": 0.0, "scoring": 0.0}, "tokens": 0}


def test_what_is_left_of_a_step_is_its_update():
    script = runpy.run_path(str(BENCHMARKS / "align_vs_trl.py"))

    def step(whole: float, sampling: float, scoring: float) -> Any:
        return script["Piece"](whole, {"seconds": {"sampling": sampling, "scoring": scoring}})

    pieces = [step(10, 6, 1), step(30, 7, 2), step(20, 9, 1.5)]
    assert script["of_parts"](pieces) == ["20.0", "7.0", "1.5", "9.5"]


def test_a_gradient_is_compared_tensor_by_tensor_under_its_name(tmp_path: Path):
    """A tree as Hugging Face names it, and the tensor that is farthest from TRL's."""
    from safetensors.numpy import save_file

    from rmjax.models.presets import quickstart

    script = runpy.run_path(str(BENCHMARKS / "aligners.py"))
    decoder = quickstart()
    layers, width = decoder.num_hidden_layers, decoder.hidden_size
    heads, size = decoder.num_attention_heads, decoder.head_dim
    q = np.random.default_rng(0).normal(size=(layers, width, heads, size)).astype(np.float32)
    tree = {"layers": {"q": q}, "final_norm": np.arange(width, dtype=np.float32)}

    class Model:
        config = decoder

    class Tensor:
        def __init__(self, values: np.ndarray):
            self.grad, self.numpy = self, lambda: values

    found = script["as_hf"](tree, Model)
    assert len(found) == layers + 1
    expected = q[1].reshape(width, heads * size).T
    np.testing.assert_array_equal(found["model.layers.1.self_attn.q_proj.weight"], expected)
    np.testing.assert_array_equal(found["model.norm.weight"], tree["final_norm"])

    class Network:
        def named_parameters(self) -> list[tuple[str, Any]]:
            gradients = {"a": [3.0, 4.0], "b": [0.0, 10.0], "c": [0.0]}
            return [(name, Tensor(np.asarray(x, np.float32))) for name, x in gradients.items()]

    ours = {"a": np.asarray([3.0, 4.5], np.float32), "b": np.asarray([0.2, 10.0], np.float32)}
    ours["c"] = np.zeros(1, np.float32)  # as where everything is clipped
    save_file(ours, tmp_path / "ours")
    apart = script["gradient_apart"](Network(), tmp_path / "ours")
    assert apart == pytest.approx(0.1)  # .5 of 5; .2 of 10 is less


def test_two_calls_for_stretches_merge_to_attention_and_its_gradients():
    """With XLA in cuDNN's place, which leaves NaN where nothing was asked for."""
    import jax
    import jax.numpy as jnp

    script = runpy.run_path(str(BENCHMARKS / "gpu_kernels.py"))
    rng = np.random.default_rng(0)
    case = script["Case"]("", (4, 2, 8), 2, 96, 12, 15, 2)
    layout, own, to_prompt = script["make_rows"](case)
    rows = [
        [
            (shared, [size for start, size in parts[1:]])
            for shared, parts in _groups(own.queries[:, row].T, to_prompt.keys[:, row].T)
        ]
        for row in range(case.rows)
    ]
    expected, seen = make_layout(rows, case.length, 1)
    for ours, theirs in zip(layout, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    q, k, v, by = (rng.normal(size=(2, 96, n, 8)).astype(np.float32) for n in (4, 2, 2, 4))
    by = np.where(layout.segment_ids[..., None, None] > 0, by, 0)

    @jax.jit
    def both(q, k, v, by):
        def attend(q, k, v):
            return script["two_calls"](script["stand_in"](), own, to_prompt, q, k, v)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(by)

    found = both(*map(jnp.asarray, (q, k, v, by)))
    for ours, theirs in zip(
        found, (dense(q, k, v, seen), *dense_gradients(q, k, v, seen, by)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    pairs = case.rows * case.length * (case.length + 1) / 2
    assert script["seen_share"](layout) == pytest.approx(seen.sum() / pairs)


def _groups(parts: np.ndarray, prompts: np.ndarray) -> list[tuple[int, list[np.ndarray]]]:
    """Each prompt's length, and first position and length of it and its responses."""
    starts = [start for start, size in prompts if size >= 0]
    bounds = [*starts[1:], 10**9]
    return [
        (size, [part for part in parts if start <= part[0] < end])
        for (start, size), end in zip(prompts, bounds)
    ]


def test_the_parts_of_the_check_on_a_gpu_are_there():
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    parts = re.findall(r"(?:benchmarks|tests|configs)/[\w/]+\.py", script.read_text())
    assert len(parts) >= 5
    assert [part for part in parts if not (ROOT / part).exists()] == []
