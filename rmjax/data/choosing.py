"""Training data made of scored responses: the best of n, best and worst, or all with their ratings.

Each way is a function from a row's scored responses to what is written for it, or a reason why
nothing is; `WAYS` has them by name.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rmjax.data.conversation import Conversation
from rmjax.data.fields import is_number
from rmjax.data.layouts import find_layout
from rmjax.data.messages import Message
from rmjax.data.readers import Row, Source
from rmjax.data.records import EMPTY, EQUAL, TIE
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError, shortened

WITHOUT = "responses without a score"
NO_SCORE, TOO_CLOSE = "no response with a score", "the best and the worst are too close"
NO_RATINGS = "a response without ratings ('attributes')"
UNENDED = "responses that did not end"
_LARGEST = 1e300  # of a score: differences of two are finite
_RATINGS_TURN = "Answer with these ratings: "


@dataclasses.dataclass(frozen=True)
class Scored:
    """A response and its scores.

    Attributes:
      conversation: that ends with it.
      value: its score.
      attributes: its scores by name.
    """

    conversation: Conversation
    value: float
    attributes: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How responses are chosen.

    Attributes:
      way: one of `WAYS`.
      first: how many of a row's responses count, from its first; 0 for all.
      unended: whether responses that did not end count.
      apart: how far the best and the worst must be apart, at least.
      ratings: the lowest and the highest rating that is written into a conversation.
    """

    way: str
    first: int = 0
    unended: bool = False
    apart: float = 0.0
    ratings: tuple[int, int] = (0, 4)


Rows = list[dict[str, Any]]


def best(scored: Sequence[Scored], choice: Choice) -> Rows | str:
    """The response with the highest value (the first of equal ones), as `messages`."""
    found = max(scored, key=lambda s: s.value)
    return [_messages(found.conversation) | {"score": found.value, **_named(found)}]


def best_and_worst(scored: Sequence[Scored], choice: Choice) -> Rows | str:
    """`chosen` and `rejected` with the difference of their values as `margin`."""
    top, bottom = max(scored, key=lambda s: s.value), min(scored, key=lambda s: s.value)
    margin = top.value - bottom.value
    if margin == 0:
        return TIE
    if top.conversation == bottom.conversation:
        return EQUAL
    if margin < choice.apart:
        return TOO_CLOSE
    sides = {"chosen": top.conversation.messages, "rejected": bottom.conversation.messages}
    return [sides | {"margin": margin} | _tools(top.conversation)]


def steered(scored: Sequence[Scored], choice: Choice) -> Rows | str:
    """Every response as `messages` whose system turn says its ratings (SteerLM, 2310.05344)."""
    low, high = choice.ratings
    rows = []
    for response in scored:
        if not response.attributes:
            return NO_RATINGS
        ratings = {k: min(high, max(low, round(v))) for k, v in response.attributes.items()}
        told = Conversation(
            with_ratings(response.conversation.messages, ratings), response.conversation.tools
        )
        rows.append(_messages(told) | {"score": response.value, **_named(response)})
    return rows


WAYS: dict[str, Callable[[Sequence[Scored], Choice], Rows | str]] = {
    "best-of": best,
    "pairs": best_and_worst,
    "steerlm": steered,
}


def with_ratings(messages: Sequence[Message], ratings: Mapping[str, int]) -> list[Message]:
    """Messages whose system turn ends with the ratings that the answer has, or shall have."""
    line = _RATINGS_TURN + ", ".join(f"{name} {rating}" for name, rating in ratings.items())
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": line}, *messages]
    return [first | {"content": f"{first['content']}\n\n{line}"}, *rest]


