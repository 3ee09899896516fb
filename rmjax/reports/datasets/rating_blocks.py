"""The sections about ratings."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmjax.reports import plots
from rmjax.reports.datasets.rating_statistics import RESPONSE_LENGTH, RatedResponses
from rmjax.reports.datasets.tables import counts_block, length_table
from rmjax.reports.document import Block, Figure, Heading, Table, Warning
from rmjax.reports.numbers import count, decimal, percent, short

_BOXES = 10  # up to so many different ratings, each gets a box


def rating_blocks(measured: Mapping[str, Any], ratings: RatedResponses) -> list[Block]:
    """Shows the statistics of `measure_ratings`."""
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
        counts_block("responses to the prompt", "prompts", measured["responses_per_prompt"]),
        Heading("Lengths"),
        length_table(measured["lengths"]),
        counts_block("messages before the response", "samples", measured["turns"]),
        *_length_figures(measured, ratings),
    ]
    return blocks


def _empty_warnings(measured: Mapping[str, Any]) -> list[Block]:
    warnings: list[Block] = []
    for name, row in measured["attributes"].items():
        if not row["ratings"]:
            warnings.append(Warning(f"{name} has no rating at all."))
        elif not row["sd"]:
            warnings.append(Warning(f"Every rating of {name} is {short(row['mean'])}."))
    return warnings


def _histograms(measured: Mapping[str, Any]) -> list[Block]:
    figures: list[Block] = []
    for i, (name, row) in enumerate(measured["attributes"].items()):
        histogram, whole = row["histogram"], row["ratings"]
        shares = [number / whole for number in histogram["counts"]]
        if histogram["values"] is not None:
            labels = [short(value, 3) for value in histogram["values"]]
        else:
            middles = np.convolve(histogram["edges"], (0.5, 0.5), "valid")
            labels = [short(value, 3) for value in middles.tolist()]
        words = ", ".join(f"{label}: {percent(s)}" for label, s in zip(labels, shares))
        caption = f"{name}, mean {decimal(row['mean'], 2)}."
        drawing = plots.columns(labels, {name: shares}, name)
        figures.append(Figure(drawing, f"ratings-{i}", f"{caption} {words}.", caption))
    return figures


def _correlations(measured: Mapping[str, Any], ratings: RatedResponses) -> list[Block]:
    names, matrix = measured["correlation"]["names"], measured["correlation"]["pearson"]
    rows = tuple((name, *map(decimal, row)) for name, row in zip(names, matrix))
    note = f"{RESPONSE_LENGTH}: in characters. Each number is over the responses that have both."
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
        note="Over prompts with two ratings or more, and every two of their responses. Variance "
        "within: the share of the ratings' variance that is within prompts, not between them.",
    )


def _length_figures(measured: Mapping[str, Any], ratings: RatedResponses) -> list[Block]:
    length = measured["lengths"]["response_characters"]
    caption = (
        f"Length of the responses: median {short(length['median'])}, 95 % of them below "
        f"{decimal(length['p95'], 0)} characters."
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
