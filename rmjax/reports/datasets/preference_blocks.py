"""The sections about preference pairs, and about ratings of the same responses."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Drawing

from rmjax.reports import plots
from rmjax.reports.datasets.lengths import response_characters
from rmjax.reports.datasets.preference_statistics import Pair
from rmjax.reports.datasets.tables import counts_block, length_table, percent_interval
from rmjax.reports.document import Block, Figure, Heading, Table, Warning
from rmjax.reports.numbers import count, decimal, minus, percent, short


def preference_blocks(preferred: Mapping[str, Any], pairs: Sequence[Pair]) -> list[Block]:
    """Shows the statistics of `measure_preferences`."""
    position = preferred["position"]
    strengths = preferred["strengths"]
    shares = {name: number / preferred["pairs"] for name, number in strengths.items()}
    rows = tuple((minus(name), count(n), percent(shares[name])) for name, n in strengths.items())
    note = (
        "Negative: response 1 is better; positive: response 2 is better."
        if position
        else "How much better the chosen response is; unknown where the data do not say."
    )
    blocks: list[Block] = [Heading("Preferences"), *_pair_warnings(preferred)]
    if len(strengths) > 1 or "unknown" not in strengths:
        caption = "Strength of the preferences"
        blocks.append(Table(("strength", "pairs", "share"), rows, caption=caption, note=note))
    blocks.append(_longer_table(preferred))
    if position:
        blocks.append(_position_table(position))
    blocks += [
        length_table(preferred["lengths"]),
        counts_block("messages before the response", "pairs", preferred["turns"]),
        *_pair_figures(shares, preferred, pairs),
    ]
    return blocks


def _pair_warnings(preferred: Mapping[str, Any]) -> list[Block]:
    repeats = preferred["repeats"]
    texts = {
        "contradictions": "{} pairs occur twice or more, with opposite preferences.",
        "repeated": "{} rows repeat an earlier pair of responses to the same prompt.",
        "identical": "{} rows have the same text as both responses.",
    }
    return [Warning(text.format(count(repeats[k]))) for k, text in texts.items() if repeats[k]]


def _longer_table(preferred: Mapping[str, Any]) -> Table:
    longer = preferred["longer_chosen"]
    rows = [(f"strength {name}", row) for name, row in longer["by_strength"].items()]
    return Table(
        ("pairs", "with different lengths", "longer one chosen", "95 % interval"),
        tuple(
            (name, count(row["pairs"]), percent(row["share"]), percent_interval(row))
            for name, row in [*rows, ("all", longer["all"])]
        ),
        caption="How often the longer response is the chosen one",
        note="In characters, without ties. 50 % would be no preference for length.",
        strong=(len(rows),),
    )


def _position_table(position: Mapping[str, float]) -> Table:
    row = (count(position["pairs"]), percent(position["share"]), percent_interval(position))
    return Table(
        ("", "pairs", "response 2 chosen", "95 % interval"),
        (("all", *row),),
        caption="Whether the position of a response matters",
        note="Without ties. 50 % would be no preference for a position.",
    )


def _pair_figures(
    shares: Mapping[str, float], preferred: Mapping[str, Any], pairs: Sequence[Pair]
) -> list[Block]:
    chosen = response_characters([pair[0] for pair in pairs if pair[0].strength != 0])
    rejected = response_characters([pair[1] for pair in pairs if pair[0].strength != 0])
    lengths = preferred["lengths"]
    medians = (lengths["chosen_characters"]["median"], lengths["rejected_characters"]["median"])
    caption = (
        f"Length of chosen and rejected responses: medians {short(medians[0])} and "
        f"{short(medians[1])} characters."
    )
    drawing = plots.histograms({"chosen": chosen, "rejected": rejected}, "characters")
    figures: list[Block] = [Figure(drawing, "pair-length", caption, caption)]
    if len(shares) > 1:
        words = ", ".join(f"{name}: {percent(value)}" for name, value in shares.items())
        caption = "Pairs by the strength of the preference."
        drawing = plots.columns(
            [minus(name) for name in shares], {"pairs": list(shares.values())}, "strength"
        )
        figures.append(Figure(drawing, "strengths", f"{caption} {words}.", caption))
    rows = preferred["longer_chosen"]["by_strength"]
    if len(rows) > 1:
        named = {f"strength {name}": row for name, row in rows.items()}
        drawing = _share_bars(named, "share", "longer one chosen")
        caption = "Share of pairs whose longer response is the chosen one, with 95 % intervals."
        figures.append(Figure(drawing, "longer-chosen", caption, caption))
    return figures


def _share_bars(rows: Mapping[str, Mapping[str, Any]], field: str, xlabel: str) -> Drawing:
    """Bars of shares of pairs with their intervals; chance is one half."""
    share, low, high = ([row[f] for row in rows.values()] for f in (field, "low", "high"))
    return plots.bars(list(rows), share, xlabel, low, high, chance=0.5)


def agreement_blocks(agreement: Mapping[str, Any]) -> list[Block]:
    """Shows the statistics of `measure_agreement`."""
    blocks: list[Block] = [Heading("Preferences against ratings")]
    matched, pairs = agreement["matched"], agreement["pairs"]
    if not matched:
        blocks.append(Warning("No pair has ratings of both its responses."))
        return blocks
    attributes = agreement["attributes"]
    rows = tuple(
        (
            name,
            *(count(row[field]) for field in ("agree", "equal", "opposite")),
            percent(row["agreement"]),
            percent_interval(row),
            decimal(row["mean_difference"], 2),
        )
        for name, row in attributes.items()
    )
    columns = ("attribute", "chosen rated higher", "equally", "lower", "agreement")
    blocks.append(
        Table(
            (*columns, "95 % interval", "mean difference"),
            rows,
            caption="Whether the preferred response has the higher rating",
            note=f"{count(matched)} of {count(pairs)} pairs have ratings of both responses; ties "
            "are left out. Agreement: among pairs with different ratings. Difference: chosen minus "
            "rejected.",
        )
    )
    strengths = list(dict.fromkeys(s for row in attributes.values() for s in row["by_strength"]))
    if len(strengths) > 1:
        blocks += _agreement_by_strength(attributes, strengths)
    drawing = _share_bars(attributes, "agreement", "agreement with the preference")
    words = ", ".join(f"{name} {percent(row['agreement'])}" for name, row in attributes.items())
    caption = "Agreement of each rating with the preference, with 95 % intervals."
    blocks.append(Figure(drawing, "agreement", f"{caption} {words}.", caption))
    if len(strengths) > 1:
        curves = [
            plots.Curve(
                name,
                [float(s) for s in strengths],
                [row["by_strength"].get(s, {}).get("mean_difference", math.nan) for s in strengths],
            )
            for name, row in attributes.items()
        ]
        caption = "Rating of the chosen response minus that of the rejected one, by strength."
        drawing = plots.curves(curves, "strength", "mean difference")
        blocks.append(Figure(drawing, "agreement-strength", caption, caption))
    return blocks


def _agreement_by_strength(
    attributes: Mapping[str, Mapping[str, Any]], strengths: Sequence[str]
) -> list[Block]:
    rows = tuple(
        (
            name,
            *(percent(row["by_strength"].get(s, {}).get("agreement")) for s in strengths),
            decimal(row["ties"]["mean_difference"], 2),
        )
        for name, row in attributes.items()
    )
    columns = ("attribute", *(f"strength {s}" for s in strengths), "difference in ties")
    return [
        Table(
            columns,
            rows,
            caption="Agreement by the strength of the preference",
            note="Difference in ties: mean absolute difference of the ratings.",
        )
    ]
