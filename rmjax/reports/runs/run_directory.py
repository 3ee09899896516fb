"""Reads the files of a training run, which may be running, killed or finished."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.alignment.rollouts import DIRECTORY as ROLLOUTS
from rmjax.checkpoints.manager import DIRECTORY
from rmjax.data.fields import LARGEST
from rmjax.errors import UserError
from rmjax.evaluation.metrics import PolicyMetrics
from rmjax.runtime.files import read_json
from rmjax.training.logger import METRICS_FILE
from rmjax.training.workdir import LOCK, RECORD

_FORMAT = "rmjax-run"
_LOCKS = Path("/proc/locks")
_OF_POLICIES = {field.name for field in dataclasses.fields(PolicyMetrics)}
STEP_FIELDS = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "padding")


@dataclasses.dataclass(frozen=True)
class LoggedEvaluation:
    """An evaluation on held-out data, from `metrics.jsonl`; NaN where a number is not defined.

    Attributes:
      step: after which it was made.
      loss: the objective's value.
      seconds: how long it took.
      attributes: the fields of `metrics.AttributeMetrics` for each rated attribute.
      pairs: the numbers of `metrics.PairMetrics`, and `accuracy_at_strength_...`; empty without
        pairs.
      policy: the numbers of `metrics.PolicyMetrics`; empty of a reward model.
    """

    step: int
    loss: float
    seconds: float
    attributes: Mapping[str, Mapping[str, float]]
    pairs: Mapping[str, float]
    policy: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files.

    Attributes:
      directory: of the run.
      going_on: whether a process is running it now; None if that cannot be known.
      config: the value of each field, by its path.
      versions: of packages.
      devices: in words.
      data: `data.json`; empty if the run did not get that far.
      lines: of the metrics, in order.
      steps: the number of each logged step.
      numbers: for each of `STEP_FIELDS` a number for each of `steps`, or NaN.
      evaluations: in order.
      checkpoints: the steps that are kept.
      unread: how many lines of the metrics are not JSON, such as the last one of a killed run.
    """

    directory: Path
    going_on: bool | None
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    devices: str
    data: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    steps: Sequence[int]
    numbers: Mapping[str, Float[np.ndarray, "S"]]
    evaluations: Sequence[LoggedEvaluation]
    checkpoints: Sequence[int]
    unread: int

    @property
    def best(self) -> LoggedEvaluation | None:
        """The evaluation with the lowest validation loss."""
        finite = [e for e in self.evaluations if math.isfinite(e.loss)]
        return min(finite, key=lambda e: e.loss, default=None)

    @property
    def is_alignment(self) -> bool:
        """Whether it is a run of `rmjax.align`."""
        return "rollout.n" in self.config

    @property
    def is_over(self) -> bool:
        """Whether no process runs it; where nobody can know, whether all its steps are done."""
        if self.going_on is None:
            return bool(self.steps and self.planned and self.steps[-1] >= self.planned)
        return not self.going_on

    @property
    def planned(self) -> int:
        """How many steps the config asks for, approximately if in epochs; 0 if unknown."""
        config = self.config
        if config.get("steps"):
            return int(config["steps"])
        # The sample counts may be of pairs; the batch size and the tokens are of responses.
        tokens = self.data.get("train", {}).get("tokens", {})
        responses = round(tokens["total"] / tokens["mean"]) if tokens.get("mean") else 0
        responses *= config.get("rollout.n", 1)  # the data of an alignment are prompts
        return math.ceil(config.get("epochs", 0) * responses / max(1, config.get("batch_size", 1)))


