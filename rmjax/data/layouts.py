"""The layouts of rows that are read, by their fields. docs/data.md shows a row of each."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from rmjax.errors import UserError

Kind = Literal["ratings", "pairs", "ranking"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One row of the table.

    Attributes:
      kind: whether a row is a response with ratings, a pair of which one is preferred, or a list of
        responses, best first.
      prompt: the field of the prompt; empty if responses are whole conversations.
      responses: the fields of the responses; of a pair the preferred one first, of a ranking the
        list.
      whole: whether responses are whole conversations in a row whose prompt is missing.
      preference: the field of a number that decides instead of the order of `responses`: negative
        where the first one is better, positive where the second one is, 0 in a tie.
      scores: of a ranking, the field of a list of numbers that a row may have: higher is better.
      element: of a ranking, the fields of an element that hold its response and its rank, lower is
        better; empty if elements are responses.
    """

    kind: Kind
    prompt: str
    responses: tuple[str, ...]
    whole: bool = False
    preference: str = ""
    scores: str = ""
    element: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that a row of this layout has."""
        prompt = [] if self.whole else [self.prompt]
        return tuple(filter(None, [*prompt, *self.responses, self.preference]))

    @property
    def fields(self) -> set[str]:
        """All fields that a row of this layout may have."""
        return {*self.required, *filter(None, [self.prompt, self.scores])}

    @functools.cached_property
    def needed(self) -> frozenset[str]:
        """Those of `required`; every row is asked for those of every layout."""
        return frozenset(self.required)


_CHOSEN = ("chosen", "rejected")
# The first that fits is taken.
LAYOUTS = (
    # HelpSteer2
    Layout("ratings", "prompt", ("response",)),
    Layout("ratings", "prompt", ("completion",)),  # TRL
    # HelpSteer2-Preference
    Layout("pairs", "prompt", ("response_1", "response_2"), preference="preference_strength"),
    # HelpSteer3-Preference
    Layout("pairs", "context", ("response1", "response2"), preference="overall_preference"),
    # UltraFeedback-binarized, Skywork-Reward-Preference, hh-rlhf, TRL
    Layout("pairs", "prompt", _CHOSEN),
    Layout("pairs", "context", _CHOSEN),
    Layout("pairs", "conversations", _CHOSEN),  # ShareGPT, as LLaMA-Factory writes pairs
    Layout("pairs", "prompt", _CHOSEN, whole=True),
    Layout("ranking", "prompt", ("responses",), scores="scores"),
    Layout("ranking", "prompt", ("answers",), element=("answer", "rank")),  # Nectar
    Layout("ranking", "context", ("completions",), element=("completion", "rank")),  # NeMo-RL
    # Whole conversations with ratings: last, since rows of pairs may have them as well.
    Layout("ratings", "", ("messages",)),
    Layout("ratings", "", ("conversations",)),
)

SAMPLED_TOKENS = "token_ids"  # of each response, where a row has them as `rmjax.sample` wrote them
PROMPTS = ("prompt", "context")  # fields that hold a prompt, whatever else is in the row
# What a row says of responses of its own: of other ones it would be wrong.
RESPONSES = frozenset(name for layout in LAYOUTS for name in layout.fields - {layout.prompt})


def find_prompt(row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], bool]:
    """Where a row has its prompt: a field of its own, or whole conversations.

    Args:
      row: its fields; it need not have a response.
      where: file and row, for messages.

    Returns:
      The field of the prompt, or of a conversation, or the two of a pair of them; and whether they
      are conversations.

    Raises:
      UserError: it has neither.
    """
    filled = {field for field, value in row.items() if value is not None}
    for layout in LAYOUTS:
        if set(layout.required) <= filled:
            if layout.prompt in filled:
                return (layout.prompt,), False
            return layout.responses, True
    for field in PROMPTS:
        if field in filled:
            return (field,), False
    raise UserError(
        f"{where}: there is no prompt in it; the row has {', '.join(sorted(row)) or 'no field'}. "
        f"Expected {' or '.join(PROMPTS)}, messages, conversations, or chosen and rejected"
    )


def is_pairs_alone(row: Mapping[str, Any]) -> bool:
    """Whether a row compares responses, and holds no other one that it could stand for."""
    kinds = {layout.kind for layout in _fitting(row)}
    return bool(kinds) and "ratings" not in kinds


def _fitting(row: Mapping[str, Any]) -> list[Layout]:
    """The layouts that a row has, the first of which is meant."""
    filled = {field for field, value in row.items() if value is not None}
    fitting = []
    for fields in (filled, set(row)):  # tables write null where a row lacks a field
        fitting += [layout for layout in LAYOUTS if layout.needed <= fields]
    return fitting


def find_layout(row: Mapping[str, Any], where: str, *kinds: Kind) -> Layout:
    """The layout of a row.

    Args:
      row: its fields.
      where: file and row, for messages.
      kinds: those that are wanted; any if none is given.

    Raises:
      UserError: it has none of these layouts; the message names the nearest.
    """
    fitting = _fitting(row)
    for layout in fitting:
        if not kinds or layout.kind in kinds:
            return layout
    has = f"the row has {', '.join(sorted(row)) or 'no field'}"
    if fitting:
        raise UserError(
            f"{where}: expected {' or '.join(kinds)}, found {fitting[0].kind} "
            f"({', '.join(fitting[0].required)}); {has}"
        )
    wanted = [layout for layout in LAYOUTS if not kinds or layout.kind in kinds]
    nearest = sorted(wanted, key=lambda layout: len(set(layout.required) - set(row)))[:3]
    missing = next(field for field in nearest[0].required if field not in row)
    described = "; ".join(f"{layout.kind} ({', '.join(layout.required)})" for layout in nearest)
    raise UserError(
        f"{where}: field {missing!r} is missing; {has}. The nearest layouts: {described}"
    )
