"""A tokenized data set, and how sets are made in memory, joined and split."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, Shaped

from rmjax.data.assistant_tokens import most_shared
from rmjax.data.row_layout import common_prefix
from rmjax.errors import UserError

# The label column that holds the log-probability of a sample's response by a reference policy.
REFERENCE = "reference_log_probability"


class TokenValues(NamedTuple):
    """What a policy's own samples are learned by: a number for each token, 0 where nothing is said.

    Attributes:
      old: the token's log-probability by the policy that sampled it.
      reference: likewise, by the policy that the trained one is held to; 0 without one.
      advantages: how much better than expected the token was.
      shares: what its loss counts; losses are divided by the sum of these.
    """

    old: Float32[np.ndarray, "T"]
    reference: Float32[np.ndarray, "T"]
    advantages: Float32[np.ndarray, "T"]
    shares: Float32[np.ndarray, "T"]


class TokenReturns(NamedTuple):
    """What a critic of such samples is trained with, likewise.

    Attributes:
      old: what it said of the state before the token, before the step.
      returns: what came of it.
      shares: what its loss counts; losses are divided by the sum of these.
    """

    old: Float32[np.ndarray, "T"]
    returns: Float32[np.ndarray, "T"]
    shares: Float32[np.ndarray, "T"]


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """Tokenized samples; the responses to one prompt are adjacent.

    Attributes:
      attributes: names of the label columns.
      tokens: all samples' tokens, one after the other.
      offsets: sample i is `tokens[offsets[i] : offsets[i + 1]]`.
      labels: ratings; NaN where there is none.
      prompt_ids: number of the sample's prompt, from 0 and ascending.
      prompt_hashes: of the sample's prompt, the same in whatever data it stands.
      shared: length of the prefix that all samples of its prompt share; less than the shortest has.
      rows: the sample's row in its source, from 1.
      counts: samples by what became of them: read, kept, and reasons.
      source: where they came from.
      notes: what of the source was not used, for people.
      key: fingerprint of everything that made them.
      chosen: whether the sample is the preferred one of a pair; the next one is then the other.
      strengths: how much better the preferred one of the sample's pair is; 0 in a tie, NaN where
        the data do not say, or where there is no pair.
      spoken: of each of `tokens`, whether the assistant says it, which is what policies are trained
        on; None where nobody asked, as for a reward.
      values: of each of `tokens`, where a policy or its critic learns from samples of its own; or
        None.
    """

    attributes: tuple[str, ...]
    tokens: Int32[np.ndarray, "T"]
    offsets: Int64[np.ndarray, "N+1"]
    labels: Float32[np.ndarray, "N A"]
    prompt_ids: Int32[np.ndarray, "N"]
    prompt_hashes: Int64[np.ndarray, "N"]
    shared: Int32[np.ndarray, "N"]
    rows: Int32[np.ndarray, "N"]
    chosen: Bool[np.ndarray, "N"]
    strengths: Float32[np.ndarray, "N"]
    counts: dict[str, int]
    source: str
    key: str
    notes: tuple[str, ...] = ()
    spoken: Bool[np.ndarray, "T"] | None = None
    values: TokenValues | TokenReturns | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, "N"]:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @functools.cached_property
    def samples_together(self) -> int:
        """The most samples that cannot be separated: 2 where there are pairs, else 1."""
        return 2 if self.chosen.any() else 1

    @functools.cached_property
    def computed_as(self) -> Int64[np.ndarray, "N"]:
        """The sample that stands for each: in pairs, the prompt's first one with the same tokens.

        So a response that is in several pairs is computed once. A sample without a pair stands for
        itself, since it has a label of its own.
        """
        found = np.arange(len(self))
        first: dict[tuple[bytes, bytes], int] = {}
        prompt = -1
        for sample in np.flatnonzero(self.chosen | np.roll(self.chosen, 1)).tolist():
            if prompt != self.prompt_ids[sample]:  # a prompt's samples are adjacent
                prompt = self.prompt_ids[sample]
                first.clear()
            said = b"" if self.spoken is None else self.spoken_in(sample).tobytes()
            found[sample] = first.setdefault((self.sequence(sample).tobytes(), said), sample)
        return found

    def sequence(self, sample: int) -> Int32[np.ndarray, "L"]:
        """Tokens of one sample."""
        return self.tokens[self.offsets[sample] : self.offsets[sample + 1]]

    def spoken_in(self, sample: int) -> Bool[np.ndarray, "L"]:
        """Which tokens of one sample the assistant says."""
        assert self.spoken is not None
        return self.spoken[self.offsets[sample] : self.offsets[sample + 1]]

    def of_sample(self, values: Shaped[np.ndarray, "T"], sample: int) -> Shaped[np.ndarray, "L"]:
        """The part of `values`, one of each of `tokens`, that belongs to a sample's."""
        return values[self.offsets[sample] : self.offsets[sample + 1]]

    def where(self, sample: int) -> str:
        """File and row of a sample, for messages."""
        return f"{self.source} row {self.rows[sample]}"


def in_memory(
    tokens: Sequence[np.ndarray],
    prompts: Sequence[Hashable],
    spoken: Sequence[np.ndarray] | None = None,
) -> tuple[TokenizedData, Int64[np.ndarray, "N"]]:
    """Samples without labels, ordered by prompt, and which of `tokens` each of them is.

    Args:
      tokens: of each sample.
      prompts: of each sample.
      spoken: which tokens of each sample the assistant says, for policies.

    Raises:
      UserError: a policy cannot be asked for a sample's tokens; see `most_shared`.
    """
    numbers: dict[Hashable, int] = {}
    ids = np.asarray([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], np.int32)
    order = np.argsort(ids, kind="stable")
    sequences = [tokens[i] for i in order]
    said = [spoken[i] for i in order] if spoken else None
    data = TokenizedData(
        attributes=(),
        tokens=np.concatenate(sequences),
        offsets=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        labels=np.zeros((len(order), 0), np.float32),
        prompt_ids=ids[order],
        prompt_hashes=ids[order].astype(np.int64),
        shared=shared_prefixes(
            sequences.__getitem__, ids[order], said.__getitem__ if said else None
        ),
        rows=order.astype(np.int32) + 1,
        chosen=np.zeros(len(order), bool),
        strengths=np.full(len(order), np.nan, np.float32),
        counts={},
        source="memory",
        key="",
        spoken=np.concatenate(said) if said else None,
    )
    return data, order


