"""The report of a training run: results, training, data, configuration."""

import math
from typing import Any

import numpy as np

from rmjax.reports.document import Block, Collapsible, Document, Facts, Heading, Headline, Warning
from rmjax.reports.numbers import DASH, count, decimal, interval
from rmjax.reports.runs.blocks import (
    config_facts,
    data_blocks,
    evaluation_blocks,
    median_speed,
    result_blocks,
    training_blocks,
)
from rmjax.reports.runs.run_directory import RunFiles

RUN_FORMAT = "rmjax.report.run/1"
_LAST = 20  # steps that the final loss is the mean of


def run_document(run: RunFiles) -> Document:
    """The whole report."""
    blocks: list[Block] = [Headline(_headline(run)), *map(Warning, notes(run))]
    if run.best:
        blocks += result_blocks(run.best)
        blocks += evaluation_blocks(run)
    if run.steps:
        blocks += training_blocks(run)
    blocks += data_blocks(run.data)
    versions = Facts(tuple((name, str(version)) for name, version in run.versions.items()))
    blocks += [
        Heading("Made with"),
        Collapsible("Versions", (versions,)),
        Collapsible("Configuration", (config_facts(run.config),)),
    ]
    source = run.data.get("train", {}).get("source") or run.config.get("data.train", "")
    return Document(
        title=f"Training run {run.directory.name}",
        subtitle=state_of(run),
        facts=(
            ("objective", str(run.config.get("objective", DASH))),
            ("weights", str(run.config.get("init") or "random")),
            ("training data", str(source)),
            ("devices", run.devices or DASH),
            ("batch", f"{run.config.get('batch_size', DASH)} responses"),
            ("seed", str(run.config.get("seed", DASH))),
        ),
        blocks=tuple(blocks),
    )


def run_data(run: RunFiles) -> dict[str, Any]:
    """The numbers of a run, as in `report.json`."""
    best = run.best
    return {
        "format": RUN_FORMAT,
        "run": str(run.directory),
        "state": {
            "going_on": run.going_on,
            "last_step": run.steps[-1] if run.steps else 0,
            "planned_steps": run.planned,
            "checkpoints": run.checkpoints,
        },
        "summary": {
            "final_loss": _final_loss(run),
            "best_step": best.step if best else None,
            "best_validation_loss": best.loss if best else None,
            "tokens": int(np.nansum(run.numbers["tokens"])),
            "median_tokens_per_second": median_speed(run),
        },
        "notes": notes(run),
        "evaluations": [
            {
                "step": e.step,
                "validation_loss": e.loss,
                "seconds": e.seconds,
                "attributes": e.attributes,
                "pairs": e.pairs or None,
                "policy": e.policy or None,
            }
            for e in run.evaluations
        ],
        "steps": {"step": run.steps, **run.numbers},
        "data": run.data,
        "config": run.config,
        "versions": run.versions,
        "devices": run.devices,
    }


def notes(run: RunFiles) -> list[str]:
    """What a reader must know before the numbers."""
    texts = []
    if not run.steps:
        texts.append("The run has not finished a step yet.")
    elif not run.evaluations:
        texts.append(
            "There is no evaluation. A run with data that are held out (config.data.validation or "
            "hold_out) is evaluated every eval_every steps and after the last one."
        )
    return texts + notes_of_lines(run)


def notes_of_lines(run: RunFiles) -> list[str]:
    """What is wrong with the lines of the metrics of any run."""
    texts = []
    if run.unread:
        lines, is_ = ("line", "is") if run.unread == 1 else ("lines", "are")
        texts.append(
            f"{run.unread} {lines} of metrics.jsonl cannot be read and {is_} left out. A run "
            "that is killed while it writes leaves such a line."
        )
    broken = [step for step, loss in zip(run.steps, run.numbers["loss"]) if not math.isfinite(loss)]
    if broken:
        texts.append(f"The loss is not finite at step {broken[0]}.")
    return texts


def state_of(run: RunFiles) -> str:
    """How far the run is, in a sentence."""
    last, planned = (run.steps[-1] if run.steps else 0), run.planned
    about = "" if run.config.get("steps") else "about "
    of = f" of {about}{count(planned)}" if planned else ""
    if run.going_on:
        return f"Going on: step {count(last)}{of} is done."
    if planned and not about and last >= planned:
        return f"Finished: {count(last)} steps."
    ended = "Not running" if run.going_on is False else "As of its records"
    return f"{ended}: step {count(last)}{of} is the last one on record."


def _final_loss(run: RunFiles) -> float:
    losses = run.numbers["loss"][-_LAST:]
    return float(np.mean(losses)) if len(losses) else math.nan


def _headline(run: RunFiles) -> tuple[tuple[str, str, str], ...]:
    last, best = (run.steps[-1] if run.steps else 0), run.best
    items = [
        (
            "Steps",
            count(last),
            f"{count(int(np.nansum(run.numbers['tokens'])))} tokens" if last else "",
        ),
        (
            "Training loss",
            decimal(_final_loss(run), 4),
            f"last {_LAST} steps" if last >= _LAST else "",
        ),
    ]
    if best:
        items.append(("Validation loss", decimal(best.loss, 4), f"the best, step {best.step}"))
        if best.pairs:
            shown = f"95 %: {interval(best.pairs.get('low'), best.pairs.get('high'))}"
            accuracy = decimal(best.pairs.get("accuracy"))
            items.append(("Pair accuracy", accuracy, f"{shown}, step {best.step}"))
        elif best.attributes:
            name, row = next(iter(best.attributes.items()))
            shown = decimal(row.get("pearson"))
            items.append((f"Pearson, {name}", shown, f"step {best.step}"))
    items.append(("Speed", decimal(median_speed(run), 0), "tokens/s, median"))
    return tuple(items)
