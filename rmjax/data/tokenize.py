"""Samples to tokens, once: the result is cached on disk, keyed by everything that made it."""

import hashlib
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
from rmjax.data.tokenizer import Tokenizer, encode
from rmjax.errors import UserError
from rmjax.runtime.cache import cache_errors, cache_root

OVER_LONG = ("drop", "truncate_left", "error")
_VERSION = 3  # of this module's result; part of the cache's key


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
    """The tokenised samples of a source, from the cache if it has them.

    Args:
      source: see `sources.read_samples`.
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

    The cache is `tokens/` in that of `runtime.cache`.

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
            found = pairs_of_ratings(read_samples(source, split, [compare], label_range), compare)
        elif pairs:
            found = read_pairs(source, split)
        else:
            found = [[s] for s in read_samples(source, split, attributes, label_range, unrated)]
        result = _tokenize(
            found, len(attributes), tokenizer, max_length, over_long, drop_ties=ties == "drop"
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
    found: Sequence[Sequence[Sample]],
    columns: int,
    tokenizer: Tokenizer,
    max_length: int,
    over_long: str,
    drop_ties: bool,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Arrays and counts; samples that are found together, a pair's two, are kept or dropped so."""
    counts: Counter[str] = Counter(read=len(found))
    groups: dict[str, list[tuple[Sample, np.ndarray]]] = {}
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for members in found:
        tokens = [_encode(sample, tokenizer) for sample in members if sample.response]
        longest = max(map(len, tokens), default=0)
        reason = _why_not(members, tokens, drop_ties)
        if not reason and longest > max_length:
            if over_long == "error":
                raise UserError(
                    f"{members[0].where}: {longest} tokens, more than data.max_length = "
                    f"{max_length} (and data.over_long is 'error')"
                )
            if over_long == "drop":
                reason = "dropped: too long"
            else:
                counts["truncated on the left"] += 1
                tokens = [truncate_left(t, max_length, tokenizer.bos_token_id) for t in tokens]
                reason = _why_not(members, tokens, drop_ties)
        if reason:
            counts[reason] += 1
            continue
        prompt = json.dumps(members[0].prompt, sort_keys=True)
        groups.setdefault(prompt, []).extend(zip(members, tokens))
        if len(members) == 2:
            pairs[tokens[0].tobytes(), tokens[1].tobytes()] += 1
    kept = [(g, *member) for g, found in enumerate(groups.values()) for member in found]
    counts["kept"] = len(kept) // len(found[0])
    counts["prompts"] = len(groups)
    counts.update(_repetitions(pairs))
    if not kept:
        raise UserError(
            f"{found[0][0].where.rsplit(' row ', 1)[0]}: no "
            f"{'sample' if len(found[0]) == 1 else 'pair'} is left of {len(found)} "
            f"({', '.join(f'{n} {reason}' for reason, n in counts.items() if n)})"
        )
    numbers = np.asarray([g for g, _, _ in kept], np.int32)
    unrated = (np.nan,) * columns  # of a pair's two
    samples = [sample for _, sample, _ in kept]
    paired = len(found[0]) == 2
    arrays = {
        "tokens": np.concatenate([tokens for _, _, tokens in kept]),
        "offsets": np.cumsum([0] + [len(tokens) for _, _, tokens in kept], dtype=np.int64),
        "labels": np.asarray([unrated if paired else s.labels for s in samples], np.float32),
        "groups": numbers,
        "shared": shared_prefixes([tokens for _, _, tokens in kept], numbers),
        "rows": np.asarray([sample.row for sample in samples], np.int32),
        "chosen": (np.arange(len(kept)) % 2 == 0) & paired,
        "strengths": np.asarray([sample.strength for sample in samples], np.float32),
    }
    return arrays, dict(counts)


def _repetitions(pairs: Counter[tuple[bytes, bytes]]) -> dict[str, int]:
    """Pairs that were kept though they say something again, or its opposite."""
    again = sum(count - 1 for count in pairs.values())
    opposed = sum(count for (a, b), count in pairs.items() if (b, a) in pairs)
    said = {"of these repeat another": again, "of these contradict another": opposed}
    return {reason: count for reason, count in said.items() if count}


def _encode(sample: Sample, tokenizer: Tokenizer) -> np.ndarray:
    messages = [*sample.prompt, {"role": "assistant", "content": sample.response}]
    try:
        return encode(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from error


def _why_not(members: Sequence[Sample], tokens: Sequence[np.ndarray], drop_ties: bool) -> str:
    """Why nothing can be learned from a sample or a pair; empty if something can."""
    if len(tokens) < len(members):
        return "dropped: an empty response"
    if len(members) == 1:
        return "dropped: no label" if all(np.isnan(members[0].labels)) else ""
    if np.array_equal(tokens[0], tokens[1]):
        return "dropped: chosen equals rejected"
    return "dropped: a tie" if drop_ties and members[0].strength == 0 else ""


def truncate_left(tokens: np.ndarray, max_length: int, bos: int | None) -> np.ndarray:
    """The last `max_length` tokens, with the BOS that stood in front kept in front.

    The end stays whole, since the reward is read there.
    """
    if len(tokens) <= max_length:
        return tokens
    if bos is not None and tokens[0] == bos and max_length > 1:
        return np.concatenate([tokens[:1], tokens[-(max_length - 1) :]])
    return tokens[-max_length:]


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
    def array(name: str) -> np.ndarray:
        return np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    return TokenizedData(
        attributes=attributes,
        tokens=array("tokens"),
        offsets=np.asarray(array("offsets")),
        labels=np.asarray(array("labels")),
        groups=np.asarray(array("groups")),
        shared=np.asarray(array("shared")),
        rows=np.asarray(array("rows")),
        chosen=np.asarray(array("chosen")),
        strengths=np.asarray(array("strengths")),
        counts=json.loads((entry / "counts.json").read_text()),
        source=source,
        key=key,
    )