def read_run(directory: Path) -> RunFiles:
    """Reads a run's files; nothing is written, and a running run is not disturbed.

    Raises:
      UserError: it is not a run's directory, or a file is broken.
    """
    if not (directory / RECORD).is_file():
        what = "has no config.json" if directory.is_dir() else "is not a directory"
        raise UserError(
            f"{directory}: not a training run ({what}); name what --config.workdir named"
        )
    record = read_json(directory / RECORD)
    if record.get("format") != _FORMAT or not isinstance(record.get("config"), dict):
        raise UserError(
            f"{directory / RECORD}: field 'format' is {record.get('format')!r}, expected "
            f"{_FORMAT!r}: this is not a training run; name what --config.workdir named"
        )
    going_on = _is_locked(directory / LOCK)  # first: what a run that is over wrote is all there
    data = directory / "data.json"
    lines, unread = _read_lines(directory / METRICS_FILE, going_on)
    trained = [line for line in lines if "loss" in line]
    kept = directory / DIRECTORY
    names = [path.name for path in kept.iterdir()] if kept.is_dir() else []
    return RunFiles(
        directory=directory,
        going_on=going_on,
        config=record["config"],
        versions=record.get("versions", {}),
        devices=str(record.get("devices", "")),
        data=read_json(data) if data.exists() else {},
        lines=lines,
        steps=[line["step"] for line in trained],
        numbers={
            field: np.array([_float(line.get(field)) for line in trained], float)
            for field in STEP_FIELDS
        },
        evaluations=[_evaluation(line) for line in lines if "validation_loss" in line],
        checkpoints=sorted(int(name) for name in names if name.isdecimal()),
        unread=unread,
    )


def state_of_files(directory: Path) -> tuple[Any, ...]:
    """What is another value when a run's files, or whether it goes on, have changed."""
    files = [directory / name for name in (RECORD, "data.json", METRICS_FILE)]
    rollouts = directory / ROLLOUTS
    files += sorted(rollouts.glob("*.jsonl")) if rollouts.is_dir() else []
    seen = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            seen.append((path.name, stat.st_mtime_ns, stat.st_size))
    return _is_locked(directory / LOCK), *seen


def _read_lines(path: Path, going_on: bool | None) -> tuple[list[dict[str, Any]], int]:
    """The lines of the metrics that can be read, and the number of those that cannot."""
    if not path.exists():
        return [], 0
    lines, unread = [], 0
    written = path.read_text(encoding="utf-8", errors="replace")
    if going_on:
        written = written[: written.rfind("\n") + 1]  # the rest is just being written
    for text in written.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and _is_step(line.get("step")):
            lines.append(line)
        else:
            unread += 1
    return lines, unread


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _evaluation(line: Mapping[str, Any]) -> LoggedEvaluation:
    attributes: dict[str, dict[str, float]] = {}
    pairs, policy = {}, {}
    for key, value in line.items():
        name, slash, field = key.rpartition("/")
        if slash and name == "pairs":
            pairs[field] = _float(value)
        elif slash and name == "policy" and field in _OF_POLICIES:  # it may be an attribute's name
            policy[field] = _float(value)
        elif slash:
            attributes.setdefault(name, {})[field] = _float(value)
    return LoggedEvaluation(
        step=line["step"],
        loss=_float(line["validation_loss"]),
        seconds=_float(line.get("evaluation_seconds")),
        attributes=attributes,
        pairs=pairs,
        policy=policy,
    )


def _float(value: Any) -> float:
    """A number that a run may have written: float32's, and finite."""
    known = isinstance(value, int | float) and abs(value) <= LARGEST
    return float(value) if known else math.nan


def _is_locked(lock: Path) -> bool | None:
    """Whether a process of this machine holds the run's lock, without touching the lock."""
    if not lock.exists():
        return False
    try:
        stat = os.stat(lock)
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return None
    held = [line.split() for line in lines]
    # "1: FLOCK ADVISORY WRITE 710 fd:01:533 0 EOF": device in hexadecimal and inode
    name = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    if any(name in fields for fields in held):
        return True
    # On some file systems the device is not the one that stat gives, so nothing is known.
    inodes = {field.rsplit(":", 1)[-1] for fields in held for field in fields if ":" in field}
    return None if str(stat.st_ino) in inodes else False
