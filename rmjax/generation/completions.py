"""What is asked of a language model, and what it answers; whatever computes it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float32, Int32

from rmjax.data.messages import Message
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError

# A text, which is the user's turn; messages that end with the user's turn; or tokens.
Prompt = str | Sequence[Message] | Int32[np.ndarray, "..."]
_LARGEST = 2**32  # seeds and keys are smaller
_MOST = 2**31  # of other whole numbers
_COLDEST = 1e-6
_MOST_SAMPLES = 1 << 16  # of a prompt


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn.

    Attributes:
      n: samples of each prompt.
      temperature: what logits are divided by; 0 takes the most probable token. Less than 1e-6
        would be no number that float32 can divide by.
      top_p: of the probability, the share that the most probable tokens must have; the others are
        never drawn. 1 for all tokens.
      top_k: so many of the most probable tokens are left; 0 for all. It comes before `top_p`.
      max_tokens: of a sample.
      stop: texts that end a sample. They are not part of its text.
      seed: of the noise, with the prompt's key, the sample's number and the token's position.

    Raises:
      UserError: a field is out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise UserError(
                f"stop = {self.stop!r}: expected several texts, such as ({self.stop!r},)"
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(text, str) for text in self.stop):
            raise UserError(f"stop = {self.stop!r}: expected texts")
        for name in ("n", "top_k", "max_tokens", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise UserError(f"{name} = {value!r}: expected a whole number")
        for name, fine, range_ in (
            ("n", 1 <= self.n <= _MOST_SAMPLES, f"from 1 to {_MOST_SAMPLES:,}"),
            (
                "temperature",
                self.temperature == 0 or _COLDEST <= self.temperature < float("inf"),
                f"0, or {_COLDEST:g} or more",
            ),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and up to 1"),
            ("top_k", 0 <= self.top_k < _MOST, "0 (off) or more, less than 2^31"),
            ("max_tokens", 1 <= self.max_tokens < _MOST, "1 or more, less than 2^31"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("seed", 0 <= self.seed < _LARGEST, "from 0 to 2^32 - 1"),
        ):
            if not fine:
                raise UserError(f"{name} = {getattr(self, name)!r}: expected {range_}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "SamplingSettings":
        """Settings with these fields.

        Raises:
          UserError: there is no such field, or one is out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise UserError(f"sample: there is no {unknown[0]!r}; there are {', '.join(known)}")
        return cls(**fields)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Completion:
    """One sample.

    Attributes:
      tokens: that were sampled; an end token is part of them, and so is what a stop text is of.
      text: of the tokens, without the end token, and without a stop text and what follows it.
      log_probabilities: of each token given those before, by the model itself: at temperature 1,
        among all tokens. NaN where a server does not give them.
      reason: why it is over: an end token, one of the `stop` texts, or no room for more.
      stop: the text that ended it; empty otherwise.
    """

    tokens: Int32[np.ndarray, "T"]
    text: str
    log_probabilities: Float32[np.ndarray, "T"]
    reason: Literal["end", "stop", "length"]
    stop: str = ""

    def __repr__(self) -> str:
        return f"Completion({self.text!r}, {self.reason!r}, {len(self.tokens)} tokens)"

    @property
    def ended(self) -> bool:
        """Whether the model came to an end, rather than run out of room."""
        return self.reason != "length"


class Engine(Protocol):
    """Whatever samples from a language model: the model in this process, or a server.

    Attributes:
      tokenizer: the model's.
      context: tokens of a prompt and its answer together; None if that is not known.
      state: changes when another model, or another server, would answer.
    """

    tokenizer: Tokenizer
    state: str

    @property
    def context(self) -> int | None:
        """See above; read only."""
        ...

    def __call__(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """The samples of each prompt, in their order.

        Args:
          prompts: what to answer.
          settings: of all of them.
          keys: of each prompt, on which its noise depends; its number if not given.
        """
        ...


def check_keys(keys: Sequence[int] | None, count: int) -> list[int]:
    """The key of each prompt.

    Raises:
      UserError: there are more or fewer than prompts, or one is out of range.
    """
    if keys is None:
        return list(range(count))
    if len(keys) != count:
        raise UserError(f"keys: {len(keys)} of them for {count} prompts; give one to each")
    for number, key in enumerate(keys):
        if not isinstance(key, int | np.integer) or isinstance(key, bool):
            raise UserError(f"keys: the one of prompt {number} is {key!r}, expected a whole number")
        if not 0 <= key < _LARGEST:
            raise UserError(f"keys: the one of prompt {number} is {key}, expected 0 to 2^32 - 1")
    return [int(key) for key in keys]
