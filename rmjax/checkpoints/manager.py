"""A run's checkpoints: training state, data position and config; the best and the last two stay.

What is read is checked: a CRC32C of every chunk of an array, and a checksum of the metadata. The
last but one stays, so that a run can go on if the last one is damaged.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rmjax.checkpoints.model_files import FORMAT_VERSION
from rmjax.checkpoints.orbax_arrays import cause, with_checksums
from rmjax.errors import UserError, write_errors

DIRECTORY = "checkpoints"
RUN_FORMAT = "rmjax-run"  # field `format` of a run's config.json
_CHUNK_BYTES = 16 << 20
# Orbax gives a save up after so many seconds by the clock on the wall, by default after 20 minutes,
# which a machine that was asleep puts it forward by.
_SAVE_SECONDS = 10**9


def _loss(metrics: Any) -> float:
    return metrics["validation_loss"]


def _chunks(key: Any, value: Any) -> Any:
    """Cuts an array for storage: by layers first, where it has any.

    By default Orbax makes one chunk of all that a device holds, and whoever reads one layer, as a
    conversion does, decodes all of them. Orbax cuts a named axis into single indices, so only the
    layers are named: of an embedding each row would become a chunk.
    """
    from orbax.checkpoint import v1 as ocp

    options = ocp.options.ArrayOptions.Saving.StorageOptions
    stacked = any(getattr(part, "key", None) == "layers" for part in key)
    first = (0,) if stacked else ()
    return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=first) if np.ndim(value) else None


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous and atomic: a step is whole or not there.

    Each has `params`, `optimizer` (with the step) and, as metadata, the data's position, the config
    and the format version.
    """

    def __init__(self, workdir: Path, *, clean: bool = True):
        """Opens them; `clean`, which only the run itself may, removes what a killed save left."""
        from orbax.checkpoint import v1 as ocp  # takes long to import, and conversions need none

        self.directory = workdir / DIRECTORY
        self._saving: Any = None  # what Orbax answers of the last save
        with_checksums()
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        context.asynchronous.timeout_secs = _SAVE_SECONDS
        context.array.saving.scoped_storage_options_creator = _chunks
        try:  # it reads the metadata of every step
            self._orbax = ocp.training.Checkpointer(
                str(self.directory.absolute()),
                context=context,
                # The training loop decides when to save; Orbax's own policy would skip steps.
                save_decision_policy=_Always(),
                preservation_policy=policies.AnyPreservationPolicy(  # pyright: ignore[reportArgumentType]
                    [
                        policies.LatestN(2),
                        policies.BestN(
                            get_metric_fn=_loss,
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=clean,
            )
        except (OSError, ValueError) as error:
            if (step := _unreadable(self.directory)) is not None:
                raise self._damaged(step, cause(error)) from error
            raise UserError(
                f"{self.directory}: the checkpoints there cannot be read ({cause(error)})"
            ) from error

        self._opened = self.directory.stat() if self.directory.exists() else None

    def _check_there(self) -> None:
        """Raises if the directory was removed, where Orbax would make it anew."""
        there = self.directory.exists() and self.directory.stat()
        if self._opened and not (there and os.path.samestat(there, self._opened)):
            raise UserError(
                f"{self.directory}: removed while the run went on, and its checkpoints with it; "
                "restore the run's directory, or choose another --config.workdir"
            )

    @property
    def latest(self) -> int | None:
        """The last step saved."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The evaluations of the steps that are kept, by step, as they were saved."""
        metrics: Any = {c.step: c.metrics for c in self._orbax.checkpoints if c.metrics}
        return metrics

    def save(
        self,
        step: int,
        items: dict[str, Any],
        *,
        position: dict[str, Any],
        config: dict[str, Any],
        evaluation: dict[str, Any] | None,
    ) -> None:
        """Starts saving; waits for an earlier save first.

        Args:
          step: number of optimizer steps done.
          items: `params` and `optimizer` after them; the arrays may be donated as soon as this
            returns.
          position: of the data.
          config: the resolved config.
          evaluation: `validation_loss` and more, if this step was evaluated.

        Raises:
          UserError: there is a number in it that is not finite. A step's loss and gradient may be
            finite, and its update not: then the next step would show it, and the last one has none.
        """
        if not bool(_finite()(items)):
            raise UserError(
                f"step {step}: weights or optimizer are not finite after it, and are not saved: "
                "lower config.optimizer.learning_rate, or look at the step's samples"
            )
        metadata = {"format_version": FORMAT_VERSION, "position": position, "config": config}
        self._check_there()
        with _save_errors(f"checkpoint {step} in {self.directory}"):
            self._wait()
            self._saving = self._orbax.save_checkpointables_async(
                step,
                items,
                metrics=evaluation,
                custom_metadata=metadata | {"checksum": _checksum(metadata, evaluation)},
            )

    def metadata(self, step: int) -> dict[str, Any]:
        """Format version, position and config of a checkpoint."""
        metadata: Any = self._orbax.checkpointables_metadata(step).custom_metadata
        if not metadata:
            raise self._damaged(step, "its metadata are missing")
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.directory / str(step)}: format version {version!r}; this version of rmjax "
                f"reads {FORMAT_VERSION!r}"
            )
        checksum = metadata.pop("checksum", "")
        if checksum != _checksum(metadata, self.evaluations.get(step)):
            raise self._damaged(step, "its metadata are not what was saved")
        return metadata

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The items of a step, with the shapes, dtypes and shardings of `abstract`."""
        try:
            return self._orbax.load_checkpointables(step, abstract)
        except Exception as error:  # Orbax passes on whatever its storage raises
            raise self._damaged(step, cause(error)) from error

    def _damaged(self, step: int, why: str) -> UserError:
        before = max((other for other in _steps(self.directory) if other < step), default=None)
        instead = "to begin anew, since it is the only one"
        if before is not None:
            instead = f"to continue from the one before it, step {before}"
        return UserError(
            f"{self.directory / str(step)}: incomplete or damaged checkpoint ({why}). Delete that "
            f"directory {instead}"
        )

    def close(self) -> None:
        """Waits for the last save, and raises its error if it failed.

        Raises:
          UserError: the disk is full or refuses, or the directory is not there any more.
        """
        with _save_errors(f"a checkpoint in {self.directory}"):
            try:
                self._wait()
            finally:
                self._orbax.close()
        self._check_there()

    def _wait(self) -> None:
        """For the last save. Orbax ends the save's thread when it is asked for what came of it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


@contextlib.contextmanager
def _save_errors(what: str) -> Iterator[None]:
    """`write_errors`, and a wait that Orbax gives up, by the clock on the wall."""
    with write_errors(what):
        try:
            yield
        except TimeoutError as error:
            raise UserError(
                f"{what}: not saved in time ({cause(error)}): the disk is too slow, or the clock "
                "was put forward meanwhile; run the command again, and it continues"
            ) from error


def _steps(directory: Path) -> list[int]:
    """The steps that are saved, by their directories' names."""
    return [int(path.name) for path in directory.glob("*") if path.name.isdecimal()]


def _unreadable(directory: Path) -> int | None:
    """A step of which Orbax cannot read what it reads of all of them, their metadata."""
    for step in sorted(_steps(directory), reverse=True):
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
            file = directory / str(step) / name
            try:
                json.loads(file.read_text() if file.exists() else "{}")
            except (OSError, ValueError):
                return step
    return None


def _checksum(metadata: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Of what is saved with a checkpoint beside its arrays, the same before and after JSON."""
    text = json.dumps(json.loads(json.dumps([metadata, evaluation or {}])), sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


@functools.cache
def _finite() -> Callable[[dict[str, Any]], Any]:
    """A program that says whether all numbers of a tree are finite."""
    import jax
    import jax.numpy as jnp

    def finite(items: dict[str, Any]) -> jax.Array:
        leaves = [x for x in jax.tree.leaves(items) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jnp.stack([jnp.isfinite(jnp.asarray(x)).all() for x in [0.0, *leaves]]).all()

    return jax.jit(finite)


class _Always:
    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


def best_checkpoint(workdir: Path) -> tuple[Path, dict[str, Any]]:
    """A run's checkpoint with the lowest validation loss, else its last, and its evaluation.

    Returns:
      The checkpoint's directory; and the evaluation that was saved with it, empty if none was.

    Raises:
      UserError: there is no complete checkpoint, or one of them is damaged.
    """
    checkpoints = Checkpoints(workdir, clean=False)
    try:
        evaluations = checkpoints.evaluations
        for step in evaluations:
            checkpoints.metadata(step)  # checked, so that no damaged number decides
        losses = {step: e["validation_loss"] for step, e in evaluations.items()}
        step = min(losses, key=losses.__getitem__) if losses else checkpoints.latest
    finally:
        checkpoints.close()
    if step is None:
        raise UserError(f"{workdir / DIRECTORY}: there is no complete checkpoint in this run yet")
    return workdir / DIRECTORY / str(step), evaluations.get(step, {})
