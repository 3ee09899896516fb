"""What a row of a data source means: a rated response, or a pair of which one is preferred."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.conversation import parse_prompt, parse_response
from rmjax.data.readers import GENERATED, SPLITS, read_rows
from rmjax.data.tokenizer import Message
from rmjax.errors import UserError

_STRENGTHS = ("margin", "strength")  # fields
_PLACES = {"response_1": 1, "response_2": 2}
_MASKED = -100  # what NeMo's files put where a label is missing


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response.

    Attributes:
      prompt: the conversation up to the response.
      response: the text that was rated or compared.
      labels: one rating an attribute; NaN where there is none.
      where: file and row, for messages.
      row: its row in the source, from 1.
      strength: how much better the preferred one of its pair is; 0 if neither is, NaN if the data
        do not say.
      place: which response of its pair it was to the annotators, 1 or 2; 0 if the data do not say.
    """

    prompt: list[Message]
    response: str
    labels: tuple[float, ...]
    where: str
    row: int
    strength: float = math.nan
    place: int = 0


def read_samples(
    source: str,
    split: str,
    attributes: Sequence[str],
    label_range: tuple[float, float],
    unrated: str = "",
) -> list[Sample]:
    """All rated responses of a source, checked.

    Args:
      source: see `read_rows`.
      split: `train` or `validation`.
      attributes: the columns that hold the ratings.
      label_range: the lowest and highest rating there may be.
      unrated: one of the attributes, whose column may be missing.

    Raises:
      UserError: naming file, row and field.
    """
    samples = []
    name, rows = read_rows(source, split)
    for number, row in enumerate(rows, start=1):
        if unrated:
            row.setdefault(unrated, None)
        samples.append(
            _rated_response(row, attributes, label_range, f"{name} row {number}", number)
        )
    if not samples:
        raise UserError(f"{name}: there is no row in it")
    return samples


def read_pairs(source: str, split: str) -> list[tuple[Sample, Sample]]:
    """All preference pairs of a source, checked: the preferred response and the other one.

    A row has one of three forms:
    - `prompt`, `response_1`, `response_2` and `preference_strength`, as HelpSteer2-Preference:
      negative where the first response is better, positive where the second is, 0 in a tie. Rows
      whose field `split` names another split are left to that one.
    - `prompt`, `chosen` and `rejected`.
    - `chosen` and `rejected` alone, each a whole conversation that ends with the response.
    The last two may have a `margin` or a `strength`, 0 or more. A conversation is a list of
    messages, or a text with `\\n\\nHuman: ` and `\\n\\nAssistant: ` before its turns. A response
    may be empty.

    Args:
      source: see `read_rows`; not a generated one.
      split: `train` or `validation`.

    Raises:
      UserError: naming file, row and field.
    """
    if source.startswith(GENERATED):
        raise UserError(
            f"{source}: there are generated ratings only, no pairs; config.data.compare = "
            "'helpfulness' makes pairs of them"
        )
    name, rows = read_rows(source, split)
    pairs = [
        pair_of_row(row, f"{name} row {number}", number, split)
        for number, row in enumerate(rows, start=1)
    ]
    pairs = [pair for pair in pairs if pair is not None]
    if not pairs:
        raise UserError(f"{name}: there is no row of the split {split!r} in it")
    return pairs


def pairs_of_ratings(samples: Sequence[Sample], attribute: str) -> list[tuple[Sample, Sample]]:
    """Every two responses to one prompt, the one with the higher rating first.

    Their strength is the difference of the ratings. Responses without the rating make none.

    Args:
      samples: with this rating alone.
      attribute: its name, for messages.

    Raises:
      UserError: there is no pair.
    """
    prompts: dict[str, list[Sample]] = {}
    for sample in samples:
        if not math.isnan(sample.labels[0]):
            prompts.setdefault(json.dumps(sample.prompt, sort_keys=True), []).append(sample)
    pairs = []
    for responses in prompts.values():
        for first, second in itertools.combinations(responses, 2):
            better = max(first, second, key=lambda sample: sample.labels[0])
            other = second if better is first else first
            strength = better.labels[0] - other.labels[0]
            pairs.append(tuple(dataclasses.replace(s, strength=strength) for s in (better, other)))
    if not pairs:
        raise UserError(
            f"{samples[0].where.rsplit(' row ', 1)[0]}: no prompt has two responses with a rating "
            f"of {attribute!r} to compare"
        )
    return pairs


