"""Samples to tokens: tokenized once, then read from a cache that is keyed by all that made it."""

import contextlib
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.portion import PortionEncoder
from rmjax.data.readers import open_source
from rmjax.data.records import (
    EQUAL,
    Reading,
    Records,
    pairs_of_ratings,
    read_pairs,
    read_responses,
    read_samples,
)
from rmjax.data.token_cache import is_whole, read_entry, write_entry
from rmjax.data.token_files import TokenFiles
from rmjax.data.token_stream import encoded_entries
from rmjax.data.tokenized import TokenizedData
from rmjax.data.tokenizer import Tokenizer, truncate_left
from rmjax.errors import UserError
from rmjax.runtime.cache import cache_directory, cache_errors

_Item = TypeVar("_Item")
_SHOWN_AFTER, _SHOWN_EVERY = 3.0, 256  # seconds; entries
OVER_LONG = ("drop", "truncate_left", "error")
TURNS = ("last", "all")
_VERSION = 4  # of this module's result; part of the cache's key, which checkpoints hold too


def load_tokenized(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    attributes: Sequence[str],
    label_range: tuple[float, float],
    max_length: int,
    over_long: str,
    pairs: bool = False,
    compare: str = "",
    ties: str = "drop",
    unrated: str = "",
    policy: bool = False,
    turns: str = "last",
) -> TokenizedData:
    """The tokenized samples of a source, from the cache if it has them.

    The cache is `$RMJAX_CACHE`, else `~/.cache/rmjax`; its entries can be deleted at any time.

    Args:
      source: see `open_source`.
      split: `train` or `validation`.
      tokenizer: of the model.
      attributes: of the head; a policy has none.
      label_range: the lowest and highest rating.
      max_length: most tokens of a sample.
      over_long: one of `OVER_LONG`.
      pairs: whether pairs are wanted, not ratings.
      compare: the rating whose differences make them; empty if the source holds pairs.
      ties: whether pairs without a preference are left out: `drop`, or anything else.
      unrated: an attribute whose column may be missing.
      policy: whether they are for a policy: then it is noted which tokens the assistant says, and
        without pairs any conversation will do, rated or not.
      turns: which of a policy's turns it learns, one of `TURNS`.

    Raises:
      UserError: bad data, naming file, row and field; or nothing is left after the length policy.
    """
    opened = open_source(source, split, pairs and not compare)
    made_by = {
        "version": _VERSION,
        "data": opened.fingerprint(),
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "attributes": list(attributes),
        "label_range": list(label_range),
        "max_length": max_length,
        "over_long": over_long,
        "pairs": pairs,
        "compare": compare,
        "ties": ties == "drop",
        "unrated": unrated,
    }
    if policy:  # and else no field, so that what was cached for reward models keeps its key
        made_by["policy"] = True
    if policy and turns != "last":
        made_by["turns"] = turns
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache_directory("tokens") / key
    with cache_errors():
        whole = is_whole(entry)
    if not whole:
        if compare:
            rated = read_samples(source, split, [compare], label_range)
            rated.decide(_looked_at)
            records = pairs_of_ratings(rated.all(), compare)
        elif pairs:
            records = read_pairs(source, split)
        elif policy:
            records = read_responses(source, split)
        else:
            records = read_samples(source, split, attributes, label_range, unrated)
        if isinstance(records, Reading):
            records.decide(_looked_at)
        encoder = ChatEncoder(tokenizer)
        _tokenize(
            entry,
            records,
            len(attributes),
            PortionEncoder(encoder, policy, every_turn=turns == "all"),
            max_length,
            over_long,
            drop_ties=ties == "drop",
        )
    return read_entry(entry, tuple(attributes), opened.name, key)


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made_of = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # Settings of the last call, not of the tokenizer: encoding itself changes them.
    made_of |= {"truncation": None, "padding": None}
    # The template writes special tokens by their role.
    parts = [made_of, tokenizer.chat_template, tokenizer.special_tokens_map]
    parts.append(tokenizer.split_special_tokens)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _tokenize(
    entry: Path,
    records: Records | Reading,
    columns: int,
    encode: PortionEncoder,
    max_length: int,
    over_long: str,
    drop_ties: bool,
) -> None:
    """Writes an entry of the cache. The two samples of a pair stay together."""
    bos = encode.encoder.tokenizer.bos_token_id
    counts: Counter[str] = Counter(read=0)
    with (
        TokenFiles(entry.parent, columns) as files,
        # Closed at an error, too, so that no process that helps is left.
        contextlib.closing(encoded_entries(records, encode, drop_ties=drop_ties)) as encoded,
        contextlib.closing(_shown(encoded, "tokenized")) as shown,
    ):
        paired = False
        for read, reason, prompt, found in shown:
            counts["read"] += 1
            paired = len(read) == 2
            longest = max((len(tokens) for tokens, _ in found), default=0)
            if longest > max_length:
                if over_long == "error":
                    raise UserError(
                        f"{read[0].where}: {longest} tokens, more than data.max_length = "
                        f"{max_length} (and data.over_long is 'error')"
                    )
                if over_long == "drop":
                    reason = "too long"
                else:
                    counts["truncated on the left"] += 1
                    found = [(truncate_left(t, max_length, bos), said) for t, said in found]
            if not reason and paired and np.array_equal(found[0][0], found[1][0]):
                reason = EQUAL
            if reason:
                counts[f"dropped: {reason}"] += 1
                continue
            files.add(prompt, read, found)
        skipped = {f"skipped: {reason}": n for reason, n in records.skipped.items()}
        found = {"read": counts.pop("read")} | skipped | counts
        found |= {"kept": files.kept, "prompts": files.prompts} | files.repetitions()
        if not files.kept:
            raise UserError(
                f"{records.source}: no {'pair' if paired else 'sample'} is left of "
                f"{found['read']} "
                f"({', '.join(f'{n} {reason}' for reason, n in found.items() if n)})"
            )
        summary = {"counts": found, "notes": [*records.notes, *encode.encoder.notes()]}
        with cache_errors():
            write_entry(entry, files, summary)


def _shown(entries: Iterable[_Item], what: str) -> Generator[_Item, None, None]:
    """The entries or rows; if they take long, a line says how many of them were so far `what`."""
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), "{task.completed:,}", TimeElapsedColumn())
    progress, task = Progress(*columns, transient=True), None
    try:
        for count, entry in enumerate(entries, start=1):
            yield entry
            if count % _SHOWN_EVERY or time.monotonic() - began < _SHOWN_AFTER:
                continue
            if task is None and jax.process_index() == 0:
                progress.start()
                task = progress.add_task(what)
            if task is not None:
                progress.update(task, completed=count)
    finally:
        progress.stop()


_looked_at = functools.partial(_shown, what="looked for splits")
