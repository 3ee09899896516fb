"""Samples to tokens: tokenized once, then read from a cache that is keyed by all that made it."""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import prompt_key
from rmjax.data.readers import open_source
from rmjax.data.records import (
    EMPTY,
    EQUAL,
    TIE,
    Records,
    pairs_of_ratings,
    read_pairs,
    read_responses,
    read_samples,
)
from rmjax.data.row_reader import Sample
from rmjax.data.tokenized import TokenizedData, shared_prefixes
from rmjax.data.tokenizer import Tokenizer, truncate_left
from rmjax.errors import UserError
from rmjax.runtime.cache import cache_errors, cache_root

_SUMMARY = "summary.json"
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
    entry = cache_root() / "tokens" / key
    with cache_errors():
        whole = _is_whole(entry)
    if not whole:
        if compare:
            records = read_samples(source, split, [compare], label_range)
            records = pairs_of_ratings(records, compare)
        elif pairs:
            records = read_pairs(source, split)
        elif policy:
            records = read_responses(source, split)
        else:
            records = read_samples(source, split, attributes, label_range, unrated)
        encoder = ChatEncoder(tokenizer)
        arrays, counts = _tokenize(
            records,
            len(attributes),
            encoder,
            max_length,
            over_long,
            drop_ties=ties == "drop",
            policy=policy,
            every_turn=turns == "all",
        )
        summary = {"counts": counts, "notes": [*records.notes, *encoder.notes()]}
        with cache_errors():
            _write(entry, arrays, summary)
    return _read(entry, tuple(attributes), opened.name, key)


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
    records: Records,
    columns: int,
    encoder: ChatEncoder,
    max_length: int,
    over_long: str,
    drop_ties: bool,
    policy: bool,
    every_turn: bool,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Arrays and counts. The two samples of a pair stay together."""
    entries, bos = records.entries, encoder.tokenizer.bos_token_id
    counts: Counter[str] = Counter(read=len(entries))
    counts.update({f"skipped: {reason}": n for reason, n in records.skipped.items()})
    encoded: dict[int, np.ndarray] = {}  # ranked lists have a conversation in several pairs
    spoken: dict[int, np.ndarray] = {}  # which of these tokens are the assistant's, for a policy
    prompts: dict[str, list[tuple[Sample, np.ndarray]]] = {}
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for entry in entries:
        reason = _reason_to_drop(entry, drop_ties)
        if not reason:
            for sample in entry:
                known = id(sample.conversation)
                if known in encoded:
                    continue
                if policy:
                    found = encoder.encode_spoken(sample.conversation, sample.where, every_turn)
                    encoded[known], spoken[known] = found
                else:
                    encoded[known] = encoder.encode(sample.conversation, sample.where)
            if not all(encoder.shows_response(s.conversation, every_turn) for s in entry):
                reason = EMPTY
        tokens = [] if reason else [encoded[id(sample.conversation)] for sample in entry]
        longest = max(map(len, tokens), default=0)
        if longest > max_length:
            if over_long == "error":
                raise UserError(
                    f"{entry[0].where}: {longest} tokens, more than data.max_length = "
                    f"{max_length} (and data.over_long is 'error')"
                )
            if over_long == "drop":
                reason = "too long"
            else:
                counts["truncated on the left"] += 1
                tokens = [truncate_left(t, max_length, bos) for t in tokens]
        if not reason and len(tokens) == 2 and np.array_equal(tokens[0], tokens[1]):
            reason = EQUAL
        if reason:
            counts[f"dropped: {reason}"] += 1
            continue
        prompt = prompt_key([sample.conversation for sample in entry])
        prompts.setdefault(prompt, []).extend(zip(entry, tokens))
        if len(entry) == 2:
            pairs[tokens[0].tobytes(), tokens[1].tobytes()] += 1
    kept = list(itertools.chain.from_iterable(prompts.values()))
    paired = len(entries[0]) == 2
    counts["kept"] = len(kept) // (2 if paired else 1)
    counts["prompts"] = len(prompts)
    counts.update(_repetitions(pairs))
    if not kept:
        raise UserError(
            f"{records.source}: no {'pair' if paired else 'sample'} is left of {len(entries)} "
            f"({', '.join(f'{n} {reason}' for reason, n in counts.items() if n)})"
        )
    samples, sequences = zip(*kept)
    said = [spoken[id(sample.conversation)] for sample in samples] if policy else None
    prompt_ids = np.repeat(np.arange(len(prompts)), [len(p) for p in prompts.values()])
    labels = [(np.nan,) * columns if paired else sample.labels for sample in samples]
    arrays = {
        "tokens": np.concatenate(sequences),
        "offsets": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        "labels": np.asarray(labels, np.float32),
        "prompt_ids": prompt_ids.astype(np.int32),
        "prompt_hashes": np.asarray(list(map(_hash, prompts)), np.int64)[prompt_ids],
        "shared": shared_prefixes(sequences, prompt_ids, said),
        "rows": np.asarray([sample.row for sample in samples], np.int32),
        "chosen": (np.arange(len(samples)) % 2 == 0) & paired,
        "strengths": np.asarray([sample.strength for sample in samples], np.float32),
    }
    if said:
        arrays["spoken"] = np.concatenate(said)
    return arrays, dict(counts)


def _repetitions(pairs: Counter[tuple[bytes, bytes]]) -> dict[str, int]:
    """How many of the pairs that were kept repeat another one, or say its opposite."""
    repeated = sum(count - 1 for count in pairs.values())
    opposed = sum(count for (a, b), count in pairs.items() if (b, a) in pairs)
    counts = {"of these repeat another": repeated, "of these contradict another": opposed}
    return {reason: count for reason, count in counts.items() if count}


def _hash(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big", signed=True)


def _reason_to_drop(entry: Sequence[Sample], drop_ties: bool) -> str:
    """Why nothing can be learned from a sample or a pair; empty if something can."""
    if any(sample.conversation.is_empty for sample in entry):
        return EMPTY
    if len(entry) == 1:
        labels = entry[0].labels
        return "no label" if labels and all(np.isnan(labels)) else ""
    return TIE if drop_ties and entry[0].strength == 0 else ""


def _is_whole(entry: Path) -> bool:
    """Whether the cache has this; what is cut short there, as by a crash, is removed."""
    if not (entry / _SUMMARY).exists():
        return False
    try:
        json.loads((entry / _SUMMARY).read_text())
        for file in entry.glob("*.npy"):
            np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        shutil.rmtree(entry)
        return False
    return True


def _write(entry: Path, arrays: dict[str, np.ndarray], summary: dict[str, Any]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    # Not named by the process: its number may be the same on another host with the same disk.
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    try:
        for name, array in arrays.items():
            _save(partial / f"{name}.npy", array)
        (partial / _SUMMARY).write_text(json.dumps(summary))
        try:
            partial.rename(entry)
        except OSError:  # another process was first with the same result
            if not (entry / _SUMMARY).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it has another name now, or is no good


def _save(file: Path, array: np.ndarray) -> None:
    """`np.save`, which of a full disk says only how many numbers were written."""
    header = np.lib.format.header_data_from_array_1_0(array)
    with open(file, "wb") as opened:
        np.lib.format.write_array_header_1_0(opened, header)
        opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _read(entry: Path, attributes: tuple[str, ...], source: str, key: str) -> TokenizedData:
    arrays = {
        file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in entry.glob("*.npy")
    }
    tokens = arrays.pop("tokens")  # stays on disk, and is read where it is needed
    small = {name: np.asarray(array) for name, array in arrays.items()}
    summary = json.loads((entry / _SUMMARY).read_text())
    return TokenizedData(
        attributes=attributes,
        tokens=tokens,
        source=source,
        key=key,
        **small,
        **summary | {"notes": tuple(summary["notes"])},
    )