def choose(source: Source, choice: Choice, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows that are chosen of a source of scored responses.

    Args:
      source: rows with `scores`, as `rmjax.score` writes them.
      choice: what is chosen.
      counts: gets how many rows were read and written, and why others were not.

    Raises:
      UserError: a row is not one of scored responses, with its file.
    """
    reader = RowReader()
    for row in source:
        counts["read"] += 1
        scored = _scored(row, reader, choice, counts)
        found = WAYS[choice.way](scored, choice) if scored else NO_SCORE
        if isinstance(found, str):
            counts[f"dropped: {found}"] += 1
            continue
        for fields in found:
            counts["written"] += 1
            yield fields | ({"id": row.fields["id"]} if "id" in row.fields else {})


def against_given(
    samples: Source, given: Source, counts: Counter[str], unended: bool = False
) -> Iterator[dict[str, Any]]:
    """Pairs of a given response, `chosen`, and a policy's own first one, `rejected`.

    SPIN (arXiv 2401.01335) learns from these.

    Args:
      samples: as `rmjax.sample` writes them for the rows of `given`, in their order.
      given: rows with a response; of a pair the chosen one is meant.
      counts: gets how many rows were read and written, and why others were not.
      unended: whether a response that did not end counts.

    Raises:
      UserError: the two do not fit together, naming the row.
    """
    reader, other = RowReader(), RowReader()
    missing = object()
    for row, answer in itertools.zip_longest(given, samples, fillvalue=missing):
        if not isinstance(row, Row) or not isinstance(answer, Row):
            longer = answer if isinstance(answer, Row) else row
            raise UserError(
                f"{longer.where}: the other file has fewer rows; --given must be the file whose "  # pyright: ignore
                "prompts were sampled"
            )
        counts["read"] += 1
        if reader.prompt(row) != other.prompt(answer):
            raise UserError(
                f"{answer.where}: its prompt is not that of {row.where}; --given must be the file "
                "whose prompts were sampled"
            )
        chosen, own = _given(row, reader), other.responses(answer)
        ended = _column(answer, "ended", len(own))
        if ended and ended[0] is False and not unended:
            counts[f"dropped: {UNENDED}"] += 1
        elif not own or own[0].is_empty or chosen.is_empty:
            counts[f"dropped: {EMPTY}"] += 1
        elif own[0] == chosen:
            counts[f"dropped: {EQUAL}"] += 1
        else:
            counts["written"] += 1
            pair = {"chosen": chosen.messages, "rejected": own[0].messages}
            yield pair | _tools(chosen) | ({"id": row.fields["id"]} if "id" in row.fields else {})


def _given(row: Row, reader: RowReader) -> Conversation:
    """The response that a row gives as an example."""
    layout = find_layout(row.fields, row.where)
    if layout.kind == "pairs":
        pairs = reader.pairs(row)
        return pairs[0][0].conversation
    found = reader.responses(row)
    if len(found) != 1:
        raise UserError(
            f"{row.where}: {len(found)} responses, and which is the example is not said; give "
            "rows with one response, or pairs"
        )
    return found[0]


def _scored(row: Row, reader: RowReader, choice: Choice, counts: Counter[str]) -> list[Scored]:
    conversations = reader.responses(row)
    columns = {
        name: _column(row, name, len(conversations)) for name in ("scores", "attributes", "ended")
    }
    if columns["scores"] is None:
        raise UserError(
            f"{row.where}: field 'scores' is missing; `python -m rmjax.score` writes it"
        )
    scored = []
    for number in range(len(conversations))[: choice.first or None]:
        value: Any
        value, named, ended = (c[number] if c else None for c in columns.values())
        if ended not in (None, True, False) or (ended in (0, 1) and not isinstance(ended, bool)):
            raise UserError(f"{row.where}: field 'ended' has {ended!r} in it, expected true, false")
        if ended is False and not choice.unended:
            counts[UNENDED] += 1
        elif value is None:
            counts[WITHOUT] += 1
        else:
            value = _finite(value, row, "scores")
            scored.append(Scored(conversations[number], value, _ratings(named, row)))
    return scored


def _finite(value: Any, row: Row, name: str) -> float:
    if not is_number(value) or not abs(value) <= _LARGEST:
        raise UserError(
            f"{row.where}: field {name!r} has {shortened(repr(value))} in it, expected a number up "
            f"to {_LARGEST:g}"
        )
    return float(value)


def _ratings(named: Any, row: Row) -> dict[str, float]:
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        raise UserError(
            f"{row.where}: field 'attributes' has {named!r} in it, expected numbers by name"
        )
    return {name: _finite(value, row, "attributes") for name, value in named.items()}


def _column(row: Row, name: str, count: int) -> list[Any] | None:
    value = row.fields.get(name)
    if value is not None and (not isinstance(value, list) or len(value) != count):
        raise UserError(
            f"{row.where}: field {name!r} is not a list of {count}, one for each response"
        )
    return value


def _messages(conversation: Conversation) -> dict[str, Any]:
    return {"messages": conversation.messages} | _tools(conversation)


def _tools(conversation: Conversation) -> dict[str, Any]:
    return {"tools": conversation.tools} if conversation.tools else {}


def _named(scored: Scored) -> dict[str, Any]:
    # Not `attributes`, which another model's scores of the chosen response will be.
    return {"attribute_scores": dict(scored.attributes)} if scored.attributes else {}
