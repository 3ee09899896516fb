"""Samples of a source's prompts, in a file of JSON lines that a kill does not lose."""

import dataclasses
import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from rmjax.config import HELPSTEER2
from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.choosing import with_ratings
from rmjax.data.conversation import Conversation, conversation_key
from rmjax.data.layouts import RESPONSES
from rmjax.data.readers import Row, Source
from rmjax.data.row_file import json_line, open_row_file, said_nulls
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError
from rmjax.generation.completions import Completion, Engine, SamplingSettings
from rmjax.inference import score_file

# What a row of the result has of its samples, and what was said of a row's earlier ones.
FIELDS = ("responses", "ended", "token_ids", "log_probabilities")
_LEFT_OUT = {*FIELDS, *score_file.FIELDS, *RESPONSES, *HELPSTEER2}
# Samples that are made together, after which they are written. Enough of them that few rows wait
# for the last ones.
_AT_ONCE = 512


@dataclasses.dataclass
class Sampled:
    """What a file of samples holds.

    Attributes:
      rows: in the file.
      before: how many of them were there already.
      responses: sampled now.
      ended: of these, how many came to an end.
      tokens: of these.
      no_room: rows of now whose prompt fills the model's context, and which have no response.
      less_room: rows of now whose responses had less room than was asked for.
      again: rows passed over, whose prompt an earlier row has.
      notes: what of the rows was not used, or not as it was.
      nulls: fields in which NaN became null now, and in how many rows.
    """

    rows: int = 0
    before: int = 0
    responses: int = 0
    ended: int = 0
    tokens: int = 0
    no_room: int = 0
    less_room: int = 0
    again: int = 0
    notes: tuple[str, ...] = ()
    nulls: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A row, its prompt, and this prompt's tokens."""

    row: Row
    prompt: Conversation
    tokens: Int32[np.ndarray, "L"]


