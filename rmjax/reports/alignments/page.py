"""The page of an alignment run: what was learned, how far the policy went, and what it says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.reports.alignments.alignment_files import AlignmentFiles
from rmjax.reports.alignments.curves import judge_figures, step_blocks
from rmjax.reports.alignments.measures import ends, measure_alignment
from rmjax.reports.alignments.notes import notes
from rmjax.reports.alignments.samples import Answers
from rmjax.reports.document import (
    Block,
    Collapsible,
    Document,
    Example,
    Facts,
    Heading,
    Headline,
    Paragraph,
    Table,
    Text,
    Warning,
)
from rmjax.reports.numbers import DASH, count, decimal, interval, percent, signed
from rmjax.reports.runs.blocks import config_facts, data_blocks
from rmjax.reports.runs.page import state_of

_PROMPTS = 10  # whose answers are shown
_ANSWERS = 5  # of each
_GIVERS = ("model", "function", "server")  # of a reward, one of them


def alignment_data(files: AlignmentFiles) -> dict[str, Any]:
    """The numbers of a run, as in `report.json`."""
    data = measure_alignment(files)
    return data | {"notes": notes(files, data)}


def alignment_document(files: AlignmentFiles, data: Mapping[str, Any]) -> Document:
    """The whole page.

    Args:
      files: of the run.
      data: `alignment_data` of them.
    """
    run = files.run
    blocks: list[Block] = [Headline(_headline(files, data)), *map(Warning, data["notes"])]
    if data["evaluations"]:
        blocks += [Heading("Held-out prompts"), _evaluations(files, data)]
        blocks += [*judge_figures(data), *_judges(data), *_attributes(data)]
    blocks += step_blocks(files, data)
    if data["seconds"]:
        blocks += [Heading("Seconds of a step"), _seconds(data)]
    blocks += _over_time(files) + _extremes(files)
    blocks += data_blocks(run.data, "prompt")
    versions = Facts(tuple((name, str(version)) for name, version in run.versions.items()))
    blocks += [
        Heading("Made with"),
        Collapsible("Versions", (versions,)),
        Collapsible("Configuration", (config_facts(run.config),)),
    ]
    config = run.config
    return Document(
        title=f"Alignment run {run.directory.name}",
        subtitle=state_of(run),
        facts=(
            ("method", str(config.get("objective", DASH))),
            ("policy at the start", str(config.get("init") or "random")),
            ("rewards", _rewards(config)),
            ("prompts", str(config.get("data.train", DASH))),
            ("held-out prompts", str(config.get("data.validation") or DASH)),
            (
                "step",
                f"{config.get('batch_size', DASH)} samples, {config['rollout.n']} of each prompt",
            ),
            ("devices", run.devices or DASH),
            ("seed", str(config.get("seed", DASH))),
        ),
        blocks=tuple(blocks),
    )


def _rewards(config: Mapping[str, Any]) -> str:
    """The rewards by name, with their weights: `teacher: runs/rm, brief: mine.py:brief x 0.2`."""
    said = []
    for name in dict.fromkeys(key.split(".")[1] for key in config if key.startswith("rewards.")):
        of = {field: config.get(f"rewards.{name}.{field}") for field in _GIVERS}
        weight = config.get(f"rewards.{name}.weight", 1)
        giver = next((str(giver) for giver in of.values() if giver), DASH)
        said.append(f"{name}: {giver}" + (f" x {weight:g}" if weight != 1 else ""))
    return ", ".join(said) or DASH


# ---- numbers ------------------------------------------------------------------------------------


def _headline(files: AlignmentFiles, data: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    summary, last = data["summary"], data["state"]["last_step"]
    items = [("Steps", count(last), f"{count(summary['samples'])} samples")]
    if summary["best_step"] is not None:
        first = f"first {decimal(summary['first_reward'], 2)}"
        shown = decimal(summary["best_reward"], 2)
        items.append(("Held-out reward", shown, f"step {summary['best_step']}, the best; {first}"))

    def moved(label: str, field: str, shown: Any, unit: str) -> None:
        first, end = ends(files.numbers.get(field, np.zeros(0)))
        if np.isfinite(end):
            items.append((label, shown(end), f"{unit}first {shown(first)}"))

    if summary["best_step"] is None:
        moved("Reward of a step", "reward", lambda x: decimal(x, 2), "")
    moved("KL", "kl", lambda x: decimal(x, 1), "nats a sample; ")
    moved("Length", "length", lambda x: decimal(x, 1), "tokens; ")
    moved("Ended", "ended", percent, "")
    return tuple(items)


def _evaluations(files: AlignmentFiles, data: Mapping[str, Any]) -> Table:
    rows, strong = [], []
    for number, entry in enumerate(data["evaluations"]):
        if entry["step"] == files.best:
            strong.append(number)
        rows.append(
            (
                count(entry["step"]),
                *_reward_and_gain(entry),
                decimal(entry["length"], 1),
                percent(entry["ended"]),
                decimal(entry["kl"], 1),
            )
        )
    first = min(files.held_out, default=None)
    over = "" if first is None else f" gain: over step {first}, on the same prompts."
    return Table(
        ("step", "reward", "95 %", "gain", "gain, 95 %", "tokens", "ended", "KL"),
        tuple(rows),
        note=(
            "One answer to each held-out prompt, with the same noise each time; means over prompts "
            f"with 95 % intervals (bootstrap over prompts).{over} KL: nats of a sample of the "
            "step's own prompts, drawn before its update. Bold: the best reward, whose checkpoint "
            "is kept."
        ),
        align="r" * 8,
        strong=tuple(strong),
    )


def _reward_and_gain(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    reward, gain = entry["reward"], entry["gain"] or {}
    return (
        decimal(reward["mean"]),
        interval(reward["low"], reward["high"]),
        signed(gain.get("mean")),
        interval(gain.get("low"), gain.get("high")),
    )


def _judges(data: Mapping[str, Any]) -> list[Block]:
    rows = tuple(
        (name, count(entry["step"]), *_reward_and_gain(judge), count(judge["unscored"]))
        for entry in data["evaluations"]
        for name, judge in entry["judges"].items()
    )
    if not rows:
        return []
    return [
        Table(
            ("judge", "step", "score", "95 %", "gain", "gain, 95 %", "unscored"),
            tuple(sorted(rows, key=lambda row: row[0])),
            caption="The same answers by other judges",
            note="gain: over the first step that the judge scored, on the same prompts.",
        )
    ]


def _attributes(data: Mapping[str, Any]) -> list[Block]:
    entries = [entry for entry in data["evaluations"] if entry["attributes"]]
    names = list(dict.fromkeys(name for entry in entries for name in entry["attributes"]))
    if len(names) < 2:
        return []
    rows = tuple(
        (count(e["step"]), *(decimal(e["attributes"].get(name)) for name in names)) for e in entries
    )
    caption = "The reward's attributes, means of held-out answers"
    return [Table(("step", *names), rows, caption=caption, align="r" * (1 + len(names)))]


def _seconds(data: Mapping[str, Any]) -> Table:
    seconds = data["seconds"]
    total = sum(seconds.values())
    rows = [
        (name, decimal(value, 2), percent(value / total if total else None))
        for name, value in seconds.items()
    ]
    return Table(
        ("part", "median", "share"),
        (*rows, ("together", decimal(total, 2), percent(1.0 if total else None))),
        note="Medians over the steps without the first, which waits for the compiler.",
        strong=(len(rows),),
    )


# ---- answers ------------------------------------------------------------------------------------


def _over_time(files: AlignmentFiles) -> list[Block]:
    steps = list(files.held_out)
    if not steps:
        return []
    places = np.unique(
        np.linspace(0, len(steps) - 1, min(_ANSWERS, len(steps))).round().astype(int)
    )
    chosen = [steps[place] for place in places]
    many = len(files.held_out[steps[0]])
    return [
        Heading("The same prompts over time"),
        Paragraph("The first held-out prompts; nothing is picked."),
        *(_example(files, number, chosen) for number in range(min(_PROMPTS, many))),
    ]


def _example(files: AlignmentFiles, number: int, steps: Sequence[int]) -> Example:
    texts = [_prompt(files.held_out[steps[0]][number])]
    for step in steps:
        scores = tuple(
            (name, decimal(of_steps[step][number][0], 2))
            for name, of_steps in files.judges.items()
            if step in of_steps
        )
        texts.append(_answer(f"step {step}", files.held_out[step][number], 0, scores))
    return Example(f"Prompt {number + 1}", tuple(texts))


def _extremes(files: AlignmentFiles) -> list[Block]:
    """The samples of the last step with the highest and the lowest reward."""
    if files.last is None:
        return []
    step, rows = files.last
    found = [
        (reward, row, place)
        for row in rows
        for place, reward in enumerate(row.rewards)
        if np.isfinite(reward)
    ]
    if not found:
        return []
    examples = [
        Example(title, (_prompt(row), _answer("sample", row, place)))
        for title, (_, row, place) in (
            ("The highest reward", max(found, key=lambda x: x[0])),
            ("The lowest reward", min(found, key=lambda x: x[0])),
        )
    ]
    return [Heading(f"Samples of step {count(step)}"), *examples]


def _prompt(row: Answers) -> Text:
    tools = (("tools", count(row.tools)),) if row.tools else ()
    return Text("prompt", row.prompt, "prompt", tools)


def _answer(label: str, row: Answers, place: int, scores: tuple[tuple[str, str], ...] = ()) -> Text:
    numbers = [("reward", decimal(row.rewards[place], 2)), *scores]
    numbers.append(("tokens", count(row.lengths[place])))
    if not row.ended[place]:
        numbers.append(("ended", "no"))
    return Text(label, row.texts[place], "other", tuple(numbers))
