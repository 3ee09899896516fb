"""Kills: a command is killed at a random moment, continued, and its result compared bit for bit.

Each is run undisturbed once; its result and its duration are what the others are held to. A killed
one is given again until it ends by itself. Moments are uniform over the duration, so that some fall
into a save.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from campaign import forks, good
from campaign.ledger import Row

# Fields of records that a clock writes.
_CLOCK = ("tokens_per_second", "evaluation_seconds", "seconds", "time", "examples_per_second")
_CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"
_TRAIN = [
    "train",
    f"--config={_CONFIG}",
    "--config.data.train=generated:64",
    "--config.data.validation=generated:16",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.head_dim=8",
    "--config.batch_size=8",
    "--config.epochs=0",
    "--config.steps=24",
    "--config.rows_per_device=2",
    "--config.optimizer.warmup_steps=2",
    "--config.eval_every=4",
    "--config.checkpoint_every=2",
    "--config.workdir=out",
]


@dataclasses.dataclass(frozen=True)
class Victim:
    """A command that is killed.

    Attributes:
      arguments: of the command, which is given again after a kill.
      result: of its directory, what must be the same to the bit.
    """

    arguments: list[str]
    result: Callable[[Path], dict[str, str]]


def run(seed: int, minutes: float, scratch: Path, show: Callable[[str], None]) -> list[Row]:
    """Kills the victims in turn, until the minutes are over."""
    end, rng = time.monotonic() + 60 * minutes, random.Random(seed)
    victims = _victims(scratch)
    rows = {name: Row("kill -9", name) for name in victims}
    whole: dict[str, tuple[dict[str, str], float]] = {}
    for name, victim in victims.items():
        for _ in range(2):  # the first compiles
            directory = _fresh(scratch, name)
            ended = forks.run(victim.arguments, directory)
            if ended.code:
                raise SystemExit(f"{name} fails undisturbed: {ended.text}")
        whole[name] = forks.call(victim.result, directory), ended.seconds
        show(f"{name}: {ended.seconds:.1f} s undisturbed")
    while time.monotonic() < end:
        for name, victim in victims.items():
            wanted, seconds = whole[name]
            fault = _killed(victim, _fresh(scratch, name), wanted, rng, seconds)
            rows[name].count(fault)
            show(f"{name}: {fault or 'the same to the bit'}")
    signals = _signals(scratch, show)
    return [*rows.values(), *signals]


def _killed(
    victim: Victim, directory: Path, wanted: dict[str, str], rng: random.Random, seconds: float
) -> str:
    """Kills a command once or twice and continues it; what went wrong, if anything did."""
    for _ in range(rng.randint(1, 2)):
        forks.run(victim.arguments, directory, when=_at(rng.random() * seconds, signal.SIGKILL))
    ended = forks.run(victim.arguments, directory)
    # It may have been killed at its very end, when the result had its name.
    said = ("is there already", "already exists and is not empty")
    is_there = ended.code == 1 and any(words in ended.text for words in said)
    if ended.code and not is_there:
        return f"not continued: {ended.text.strip()[-300:]}"
    found = forks.call(victim.result, directory)
    if found == wanted:
        return ""
    return f"differs: {sorted(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))}"


def _at(moment: float, number: int) -> Callable[[int, float], bool]:
    """Sends a signal at a moment."""

    def when(process: int, now: float) -> bool:
        if now < moment:
            return False
        os.kill(process, number)
        return True

    return when


def _fresh(scratch: Path, name: str) -> Path:
    directory = scratch / "victims" / name.replace(" ", "-").replace("/", "-")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _victims(scratch: Path) -> dict[str, Victim]:
    model = good.write_huggingface(scratch / "model")
    orbax = scratch / "orbax"
    made = forks.run(["convert", "hf-to-orbax", str(model), str(orbax)], scratch)
    if made.code:
        raise SystemExit(made.text)
    rows = good.write_rows(scratch / "pairs.jsonl", good.pair_rows(300))
    pairs = [f"pairs={rows}", "--out=out"]
    return {
        "training": Victim(_TRAIN, _of_run),
        "conversion to Orbax": Victim(["convert", "hf-to-orbax", str(model), "out"], _of_files),
        "conversion to Hugging Face": Victim(
            ["convert", "orbax-to-hf", str(orbax), "out"], _of_files
        ),
        "evaluation": Victim(["evaluate", str(model), *pairs], _of_evaluation),
        "scoring a file": Victim(["score", str(model), str(rows), "out.jsonl"], _of_files),
    }


def _of_files(directory: Path) -> dict[str, str]:
    """Every file's digest, but what the harness keeps there and what has a time in it."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("output.txt", "_CHECKPOINT_METADATA")
    }


