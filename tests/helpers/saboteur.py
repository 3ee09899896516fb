"""`python -m helpers.saboteur`: `rmjax.train`, observed and disturbed by environment variables.

SABOTEUR_DUMPS is a directory for what this process sees: its samples, and the states saved and
restored. SABOTEUR_HEARTBEAT is what to take for `distributed.HEARTBEAT_SECONDS`. SABOTEUR is
"PROCESS WHAT ...", what goes wrong on one of the processes:

  kill SIGNAL STEP    it gets a signal after a step, when every earlier checkpoint is on disk
  version             it has another version of JAX
  cache               it cannot write its cache
  elsewhere           it sees another directory under the same name
  hold                it stops when it has the directory, and prints "held"
"""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rmjax.runtime.cluster
import rmjax.train
import rmjax.training.workdir
from rmjax.checkpoints.manager import Checkpoints
from rmjax.training.command_line import run_with_config
from rmjax.training.step import TrainState

seen: list[int] = []


def whole(state) -> dict[str, np.ndarray]:
    """A state's arrays, gathered from all processes."""
    everywhere = jax.tree.leaves(state)[0].sharding.update(spec=jax.P())
    state = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(state)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def observe(dumps: Path) -> None:
    iterate, save, restore = rmjax.train.iterate, Checkpoints.save, Checkpoints.restore

    def iterate_and_note(*arguments):
        for batch in iterate(*arguments):
            for shard in batch.samples.addressable_shards:
                if shard.replica_id == 0:
                    samples = np.asarray(shard.data)
                    seen.extend(samples[samples >= 0].tolist())
            yield batch

    def put_down(name, state) -> None:
        arrays: dict[str, Any] = whole(state)
        if jax.process_index() == 0:
            np.savez(dumps / name, **arrays)

    def save_and_note(self, step, items, **rest):
        put_down(f"saved-{step}.npz", TrainState.from_items(items))
        save(self, step, items, **rest)

    def restore_and_note(self, step, abstract):
        items = restore(self, step, abstract)
        put_down(f"restored-{step}.npz", TrainState.from_items(items))
        return items

    rmjax.train.iterate = iterate_and_note
    ours: Any = Checkpoints
    ours.save, ours.restore = save_and_note, restore_and_note


def send(number: int, at: int) -> None:
    finish_step = rmjax.train.finish_step

    def finish_and_send(step, *rest):
        finish_step(step, *rest)
        if step == at:
            last = (at - 1) // 2 * 2  # saved every two steps
            while last and not (checkpoints / str(last)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    rmjax.train.finish_step = finish_and_send


def disturb(what: str, *arguments: str) -> None:
    open_workdir = rmjax.train.open_workdir
    if what == "kill":
        send(*map(int, arguments))
    elif what == "version":
        versions = rmjax.train.package_versions()
        rmjax.train.package_versions = lambda: versions | {"jax": "0.0.1"}
    elif what == "cache":
        os.environ["RMJAX_CACHE"] = "/dev/null"
    elif what == "elsewhere":
        rmjax.training.workdir._SHARED_SECONDS = 2.0
        rmjax.train.open_workdir = lambda config: open_workdir(
            dataclasses.replace(config, workdir=config.workdir + "-of-my-own")
        )
    elif what == "hold":

        def hold(workdir, config):
            print("held")
            time.sleep(600)

        rmjax.train.train_in = hold


def train(config) -> None:
    global checkpoints
    checkpoints = Path(config.workdir) / "checkpoints"
    dumps = os.environ.get("SABOTEUR_DUMPS")
    if dumps:
        observe(Path(dumps))
    victim, *disturbance = os.environ.get("SABOTEUR", "").split() or ["none"]
    if victim == str(jax.process_index()):
        disturb(*disturbance)
    rmjax.train.train(config)
    if dumps:
        np.save(Path(dumps) / f"samples-{jax.process_index()}.npy", seen)


if __name__ == "__main__":
    if "SABOTEUR_HEARTBEAT" in os.environ:
        rmjax.runtime.cluster.initialize = functools.partial(
            rmjax.runtime.cluster.initialize,
            heartbeat_seconds=int(os.environ["SABOTEUR_HEARTBEAT"]),
        )
    run_with_config(train)
