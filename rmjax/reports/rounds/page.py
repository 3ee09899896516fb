"""The page that shows what an alignment did, round by round: the rewards, and what was hacked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.evaluation.bootstrap import mean_of_prompts
from rmjax.reports.document import (
    Block,
    Document,
    Example,
    Figure,
    Heading,
    Paragraph,
    Table,
    Text,
    Warning,
)
from rmjax.reports.numbers import DASH, count, decimal, interval, percent, signed
from rmjax.reports.plots.lines import Curve, curves
from rmjax.reports.rounds.answers import Round, last_user_turn

ROUNDS_FORMAT = "rmjax.report.rounds/1"
_EXAMPLES = 10


def rounds_data(rounds: Sequence[Round]) -> dict[str, Any]:
    """The numbers of all rounds, as in `report.json`.

    Each is compared with the first. A prompt counts once, however many answers it has.
    """
    start = rounds[0]
    return {
        "format": ROUNDS_FORMAT,
        "prompts": len(start.prompts),
        "rounds": [_round(found, start) for found in rounds],
    }


def _round(found: Round, start: Round) -> dict[str, Any]:
    ended = [answer.ended for answer in found.flat if answer.ended is not None]
    judges = {}
    for name in found.judges:
        value = found.by_prompt(found.values[name])
        entry: dict[str, Any] = mean_of_prompts(value)
        entry["unscored"] = int(np.isnan(found.values[name]).sum())
        entry["attributes"] = {
            attribute: mean_of_prompts(found.by_prompt(scores))
            for attribute, scores in found.attributes[name].items()
        }
        if found is not start and name in start.values:
            before = start.by_prompt(start.values[name])
            entry["gain"] = mean_of_prompts(value - before)
            entry["win_rate"] = mean_of_prompts(_won(value, before))
        judges[name] = entry
    return {
        "name": found.name,
        "answers": len(found.flat),
        "words": mean_of_prompts(found.by_prompt(found.words)),
        "ended": float(np.mean(ended)) if ended else None,
        "different": float(np.mean([len({a.text for a in x}) / len(x) for x in found.answers])),
        "log_ratio": mean_of_prompts(found.by_prompt(found.log_ratios)),
        "judges": judges,
    }


def _won(value: Float[np.ndarray, "P"], before: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """1 where a prompt's answer is better than before, 1/2 where it is as good."""
    known = np.isfinite(value) & np.isfinite(before)
    return np.where(known, 0.5 + 0.5 * np.sign(value - before), np.nan)


# ---- the page -----------------------------------------------------------------------------------


def rounds_document(rounds: Sequence[Round], data: dict[str, Any]) -> Document:
    """The whole page."""
    found = data["rounds"]
    judges = list(dict.fromkeys(name for entry in found for name in entry["judges"]))
    blocks: list[Block] = [Warning(text) for text in _warnings(found, judges)]
    blocks += [Heading("Rewards"), _rewards(found, judges)]
    if len(found) > 1:
        blocks += [_figure(found, name) for name in judges] + [_words_figure(found)]
    blocks += [_attributes(found, name) for name in judges if _several(found, name)]
    blocks += [Heading("Answers"), _answers(found)]
    blocks += [
        Heading("The same prompts in each round"),
        Paragraph("The first prompts of the file; nothing is picked."),
        *(_example(rounds, number) for number in range(len(rounds[0].prompts))[:_EXAMPLES]),
    ]
    return Document(
        title=f"Rounds {found[0]['name']} to {found[-1]['name']}",
        subtitle=f"{count(data['prompts'])} prompts that every round answers",
        facts=(("rounds", ", ".join(entry["name"] for entry in found)), ("judges", _list(judges))),
        blocks=tuple(blocks),
    )


def _warnings(found: Sequence[dict[str, Any]], judges: Sequence[str]) -> list[str]:
    texts = []
    if judges == ["reward"]:
        texts.append(
            "The only judge is the model that taught. What a policy learns from a reward it can "
            "learn to exploit: have a model that did not teach score the answers as well."
        )
    for entry in found:
        for name, judge in entry["judges"].items():
            if judge["unscored"]:
                texts.append(
                    f"{entry['name']}: {count(judge['unscored'])} answers have no score by {name}, "
                    "such as empty ones; means are of the others."
                )
    last, first = found[-1]["words"]["mean"], found[0]["words"]["mean"]
    if len(found) > 1 and first and not 2 / 3 < last / first < 3 / 2:
        texts.append(
            f"Answers have {decimal(last, 1)} words at the end and {decimal(first, 1)} at the "
            "start. A part of the reward may be a taste for that."
        )
    return texts


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or DASH


