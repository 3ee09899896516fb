"""Programs compiled for TPUs that are not there. Needs the TPU compiler (the extra `aot`)."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import forked
from helpers.paths import ROOT
from rmjax.aot.hardware import CHIPS
from rmjax.aot.program import Workload, topology_devices
from rmjax.errors import UserError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'rmjax[aot]'",
)

TINY = """
from rmjax.config import Config, DataConfig
from rmjax.models.hf_config import DecoderConfig
from rmjax.training.optimizer import OptimizerConfig

def get_config(arg=None):
    return Config(
        workdir="unused",
        data=DataConfig(train="unused", max_length=256),
        model=DecoderConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            max_position_embeddings=256, rms_norm_eps=1e-5,
        ),
        tokenizer="bytes",
        batch_size=32,
        steps=10,
        optimizer=OptimizerConfig(learning_rate=1e-5),
    )
"""

ALIGNED = TINY.replace(
    "rmjax.config import Config, DataConfig",
    "rmjax.config import AlignConfig, DataConfig, RewardConfig, RolloutConfig\n"
    "from rmjax.runtime.sharding import MeshConfig",
)
for before, after in (
    ("return Config(", "return AlignConfig("),
    ("max_length=256)", "attributes=(), max_length=256, row_length=1024)"),
    (
        "batch_size=32,",
        """batch_size=64,
        objective="ppo",
        rollout=RolloutConfig(n=4, max_tokens=128, mesh=MeshConfig(data=-1, fsdp=1, tensor=2)),
        rewards={"teacher": RewardConfig(model="runs/none")},
        mesh=MeshConfig(fsdp=-1, tensor=2),""",
    ),
):
    assert before in ALIGNED
    ALIGNED = ALIGNED.replace(before, after)

LAYER = 256 * (256 + 256 + 128 + 128 + 3 * 512)  # numbers of a layer's matrices
HEAD = 256 * 1024


def run(*arguments: str, config: Path | str, seconds: float = 500):
    """The command, in a process of its own as a user runs it."""
    suite = ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in suite}
    return subprocess.run(
        [sys.executable, "-m", "rmjax.compile_check", f"--config={config}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "aligned.py"
    path.write_text(ALIGNED)
    return path


def reports(result) -> list[dict]:
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@needs_compiler
@pytest.mark.slow
def test_what_a_small_model_comes_to(tiny):
    result = run("--topology=v5e:2x4", "--json", config=tiny)
    assert result.returncode == 0, result.stderr
    (report,) = reports(result)
    layer = LAYER + 2 * 256
    parameters = 6 * layer + 1024 * 256 + 256 + 256 * 5
    whole = 6 * 2 * 256 + 256  # norms, on every chip
    assert report["parameters"] == 4 * ((parameters - whole) / 8 + whole)
    assert report["optimizer"] == 2 * report["parameters"] + 8  # two moments, two counters
    assert report["gradients"] == report["parameters"]
    assert report["peak"] < report["memory"] == CHIPS["v5e"].memory
    assert report["fits"] and report["microbatches"] == 4 and report["rows"] == 8
    # Rows of one sample and one block: the kernel takes all of its one step.
    assert report["attention"] == "splash" and report["steps_taken"] == 1
    found = report["prediction"]
    # Four micro-batches; the forward pass twice, but for its last product and the masked half.
    assert 1.0 < found["flops"] * 8 / report["model_flops"] < 1.7
    gathered = sum(row["bytes"] for row in found["traffic"] if row["kind"] == "all-gather")
    # Weights in bfloat16, 7 of 8 parts, twice a micro-batch, in each of the six layers.
    assert gathered == pytest.approx(4 * 2 * 2 * 6 * (layer - 512) * 7 / 8, rel=0.35)
    assert found["floor"] <= found["step"] <= found["serial"] * 1.001
    assert 0 < found["mfu"] < 1


@needs_compiler
@pytest.mark.slow
def test_what_a_policys_step_comes_to(tiny):
    told = ["objective=dpo", "data.row_length=1024", "rows_per_device=2", "batch_size=128"]
    told = [f"--config.{setting}" for setting in told]
    result = run("--topology=v5e:2x4", "--json", *told, "--tokens=200", "--prompt=20", config=tiny)
    assert result.returncode == 0, result.stderr
    (report,) = reports(result)
    whole = 6 * 2 * 256 + 256
    parameters = 6 * LAYER + 2 * HEAD + whole  # embedding and head
    assert report["parameters"] == 4 * ((parameters - whole) / 8 + whole)
    # 64 prompts of 20 tokens, of which each response has its own last one, and 180 more of it.
    places = 19 + 2 * 181
    assert report["tokens"] == 64 * places and report["microbatches"] == 2
    shared = 19 * 20 // 2
    seen = shared + 2 * (200 * 201 // 2 - shared)
    forward = 64 * (2 * places * 6 * LAYER + 4 * 6 * seen * 256 + 2 * 2 * 180 * HEAD)
    assert report["model_flops"] == 3 * forward
    # 32 rows are computed, layers forward twice, but for their last product, and backward. Of the
    # 2,048 places of a device 1,440 predict, so that the head computes three chunks of 512, forward
    # twice and backward. Of four blocks of attention three: twice forward, by queries, by keys.
    layers = 32 * 1024 * 6 * (4 * LAYER - 256 * 512) * 2
    head = 8 * 2 * 3 * 512 * 4 * HEAD * 2
    attention = 32 * 6 * 4 * 3 * 512 * 512 * 64 * 2 * (2 + 2 + 3 + 4)
    found = report["prediction"]["flops"] * 8
    assert found == pytest.approx(layers + head + attention, rel=1e-3)


@needs_compiler
@pytest.mark.slow
def test_what_sampling_comes_to(tiny):
    sample = "--sample=prompt:65,tokens:100,n:4,rows:64"
    result = run("--topology=v5e:2x4", "--json", sample, config=tiny)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["mesh"] == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}
    assert report["rows"] == 64 and report["fits"]
    norms = 6 * 2 * 256 + 256  # in float32, on every chip
    assert report["weights"] == 2 * (6 * LAYER + 2 * HEAD) / 2 + 4 * norms
    # Four groups of four rows a chip, of one kv head: 128 places for prompts, 128 slots a row.
    assert report["cache"] == 2 * 2 * 6 * 4 * (128 + 4 * 128) * 64
    assert report["read"] == report["weights"] - HEAD + report["cache"]
    chunk = report["chunk"]
    assert 0 < report["bound"] < report["seconds_per_token"] == chunk["step"] / 32
    # The head's matrix stays where it is: sums of the stream, and logits, are what is moved.
    assert sum(row["bytes"] for row in chunk["traffic"]) < 32 * HEAD
    # What is kept is read as it lies, in part from the chip's own memory, and never copied.
    assert chunk["bytes"] < 32 * report["read"]
    assert report["sampled_per_second"] < report["decoded_per_second"]


@needs_compiler
@pytest.mark.slow
def test_what_a_step_of_alignment_comes_to(aligned):
    result = run("--topology=v5e:2x4", "--json", config=aligned)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert report["sampling"]["mesh"] == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}
    assert "runs/none is not here: taken as the policy's architecture" in report["reward"]
    load = report["load"]
    assert (load["prompt"], load["tokens"], load["n"], load["rows"]) == (128, 128, 4, 64)

    # ---- what lives when, by hand: norms are in float32 and on every chip
    norms, matrices = 6 * 2 * 256 + 256, 6 * LAYER + 2 * HEAD
    trained = 4 * (matrices / 8 + norms)
    in_half = 2 * matrices / 8 + 4 * norms
    reward = 2 * (matrices - HEAD) / 8 + 4 * norms + 4 * 256 / 4  # its head is over fsdp alone
    critic = 3 * (4 * (matrices - HEAD) / 8 + 4 * norms + 4 * 256 / 4) + 8
    # Four groups of four rows a chip, of one kv head: 128 places for prompts, 128 slots a row.
    cache = 2 * 2 * 6 * 4 * (128 + 4 * 128) * 64
    assert {part["name"]: part["bytes"] for part in report["parts"]} == {
        "policy": trained,
        "optimizer": 2 * trained + 8,
        "critic": critic,
        "reference": in_half,
        "reward model": reward,
        "weights that sample": 2 * matrices / 2,  # norms are there as they are
        "their cache": cache,
        "gradients": trained,
    }
    assert report["always"] == 3 * trained + 8 + critic + in_half + reward

    # ---- programs
    phases = {phase["name"]: phase for phase in report["phases"]}
    said = [f"log-probabilities, {name}" for name in ("policy", "reference")]
    before = ["weights to sample with", "sampling", "rewards", *said]
    assert list(phases) == [*before, "values of the critic", "update", "update of the critic"]
    for phase in phases.values():
        assert phase["fits"] and phase["peak"] == report["always"] + phase["own"]
        assert phase["seconds"] > 0
    assert report["seconds"] == pytest.approx(sum(p["seconds"] for p in phases.values()))
    assert phases["weights to sample with"]["own"] >= 2 * matrices / 2
    assert phases["sampling"]["own"] >= 2 * matrices / 2 + cache
    assert phases["update"]["own"] >= trained
    assert phases["update of the critic"]["own"] >= critic / 4  # its gradient
    # A prompt and its samples are 127 + 4 x 129 places, one group a row; 16 rows on 4 row shards.
    assert phases[said[0]]["calls"] == 4 and report["update"]["microbatches"] == 4
    assert phases["sampling"]["calls"] == 128
    chunk = report["sampling"]["chunk"]["step"] / 32
    prompts = report["sampling"]["prompts"]["step"] * report["sampling"]["calls"]
    assert phases["sampling"]["seconds"] == pytest.approx(128 * chunk + prompts)


@needs_compiler
@pytest.mark.slow
def test_slices_share_only_gradients_over_the_slow_network(tiny):
    slow = ["--topology=v5e:2x4", "--slices=2", "--config.mesh.data=2"]
    (report,) = reports(run(*slow, "--json", config=tiny))
    traffic = report["prediction"]["traffic"]
    between = [row for row in traffic if "slow" in row["network"] and row["bytes"] > 1e4]
    assert between and all("fsdp" not in row["network"] for row in between)
    assert sum(row["bytes"] for row in between) == pytest.approx(
        report["gradients"], rel=0.35, abs=1e4
    )
    refused = run("--topology=v5e:2x4", "--slices=2", config=tiny)
    assert refused.returncode == 1
    assert "2 slices" in refused.stderr and "--config.mesh.data" in refused.stderr


@needs_compiler
@pytest.mark.slow
def test_a_model_that_does_not_fit_says_so_and_fails():
    result = run("--topology=v5e:2x2", "--tokens=550", config="configs/llama70b_regression.py")
    assert result.returncode == 1
    assert "DOES NOT FIT" in result.stdout and "FITS:" not in result.stdout


@needs_compiler
@pytest.mark.slow
def test_what_sparse_cores_do_is_read_whatever_the_version_of_jax(tiny):
    """JAX 0.10 cannot write down what the compiler makes for v6e, so the compiler does."""
    result = run("--topology=v6e:2x2", config=tiny)
    assert result.returncode == 0, result.stderr
    assert "FITS: " in result.stdout and "MFU" in result.stdout


@needs_compiler
@pytest.mark.slow
def test_a_search_ranks_what_it_compiled(tiny):
    result = run("--topology=v5e:2x2", "--search", "--minutes=0.5", "--json", config=tiny)
    assert result.returncode == 0, result.stderr
    found = reports(result)
    times = [r["prediction"]["step"] for r in found if r["prediction"]]
    assert len(found) >= 2 and times == sorted(times)
    assert len({(tuple(r["mesh"].items()), r["rows"], r["remat"]) for r in found}) == len(found)
    for report in found:
        assert math.prod(report["mesh"].values()) == 4


@needs_compiler
@pytest.mark.slow
def test_the_compilers_cycles_are_those_of_the_data_sheet():
    """A product large enough to run at the peak takes the time the data sheet gives it."""
    script = """