def sample_file(
    engine: Engine,
    source: Source,
    out: Path,
    settings: SamplingSettings,
    made_by: dict[str, Any],
    log_probabilities: bool = False,
    ratings: Mapping[str, int] | None = None,
    distinct: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Sampled:
    """Writes each row of a source with samples of its prompt.

    Beside its own fields a row gets `prompt`, the messages; `tools`, if there are any; and lists
    with an entry for each sample: `responses`, the texts; `ended`; `token_ids`; and
    `log_probabilities`, if they are wanted. Fields about responses of its own are left out, and the
    notes say which. A prompt that leaves no room in the model's context has empty lists.

    The noise of a row's samples depends on its number in the source. Rows that are sampled together
    are the same ones after a kill, so that it does not even change the rounding.

    Args:
      engine: the model.
      source: rows with prompts.
      out: the file; it must not exist.
      settings: how to sample.
      made_by: whatever decides what the file holds, in JSON's types.
      log_probabilities: whether they are written.
      ratings: that the answers shall have, which the policy is told as `choosing.steered` tells it;
        `prompt` in the file does not say them.
      distinct: whether a row is passed over whose prompt an earlier row has.
      tell: is told how far it is.

    Raises:
      UserError: a bad row, with its file; the file exists; or it was begun by something else.
    """
    together = max(1, _AT_ONCE // settings.n)
    reader, encoder = RowReader(used=_LEFT_OUT), ChatEncoder(engine.tokenizer)
    left_out: Counter[str] = Counter()
    with open_row_file(out, made_by, together) as file:
        done = Sampled(before=file.before)
        asked_before = _Seen() if distinct else None
        for part in _portions(source, reader, together, asked_before):
            left_out.update(field for row, _ in part for field in row.fields if field in _LEFT_OUT)
            done.rows += len(part)
            if done.rows <= file.before:
                continue
            began, tokens = time.monotonic(), done.tokens
            asked = [
                _Asked(r, p, encoder.encode(_told(p, ratings), r.where, asking=True))
                for r, p in part
            ]
            file.write(_sampled(engine, asked, settings, log_probabilities, done))
            speed = (done.tokens - tokens) / (time.monotonic() - began)
            tell(f"{done.rows:,} rows are sampled, {speed:,.0f} tokens/s")
        if not done.rows:
            raise UserError(f"{source.name}: there is no row in it")
    notes = []
    if left_out:
        counts = ", ".join(f"{field} ({count:,})" for field, count in sorted(left_out.items()))
        notes.append(
            "columns left out, which say the prompt again or are about other responses, and of how "
            f"many rows: {counts}"
        )
    done.again = asked_before.again if asked_before else 0
    done.notes = (*notes, *said_nulls(done.nulls), *reader.notes(), *encoder.notes())
    return done


def _told(prompt: Conversation, ratings: Mapping[str, int] | None) -> Conversation:
    if not ratings:
        return prompt
    return Conversation(with_ratings(prompt.messages, ratings), prompt.tools)


class _Seen:
    """Prompts that were there before."""

    def __init__(self) -> None:
        self._prompts: set[bytes] = set()
        self.again = 0

    def is_new(self, prompt: Conversation) -> bool:
        """Whether it is the first one that says this."""
        digest = hashlib.sha256(conversation_key(prompt).encode()).digest()
        new = digest not in self._prompts
        self._prompts.add(digest)
        self.again += not new
        return new


def _portions(
    source: Source, reader: RowReader, together: int, seen: _Seen | None
) -> Iterator[list[tuple[Row, Conversation]]]:
    asked = ((row, reader.prompt(row)) for row in source)
    rows = ((row, prompt) for row, prompt in asked if seen is None or seen.is_new(prompt))
    while portion := list(itertools.islice(rows, together)):
        yield portion


def _sampled(
    engine: Engine,
    asked: list[_Asked],
    settings: SamplingSettings,
    log_probabilities: bool,
    done: Sampled,
) -> list[bytes]:
    """The lines of some rows, sampled together."""
    rooms = [_room(engine, one, settings) for one in asked]
    fitting = [one for one, room in zip(asked, rooms) if room > 0]
    keys = [one.row.number for one in fitting]
    try:
        found = iter(engine([one.tokens for one in fitting], settings, keys))
    except UserError as error:
        # It counts the prompts that it was given; people count rows.
        number = re.match(r"prompt (\d+)", str(error))
        where = f"{fitting[int(number[1])].row.where}: " if number else ""
        raise UserError(f"{where}{error}") from error
    lines = []
    for one, room in zip(asked, rooms):
        completions = next(found) if room > 0 else []
        done.no_room += room <= 0
        done.less_room += 0 < room < settings.max_tokens
        done.responses += len(completions)
        done.ended += sum(completion.ended for completion in completions)
        done.tokens += sum(len(completion.tokens) for completion in completions)
        lines.append(_line(one, completions, log_probabilities, done.nulls))
    return lines


def _room(engine: Engine, one: _Asked, settings: SamplingSettings) -> int:
    """Tokens that an answer may have, as far as is known; an engine refuses a prompt too long."""
    return settings.max_tokens if engine.context is None else engine.context - len(one.tokens)


def _line(
    one: _Asked, completions: list[Completion], log_probabilities: bool, nulls: Counter[str]
) -> bytes:
    own = {name: value for name, value in one.row.fields.items() if name not in _LEFT_OUT}
    fields: dict[str, Any] = {"prompt": one.prompt.messages}
    if one.prompt.tools:
        fields["tools"] = one.prompt.tools
    fields["responses"] = [completion.text for completion in completions]
    fields["ended"] = [completion.ended for completion in completions]
    fields["token_ids"] = [completion.tokens.tolist() for completion in completions]
    if log_probabilities:
        if any(np.isnan(completion.log_probabilities).any() for completion in completions):
            raise UserError(
                f"{one.row.where}: the server gives no log-probabilities of these tokens (docs/"
                "sample.md says which do); leave out --log-probabilities"
            )
        # The shortest decimals that read back as the same float32.
        fields["log_probabilities"] = [
            [float(str(value)) for value in completion.log_probabilities]
            for completion in completions
        ]
    return json_line(one.row, own | fields, nulls)
