"""The report of a data set: the HelpSteer2 papers' tables for any ratings and preferences."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.reports.datasets.preference_blocks import agreement_blocks, preference_blocks
from rmjax.reports.datasets.preference_statistics import Pair
from rmjax.reports.datasets.rating_blocks import rating_blocks
from rmjax.reports.datasets.rating_statistics import RatedResponses
from rmjax.reports.datasets.tables import percent_interval
from rmjax.reports.document import Block, Document, Headline
from rmjax.reports.numbers import count, decimal, percent, short

DATA_FORMAT = "rmjax.report.data/1"


def data_document(
    name: str, data: Mapping[str, Any], ratings: RatedResponses | None, pairs: Sequence[Pair] | None
) -> Document:
    """The whole report.

    Args:
      name: of the data.
      data: the contents of `report.json`; `ratings`, `preferences` and `agreement` may be None.
      ratings: what `ratings` was measured on.
      pairs: what `preferences` was measured on.
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
        blocks += rating_blocks(measured, ratings)
    if preferred and pairs:
        contents.append(f"{count(preferred['pairs'])} preference pairs")
        facts.append(("preferences", preferred["source"]))
        blocks += preference_blocks(preferred, pairs)
    if agreement:
        blocks += agreement_blocks(agreement)
    facts += [("split", data["split"]), ("tokenizer", data["tokenizer"] or "none")]
    facts += [("note", note) for note in data["notes"]]
    title = f"Data: {name}"
    return Document(title, f"{' and '.join(contents)}.", tuple(facts), tuple(blocks))


def _headline(
    measured: Mapping[str, Any] | None, preferred: Mapping[str, Any] | None
) -> tuple[tuple[str, str, str], ...]:
    items = []
    if measured:
        items.append(("Responses", count(measured["responses"]), "rated"))
        items.append(("Prompts", count(measured["prompts"]), _multi_turn(measured["turns"])))
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
        shown = f"95 %: {percent_interval(longer)}"
        items.append(("Longer one chosen", percent(longer["share"]), shown))
    return tuple(items)


def _multi_turn(turns: Mapping[str, int]) -> str:
    whole = sum(turns.values())
    return f"{percent(1 - turns.get('1', 0) / whole)} of the samples have several turns"
