"""What a policy's samples are worth: by a reward model, or by any function."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float64

from rmjax.config import RewardConfig
from rmjax.data.conversation import Conversation
from rmjax.data.fields import is_number
from rmjax.errors import UserError, shortened
from rmjax.inference.scorer import Encoded, Scorer, load
from rmjax.runtime.processes import from_first
from rmjax.runtime.sharding import MeshConfig


class Reward(Protocol):
    """Rewards responses to prompts."""

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], list[list[dict[str, float] | None]] | None]:
        """The reward of each response, NaN where there is none; and attributes, if there are any.

        Args:
          prompts: conversations that lack their response.
          responses: texts, as many to each prompt.
        """
        ...


def open_reward(config: RewardConfig, mesh: MeshConfig) -> Reward:
    """The reward that a config names.

    Raises:
      UserError: there is no such model or function.
    """
    if config.model:
        return ModelReward(load(config.model, value=config.value or None, mesh=mesh))
    return AskedOnce(lambda: FunctionReward(config.function))


class AskedOnce:
    """A reward that process 0 alone opens and asks; the others are told what it said.

    A model is computed by all processes, each on its own devices. A function need not say the same
    on each of them, and may be dear to ask.
    """

    def __init__(self, opened: Callable[[], Reward]):
        """Opens it, on process 0."""
        self._reward = opened() if jax.process_index() == 0 else None

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], list[list[dict[str, float] | None]] | None]:
        """See `Reward`."""

        def ask() -> tuple[list[list[float]], Any]:
            assert self._reward is not None
            rewards, attributes = self._reward(prompts, responses)
            return rewards.tolist(), attributes

        rewards, attributes = from_first("rewards", ask)
        return np.asarray(rewards, np.float64), attributes


class ModelReward:
    """A reward model's values, and its attributes.

    An empty response has no reward, and neither has one of which the template shows nothing, or
    that is too long for the model: nothing says what it would be worth.
    """

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], list[list[dict[str, float] | None]]]:
        """See `Reward`."""
        rewards = np.full((len(prompts), len(responses[0])), np.nan)
        attributes: list[list[dict[str, float] | None]] = [[None] * len(r) for r in responses]
        places, encoded = [], []
        for number, (prompt, texts) in enumerate(zip(prompts, responses)):
            for sample, text in enumerate(texts):
                answer = {"role": "assistant", "content": text}
                whole = Conversation([*prompt.messages, answer], prompt.tools)
                if whole.is_empty or not self.scorer.encoder.shows_response(whole):
                    continue
                where = f"prompt {number}, response {sample + 1}"
                tokens = self.scorer.encoder.encode(whole, where)
                if len(tokens) <= self.scorer.max_length:
                    places.append((number, sample))
                    encoded.append(Encoded(tokens, 0, where))
        for (number, sample), score in zip(places, self.scorer.score_encoded(encoded)):
            rewards[number, sample] = score.value
            attributes[number][sample] = score.attributes
        if np.isnan(rewards).all():
            raise UserError("the reward model has no value for any response of this step")
        return rewards, attributes


class FunctionReward:
    """The values of a function of a Python file."""

    def __init__(self, address: str):
        """Loads it: `FILE.py:NAME`."""
        file, _, name = address.rpartition(":")
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(
                f"config.reward.function = {address!r}: expected FILE.py:NAME, and there is no "
                f"file {file!r}"
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._function: Any = getattr(module, name, None)
        self._address = address
        if not callable(self._function):
            raise UserError(f"config.reward.function: {file} has no function {name!r}")

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], None]:
        """See `Reward`.

        Raises:
          UserError: it raises, or returns something else.
        """
        asked = [p.messages for p, texts in zip(prompts, responses) for _ in texts]
        said = [text for texts in responses for text in texts]
        try:
            found = list(self._function(asked, said))
        except Exception as error:
            raise UserError(
                f"{self._address} raised {type(error).__name__}: {shortened(str(error), 300)}"
            ) from error
        if len(found) != len(said):
            raise UserError(f"{self._address}: {len(found)} rewards for {len(said)} responses")
        return np.asarray([self._number(x) for x in found]).reshape(len(prompts), -1), None

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        value = value.item() if isinstance(value, np.generic) else value
        if not is_number(value) or not math.isfinite(value):
            raise UserError(
                f"{self._address}: a reward is {value!r}, expected a number, or None for none"
            )
        return float(value)
