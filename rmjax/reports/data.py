"""The report of a data set: the tables of the HelpSteer2 papers for any ratings and preferences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.reports import plots
from rmjax.reports.document import (
    Block,
    Collapsible,
    Document,
    Facts,
    Figure,
    Heading,
    Headline,
    Table,
    Warning,
)
from rmjax.reports.lengths import response_characters
from rmjax.reports.numbers import DASH, count, decimal, minus, percent, short
from rmjax.reports.preferences import Pair
from rmjax.reports.ratings import LENGTH, Ratings

FORMAT = "rmjax.report.data/1"
_BOXES = 10  # different ratings up to which each gets a box
_ROWS = 8  # of a tally that is not collapsed
_LENGTHS = {
    "prompt_characters": "prompt, characters",
    "response_characters": "response, characters",
    "chosen_characters": "chosen response, characters",
    "rejected_characters": "rejected response, characters",
    "response_tokens": "response, tokens",
    "chosen_tokens": "chosen response, tokens",
    "rejected_tokens": "rejected response, tokens",
    "sample_tokens": "templated conversation, tokens",
}


def data_document(
    name: str,
    data: Mapping[str, Any],
    ratings: Ratings | None,
    pairs: Sequence[Pair] | None,
) -> Document:
    """What is shown of a data set.

    Args:
      name: of the data.
      data: `report.json`'s: `ratings`, `preferences` and `agreement`, each of which may be None.
      ratings: what the first was measured on.
      pairs: the second.
    """
    measured, preferred, agreement = (data[k] for k in ("ratings", "preferences", "agreement"))
    blocks: list[Block] = [Headline(_headline(measured, preferred))]
    contents, facts = [], []
    if measured and ratings:
        contents.append(
            f"{count(measured['responses'])} rated responses to {count(measured['prompts'])} "
            "prompts"
        )
        facts.append(("ratings", measured["source"]))
        facts.append(("attributes", ", ".join(ratings.attributes)))
        blocks += _ratings(measured, ratings)
    if preferred and pairs:
        contents.append(f"{count(preferred['pairs'])} preference pairs")
        facts.append(("preferences", preferred["source"]))
        blocks += _preferences(preferred, pairs)
    if agreement:
        blocks += _agreement(agreement)
    facts += [("split", data["split"]), ("tokenizer", data["tokenizer"] or "none")]
    title = f"Data: {name}"
    return Document(title, f"{' and '.join(contents)}.", tuple(facts), tuple(blocks))


def _headline(
    measured: Mapping[str, Any] | None, preferred: Mapping[str, Any] | None
) -> tuple[tuple[str, str, str], ...]:
    items = []
    if measured:
        items.append(("Responses", count(measured["responses"]), "rated"))
        items.append(("Prompts", count(measured["prompts"]), _several(measured["turns"])))
        name, first = next(iter(measured["attributes"].items()))
        items.append(
            (
                f"Mean {name}",
                decimal(first["mean"], 2),
                f"standard deviation {decimal(first['sd'], 2)}",
            )
        )
        length = measured["lengths"]["response_characters"]
        items.append(("Response length", short(round(length["mean"])), "characters, mean"))
    if preferred:
        ties = preferred["ties"]
        items.append(("Pairs", count(preferred["pairs"]), f"{count(ties)} ties"))
        longer = preferred["longer_chosen"]["all"]
        shown = f"95 %: {_percents(longer)}"
        items.append(("Longer one chosen", percent(longer["share"]), shown))
    return tuple(items)


def _several(turns: Mapping[str, int]) -> str:
    whole = sum(turns.values())
    return f"{percent(1 - turns.get('1', 0) / whole)} of the samples with several turns"


def _percents(found: Mapping[str, float]) -> str:
    if not math.isfinite(found["low"]):
        return DASH
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"


# ---- ratings ------------------------------------------------------------------------------------


def _ratings(measured: Mapping[str, Any], ratings: Ratings) -> list[Block]:
    rows = tuple(
        (
            name,
            count(row["ratings"]),
            percent(row["missing"] / measured["responses"]),
            decimal(row["mean"], 2),
            decimal(row["sd"], 2),
            *(short(row[field]) for field in ("min", "median", "max")),
        )
        for name, row in measured["attributes"].items()
    )
    columns = ("attribute", "ratings", "missing", "mean", "sd", "least", "median", "most")
    blocks: list[Block] = [
        Heading("Ratings"),
        *_empty_warnings(measured),
        Table(columns, rows, caption="Ratings of each attribute", note="sd: standard deviation."),
        *_histograms(measured),
        Heading("Correlations"),
        *_correlations(measured, ratings),
        Heading("Responses to one prompt"),
        _sibling_table(measured),
        _tally("responses to the prompt", "prompts", measured["responses_per_prompt"]),
        Heading("Lengths"),
        _length_table(measured["lengths"]),
        _tally("messages before the response", "samples", measured["turns"]),
        *_length_figures(measured, ratings),
    ]
    return blocks


def _empty_warnings(measured: Mapping[str, Any]) -> list[Block]:
    found = []
    for name, row in measured["attributes"].items():
        if not row["ratings"]:
            found.append(Warning(f"{name} has no rating at all."))
        elif not row["sd"]:
            found.append(Warning(f"Every rating of {name} is {short(row['mean'])}."))
    return found


def _histograms(measured: Mapping[str, Any]) -> list[Block]:
    figures: list[Block] = []
    for i, (name, row) in enumerate(measured["attributes"].items()):
        found, whole = row["histogram"], row["ratings"]
        shares = [number / whole for number in found["counts"]]
        if found["values"] is not None:
            labels = [short(value, 3) for value in found["values"]]
        else:
            middles = np.convolve(found["edges"], (0.5, 0.5), "valid")
            labels = [short(value, 3) for value in middles.tolist()]
        words = ", ".join(f"{label}: {percent(s)}" for label, s in zip(labels, shares))
        caption = f"{name}, mean {decimal(row['mean'], 2)}."
        drawing = plots.columns(labels, {name: shares}, name)
        figures.append(Figure(drawing, f"ratings-{i}", f"{caption} {words}.", caption))
    return figures


def _correlations(measured: Mapping[str, Any], ratings: Ratings) -> list[Block]:
    names, matrix = measured["correlation"]["names"], measured["correlation"]["pearson"]
    rows = tuple(
        (name, *(decimal(float(value), 3) for value in row)) for name, row in zip(names, matrix)
    )
    note = f"{LENGTH}: in characters. Each number is over the responses that have both."
    table = Table(("", *names), rows, caption="Pearson correlations", note=note)
    caption = "Pearson correlations: blue is positive, orange negative."
    figure = Figure(plots.correlation_matrix(names, matrix), "correlations", caption, caption)
    with_tokens = ratings.tokens is not None
    columns = ["attribute", "Pearson, characters", "Spearman, characters"]
    fields = ["pearson_characters", "spearman_characters"]
    if with_tokens:
        columns += ["Pearson, tokens", "Spearman, tokens"]
        fields += ["pearson_tokens", "spearman_tokens"]
    lengths = tuple(
        (name, *(decimal(row[field]) for field in fields))
        for name, row in measured["length_correlation"].items()
    )
    return [
        table,
        Table(tuple(columns), lengths, caption="Correlation with the response's length"),
        figure,
        *_length_bars(measured),
    ]


def _length_bars(measured: Mapping[str, Any]) -> list[Block]:
    names = list(measured["length_correlation"])
    values = [row["spearman_characters"] for row in measured["length_correlation"].values()]
    words = ", ".join(f"{name} {decimal(value, 2)}" for name, value in zip(names, values))
    caption = "Spearman correlation of each rating with the response's length."
    drawing = plots.bars(names, values, "Spearman correlation with length")
    return [Figure(drawing, "length-correlations", f"{caption} {words}.", caption)]


def _sibling_table(measured: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            name,
            count(row["prompts"]),
            count(row["pairs"]),
            percent(row["equal"]),
            decimal(row["mean_difference"]),
            percent(row["within"]),
        )
        for name, row in measured["siblings"].items()
    )
    return Table(
        ("attribute", "prompts", "pairs", "rated equally", "mean difference", "variance within"),
        rows,
        caption="How much the ratings of responses to one prompt differ",
        note="Of prompts with two ratings or more, and of every two responses to one of them. "
        "Variance within: the share of the ratings' variance that is not between prompts.",
    )


def _tally(what: str, whats: str, found: Mapping[str, int]) -> Block:
    whole = sum(found.values())
    rows = tuple((name, count(n), percent(n / whole)) for name, n in found.items())
    if len(rows) == 1:
        return Facts(((what, f"{rows[0][0]}, of all {rows[0][1]} {whats}"),))
    table = Table((what, whats, "share"), rows)
    if len(rows) <= _ROWS:
        return table
    return Collapsible(f"{whats.capitalize()} by {what}: {rows[0][0]} to {rows[-1][0]}", (table,))


def _length_table(lengths: Mapping[str, Mapping[str, float]]) -> Table:
    fields = ("mean", "sd", "min", "p5", "median", "p95", "max")
    rows = tuple(
        (
            _LENGTHS[name],
            *(short(round(row[f]) if math.isfinite(row[f]) else row[f]) for f in fields),
        )
        for name, row in lengths.items()
    )
    columns = ("", "mean", "sd", "least", "5 %", "median", "95 %", "most")
    return Table(columns, rows, caption="Lengths", note="5 % and 95 % are percentiles.")


def _length_figures(measured: Mapping[str, Any], ratings: Ratings) -> list[Block]:
    length = measured["lengths"]["response_characters"]
    caption = (
        f"Length of the responses: median {short(length['median'])}, 95 % of them below "
        f"{short(round(length['p95']))} characters."
    )
    drawing = plots.histograms({"responses": ratings.characters}, "characters")
    blocks: list[Block] = [Figure(drawing, "response-length", caption, caption)]
    name, column = ratings.attributes[0], ratings.labels[:, 0]
    values = np.unique(column[~np.isnan(column)])
    if 2 <= len(values) <= _BOXES:
        groups = {short(value): ratings.characters[column == value] for value in values.tolist()}
        caption = (
            f"Length of the responses by their {name}: quartiles and median, whiskers from the "
            "5th to the 95th percentile."
        )
        blocks.append(
            Figure(plots.boxes(groups, "characters"), "length-by-rating", caption, caption)
        )
    return blocks


# ---- preferences --------------------------------------------------------------------------------


def _preferences(preferred: Mapping[str, Any], pairs: Sequence[Pair]) -> list[Block]:
    position = preferred["position"]
    strengths = preferred["strengths"]
    shares = {name: number / preferred["pairs"] for name, number in strengths.items()}
    rows = tuple((minus(name), count(n), percent(shares[name])) for name, n in strengths.items())
    note = (
        "Negative: response 1 is better; positive: response 2 is."
        if position
        else "How much better the chosen response is; unknown where nobody said."
    )
    blocks: list[Block] = [Heading("Preferences"), *_pair_warnings(preferred)]
    if len(strengths) > 1 or "unknown" not in strengths:
        caption = "Strength of the preferences"
        blocks.append(Table(("strength", "pairs", "share"), rows, caption=caption, note=note))
    blocks.append(_longer_table(preferred))
    if position:
        blocks.append(_position_table(position))
    blocks += [
        _length_table(preferred["lengths"]),
        _tally("messages before the response", "pairs", preferred["turns"]),
        *_pair_figures(shares, preferred, pairs),
    ]
    return blocks


def _pair_warnings(preferred: Mapping[str, Any]) -> list[Block]:
    repeats = preferred["repeats"]
    texts = {
        "contradictions": "{} pairs stand there twice or more, with opposite preferences.",
        "repeated": "{} rows repeat an earlier pair of responses to the same prompt.",
        "identical": "{} rows have the same text as both responses.",
    }
    return [Warning(text.format(count(repeats[k]))) for k, text in texts.items() if repeats[k]]


def _longer_table(preferred: Mapping[str, Any]) -> Table:
    found = preferred["longer_chosen"]
    rows = [(f"strength {name}", row) for name, row in found["by_strength"].items()]
    return Table(
        ("pairs", "with different lengths", "longer one chosen", "95 % interval"),
        tuple(
            (name, count(int(row["pairs"])), percent(row["share"]), _percents(row))
            for name, row in [*rows, ("all", found["all"])]
        ),
        caption="How often the longer response is the chosen one",
        note="In characters, without ties. 50 % would be no preference for length.",
        strong=(len(rows),),
    )


def _position_table(position: Mapping[str, float]) -> Table:
    row = (count(int(position["pairs"])), percent(position["share"]), _percents(position))
    return Table(
        ("", "pairs", "response 2 chosen", "95 % interval"),
        (("all", *row),),
        caption="Whether the place of a response matters",
        note="Without ties. 50 % would be no preference for a place.",
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
    found = preferred["longer_chosen"]
    rows = found["by_strength"]
    if len(rows) > 1:
        values = list(rows.values())
        drawing = plots.bars(
            [f"strength {name}" for name in rows],
            [row["share"] for row in values],
            "longer one chosen",
            [row["low"] for row in values],
            [row["high"] for row in values],
            chance=0.5,
        )
        caption = "Share of pairs whose longer response is the chosen one, with 95 % intervals."
        figures.append(Figure(drawing, "longer-chosen", caption, caption))
    return figures


# ---- agreement ----------------------------------------------------------------------------------


def _agreement(agreement: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("Preferences against ratings")]
    matched, pairs = agreement["matched"], agreement["pairs"]
    if not matched:
        blocks.append(Warning("No pair has both its responses among the rated ones."))
        return blocks
    found = agreement["attributes"]
    rows = tuple(
        (
            name,
            *(count(int(row[field])) for field in ("agree", "equal", "opposite")),
            percent(row["agreement"]),
            _percents(row),
            decimal(row["mean_difference"], 2),
        )
        for name, row in found.items()
    )
    blocks.append(
        Table(
            (
                "attribute",
                "chosen rated higher",
                "equally",
                "lower",
                "agreement",
                "95 % interval",
                "mean difference",
            ),
            rows,
            caption="Whether the preferred response has the higher rating",
            note=f"{count(matched)} of {count(pairs)} pairs have both responses among the rated "
            "ones; ties are left out. Agreement: of those with different ratings. Difference: "
            "chosen minus rejected.",
        )
    )
    strengths = list(dict.fromkeys(s for row in found.values() for s in row["by_strength"]))
    if len(strengths) > 1:
        blocks += _agreement_by_strength(found, strengths)
    names, values = list(found), list(found.values())
    drawing = plots.bars(
        names,
        [row["agreement"] for row in values],
        "agreement with the preference",
        [row["low"] for row in values],
        [row["high"] for row in values],
        chance=0.5,
    )
    words = ", ".join(f"{name} {percent(row['agreement'])}" for name, row in found.items())
    caption = "Agreement of each rating with the preference, with 95 % intervals."
    blocks.append(Figure(drawing, "agreement", f"{caption} {words}.", caption))
    if len(strengths) > 1:
        curves = [
            plots.Curve(
                name,
                [float(s) for s in strengths],
                [row["by_strength"].get(s, {}).get("mean_difference", math.nan) for s in strengths],
            )
            for name, row in found.items()
        ]
        caption = "Rating of the chosen response minus that of the rejected one, by strength."
        drawing = plots.curves(curves, "strength", "mean difference")
        blocks.append(Figure(drawing, "agreement-strength", caption, caption))
    return blocks


def _agreement_by_strength(
    found: Mapping[str, Mapping[str, Any]], strengths: Sequence[str]
) -> list[Block]:
    rows = tuple(
        (
            name,
            *(percent(row["by_strength"].get(s, {}).get("agreement", math.nan)) for s in strengths),
            decimal(row["ties"]["mean_difference"], 2),
        )
        for name, row in found.items()
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
