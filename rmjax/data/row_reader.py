"""What a row means: a rated response, pairs of which one is preferred, or a prompt."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.conversation import (
    Conversation,
    PromptError,
    parse_conversation,
    parse_question,
    parse_response,
    shared_messages,
)
from rmjax.data.fields import check_fields, number_field
from rmjax.data.layouts import SAMPLED_TOKENS, Layout, find_layout, find_prompt
from rmjax.data.readers import Row
from rmjax.errors import UserError

_STRENGTHS = ("margin", "strength")  # fields
_PLACES = {"response_1": 1, "response_2": 2, "response1": 1, "response2": 2}
_BESIDE = ("system", "tools")  # fields that belong to the conversation of any layout


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response.

    Attributes:
      conversation: that ends with the response that was rated or compared.
      labels: one rating an attribute; NaN where there is none.
      where: file and row, for messages.
      row: its row in the source, from 1.
      strength: how much better the preferred one of its pair is; 0 if neither is, NaN if the data
        do not say.
      place: which response of its pair it was to the annotators, 1 or 2; 0 if the data do not say.
    """

    conversation: Conversation
    labels: tuple[float, ...]
    where: str
    row: int
    strength: float = math.nan
    place: int = 0


Pair = tuple[Sample, Sample]  # the preferred response and the other one


class RowReader:
    """Reads rows, and remembers what it did not use.

    Every reader of rows is made of its methods, in training and in evaluation.

    Attributes:
      used: columns that the caller reads itself.
      skipped: rows that make nothing, by reason.
    """

    def __init__(self, used: Collection[str] = ()):
        """Starts with nothing seen."""
        self.used = {*used, *_BESIDE}
        self.skipped: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._marked: list[str] = []

    def conversation(
        self, fields: Mapping[str, Any], field: str, where: str, prompt: str = "", *part: Any
    ) -> Conversation:
        """The conversation of a response.

        Args:
          fields: of the row.
          field: that holds the response.
          where: file and row, for messages.
          prompt: the field of the prompt; empty if the response is the whole conversation.
          part: the response, if it is only a part of the field.

        Raises:
          UserError: naming file, row and field.
        """
        (value,) = part or (fields[field],)
        beside = map(fields.get, _BESIDE)
        try:
            # Tables write null where a row has no prompt.
            if prompt and fields.get(prompt) is not None:
                found = parse_response(fields[prompt], value, *beside)
            else:
                found = parse_conversation(value, *beside)
        except ValueError as error:
            wrong = prompt if isinstance(error, PromptError) else field
            raise UserError(f"{where}: field {wrong!r} {error}") from error
        if found.has_marks:
            self._marked.append(where)
        return found

    def pairs(self, row: Row) -> list[Pair]:
        """The pairs of a row: several if it ranks more than two responses, none if it has one.

        Raises:
          UserError: naming file, row and field.
        """
        layout = find_layout(row.fields, row.where, "pairs", "ranking")
        if layout.kind == "ranking":
            self.see(row.fields, layout.fields)
            return self._ranking(layout, row)
        fields = layout.responses
        if layout.preference:
            self.see(row.fields, layout.fields)
            signed = number_field(row.fields, layout.preference, row.where)
            fields, strength = fields[:: -1 if signed > 0 else 1], abs(signed)
        else:
            self.see(row.fields, {*layout.fields, *_STRENGTHS})
            strength = _strength(row.fields, row.where)
        chosen, rejected = (
            Sample(
                self.conversation(row.fields, field, row.where, layout.prompt),
                labels=(),
                where=row.where,
                row=row.number,
                strength=strength,
                place=_PLACES.get(field, 0),
            )
            for field in fields
        )
        return [(chosen, rejected)]

    def rated(self, row: Row) -> Conversation:
        """The conversation of a row with ratings.

        Raises:
          UserError: naming file, row and field.
        """
        layout = find_layout(row.fields, row.where, "ratings")
        self.see(row.fields, layout.fields)
        if layout.prompt and row.fields[layout.prompt] is None:
            raise UserError(f"{row.where}: field {layout.prompt!r} is null, expected a prompt")
        return self.conversation(row.fields, layout.responses[0], row.where, layout.prompt)

    def responses(self, row: Row) -> list[Conversation]:
        """The conversations of all responses of a row, in the order in which it has them.

        Raises:
          UserError: naming file, row and field.
        """
        layout = find_layout(row.fields, row.where)
        self.see(row.fields, layout.fields)
        if layout.kind == "ranking":
            return self._listed(layout, row)
        fields = layout.responses
        return [self.conversation(row.fields, f, row.where, layout.prompt) for f in fields]

    def prompt(self, row: Row) -> Conversation:
        """The prompt of a row, as a conversation that lacks its response.

        Of a whole conversation it is all before an answer at its end; of a pair of them what both
        begin with. A row needs no response.

        Raises:
          UserError: naming file, row and field.
        """
        names, whole = find_prompt(row.fields, row.where)
        self.see(row.fields, names)
        field, *other = names
        if other:
            pair = [self.conversation(row.fields, name, row.where) for name in names]
            found = pair[0].begun(shared_messages(pair))
            roles = [message["role"] for message in found.messages]
            if "user" not in roles or roles[-1] == "assistant" or found.tools != pair[1].tools:
                raise UserError(
                    f"{row.where}: fields {' and '.join(map(repr, names))} do not begin with the "
                    "same prompt; give it as 'prompt'"
                )
            return found
        beside = map(row.fields.get, _BESIDE)
        try:
            found = parse_question(row.fields[field], *beside, whole=whole)
        except ValueError as error:
            raise UserError(f"{row.where}: field {field!r} {error}") from error
        if found.has_marks:
            self._marked.append(row.where)
        return found

    def see(self, fields: Iterable[str], used: Collection[str]) -> None:
        """Remembers which fields of a row are not among `used`."""
        self._unused.update(field for field in fields if field not in used)

    def notes(self) -> tuple[str, ...]:
        """What was not used, and what may have been misread, in words."""
        unused = sorted(set(self._unused) - self.used)
        notes = [f"columns that are not used: {', '.join(unused)}"] if unused else []
        if self._marked:
            notes.append(
                "marks of turns such as '\\n\\nHuman:' are read as text inside a turn of "
                f"{len(self._marked):,} conversations; the first: {Path(self._marked[0]).name}"
            )
        return tuple(notes)

    def _listed(self, layout: Layout, row: Row) -> list[Conversation]:
        """The conversations of a list of responses."""
        (field,) = layout.responses
        values = row.fields[field]
        if not isinstance(values, list):
            raise UserError(f"{row.where}: field {field!r} is {type(values).__name__}, not a list")
        conversations = []
        for number, value in enumerate(values, start=1):
            where = f"{row.where}, {field} {number}"
            if layout.element:
                check_fields(value if isinstance(value, dict) else {}, layout.element, where)
                self.see((f"{field}: {name}" for name in value if name not in layout.element), ())
                value = value[layout.element[0]]
            conversations.append(self.conversation(row.fields, field, where, layout.prompt, value))
        return conversations

    def _ranking(self, layout: Layout, row: Row) -> list[Pair]:
        """All pairs of a ranked list: each response with every one that is worse."""
        (field,) = layout.responses
        found = self._listed(layout, row)
        if len(found) < 2:
            self.skipped["fewer than two responses"] += 1
        ranks = _ranks(layout, row, found)
        scored = row.fields.get(layout.scores) is not None
        pairs = []
        for one, two in itertools.combinations(range(len(found)), 2):
            better, worse = (one, two) if ranks[one] <= ranks[two] else (two, one)
            apart = 0.0 if ranks[better] == ranks[worse] else ranks[worse] - ranks[better]
            # Ranks say which is better, or neither, but not how much.
            strength = apart if scored or not apart else math.nan
            where = f"{row.where}, {field} {better + 1} and {worse + 1}"
            chosen, rejected = (
                Sample(found[i], (), where, row.number, strength) for i in (better, worse)
            )
            pairs.append((chosen, rejected))
        return pairs


