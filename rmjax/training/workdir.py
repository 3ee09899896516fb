"""The run's directory: whose it is, and what is put on record there."""

import contextlib
import importlib.metadata
import json
import platform
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from rmjax.checkpoints import manager
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.model_files import (
    FORMAT_VERSION,
    MODEL_CONFIG,
    SPEC_FILE,
    write_adapter_config,
    write_model_files,
)
from rmjax.checkpoints.pretrained import Pretrained, public_name
from rmjax.checkpoints.provenance import provenance, write_provenance
from rmjax.config import Config, as_flat_dict
from rmjax.data.tokenized import REFERENCE, TokenizedData
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError, disk_errors, write_errors
from rmjax.evaluation.metrics import mean_ratings
from rmjax.models.model import Model
from rmjax.models.rewards.ordinal import OrdinalScale
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.files import PARTIAL, lock_file, read_json, remove_abandoned, replace_file
from rmjax.runtime.processes import barrier, broadcast, from_first
from rmjax.training.experiment import config_objective
from rmjax.training.rows import Recorded
from rmjax.training.validate_config import check_continues

MODEL_DIRECTORY = "model"
RECORD = "config.json"
ROWS = "rows.json"
LOCK = ".lock"
_PACKAGES = ("rmjax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
_SHARED_SECONDS = 60.0  # in which a network file system shows all what one wrote


@contextlib.contextmanager
def open_workdir(config: Config) -> Iterator[Path]:
    """The run's directory: new, empty, or of a run that this config continues.

    It belongs to this run alone until the context ends. The lock is the kernel's and ends with the
    process, however that ends. Where a file system cannot lock, or not between machines, as some
    network file systems, two runs at the same time go unnoticed.

    Raises:
      UserError: something else is there, a run that this config cannot continue, or one that is
        going on; or the processes do not share the directory.
    """
    workdir = Path(config.workdir).expanduser()
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            _check_workdir(workdir, config)
            stack.enter_context(_locked(workdir))
            for directory in (workdir, *filter(Path.is_dir, workdir.iterdir())):
                remove_abandoned(directory)
        _check_shared(workdir)
        yield workdir


def _check_workdir(workdir: Path, config: Config) -> None:
    if (workdir / RECORD).exists():
        before = read_json(workdir / RECORD)
        if before.get("format") != manager.RUN_FORMAT or not isinstance(before.get("config"), dict):
            raise UserError(f"{workdir / RECORD}: not of an rmjax run; choose another workdir")
        check_continues(before["config"], config)
    elif "[" in str(workdir.absolute()):  # Orbax would fail to save there, without saying so
        raise UserError(f"{workdir}: Orbax cannot save under a path with '['; choose another")
    elif workdir.exists() and not _is_free(workdir):
        raise UserError(
            f"{workdir}: not empty, and not an rmjax run; choose another --config.workdir"
        )


def _is_free(workdir: Path) -> bool:
    """Whether nothing is there but what a run leaves that failed before it was recorded."""
    leavings = (manager.DIRECTORY, LOCK)
    return workdir.is_dir() and all(
        (path.name in leavings or path.match(f"{RECORD}.*{PARTIAL}"))
        and not (path.is_dir() and any(path.iterdir()))
        for path in workdir.iterdir()
    )


def _locked(workdir: Path) -> IO[bytes]:
    """Makes the directory and locks it, until what is returned is closed."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with disk_errors(f"{workdir / LOCK}"):
            file = open(workdir / LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror})") from error
    if not lock_file(file):
        file.close()
        raise UserError(
            f"{workdir}: another run is going on there; wait for it, end it, or choose another "
            "--config.workdir"
        )
    return file


def _check_shared(workdir: Path) -> None:
    """Checks that every process sees what process 0 writes, by a word in the lock's file."""
    if jax.process_count() == 1:
        return
    word = secrets.token_hex(8)
    if jax.process_index() == 0:
        with disk_errors(f"{workdir / LOCK}"):
            (workdir / LOCK).write_text(word)
    word = broadcast("workdir", word)
    until = time.monotonic() + _SHARED_SECONDS
    while not (workdir / LOCK).is_file() or (workdir / LOCK).read_text() != word:
        if time.monotonic() > until:
            raise UserError(
                f"{workdir}: what process 0 wrote there {_SHARED_SECONDS:g} s ago is not to be "
                "seen here; --config.workdir must be on a file system that all processes share"
            )
        time.sleep(0.1)
    barrier("workdir")


def package_versions() -> dict[str, str]:
    """Versions of what a run's numbers may depend on; a checkout need not be installed to run."""
    return {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def record_run(
    workdir: Path,
    config: Config,
    model: Model,
    tokenizer: Tokenizer,
    data: TokenizedData,
    validation: TokenizedData | None,
    source: Pretrained | None = None,
) -> None:
    """Stores the resolved config, what the data came to, and the model's files with the run.

    The config comes first: it is what makes the directory a run, which any later failure leaves
    one. The model's files never change, so a run that is continued keeps those it has. A policy
    ends its answers as `source` does, from which it began.
    """
    if jax.process_index() != 0:
        return
    record = {
        "format": manager.RUN_FORMAT,
        "format_version": FORMAT_VERSION,
        "config": as_flat_dict(config),
        "versions": package_versions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    spec = None if config_objective(config).policy else run_spec(config, model, data)
    described = {"train": describe_data(data)}
    if validation:
        described["validation"] = describe_data(validation)
    with write_errors(f"the run's files in {workdir}"):
        _write(workdir / RECORD, record)
        _write(workdir / "data.json", described)
        files = workdir / MODEL_DIRECTORY
        wanted = [MODEL_CONFIG, *([SPEC_FILE] if spec else [])]  # the first is the last written
        if not all((files / name).exists() for name in wanted):
            if spec is None and model.lora.rank:
                base = public_name(config.init) if config.init else ""
                write_adapter_config(files, model.lora, base, reward=False)
            ends = () if spec else end_tokens(source.files if source else None, tokenizer)
            if source:
                files.mkdir(parents=True, exist_ok=True)
                front = provenance(source, trained=True)
                write_provenance(files, front, "A model that rmjax trains.")
            write_model_files(files, model.config, tokenizer, spec, ends=ends)


def recorded_rows(workdir: Path) -> Recorded | None:
    """The rows that the data chose when the run began, on every process; None if it had none.

    Raises:
      UserError: the file is damaged.
    """
    return from_first("rows", lambda: _read_rows(workdir / ROWS))


def _read_rows(file: Path) -> Recorded | None:
    if not file.exists():
        return None
    rows = read_json(file).get("rows")
    shapes: list[Any] = rows if isinstance(rows, list) and rows else [None]
    for shape in shapes:
        good = isinstance(shape, list) and len(shape) == 2
        if not good or not all(type(size) is int and size > 0 for size in shape):
            raise UserError(
                f"{file}: 'rows' is {rows!r}, and not a list of [rows, length]; delete the file, "
                "and rows are chosen again"
            )
    return rows


def record_rows(workdir: Path, rows: Recorded) -> None:
    """Puts them on record."""
    if jax.process_index() == 0:
        with write_errors(f"the run's files in {workdir}"):
            _write(workdir / ROWS, {"rows": rows})


def run_spec(config: Config, model: Model, data: TokenizedData) -> RewardSpec:
    """What there is to know of a run's reward model before its first step."""
    attributes, objective = config.data.attributes, config_objective(config)
    levels = objective.levels
    rated = [n for n, mean in zip(attributes, mean_ratings(data.labels)) if np.isfinite(mean)]
    return RewardSpec(
        attributes=attributes,
        scalar={} if objective.general else {attributes[0]: 1.0},
        max_length=config.data.max_length,
        seed=config.seed,
        source=public_name(config.init) if config.init else "",
        data=data.key,
        lora=model.lora,
        ordinal=OrdinalScale(*levels, tuple(rated)) if levels else None,
        general_preference=objective.general,
    )


def describe_data(data: TokenizedData) -> dict[str, Any]:
    """Counts by reason, lengths and label statistics, in JSON's types."""
    labels = data.labels.astype(np.float64)
    return {
        "source": data.source,
        "fingerprint": data.key,
        "samples": data.counts,
        "notes": list(data.notes),
        "tokens": {
            "mean": float(data.lengths.mean()),
            "max": int(data.lengths.max()),
            "total": int(data.lengths.sum()),
        },
        "labels": {
            name: {
                "count": int((~np.isnan(column)).sum()),
                "mean": float(np.nanmean(column)),
                "sd": float(np.nanstd(column)),
            }
            for name, column in zip(data.attributes, labels.T)  # of pairs there are none
            if name != REFERENCE and not np.isnan(column).all()
        },
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