def describe(source: str, split: str) -> tuple[str, tuple[str, ...]]:
    """What a source holds, and the columns that may be ratings.

    Returns:
      `pairs` or `ratings`, by the first row's fields, and of ratings the columns in which every
      row has a number or nothing, and some row a number.

    Raises:
      UserError: the rows are neither; or a file is broken.
    """
    numeric: dict[str, bool] = {}  # whether a field ever holds a number
    refused: set[str] = set()  # fields that hold something else
    name, rows = read_rows(source, split)
    for index, row in enumerate(rows):
        if index == 0 and _kind(row, name) == "pairs":
            return "pairs", ()
        for field, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            numeric[field] = numeric.get(field, False) or number
            if not number and value is not None:
                refused.add(field)
    if not numeric:
        raise UserError(f"{name}: there is no row in it")
    return "ratings", tuple(field for field, n in numeric.items() if n and field not in refused)


def pair_of_row(
    row: dict[str, Any], where: str, number: int, split: str
) -> tuple[Sample, Sample] | None:
    """The preferred and the other response of a row, in one of the forms of `read_pairs`.

    Args:
      row: of the data.
      where: file and row, for messages.
      number: of the row, from 1.
      split: the one that is wanted; None is returned for a row that names another.

    Raises:
      UserError: naming file, row and field.
    """
    if "preference_strength" in row:
        check_fields(row, ("prompt", "response_1", "response_2"), where)
        if SPLITS.get(str(row.get("split")), split) != split:
            return None
        signed = number_field(row, "preference_strength", where)
        fields = ("response_2", "response_1") if signed > 0 else ("response_1", "response_2")
        strength = abs(signed)
    else:
        fields = ("chosen", "rejected")
        check_fields(row, fields, where)
        strength = _strength(row, where)

    def sample(field: str) -> Sample:
        try:
            messages, response = parse_response(row.get("prompt"), row[field])
        except ValueError as error:
            raise UserError(f"{where}: field {field!r} {error}") from error
        return Sample(messages, response, (), where, number, strength, _PLACES.get(field, 0))

    return sample(fields[0]), sample(fields[1])


def check_fields(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    """Raises a `UserError` unless a row has all of these."""
    for field in fields:
        if field not in row:
            raise UserError(
                f"{where}: field {field!r} is missing; the row has {', '.join(sorted(row))}"
            )


def number_field(row: Mapping[str, Any], field: str, where: str) -> float:
    """A finite number of a row, or a `UserError`."""
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UserError(f"{where}: field {field!r} is {value!r}, expected a number")
    return float(value)


def _kind(row: dict[str, Any], name: str) -> str:
    if "preference_strength" in row or {"chosen", "rejected"} <= set(row):
        return "pairs"
    if "response" in row:
        return "ratings"
    raise UserError(
        f"{name} row 1: neither a rating ('prompt', 'response') nor a pair ('chosen', 'rejected' "
        f"or 'preference_strength'); the row has {', '.join(sorted(row))}"
    )


def _strength(row: dict[str, Any], where: str) -> float:
    """How much better a row says its chosen response is; NaN if it does not say."""
    for field in _STRENGTHS:
        if row.get(field) is not None:
            strength = number_field(row, field, where)
            if strength < 0:
                raise UserError(
                    f"{where}: field {field!r} is {strength:g}: it says that 'rejected' is better; "
                    "expected 0 or more"
                )
            return strength
    return math.nan


def _rated_response(
    row: dict[str, Any],
    attributes: Sequence[str],
    label_range: tuple[float, float],
    where: str,
    number: int,
) -> Sample:
    check_fields(row, ("prompt", "response", *attributes), where)
    try:
        prompt = parse_prompt(row["prompt"])
    except ValueError as error:
        raise UserError(f"{where}: field 'prompt' {error}") from error
    response = row["response"]
    if not isinstance(response, str):
        raise UserError(f"{where}: field 'response' is {type(response).__name__}, not a string")
    if not response.strip():
        raise UserError(f"{where}: field 'response' is empty")
    labels = tuple(_label(row[name], name, label_range, where) for name in attributes)
    return Sample(prompt, response, labels, where, number)


def _label(value: Any, field: str, limits: tuple[float, float], where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: field {field!r} is {value!r}, expected a number")
    if value != value or value == _MASKED:  # NaN (math.isnan refuses integers too big for a float)
        return math.nan
    if not limits[0] <= value <= limits[1]:
        raise UserError(
            f"{where}: field {field!r} is {value}, outside {limits[0]:g} to {limits[1]:g} "
            "(--config.data.label_range)"
        )
    return float(value)