def shared_prefixes(
    tokens: Callable[[int], np.ndarray],
    prompt_ids: Int[np.ndarray, "N"],
    spoken: Callable[[int], np.ndarray] | None = None,
) -> Int32[np.ndarray, "N"]:
    """Length of the prefix that each sample shares with the other samples of its prompt.

    Args:
      tokens: gives those of a sample.
      prompt_ids: of each sample, ascending.
      spoken: gives which tokens of a sample the assistant says, for policies; see `most_shared`.
    """
    shared = np.zeros(len(prompt_ids), np.int32)
    begins = np.flatnonzero(np.diff(prompt_ids, prepend=-1))
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(prompt_ids)]):
        length = common_prefix([tokens(i) for i in range(begin, end)])
        if spoken:
            length = min(length, *(most_shared(spoken(i)) for i in range(begin, end)))
        shared[begin:end] = length
    return shared


def with_reference(data: TokenizedData, values: Float32[np.ndarray, "N"]) -> TokenizedData:
    """A policy's data with each response's log-probability by the reference."""
    return dataclasses.replace(data, attributes=(REFERENCE,), labels=values[:, None])


def subset(data: TokenizedData, samples: np.ndarray) -> TokenizedData:
    """The given samples, in ascending order; their prompts are numbered anew.

    Of a pair either both are given, or neither.
    """
    samples = np.sort(samples)
    sequences = [data.sequence(i) for i in samples]
    digest = hashlib.sha256(data.key.encode() + samples.astype(np.int64).tobytes())
    prompt_ids = np.unique(data.prompt_ids[samples], return_inverse=True)[1].astype(np.int32)
    return dataclasses.replace(
        data,
        tokens=np.concatenate(sequences) if sequences else data.tokens[:0],
        offsets=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        labels=data.labels[samples],
        prompt_ids=prompt_ids,
        prompt_hashes=data.prompt_hashes[samples],
        shared=data.shared[samples],
        rows=data.rows[samples],
        chosen=data.chosen[samples],
        strengths=data.strengths[samples],
        spoken=None if data.spoken is None else _of_samples(data, data.spoken, samples),
        values=data.values
        and type(data.values)._make(_of_samples(data, values, samples) for values in data.values),
        counts=data.counts
        | {
            "kept": len(samples) // data.samples_together,
            "prompts": int(prompt_ids.max(initial=-1)) + 1,
            "on the other side of the split": (len(data) - len(samples)) // data.samples_together,
        },
        key=digest.hexdigest()[:32],
    )


def _of_samples(data: TokenizedData, values: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """What `values`, one of each token, has of the tokens of some samples."""
    return np.concatenate([values[:0], *(data.of_sample(values, i) for i in samples)])


def join(rated: TokenizedData, pairs: TokenizedData) -> TokenizedData:
    """Rated samples and then pairs; a prompt that both have counts as two."""
    assert (rated.spoken is None) == (pairs.spoken is None)
    digest = hashlib.sha256(f"{rated.key} {pairs.key}".encode())

    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(rated, name), getattr(pairs, name)])

    return TokenizedData(
        attributes=rated.attributes,
        tokens=both("tokens"),
        offsets=np.concatenate([rated.offsets, pairs.offsets[1:] + rated.offsets[-1]]),
        labels=both("labels"),
        prompt_ids=np.concatenate([rated.prompt_ids, pairs.prompt_ids + rated.prompt_ids[-1] + 1]),
        prompt_hashes=both("prompt_hashes"),
        shared=both("shared"),
        rows=both("rows"),
        chosen=both("chosen"),
        strengths=both("strengths"),
        spoken=None if rated.spoken is None else both("spoken"),
        counts={f"ratings {name}": count for name, count in rated.counts.items()}
        | {f"pairs {name}": count for name, count in pairs.counts.items()},
        source=f"{rated.source} and {pairs.source}",
        key=digest.hexdigest()[:32],
        notes=tuple(f"{part.source}: {note}" for part in (rated, pairs) for note in part.notes),
    )


def hold_out(
    parts: Sequence[TokenizedData], share: float
) -> tuple[list[TokenizedData], list[TokenizedData]]:
    """Splits by prompt, never by row, into what stays and what is held out, of each part.

    Prompts are ordered by a hash of what is said in them, so the split depends neither on the seed
    nor on the order of the file nor on the responses, and a prompt that two parts have is on the
    same side in both.

    Args:
      parts: all samples.
      share: of the prompts, more than 0 and less than 1.
    """
    hashes = np.unique(np.concatenate([part.prompt_hashes for part in parts]))
    held_hashes = hashes[: round(share * len(hashes))]
    kept, held = [], []
    for part in parts:
        out = np.isin(part.prompt_hashes, held_hashes)
        if out.all() or not out.any():
            raise UserError(
                f"{part.source}: holding out {share:g} of {len(np.unique(part.prompt_hashes))} "
                "prompts leaves one side empty"
            )
        kept.append(subset(part, np.flatnonzero(~out)))
        held.append(subset(part, np.flatnonzero(out)))
    return kept, held
