"""What a run of `rmjax.align` has left so far: its numbers, and the samples that are there."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rmjax.alignment.rollouts import DIRECTORY, held_out_file, rollout_file
from rmjax.reports.alignments.samples import Answers, read_answers, read_scores
from rmjax.reports.runs.run_directory import RunFiles

REWARD = "held_out/reward"
_SCORES = re.compile(r"held-out-(\d+)\.scores-(.+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class AlignmentFiles:
    """The contents of a run's files.

    Attributes:
      run: what every run has.
      numbers: by name, of each of `run.steps`; NaN where there is none.
      evaluations: by step, what was logged of held-out prompts, by name without `held_out/`.
      held_out: by step, the answers to held-out prompts.
      judges: by name and step, the scores of these answers.
      last: the last step whose samples are there, and these; None if there are none.
      problems: files that are damaged or of something else, in words.
    """

    run: RunFiles
    numbers: Mapping[str, Float[np.ndarray, "S"]]
    evaluations: Mapping[int, Mapping[str, float]]
    held_out: Mapping[int, Sequence[Answers]]
    judges: Mapping[str, Mapping[int, Sequence[Sequence[float]]]]
    last: tuple[int, Sequence[Answers]] | None
    problems: Sequence[str]

    @property
    def best(self) -> int | None:
        """The step of the evaluation with the highest held-out reward."""
        known = {s: e["reward"] for s, e in self.evaluations.items() if math.isfinite(e["reward"])}
        return max(known, key=lambda step: known[step], default=None)


def read_alignment(run: RunFiles) -> AlignmentFiles:
    """Reads the samples of a run; a file that cannot be used is named among the problems."""
    problems: list[str] = []
    evaluations = {
        line["step"]: {
            name.removeprefix("held_out/"): _number(value)
            for name, value in line.items()
            if name.startswith("held_out/")
        }
        for line in run.lines
        if REWARD in line
    }
    held_out: dict[int, Sequence[Answers]] = {}
    for step in evaluations:
        found = _read(held_out_file(run.directory, step), problems)
        if found:
            asked = [row.asked for row in next(iter(held_out.values()), found)]
            if asked == [row.asked for row in found]:
                held_out[step] = found
            else:
                name = held_out_file(run.directory, step).name
                problems.append(f"{name}: not the prompts of the evaluations before it.")
    return AlignmentFiles(
        run=run,
        numbers=_numbers(run),
        evaluations=evaluations,
        held_out=held_out,
        judges=_judges(run, held_out, problems),
        last=_last(run, problems),
        problems=problems,
    )


def _numbers(run: RunFiles) -> dict[str, Float[np.ndarray, "S"]]:
    lines = [line for line in run.lines if "loss" in line]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    return {name: np.asarray([_number(line.get(name)) for line in lines], float) for name in names}


def _judges(
    run: RunFiles, held_out: Mapping[int, Sequence[Answers]], problems: list[str]
) -> dict[str, dict[int, Sequence[Sequence[float]]]]:
    found: dict[str, dict[int, Sequence[Sequence[float]]]] = {}
    for path in sorted((run.directory / DIRECTORY).glob("held-out-*.scores-*.jsonl")):
        match = _SCORES.fullmatch(path.name)
        if not match or int(match[1]) not in held_out:
            continue
        try:
            scores = read_scores(path, held_out[int(match[1])])
        except (ValueError, OSError) as error:
            problems.append(f"{path.name} is left out: {error}.")
        else:
            found.setdefault(match[2], {})[int(match[1])] = scores
    return found


def _last(run: RunFiles, problems: list[str]) -> tuple[int, Sequence[Answers]] | None:
    for step in reversed(run.steps):
        path = rollout_file(run.directory, step)
        if path.exists():
            found = _read(path, problems)
            return (step, found) if found else None
    return None


def _read(path: Path, problems: list[str]) -> Sequence[Answers]:
    """The rows of a file; none if it is not there, or damaged, which is then a problem."""
    try:
        return read_answers(path)
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        problems.append(f"{path.name} is damaged and left out ({error}).")
        return []


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
