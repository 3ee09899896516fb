"""What a reader must know before trusting the numbers of an alignment run."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmjax.reports.alignments.alignment_files import AlignmentFiles
from rmjax.reports.alignments.measures import ends, over_run
from rmjax.reports.numbers import count, decimal, percent
from rmjax.reports.runs.page import notes_of_lines

KL_NATS = 50.0  # of a sample, above which a page warns
_LENGTH = 1.5  # times longer or shorter, likewise
_ENTROPY = 0.5  # of what it was at the start
_ENDED = 0.05  # fewer that ended
_LISTED = 5  # steps named
_WEIGHT = re.compile(r"rewards\..+\.weight")  # of a reward; with 0 it did not teach


def notes(files: AlignmentFiles, data: Mapping[str, Any]) -> list[str]:
    """The warnings of a page."""
    run = files.run
    texts = [] if run.steps else ["The run has not finished a step yet."]
    texts += notes_of_lines(run) + list(files.problems)
    texts += _held_out(files) + _of_samples(data)
    return texts + _moved(files, data) + _judges(files, data)


def _held_out(files: AlignmentFiles) -> list[str]:
    if not files.run.config.get("data.validation"):
        return [
            "There are no held-out prompts (config.data.validation): that the reward of prompts "
            "that are learned from rises does not show that it rises on others."
        ]
    missing = [step for step in files.evaluations if step not in files.held_out]
    if not missing:
        return []
    named = ", ".join(map(str, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
    return [
        f"Of {len(missing)} of {len(files.evaluations)} evaluations there are no samples to read "
        f"in rollouts/ (step {named}): their rewards have no interval and no gain."
    ]


def _of_samples(data: Mapping[str, Any]) -> list[str]:
    summary, texts = data["summary"], []
    if summary["without_reward"]:
        texts.append(
            f"Samples without a reward, such as empty ones: {count(summary['without_reward'])} of "
            f"{count(summary['samples'])}. They teach nothing, and means are of the others."
        )
    if summary["without_advantage"]:
        texts.append(
            f"Prompts without an advantage: {count(summary['without_advantage'])} of "
            f"{count(summary['prompts'])}. Their samples are equally good, and teach nothing."
        )
    unscored = {e["step"]: e["unscored"] for e in data["evaluations"] if e["unscored"]}
    if unscored:
        step, most = max(unscored.items(), key=lambda item: item[1])
        texts.append(
            f"Answers to held-out prompts without a reward: up to {count(most)} (step {step}). "
            "Means are of the others."
        )
    return texts


def _moved(files: AlignmentFiles, data: Mapping[str, Any]) -> list[str]:
    """What moves when a policy finds out what a reward likes beside what it is meant to like."""
    texts = []
    reward = over_run(files, data, "reward", "reward")
    length = over_run(files, data, "length", "length")
    ended = over_run(files, data, "ended", "ended")
    if reward[1] > reward[0] and not 1 / _LENGTH <= length[1] / max(length[0], 1e-9) <= _LENGTH:
        texts.append(
            f"The reward rises while the length of an answer goes from {decimal(length[0], 1)} to "
            f"{decimal(length[1], 1)} tokens. A part of the reward may be a taste for that."
        )
    if ended[1] < ended[0] - _ENDED:
        texts.append(
            f"Fewer answers come to an end: {percent(ended[0])} at the start, "
            f"{percent(ended[1])} at the end."
        )
    entropy = ends(files.numbers.get("entropy", np.zeros(0)))
    if entropy[1] < _ENTROPY * entropy[0]:
        texts.append(
            f"The entropy of a token goes from {decimal(entropy[0])} to {decimal(entropy[1])} "
            "nats: the policy says nearly the same whenever it is asked."
        )
    kl = ends(files.numbers.get("kl", np.zeros(0)))
    if kl[1] > KL_NATS:
        texts.append(
            f"The KL of a sample is {decimal(kl[1], 1)} nats at the end, and above {KL_NATS:g} a "
            "policy writes what it hardly ever wrote before, and what a reward model may never "
            "have seen. Read the answers below."
        )
    return texts


def _judges(files: AlignmentFiles, data: Mapping[str, Any]) -> list[str]:
    weights = [value for key, value in files.run.config.items() if _WEIGHT.fullmatch(key)]
    if files.judges or not files.held_out or 0 in weights:
        return []
    step = max(files.held_out)
    name = f"rollouts/held-out-{step:06d}"
    return [
        "Only the reward that taught is shown. What a policy learns from a reward it can learn to "
        "exploit: have a model that did not teach score the held-out answers as well, and this "
        f"page will show it. For example python -m rmjax.score JUDGE {name}.jsonl "
        f"{name}.scores-judge.jsonl --replace, and likewise of the other steps."
    ]
