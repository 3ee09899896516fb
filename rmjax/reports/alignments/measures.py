"""The numbers of an alignment run: what held-out answers are worth, and what its steps took."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.evaluation.bootstrap import mean_of_prompts
from rmjax.reports.alignments.alignment_files import AlignmentFiles
from rmjax.reports.alignments.samples import Answers, by_prompt

ALIGNMENT_FORMAT = "rmjax.report.alignment/1"
_SECONDS = "seconds_"


def measure_alignment(files: AlignmentFiles) -> dict[str, Any]:
    """The numbers of a run, as in `report.json`.

    A held-out prompt counts once. Gains are over the first evaluation whose samples are there, on
    the same prompts.
    """
    run, best = files.run, files.best
    evaluations = [_evaluation(files, step) for step in files.evaluations]
    return {
        "format": ALIGNMENT_FORMAT,
        "run": str(run.directory),
        "state": {
            "going_on": run.going_on,
            "last_step": run.steps[-1] if run.steps else 0,
            "planned_steps": run.planned,
            "checkpoints": run.checkpoints,
        },
        "summary": {
            "first_reward": evaluations[0]["reward"]["mean"] if evaluations else None,
            "best_step": best,
            "best_reward": None if best is None else files.evaluations[best]["reward"],
            "samples": _samples(files),
            "without_reward": _sum(files, "without_reward"),
            "prompts": _prompts(files),
            "without_advantage": _sum(files, "without_advantage"),
        },
        "evaluations": evaluations,
        "steps": {"step": run.steps, **files.numbers},
        "seconds": _seconds(files),
        "data": run.data,
        "config": run.config,
        "versions": run.versions,
        "devices": run.devices,
    }


# ---- evaluations --------------------------------------------------------------------------------


def _evaluation(files: AlignmentFiles, step: int) -> dict[str, Any]:
    logged, answers = files.evaluations[step], files.held_out.get(step)
    found: dict[str, Any] = {
        "step": step,
        "reward": _without_interval(logged["reward"]),
        "gain": None,
        "unscored": None,
        "length": logged.get("length"),
        "ended": logged.get("ended"),
        "kl": _at(files, "kl", step),
        "attributes": {},
        "judges": {},
    }
    if answers:
        first = next(iter(files.held_out.values()))
        rewards, before = ([x.rewards for x in rows] for rows in (answers, first))
        found |= _compared(rewards, before if answers is not first else None)
        found["attributes"] = _attributes(answers)
    for name, scores in files.judges.items():
        if step in scores:
            start = next(iter(sorted(scores)))
            before = scores[start] if start != step else None
            found["judges"][name] = _compared(scores[step], before)
    return found


def _compared(
    scores: Sequence[Sequence[float]], before: Sequence[Sequence[float]] | None
) -> dict[str, Any]:
    """The mean over prompts; what it gained, and how many answers have no score."""
    now = by_prompt(scores)
    return {
        "reward": mean_of_prompts(now),
        "gain": None if before is None else mean_of_prompts(now - by_prompt(before)),
        "unscored": int(sum(np.isnan(row).sum() for row in scores)),
    }


def _without_interval(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": None, "high": None, "prompts": None}


def _attributes(answers: Sequence[Answers]) -> dict[str, float]:
    names = dict.fromkeys(name for row in answers for x in row.attributes for name in x)
    found = {
        name: by_prompt([[x.get(name, np.nan) for x in row.attributes] for row in answers])
        for name in names
    }
    return {
        name: float(np.nanmean(values))
        for name, values in found.items()
        if np.isfinite(values).any()
    }


# ---- steps --------------------------------------------------------------------------------------


def _at(files: AlignmentFiles, name: str, step: int) -> float | None:
    """A number of a step; None if it was not logged."""
    if step not in files.run.steps or name not in files.numbers:
        return None
    return float(files.numbers[name][list(files.run.steps).index(step)])


def _sum(files: AlignmentFiles, name: str) -> int:
    return int(np.nansum(files.numbers.get(name, np.zeros(0))))


def _samples(files: AlignmentFiles) -> int:
    return len(files.run.steps) * int(files.run.config.get("batch_size", 0))


def _prompts(files: AlignmentFiles) -> int:
    return _samples(files) // max(1, int(files.run.config["rollout.n"]))


def _seconds(files: AlignmentFiles) -> dict[str, float]:
    """The median seconds of each part, without the first step, which waits for the compiler."""
    parts = {
        name.removeprefix(_SECONDS): values[1:] if len(values) > 1 else values
        for name, values in files.numbers.items()
        if name.startswith(_SECONDS)
    }
    return {
        name: float(np.nanmedian(values))
        for name, values in parts.items()
        if np.isfinite(values).any()
    }


def ends(values: Float[np.ndarray, "S"]) -> tuple[float, float]:
    """The means of the first and of the last tenth of the steps, at least one of each; or NaN."""
    known = values[np.isfinite(values)]
    count = -(-len(known) // 10)
    if not count:
        return np.nan, np.nan
    return float(known[:count].mean()), float(known[-count:].mean())


def over_run(
    files: AlignmentFiles, data: Mapping[str, Any], of_evaluations: str, of_steps: str
) -> tuple[float, float]:
    """What a number was at the start and at the end: of evaluations, where there are two."""
    held = [entry[of_evaluations] for entry in data["evaluations"]]
    held = [x["mean"] if isinstance(x, dict) else x for x in held]
    known = np.asarray([x for x in held if x is not None], float)
    known = known[np.isfinite(known)]
    if len(known) > 1:
        return float(known[0]), float(known[-1])
    return ends(files.numbers.get(of_steps, np.zeros(0)))