import jax, jax.numpy as jnp
from rmjax.aot import costs, program
jax.config.update("jax_platforms", "cpu")
from jax.sharding import SingleDeviceSharding
for name, n in [(c, n) for c in ("v5p:2x2x1", "v5e:2x2", "v6e:2x2") for n in (8192, 16384)]:
    devices, chip = program.topology_devices(name)
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=SingleDeviceSharding(devices[0]))
    text = jax.jit(jnp.matmul).trace(x, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    work = list(costs.work(text, 1))
    assert sum(item.flops for item in work) == 2 * n**3, name
    print(sum(item.cycles for item in work) / chip.clock / (2 * n**3 / chip.flops))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            "JAX_COMPILATION_CACHE_DIR": "",
        },
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    ratios = list(map(float, result.stdout.split()))
    for small, large in zip(ratios[::2], ratios[1::2], strict=True):
        assert 1 <= large < small < 1.5  # the larger, the nearer to the peak, and never beyond


@needs_compiler
@pytest.mark.slow
def test_70b_stays_within_its_budget():
    """The published recipe on 64 v5p chips: half of their memory is the budget."""
    result = run(
        "--topology=v5p:4x4x4", "--json", "--tokens=550", config="configs/llama70b_regression.py"
    )
    assert result.returncode == 0, result.stderr
    (report,) = reports(result)
    # float32 parameters and two moments over 64 chips, the norms whole.
    assert report["parameters"] + report["optimizer"] == pytest.approx(12 * 69.5e9 / 64, rel=0.01)
    assert report["peak"] < 48 * 2**30
    assert report["prediction"]["flops"] * 64 < 3 * report["model_flops"]
    # The SparseCores gather all weights beside products, and scatter nearly all gradients.
    moved = report["prediction"]["traffic"]
    sizes = dict.fromkeys(("all-gather", "reduce-scatter"), 0.0)
    for row in moved:
        if row["kind"] in sizes and "fsdp" in row["network"]:
            assert row["asynchronous"] == 1.0
            sizes[row["kind"]] += row["bytes"]
    weights = report["microbatches"] * 2 * 69.5e9 / 2  # bfloat16, halved by tensor
    assert sizes["all-gather"] == pytest.approx(2 * weights, rel=0.05)  # forward and backward
    assert sizes["reduce-scatter"] == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:", "v9:4x4", "v5p:4x4x4x4", "v5p:0x-1", "4x4", "h100:8x"]
)
def test_an_unknown_topology_names_the_known(name):
    with pytest.raises(UserError, match=r"v5p:4x4x4 .*chips: v5p, v5e"):
        topology_devices(name)