def _of_evaluation(directory: Path) -> dict[str, str]:
    report = json.loads((directory / "out" / "report.json").read_text())
    samples = (directory / "out" / "samples.jsonl").read_bytes()
    return {
        "samples.jsonl": hashlib.sha256(samples).hexdigest(),
        "report.json": json.dumps(
            _timeless({k: v for k, v in report.items() if k != "work"}), sort_keys=True
        ),
    }


def _of_run(directory: Path) -> dict[str, str]:
    """The last state of a run, array for array, and the numbers that it recorded."""
    import numpy as np
    import tensorstore as ts

    found, checkpoints = {}, directory / "out" / "checkpoints"
    last = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    found["last step"] = last.name
    for item in ("params", "optimizer"):
        tree = json.loads((last / item / "_METADATA").read_text())["tree_metadata"]
        for leaf in tree.values():
            name = ".".join(str(key["key"]) for key in leaf["key_metadata"])
            base = {"driver": "file", "path": f"{last / item}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            try:
                array = ts.open({"driver": "zarr3", "kvstore": store}, read=True).result()
            except ValueError:  # nothing is stored for a node that has no array
                continue
            found[f"{item}.{name}"] = hashlib.sha256(
                np.asarray(array.read().result()).tobytes()
            ).hexdigest()
    lines = (directory / "out" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        found[f"metrics of step {line['step']}, {sorted(line)[0]}"] = json.dumps(_timeless(line))
    return found


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _CLOCK}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _signals(scratch: Path, show: Callable[[str], None]) -> list[Row]:
    """SIGTERM twice, Ctrl-C, SIGSTOP and CONT, and two runs on one directory."""
    rows = []
    directory = _fresh(scratch, "whole")
    seconds = forks.run(_TRAIN, directory).seconds
    wanted = forks.call(_of_run, directory)

    def trained(promise: str, signals: list[int], codes: tuple[int, ...], said: str) -> None:
        row = Row("signals", promise)
        rows.append(row)
        for share in (0.3, 0.7):
            place, sent = _fresh(scratch, "signals"), [*signals]

            def when(process: int, now: float) -> bool:
                if now < share * seconds + 0.2 * (len(signals) - len(sent)):  # noqa: B023
                    return False
                os.kill(process, sent.pop(0))  # noqa: B023
                return not sent  # noqa: B023

            ended = forks.run(_TRAIN, place, when=when)
            fault = ""
            if ended.code not in (*codes, 0):
                fault = f"status {ended.code}: {ended.text[-300:]}"
            elif "Traceback" in ended.text:
                fault = f"a traceback: {ended.text[-300:]}"
            elif ended.code and said not in ended.text:
                fault = f"does not say {said!r}: {ended.text[-300:]}"
            elif forks.run(_TRAIN, place).code or forks.call(_of_run, place) != wanted:
                fault = "not continued to the same bits"
            row.count(f"at {share:.0%}: {fault}" if fault else "")
            show(f"{promise} at {share:.0%}: {ended.code} {fault or 'ok'}")

    trained("SIGTERM twice while it trains", [signal.SIGTERM] * 2, (143, -signal.SIGTERM), "")
    trained("Ctrl-C while it trains", [signal.SIGINT], (130,), "interrupted")
    trained("SIGSTOP and SIGCONT", [signal.SIGSTOP, signal.SIGCONT], (), "")

    row = Row("signals", "a second run on a directory that is in use")
    rows.append(row)
    place = _fresh(scratch, "two")
    second: list[forks.Ended] = []

    def meanwhile(process: int, now: float) -> bool:
        if not (place / "out" / ".lock").exists():
            return False
        (place / "second").mkdir()
        arguments = [*_TRAIN[:-1], "--config.workdir=../out"]
        second.append(forks.run(arguments, place / "second"))
        return True

    first = forks.run(_TRAIN, place, when=meanwhile)
    refused = bool(second) and second[0].code == 1 and "another run is going on" in second[0].text
    good_end = first.code == 0 and forks.call(_of_run, place) == wanted
    row.count("" if refused and good_end else f"{second and second[0].text[-300:]} {first.code}")
    show(f"two runs: refused {refused}, the first one whole {good_end}")
    return rows
