"""What the compiler is told, and that a second run finds what the first one compiled."""

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.launching import run_all
from helpers.models import one_device
from helpers.runs import flags, tiny_config
from rmjax.runtime.compilation import compiler_options, enable_compilation_cache
from rmjax.runtime.sharding import MeshConfig, abstract_mesh

# `rmjax.train`, which puts down how often JAX asked its cache of programs, and what it found.
PROGRAM = """
import atexit, collections, json, sys
import jax
from rmjax.training.command_line import run_with_config
from rmjax.train import train

found = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **rest: found.update([event]))
path = sys.argv.pop(1)

def put_down():
    with open(f"{path}-{jax.process_index()}.json", "w") as file:
        json.dump(found, file)

atexit.register(put_down)
run_with_config(train)
"""
EVENT = "/jax/compilation_cache/"
# JAX keeps only what took it a second, which nothing here does.
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def counted(workdir: Path, processes: int, environment: dict[str, str]) -> list[dict[str, int]]:
    """Runs a training from its start; the events of each of its processes."""
    config = tiny_config(
        workdir, steps=2, rows_per_device=1, mesh=MeshConfig(data=processes, fsdp=-1)
    )
    ended = run_all(
        ["-c", PROGRAM, str(workdir), *flags(config)],
        processes=processes,
        devices=2,
        environment=KEEP_ALL | environment,
    )
    assert [one.code for one in ended] == [0] * processes, ended
    logs = [json.loads(Path(f"{workdir}-{i}.json").read_text()) for i in range(processes)]
    names = ("compile_requests_use_cache", "cache_hits", "cache_misses")
    return [{name: log.get(EVENT + name, 0) for name in names} for log in logs]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_compiles_nothing_anew(processes, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # the suite's
    environment = {"RMJAX_CACHE": str(tmp_path / "cache")}
    first = counted(tmp_path / "first", processes, environment)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache/compiled").iterdir()}
    assert first[0]["cache_misses"] > 5 and len(kept) >= first[0]["cache_misses"]
    second = counted(tmp_path / "second", processes, environment)
    # A program for CPUs is that of its own process, and only the first one's is kept.
    assert second[0]["cache_hits"] == second[0]["compile_requests_use_cache"] > 5, second
    assert not any(process["cache_misses"] for process in second)
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache/compiled").iterdir()} == kept

    if processes > 1:
        return
    # What a run that was killed leaves of a file is compiled again.
    for path in (tmp_path / "cache/compiled").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    third = counted(tmp_path / "third", processes, environment)
    assert all(process["cache_hits"] == 0 for process in third)
    runs = [
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("first", "second", "third")
    ]
    losses = [[json.loads(line).get("loss") for line in run.splitlines()] for run in runs]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) > 2


SETTING = "jax_compilation_cache_dir"


@pytest.fixture
def setting():
    """JAX's own setting, put back at the end."""
    before = getattr(jax.config, SETTING)
    yield lambda value: jax.config.update(SETTING, value)
    jax.config.update(SETTING, before)


@pytest.mark.parametrize("chosen", ["elsewhere", ""])
def test_the_users_own_directory_stays(chosen, setting):
    setting(chosen)
    enable_compilation_cache()
    assert getattr(jax.config, SETTING) == chosen


def test_programs_are_kept_in_the_cache(setting, monkeypatch, tmp_path):
    setting(None)
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path))
    enable_compilation_cache()
    assert getattr(jax.config, SETTING) == str(tmp_path / "compiled")


@pytest.mark.parametrize("kind, told", [("TPU v5", True), ("TPU v4", False), ("cpu", False)])
def test_only_chips_on_which_it_pays_are_told_more(kind, told):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))
    assert ("xla_tpu_scoped_vmem_limit_kib" in compiler_options(mesh)) == told  # type: ignore[arg-type]


def test_no_device_no_options():
    assert compiler_options(abstract_mesh(MeshConfig(), 8)) == {}
    assert compiler_options(one_device().mesh) == {}