def _several(found: Sequence[dict[str, Any]], judge: str) -> bool:
    return any(len(e["judges"].get(judge, {}).get("attributes", ())) > 1 for e in found)


def _rewards(found: Sequence[dict[str, Any]], judges: Sequence[str]) -> Table:
    rows = []
    for entry in found:
        for name in judges:
            judge = entry["judges"].get(name)
            if judge is None:
                continue
            gain, won = judge.get("gain", {}), judge.get("win_rate", {})
            rows.append(
                (
                    entry["name"],
                    name,
                    decimal(judge["mean"]),
                    signed(gain.get("mean")),
                    interval(gain.get("low"), gain.get("high")),
                    percent(won.get("mean")),
                    _percents(won),
                )
            )
    return Table(
        ("round", "judge", "reward", "gain", "gain, 95 %", "better", "better, 95 %"),
        tuple(rows),
        align="llrrrrr",
        note=(
            "Means over prompts. gain: over the first round, on the same prompts. better: the "
            "share of prompts whose answer has a higher reward than the first round's; equal "
            "ones count half. Intervals are bootstrapped over prompts."
        ),
    )


def _percents(found: dict[str, Any]) -> str:
    low, high = found.get("low"), found.get("high")
    return DASH if low is None else f"{percent(low)} to {percent(high)}"


def _answers(found: Sequence[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            entry["name"],
            count(entry["answers"]),
            decimal(entry["words"]["mean"], 1),
            percent(entry["ended"]),
            decimal(entry["log_ratio"]["mean"], 2),
            interval(entry["log_ratio"]["low"], entry["log_ratio"]["high"], 2),
        )
        for entry in found
    )
    return Table(
        ("round", "answers", "words", "ended", "log ratio", "95 %"),
        rows,
        note=(
            "words: of an answer. ended: by the model itself, not by the limit. log ratio: "
            "log(policy / start) of an answer, both at temperature 1, in nats; it is the KL "
            "divergence from the start if answers are drawn at temperature 1 and top-p 1."
        ),
    )


def _attributes(found: Sequence[dict[str, Any]], judge: str) -> Table:
    entries = [entry for entry in found if judge in entry["judges"]]
    names = list(dict.fromkeys(n for e in entries for n in e["judges"][judge]["attributes"]))
    rows = tuple(
        (
            entry["name"],
            *(
                decimal(entry["judges"][judge]["attributes"].get(name, {}).get("mean"))
                for name in names
            ),
        )
        for entry in entries
    )
    return Table(("round", *names), rows, caption=f"Attributes by {judge}")


def _figure(found: Sequence[dict[str, Any]], judge: str) -> Figure:
    known = [(i, e["judges"][judge]) for i, e in enumerate(found) if judge in e["judges"]]
    label = f"mean score by {judge}"
    return Figure(
        curves([_curve("", known)], "round", label),
        f"reward-{judge}",
        f"{label}: {', '.join(decimal(j['mean']) for _, j in known)}",
        f"Mean reward by {judge}, with 95 % intervals; round 0 is {found[0]['name']}.",
    )


def _words_figure(found: Sequence[dict[str, Any]]) -> Figure:
    known = [(i, entry["words"]) for i, entry in enumerate(found)]
    return Figure(
        curves([_curve("", known)], "round", "words of an answer"),
        "words",
        f"words of an answer: {', '.join(decimal(w['mean'], 1) for _, w in known)}",
        "Mean length of an answer, with 95 % intervals.",
    )


def _curve(label: str, known: Sequence[tuple[int, dict[str, Any]]]) -> Curve:
    def column(name: str) -> list[float]:
        return [np.nan if entry[name] is None else entry[name] for _, entry in known]

    return Curve(label, [float(i) for i, _ in known], column("mean"), column("low"), column("high"))


def _example(rounds: Sequence[Round], number: int) -> Example:
    texts = [Text("prompt", last_user_turn(rounds[0].answers[number][0]), "prompt")]
    for found in rounds:
        at = sum(len(answers) for answers in found.answers[:number])
        rewards = tuple((name, decimal(float(found.values[name][at]), 2)) for name in found.judges)
        texts.append(Text(found.name, found.answers[number][0].text, "other", rewards))
    return Example(f"Prompt {number + 1}", tuple(texts))