def _ranks(layout: Layout, row: Row, responses: Sequence[Conversation]) -> list[float]:
    """A number of each response of a ranked list: the lowest is the best."""
    (field,) = layout.responses
    if layout.element:
        values = enumerate(row.fields[field], start=1)
        return [number_field(v, layout.element[1], f"{row.where}, {field} {n}") for n, v in values]
    scores = row.fields.get(layout.scores)
    if scores is None and SAMPLED_TOKENS in row.fields:
        raise UserError(
            f"{row.where}: its responses are samples (there is a field {SAMPLED_TOKENS!r}) and "
            f"have no {layout.scores!r}, so nothing says which is better; `python -m rmjax.score` "
            "writes them"
        )
    if scores is None:
        return [float(number) for number in range(len(responses))]
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise UserError(
            f"{row.where}: field {layout.scores!r} is not a list of {len(responses)} numbers, one "
            "for each response"
        )
    return [
        math.inf  # nobody scores an empty response
        if score is None and response.is_empty
        else -number_field({layout.scores: score}, layout.scores, row.where)
        for score, response in zip(scores, responses)
    ]


def _strength(row: Mapping[str, Any], where: str) -> float:
    """How much better a row says its chosen response is; NaN if it does not say."""
    found = {
        field: number_field(row, field, where) for field in _STRENGTHS if row.get(field) is not None
    }
    if len(set(found.values())) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, found))} differ; keep the one to use")
    for field, strength in found.items():
        if strength < 0:
            raise UserError(
                f"{where}: field {field!r} is {strength:g}: it says that 'rejected' is better; "
                "expected 0 or more"
            )
        return strength
    return math.nan