def test_arguments_of_an_alignment_are_checked(aligned):
    for arguments, message in (
        (["--tokens=100"], "--sample=prompt:COUNT,tokens:COUNT says how long"),
        (["--mesh=tensor:2"], "config.rollout.mesh"),
        (["--sample=prompt:9,tokens:9,n:3"], "rollout.n and rollout.rows"),
        (["--sample=prompt:9,tokens:200"], "rollout.max_tokens = 128"),
    ):
        arguments = [f"--config={aligned}", "--topology=v5e:2x4", *arguments]
        result = forked.run(["-m", "rmjax.compile_check", *arguments])
        assert result.returncode == 1 and message in result.stderr


def test_arguments_are_checked(tiny):
    for arguments, message in (
        ([], "--topology="),
        (["--topology=v5p:4x4x4", "--tokens=300"], "1 to 256"),
        (["--topology=v5p:4x4x4", "--tokens=-1"], "1 to 256"),
        (["--topology=v5p:4x4x4", "--tokens=1", "--config.objective=sft"], "2 to 256"),
        (["--topology=v5p:4x4x4", "--sample=prompt:9"], "prompt:COUNT,tokens:COUNT"),
        (["--topology=v5p:4x4x4", "--sample=prompt:9,tokens:9", "--search"], "leave out"),
        (["--topology=v5p:4x4x4", "--mesh=tensor:2"], "--config.mesh.AXIS"),
    ):
        result = forked.run(["-m", "rmjax.compile_check", f"--config={tiny}", *arguments])
        assert result.returncode == 1 and message in result.stderr
        assert "Traceback" not in result.stderr


def test_rows_that_a_step_fills():
    assert Workload(128, 4096).rows(4096) == 128
    assert Workload(128, 550).rows(4096) == 19  # seven to a row, none cut
    assert Workload(1, 4096).rows(4096) == 1
