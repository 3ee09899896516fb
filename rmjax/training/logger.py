"""What a run says: terminal, JSON lines, TensorBoard, and W&B if asked."""

import collections
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from rmjax.data.batches import Batches
from rmjax.errors import UserError, disk_errors
from rmjax.evaluation.metrics import AttributeMetrics, PairMetrics
from rmjax.models.init import abstract_model
from rmjax.models.model import Model
from rmjax.models.parameters import adapter_parameters, flatten
from rmjax.runtime.files import replace_file
from rmjax.training.validation import Evaluation

METRICS_FILE = "metrics.jsonl"
_WINDOW = 20  # steps over which tokens per second are averaged
_FLUSH_SECONDS = 30.0
_PROTO: Any = event_pb2  # whose classes are made at run time
_LINES = 20  # lines a run prints where there is no terminal to draw a bar in


class Reporter:
    """Writes a run's metrics everywhere; silent on every process but the first."""

    def __init__(
        self, workdir: Path, *, start: int, total: int, wandb: str, config: dict[str, Any]
    ):
        """Opens the run's files; what was written beyond step `start` is taken out."""
        self._active = jax.process_index() == 0
        self.console = Console(quiet=not self._active, highlight=False, soft_wrap=True)
        self._total = total
        self._every = max(1, total // _LINES)
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

    def __enter__(self) -> "Reporter":
        self._progress.start()
        self._times.append((time.monotonic(), 0))
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()
        if self._active:
            with disk_errors("the run's metrics"):
                self._jsonl.close()
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(self, step: int, metrics: Mapping[str, float], tokens: int, places: int) -> None:
        """Reports optimizer step `step` (from 1).

        Args:
          step: its number.
          metrics: loss, gradient norm, learning rate.
          tokens: real tokens in it.
          places: token places computed, padding included.
        """
        self._times.append((time.monotonic(), tokens))
        elapsed = self._times[-1][0] - self._times[0][0]
        rate = sum(n for _, n in list(self._times)[1:]) / max(elapsed, 1e-9)
        padding = 1 - tokens / places
        self._write(
            step, {**metrics, "tokens": tokens, "tokens_per_second": rate, "padding": padding}
        )
        status = (
            f"loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3g}  "
            f"{_short(rate)} tokens/s  padding {padding:.0%}"
        )
        self._progress.update(self._task, completed=step, status=status)
        if not self.console.is_terminal and (step % self._every == 0 or step == self._total):
            self.console.print(f"step {step}/{self._total}  {status}")

    def evaluation(self, step: int, found: Evaluation, seconds: float) -> None:
        """Reports an evaluation after step `step`; its time does not count as training."""
        flat = {
            f"{name}/{field}": value
            for name, metrics in found.attributes.items()
            for field, value in dataclasses.asdict(metrics).items()
        }
        accuracy = ""
        if found.pairs:
            pairs = dataclasses.asdict(found.pairs)
            strengths = pairs.pop("by_strength")
            del pairs["attribute"]
            pairs |= {f"accuracy_at_strength_{s}": share for s, (share, _) in strengths.items()}
            flat |= {f"pairs/{field}": value for field, value in pairs.items()}
            accuracy = f", pair accuracy {found.pairs.accuracy:.3f}"
        self._write(step, {"validation_loss": found.loss, "evaluation_seconds": seconds, **flat})
        self.console.print(
            f"step {step}: validation loss {found.loss:.4f}{accuracy} ({seconds:.1f} s)"
        )
        self._times.clear()
        self._times.append((time.monotonic(), 0))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._active:
            return
        finite = {k: None if math.isnan(v) else v for k, v in values.items()}
        with disk_errors("the run's metrics"):
            print(json.dumps({"step": step, **finite}), file=self._jsonl, flush=True)
            self._board.write(step, {k: v for k, v in finite.items() if v is not None})
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


class _Board:
    """TensorBoard's file of a run's numbers, written by the loop itself.

    `SummaryWriter` leaves that to a thread, which a full disk ends; the loop then waits for it
    without end.
    """

    def __init__(self, directory: Path, start: int):
        """Opens a new file, before which steps after `start` do not count."""
        with disk_errors(str(directory)):
            directory.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(directory / "events"))
            begin = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
            self._add(_PROTO.Event(step=start + 1, session_log=begin))
            self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(_PROTO.Event(step=step, summary=scalar(name, value)))
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


