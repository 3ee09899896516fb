"""Samples to tokens: tokenized once, then read from a cache that is keyed by all that made it."""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmjax.data.readers import fingerprint, origin
from rmjax.data.records import Sample, pairs_of_ratings, read_pairs, read_samples
from rmjax.data.tokenized import TokenizedData, shared_prefixes
from rmjax.data.tokenizer import Tokenizer, encode, truncate_left
from rmjax.errors import UserError
from rmjax.runtime.cache import cache_errors, cache_root

OVER_LONG = ("drop", "truncate_left", "error")
_VERSION = 3  # of this module's result; part of the cache's key, which checkpoints hold too


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
) -> TokenizedData:
    """The tokenized samples of a source, from the cache if it has them.

    The cache is `$RMJAX_CACHE`, else `~/.cache/rmjax`; its entries can be deleted at any time.

    Args:
      source: see `read_rows`.
      split: `train` or `validation`.
      tokenizer: of the model.
      attributes: of the head.
      label_range: the lowest and highest rating.
      max_length: most tokens of a sample.
      over_long: one of `OVER_LONG`.
      pairs: whether pairs are wanted, not ratings.
      compare: the rating whose differences make them; empty if the source holds pairs.
      ties: whether pairs without a preference are left out: `drop`, or anything else.
      unrated: an attribute whose column may be missing.

    Raises:
      UserError: bad data, naming file, row and field; or nothing is left after the length policy.
    """
    made_by = {
        "version": _VERSION,
        "data": fingerprint(source, split),
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
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache_root() / "tokens" / key
    if not (entry / "counts.json").exists():
        if compare:
            entries = pairs_of_ratings(read_samples(source, split, [compare], label_range), compare)
        elif pairs:
            entries = read_pairs(source, split)
        else:
            entries = [[s] for s in read_samples(source, split, attributes, label_range, unrated)]
        result = _tokenize(
            entries, len(attributes), tokenizer, max_length, over_long, drop_ties=ties == "drop"
        )
        with cache_errors():
            _write(entry, *result)
    return _read(entry, tuple(attributes), origin(source, split), key)


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
    entries: Sequence[Sequence[Sample]],
    columns: int,
    tokenizer: Tokenizer,
    max_length: int,
    over_long: str,
    drop_ties: bool,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Arrays and counts. An entry is one sample, or the two of a pair, which stay together."""
    counts: Counter[str] = Counter(read=len(entries))
    prompts: dict[str, list[tuple[Sample, np.ndarray]]] = {}
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for entry in entries:
        tokens = [_encode(sample, tokenizer) for sample in entry if sample.response]
        longest = max(map(len, tokens), default=0)
        reason = _reason_to_drop(entry, tokens, drop_ties)
        if not reason and longest > max_length:
            if over_long == "error":
                raise UserError(
                    f"{entry[0].where}: {longest} tokens, more than data.max_length = "
                    f"{max_length} (and data.over_long is 'error')"
                )
            if over_long == "drop":
                reason = "dropped: too long"
            else:
                counts["truncated on the left"] += 1
                tokens = [truncate_left(t, max_length, tokenizer.bos_token_id) for t in tokens]
                reason = _reason_to_drop(entry, tokens, drop_ties)
        if reason:
            counts[reason] += 1
            continue
        prompt = json.dumps(entry[0].prompt, sort_keys=True)
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
            f"{entries[0][0].where.rsplit(' row ', 1)[0]}: no {'pair' if paired else 'sample'} is "
            f"left of {len(entries)} "
            f"({', '.join(f'{n} {reason}' for reason, n in counts.items() if n)})"
        )
    samples, sequences = zip(*kept)
    prompt_ids = np.repeat(np.arange(len(prompts)), [len(p) for p in prompts.values()])
    labels = [(np.nan,) * columns if paired else sample.labels for sample in samples]
    arrays = {
        "tokens": np.concatenate(sequences),
        "offsets": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        "labels": np.asarray(labels, np.float32),
        "groups": prompt_ids.astype(np.int32),  # the name in files of this version
        "shared": shared_prefixes(sequences, prompt_ids),
        "rows": np.asarray([sample.row for sample in samples], np.int32),
        "chosen": (np.arange(len(samples)) % 2 == 0) & paired,
        "strengths": np.asarray([sample.strength for sample in samples], np.float32),
    }
    return arrays, dict(counts)


def _repetitions(pairs: Counter[tuple[bytes, bytes]]) -> dict[str, int]:
    """How many of the pairs that were kept repeat another one, or say its opposite."""
    repeated = sum(count - 1 for count in pairs.values())
    opposed = sum(count for (a, b), count in pairs.items() if (b, a) in pairs)
    counts = {"of these repeat another": repeated, "of these contradict another": opposed}
    return {reason: count for reason, count in counts.items() if count}


def _encode(sample: Sample, tokenizer: Tokenizer) -> np.ndarray:
    messages = [*sample.prompt, {"role": "assistant", "content": sample.response}]
    try:
        return encode(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from error


def _reason_to_drop(entry: Sequence[Sample], tokens: Sequence[np.ndarray], drop_ties: bool) -> str:
    """Why nothing can be learned from a sample or a pair; empty if something can."""
    if len(tokens) < len(entry):
        return "dropped: an empty response"
    if len(entry) == 1:
        return "dropped: no label" if all(np.isnan(entry[0].labels)) else ""
    if np.array_equal(tokens[0], tokens[1]):
        return "dropped: chosen equals rejected"
    return "dropped: a tie" if drop_ties and entry[0].strength == 0 else ""


def _write(entry: Path, arrays: dict[str, np.ndarray], counts: dict[str, int]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    # Not named by the process: its number may be the same on another host with the same disk.
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array, allow_pickle=False)
    (partial / "counts.json").write_text(json.dumps(counts))
    try:
        partial.rename(entry)
    except OSError:  # another process was first with the same result
        if not (entry / "counts.json").exists():
            raise
        shutil.rmtree(partial)


def _read(entry: Path, attributes: tuple[str, ...], source: str, key: str) -> TokenizedData:
    arrays = {
        file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in entry.glob("*.npy")
    }
    tokens = arrays.pop("tokens")  # stays on disk, and is read where it is needed
    small = {name: np.asarray(array) for name, array in arrays.items()}
    return TokenizedData(
        attributes=attributes,
        tokens=tokens,
        prompt_ids=small.pop("groups"),
        counts=json.loads((entry / "counts.json").read_text()),
        source=source,
        key=key,
        **small,
    )
