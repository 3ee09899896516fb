"""The metrics of a run: JSON lines, TensorBoard, the progress in the terminal, W&B if asked."""

import collections
import dataclasses
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rmjax.errors import UserError, write_errors
from rmjax.runtime.files import append, replace_file
from rmjax.training.validation import ValidationMetrics

METRICS_FILE = "metrics.jsonl"
_WINDOW = 20  # steps that tokens per second are averaged over
_FLUSH_SECONDS = 30.0
_LINES = 20  # how many a run prints, if there is no terminal for a progress bar


class MetricsLogger:
    """Writes a run's metrics everywhere, on the first process only."""

    def __init__(
        self, workdir: Path, *, start: int, total: int, wandb: str, config: dict[str, Any]
    ):
        """Opens the run's files, and removes from them what is later than step `start`."""
        self._active = jax.process_index() == 0
        self.console = Console(quiet=not self._active, highlight=False, soft_wrap=True)
        self._total = total
        self._every = max(1, total // _LINES)
        self._compiled = False
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW + 1)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=start, status="compiling")
        self._wandb = _start_wandb(wandb, workdir, config) if wandb and self._active else None
        if self._active:
            self._jsonl = _reopen(workdir / METRICS_FILE, start)
            self._board = _Board(workdir / "tensorboard", start)

    def __enter__(self) -> "MetricsLogger":
        self._progress.start()
        self._times.append((time.monotonic(), 0))
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()
        if self._active:
            with write_errors("the run's metrics"):
                self._jsonl.close()
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(
        self, step: int, metrics: Mapping[str, float], tokens: int, padded_tokens: int
    ) -> None:
        """Logs an optimizer step.

        Args:
          step: its number, from 1.
          metrics: loss, gradient norm, learning rate.
          tokens: of its samples.
          padded_tokens: computed token positions, with padding.
        """
        self._times.append((time.monotonic(), tokens))
        elapsed = self._times[-1][0] - self._times[0][0]
        rate = sum(n for _, n in list(self._times)[1:]) / max(elapsed, 1e-9)
        padding = 1 - tokens / padded_tokens
        self._write(
            step, {**metrics, "tokens": tokens, "tokens_per_second": rate, "padding": padding}
        )
        reward = f"reward {metrics['reward']:.3f}  " if "reward" in metrics else ""
        if not self._compiled:  # the first step's time is the compiler's
            self._compiled = True
            self._restart_clock()
        status = (
            f"{reward}loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3g}  "
            f"{_short(rate)} tokens/s  padding {padding:.0%}"
        )
        self._progress.update(self._task, completed=step, status=status)
        if not self.console.is_terminal and (step % self._every == 0 or step == self._total):
            self.console.print(f"step {step}/{self._total}  {status}")

    def evaluation(self, step: int, metrics: ValidationMetrics, seconds: float) -> None:
        """Logs an evaluation after step `step`; its time does not count as training time."""
        flat = {
            f"{name}/{field}": value
            for name, rated in metrics.attributes.items()
            for field, value in dataclasses.asdict(rated).items()
        }
        accuracy = ""
        if metrics.pairs:
            pairs = dataclasses.asdict(metrics.pairs)
            strengths = pairs.pop("by_strength")
            del pairs["attribute"]
            pairs |= {f"accuracy_at_strength_{s}": share for s, (share, _) in strengths.items()}
            flat |= {f"pairs/{field}": value for field, value in pairs.items()}
            accuracy = f", pair accuracy {metrics.pairs.accuracy:.3f}"
        if metrics.policy:
            flat |= {f"policy/{k}": v for k, v in dataclasses.asdict(metrics.policy).items()}
        self._write(step, {"validation_loss": metrics.loss, "evaluation_seconds": seconds, **flat})
        self.console.print(
            f"step {step}: validation loss {metrics.loss:.4f}{accuracy} ({seconds:.1f} s)"
        )
        self._restart_clock()

    def sync(self) -> None:
        """Waits until all lines are on the disk.

        Before a checkpoint is saved, so that a run that continues it, also after a power cut, has
        the numbers of every step before.
        """
        if self._active:
            with write_errors("the run's metrics"):
                os.fsync(self._jsonl.fileno())

    def _restart_clock(self) -> None:
        """Whatever took time until now counts for no step."""
        self._times.clear()
        self._times.append((time.monotonic(), 0))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Logs other numbers after step `step`, and prints them but for parts of one: `a/b/c`."""
        self._write(step, values)
        whole = {name: value for name, value in values.items() if name.count("/") < 2}
        said = ", ".join(f"{name} {value:.4g}" for name, value in whole.items())
        self.console.print(f"step {step}: {said}")
        self._restart_clock()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._active:
            return
        if infinite := [f"{name} {v}" for name, v in values.items() if math.isinf(v)]:
            raise UserError(
                f"step {step}: {', '.join(infinite)}: larger than numbers are here. Stopped before "
                "anything was saved: lower config.optimizer.learning_rate, or look at the step's "
                "samples and their rewards"
            )
        finite = {k: None if math.isnan(v) else v for k, v in values.items()}
        with write_errors("the run's metrics"):
            line = json.dumps({"step": step, **finite}, allow_nan=False) + "\n"
            append(self._jsonl, line.encode(), sync=False)
            self._board.write(step, {k: v for k, v in finite.items() if v is not None})
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


class _Board:
    """Writes TensorBoard's file of a run in the calling thread.

    `SummaryWriter` writes in a thread of its own; if the disk is full that thread dies, and the
    training loop waits for it forever.
    """

    def __init__(self, directory: Path, start: int):
        """Opens a new file; TensorBoard then ignores steps after `start` in older ones."""
        with write_errors(str(directory)):
            directory.mkdir(parents=True, exist_ok=True)
            writer, self._messages, self._summary = _tensorboard()
            self._events = writer(str(directory / "events"))
            begin = self._messages.SessionLog(status=self._messages.SessionLog.START)
            self._add(self._messages.Event(step=start + 1, session_log=begin))
            self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(self._messages.Event(step=step, summary=self._summary(name, value)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def _flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _reopen(path: Path, start: int) -> Any:
    """Opens a JSON-lines file for appending, without the lines of steps after `start`.

    Where nothing was saved none is kept: what was measured before the first step is so again.
    """
    kept = []
    with write_errors(str(path)):
        for line in path.read_bytes().split(b"\n") if start and path.exists() else ():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # an incomplete line, from a killed run
                continue
        replace_file(path, b"".join(line + b"\n" for line in kept))
        return open(path, "ab", buffering=0)


def _tensorboard() -> tuple[Any, Any, Any]:
    """tensorboardX's writer, its messages, and its function that makes a message of a number.

    tensorboardX imports torch where it is installed, to name a type of arrays, and that takes
    seconds. It gets numbers here; so that it does without, torch is not to be found meanwhile.
    """
    modules: dict[str, Any] = sys.modules
    if hidden := "torch" not in modules:
        modules["torch"] = None  # Python's sign for a module that cannot be imported
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar
    finally:
        if hidden:
            del modules["torch"]
    return EventsWriter, event_pb2, scalar


def _start_wandb(project: str, workdir: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"config.wandb = {project!r} needs `pip install 'rmjax[wandb]'`") from error
    # One directory is one run there too, if it is continued.
    name = f"{workdir.name}-{zlib.crc32(str(workdir.absolute()).encode()):08x}"
    return wandb.init(id=name, project=project, dir=str(workdir), config=config, resume="allow")
