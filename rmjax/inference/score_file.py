"""Scores of a source's responses, in a file of JSON lines that a kill does not lose."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TimeElapsedColumn

from rmjax.data.conversation import Conversation
from rmjax.data.layouts import SAMPLED_TOKENS
from rmjax.data.readers import Row, Source
from rmjax.data.row_file import json_line, open_row_file, said_nulls
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError
from rmjax.inference.encoded import Encoded
from rmjax.inference.scorer import Scorer
from rmjax.inference.scores import Score

FIELDS = ("scores", "attributes", "tokens", "cut")  # what a row of the result has beside its own
_AT_ONCE = 128  # conversations for each shard of rows, after which their rows are written


@dataclasses.dataclass
class Written:
    """What a file of scores holds.

    Attributes:
      rows: in the file.
      before: how many of them were there already.
      responses: scored now.
      empty: of these, how many say nothing and so have no score.
      cut: of these, how many lost their first tokens.
      notes: what of the rows was not used, or not as it was.
      nulls: fields in which NaN became null now, and in how many rows.
    """

    rows: int = 0
    before: int = 0
    responses: int = 0
    empty: int = 0
    cut: int = 0
    notes: tuple[str, ...] = ()
    nulls: Counter[str] = dataclasses.field(default_factory=Counter)


def score_file(
    scorer: Scorer, source: Source, out: Path, made_by: dict[str, Any], replace: bool = False
) -> Written:
    """Writes each row of a source with its responses' scores.

    Beside its own fields a row gets, each a list with an entry for every response in the row's
    order: `scores`, the values; `attributes`, all scores by name; `tokens`; `cut`, how many tokens
    were cut away in front. An empty response has null in place of a score, and so has one of which
    the chat template shows nothing.

    Args:
      scorer: the model; its settings count.
      source: rows in any layout.
      out: the file; it must not exist.
      made_by: whatever decides what the file holds, in JSON's types.
      replace: whether scores that the rows have are left out for these.

    Raises:
      UserError: a bad row, with its file; the file exists; or it was begun by something else.
    """
    reader = RowReader(used=(*FIELDS, SAMPLED_TOKENS, "ended", "log_probabilities"))
    at_once = _AT_ONCE * scorer.model.options.sharding.row_shards
    with (
        open_row_file(out, made_by) as file,
        Progress(
            *Progress.get_default_columns()[:2], "{task.completed:,}", TimeElapsedColumn()
        ) as bar,
    ):
        written = Written(before=file.before)
        task = bar.add_task("scoring rows", total=None, completed=written.before)
        for part in _portions(source, reader, at_once, replace):
            after = written.rows + len(part)
            if after <= file.before:
                written.rows = after
                continue
            if written.rows < file.before:
                # A full disk left some of these rows. How a score is rounded depends on what is
                # computed with it, so all of them are made again.
                file.keep(written.rows)
                written.before = written.rows
            file.write(_scored(scorer, part, written))
            bar.update(task, completed=written.rows)
        if not written.rows:
            raise UserError(f"{source.name}: there is no row in it")
    written.notes = (*reader.notes(), *said_nulls(written.nulls))
    return written


_Scored = tuple[Row, list[Conversation]]


def _portions(
    source: Source, reader: RowReader, at_once: int, replace: bool
) -> Iterator[list[_Scored]]:
    """Rows with about `at_once` conversations together, the same ones whatever was written."""
    portion: list[_Scored] = []
    count = 0
    for row in source:
        conversations = reader.responses(row)
        taken = [field for field in FIELDS if field in row.fields]
        if taken and not replace:
            raise UserError(
                f"{row.where}: there is a field {taken[0]!r} already; rename it, or say --replace"
            )
        portion.append((row, conversations))
        count += len(conversations)
        if count >= at_once:
            yield portion
            portion, count = [], 0
    if portion:
        yield portion


def _scored(scorer: Scorer, part: list[_Scored], written: Written) -> list[bytes]:
    """The lines of some rows, their conversations scored together."""
    encoded: list[Encoded | None] = []
    for row, conversations in part:
        for number, conversation in enumerate(conversations, start=1):
            where = f"{row.where}, response {number}" if len(conversations) > 1 else row.where
            count = len(conversations)
            encoded.append(_encoded(scorer, row, number, count, conversation, where))
    found = iter(scorer.score_encoded([e for e in encoded if e]))
    scores = iter([next(found) if e else None for e in encoded])
    lines = []
    for row, conversations in part:
        own = list(itertools.islice(scores, len(conversations)))
        written.rows += 1
        written.responses += len(own)
        written.empty += own.count(None)
        written.cut += sum(bool(score and score.cut) for score in own)
        lines.append(_line(row, own, written.nulls))
    return lines


def _encoded(
    scorer: Scorer, row: Row, number: int, count: int, conversation: Conversation, where: str
) -> Encoded | None:
    """The tokens of a row's response, whose numbers begin with 1.

    None of one that says nothing, or of which the template shows nothing. A language model reads
    the tokens that were sampled, where the row has them.
    """
    sampled = row.fields.get(SAMPLED_TOKENS) if scorer.is_language_model else None
    if sampled is not None:
        if not isinstance(sampled, list) or len(sampled) != count:
            raise UserError(
                f"{row.where}: field {SAMPLED_TOKENS!r} is not a list of {count}, one for each "
                "response"
            )
        prompt = Conversation(conversation.messages[:-1], conversation.tools)
        return scorer.encode_sampled(prompt, sampled[number - 1], where)
    if conversation.is_empty or not scorer.encoder.shows_response(conversation):
        return None
    return scorer.encode(conversation, where)


def _line(row: Row, scores: list[Score | None], nulls: Counter[str]) -> bytes:
    fields = {
        "scores": [s.value if s and np.isfinite(s.value) else None for s in scores],
        "attributes": [s.attributes if s else None for s in scores],
        "tokens": [s.tokens if s else None for s in scores],
        "cut": [s.cut if s else None for s in scores],
    }
    return json_line(row, row.fields | fields, nulls)
