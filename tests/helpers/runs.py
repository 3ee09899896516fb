"""Small training runs, and what they left behind."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import rmjax.train
import rmjax.training.experiment
from helpers.checks import known
from helpers.paths import ROOT
from rmjax.checkpoints.manager import Checkpoints
from rmjax.config import Config, as_flat_dict
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.datasets import load_data
from rmjax.training.experiment import make_model, pick_tokenizer
from rmjax.training.optimizer import make_optimizer, make_schedule
from rmjax.training.step import TrainState, abstract_state

QUICKSTART = ROOT / "configs" / "quickstart.py"


def load_config(path, arg: str | None = None) -> Config:
    spec = known(importlib.util.spec_from_file_location(path.stem, path))
    module = importlib.util.module_from_spec(spec)
    known(spec.loader).exec_module(module)
    return module.get_config(arg)


def tiny_config(workdir, **changes) -> Config:
    """The quickstart, so small that a step takes milliseconds: `data__train=...` sets a field."""
    config = load_config(QUICKSTART)
    defaults = dict(
        data__train="generated:64",
        data__validation="generated:16",
        model__hidden_size=32,
        model__intermediate_size=64,
        model__head_dim=8,
        batch_size=8,
        epochs=0,
        steps=6,
        rows_per_device=2,
        optimizer__schedule="constant",
        optimizer__warmup_steps=2,
        eval_every=3,
        checkpoint_every=3,
    )
    for field, value in (defaults | {"workdir": str(workdir)} | changes).items():
        *parents, name = field.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        assert hasattr(owner, name), field
        setattr(owner, name, value)
    return config


def on_one_device(config: MeshConfig):
    return make_mesh(config, jax.devices()[:1])


def run(config: Config, **patches) -> None:
    """Trains in this process on one device; `patches` replace names of `rmjax.train`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"make_mesh": on_one_device} | patches).items():
            patch.setattr(rmjax.train, name, value)
        rmjax.train.train(config)


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir) -> list[dict]:
    """The lines of `metrics.jsonl` without what the clock says."""
    clock = ("tokens_per_second", "evaluation_seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics(workdir)]


def steps_kept(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def contents(directory) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def parts(config: Config):
    """Model, training and validation data of a config, on one device."""
    model = make_model(config, None, Sharding(on_one_device(config.mesh)))
    return model, *load_data(
        config, pick_tokenizer(config, None, known(config.model).vocab_size), share=True
    )


def seen_samples(into: list):
    """A replacement of `iterate` that writes down the samples of each batch."""
    original = rmjax.train.iterate

    def iterate(batches, start, sharding):
        for batch in original(batches, start, sharding):
            samples = np.asarray(batch.samples)
            into.append(sorted(samples[samples >= 0].tolist()))
            yield batch

    return iterate


def restore(config: Config, step: int | None = None, sharding: Sharding | None = None):
    """The state of a checkpoint (the last one) and what was stored beside it."""
    sharding = sharding or Sharding(on_one_device(config.mesh))
    model = make_model(config, None, sharding)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1))
    checkpoints = Checkpoints(Path(config.workdir), clean=False)
    try:
        step = known(step or checkpoints.latest)
        abstract = abstract_state(model, optimizer, config.trained)
        return TrainState.from_items(
            checkpoints.restore(step, abstract.items())
        ), checkpoints.metadata(step)
    finally:
        checkpoints.close()


def assert_same_bits(ours, theirs) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def flags(config) -> list[str]:
    """The command line of a config."""
    usual, wanted = as_flat_dict(load_config(QUICKSTART)), as_flat_dict(config)
    assert usual.keys() == wanted.keys()
    changed = [f"--config.{k}={v}" for k, v in wanted.items() if v != usual[k]]
    return [f"--config={QUICKSTART}", *changed]