def announce(
    console: Console,
    *,
    workdir: Path,
    model: Model,
    origin: str,
    batches: Batches,
    held_out: Batches | None,
) -> None:
    """Says what is about to run: model, mesh, data by reason, rows."""
    devices, options = jax.devices(), model.options
    mesh = ", ".join(f"{axis} {size}" for axis, size in options.sharding.mesh.shape.items())
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(abstract_model(model)).items()}
    kept = "float32"
    if model.lora.rank:
        trained = sizes["head"] + sum(sizes[row.path] for row in adapter_parameters(model.lora))
        kept = (
            f"{trained / 1e6:,.1f} M of them trained: the head and adapters of rank "
            f"{model.lora.rank} for {', '.join(model.lora.targets)}; the rest {options.dtype.name}"
        )
    console.print(f"run         {workdir}")
    console.print(f"devices     {len(devices)} x {devices[0].device_kind}; mesh {mesh}")
    console.print(
        f"model       {sum(sizes.values()) / 1e6:,.1f} M parameters, {kept}; computed in "
        f"{options.dtype.name}, remat {options.remat}, attention {options.attention}"
    )
    console.print(f"weights     {origin}")
    for name, part in (("training", batches), ("validation", held_out)):
        if part is not None:
            data = part.data
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in data.counts.items())
            console.print(
                f"{name:<11} {data.source}: {reasons}; {data.lengths.mean():.0f} tokens a sample"
            )
    spared = 1 - sum(map(batches.tokens, range(len(batches)))) / sum(
        int(batches.data.lengths[batches.samples(step)].sum()) for step in range(len(batches))
    )
    steps = range(len(batches))
    padding = 1 - sum(map(batches.tokens, steps)) / sum(map(batches.padded_tokens, steps))
    shape = batches.shape
    console.print(
        f"rows        {shape.length} places, up to {shape.slots} samples; {shape.rows} rows at "
        f"once, up to {batches.microbatches} micro-batches a step; padding {padding:.1%}"
    )
    if batches.share:
        console.print(f"prompts     computed once a group, which spares {spared:.1%} of the tokens")


def conclude(console: Console, workdir: Path, evaluations: Mapping[int, Mapping[str, Any]]) -> None:
    """Prints the table of the best checkpoint and the commands to type next."""
    if evaluations:
        best = min(evaluations, key=lambda step: evaluations[step]["validation_loss"])
        found = evaluations[best]
        title = f"held-out data, step {best} (best validation loss, {found['validation_loss']:.4f})"
        console.print()
        if found["attributes"]:
            rows = {name: AttributeMetrics(**row) for name, row in found["attributes"].items()}
            console.print(attribute_table(title, rows))
        if found.get("pairs"):
            console.print(pair_table(title, PairMetrics(**found["pairs"])))
    console.print(
        f"""
Next:
  python -m rmjax.report {workdir}
  python -m rmjax.convert orbax-to-hf {workdir} {workdir}-hf
  tensorboard --logdir {workdir}/tensorboard
  python
  >>> import rmjax
  >>> rm = rmjax.load("{workdir}")
  >>> rm.compare("a prompt", "one response", "another response")"""
    )


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _reopen(path: Path, start: int) -> Any:
    """Opens a JSON-lines file for appending, without the lines of steps after `start`."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError):  # the half line of a killed run
                continue
    with disk_errors(str(path)):
        replace_file(path, "".join(line + "\n" for line in kept).encode())
        return open(path, "a")


def _start_wandb(project: str, workdir: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"config.wandb = {project!r} needs `pip install 'rmjax[wandb]'`") from error
    # The same directory is the same run there too, also when it is continued.
    name = f"{workdir.name}-{zlib.crc32(str(workdir.absolute()).encode()):08x}"
    return wandb.init(id=name, project=project, dir=str(workdir), config=config, resume="allow")


def attribute_table(title: str, table: Mapping[str, AttributeMetrics]) -> Table:
    """The table of rated attributes on held-out data."""
    view = _table(title)
    view.add_column("attribute", no_wrap=True)
    for name in ("ratings", "MSE", "MSE of\nmean", "Pearson", "Spear-\nman", "pair\nacc.", "pairs"):
        view.add_column(name, justify="right", no_wrap=True)
    for name, metrics in table.items():
        errors = (metrics.mse, metrics.mse_constant, metrics.pearson, metrics.spearman)
        shown = map(_decimal, (*errors, metrics.pair_accuracy))
        view.add_row(name, str(metrics.count), *shown, str(metrics.pairs))
    return view


def pair_table(title: str, metrics: PairMetrics) -> Table:
    """The table of preference pairs on held-out data."""
    view = _table(title)
    view.add_column("preference pairs", no_wrap=True)
    view.add_column(metrics.attribute, justify="right", no_wrap=True)
    interval = f"{_decimal(metrics.accuracy)} ({_decimal(metrics.low)} to {_decimal(metrics.high)})"
    view.add_row("pairs", str(metrics.pairs))
    view.add_row("accuracy (95 % interval)", interval)
    for strength, (share, count) in metrics.by_strength.items():
        view.add_row(f"  strength {strength}, {count} pairs", _decimal(share))
    view.add_row("mean margin", _decimal(metrics.mean_margin))
    view.add_row("calibration error", _decimal(metrics.calibration_error))
    view.add_row("temperature", _decimal(metrics.temperature))
    view.add_row("correlation with length", _decimal(metrics.length_correlation))
    return view


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
