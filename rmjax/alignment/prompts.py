"""The prompts of a run, and which of them each step has."""

import dataclasses
import hashlib
from collections import Counter

import numpy as np
from jaxtyping import Int64

from rmjax.config import AlignConfig
from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import Conversation, conversation_key
from rmjax.data.readers import open_source
from rmjax.data.row_reader import RowReader
from rmjax.data.tokenized import TokenizedData, in_memory
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts that all have room for a sample.

    Attributes:
      conversations: what is asked.
      tokens: of each.
      counts: how many rows were read, and why others are not among these.
      source: where they came from.
      notes: what of the source was not used.
    """

    conversations: list[Conversation]
    tokens: list[np.ndarray]
    counts: dict[str, int]
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def data(self) -> TokenizedData:
        """The prompts as data, for what a run puts on record of them."""
        digest = hashlib.sha256()
        for tokens in self.tokens:
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        found, _ = in_memory(self.tokens, range(len(self)))
        return dataclasses.replace(
            found,
            counts=self.counts,
            source=self.source,
            key=digest.hexdigest()[:32],
            notes=self.notes,
        )


def read_prompts(config: AlignConfig, tokenizer: Tokenizer, source: str, split: str) -> Prompts:
    """The prompts of a source, each once, that leave room for a sample.

    Raises:
      UserError: a bad row, with its file; or no prompt is left.
    """
    opened, reader, encoder = open_source(source, split), RowReader(), ChatEncoder(tokenizer)
    room = config.data.max_length - config.rollout.max_tokens
    conversations, tokens, seen = [], [], set[str]()
    counts = Counter[str]()
    for row in opened:
        counts["read"] += 1
        prompt = reader.prompt(row)
        key = conversation_key(prompt)
        if key in seen:
            counts["dropped: an earlier row has the prompt"] += 1
            continue
        seen.add(key)
        asked = encoder.encode(prompt, row.where, asking=True)
        if len(asked) > room:
            counts[f"dropped: more than {room} tokens, data.max_length less max_tokens"] += 1
            continue
        conversations.append(prompt)
        tokens.append(asked)
    if not tokens:
        said = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        raise UserError(f"{opened.name}: there is no prompt left ({said or 'no row'})")
    counts["kept"] = len(tokens)
    return Prompts(conversations, tokens, dict(counts), opened.name, tuple(encoder.notes()))


def plan_prompts(
    count: int, *, each: int, seed: int, steps: int = 0, epochs: float = 0.0
) -> list[Int64[np.ndarray, "P"]]:
    """The prompts of each step, all different within it.

    An epoch ends where fewer than a step's prompts are left; those are others each time.

    Args:
      count: of prompts.
      each: prompts of a step.
      seed: of the order.
      steps: how many; or
      epochs: how often to see the prompts. The other is 0.

    Raises:
      UserError: there are fewer prompts than a step has.
    """
    if count < each:
        raise UserError(
            f"{count} prompts, and a step has {each} (config.batch_size / rollout.n); give more "
            "prompts, or make a step smaller"
        )
    total = steps or max(1, round(epochs * count / each))
    plan: list[np.ndarray] = []
    epoch = 0
    while len(plan) < total:
        order = np.random.Generator(np.random.Philox([seed, epoch])).permutation(count)
        whole = count // each * each
        plan += list(order[:whole].reshape(-1, each))
        epoch += 1
    return plan[:total]
