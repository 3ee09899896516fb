"""What a policy's samples are worth: the weighted sum of models, functions and servers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float64

from rmjax.alignment.reward_functions import FunctionReward
from rmjax.alignment.reward_servers import ServerReward
from rmjax.alignment.standards import Standard, kept_standard
from rmjax.config import RewardConfig
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.evaluation.fit_weights import parse_value
from rmjax.inference.encoded import Encoded
from rmjax.inference.load import load
from rmjax.inference.scorer import Scorer
from rmjax.runtime.processes import from_first
from rmjax.runtime.sharding import MeshConfig

Attributes = list[list[dict[str, float] | None]]  # of each response of each prompt, by name


class Reward(Protocol):
    """Rewards responses to prompts."""

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], Attributes | None]:
        """The reward of each response, NaN where there is none; and attributes, if there are any.

        Args:
          prompts: conversations that lack their response.
          responses: texts, as many to each prompt.
        """
        ...


def open_rewards(
    configs: Mapping[str, RewardConfig], mesh: MeshConfig, tokenizer: Tokenizer
) -> "Rewards":
    """The rewards that a config names.

    Args:
      configs: by name.
      mesh: of the models.
      tokenizer: the policy's, by whose template a server is sent texts.

    Raises:
      UserError: there is no such model or function, or the URL is none; or a model that has no
        number for one response.
    """
    return Rewards(
        configs, {name: _open(name, config, mesh, tokenizer) for name, config in configs.items()}
    )


def _open(name: str, config: RewardConfig, mesh: MeshConfig, tokenizer: Tokenizer) -> Reward:
    where = f"config.rewards.{name}"
    if config.model:
        scorer = load(config.model, value=parse_value(config.value)[0], mesh=mesh)
        if scorer.is_language_model or scorer.spec.general_preference:
            raise UserError(
                f"{where}.model: {config.model} is a language model or one of general preferences, "
                "which has no number for one response; give a reward model with attributes"
            )
        return ModelReward(scorer)
    if config.function:
        address = config.function
        return AskedOnce(lambda: FunctionReward(address, config.timeout, f"{where}.function"))
    url, value, timeout = config.server, config.value, config.timeout
    return AskedOnce(lambda: ServerReward(url, value, timeout, tokenizer, f"{where}.server"))


class Rewards:
    """The weighted sum of several rewards, which is a `Reward`.

    A response has one if each of them gives one. A weight of 0 is of a judge that only looks on:
    what it says is recorded, and may be missing. A response's attributes are the single rewards as
    they were given, by name, and with `NAME/` before them those that a model gives itself.
    """

    def __init__(self, configs: Mapping[str, RewardConfig], rewards: Mapping[str, Reward]):
        """Takes rewards as they are; see `standardize`."""
        self._configs, self._rewards = configs, rewards
        self._standards: dict[str, Standard] = {}

    def standardize(self, workdir: Path) -> None:
        """Measures what the config asks for on its data, or takes what the run has kept.

        Raises:
          UserError: see `standards.kept_standard`.
        """
        for name, config in self._configs.items():
            if config.standardize:
                reward, source = self._rewards[name], config.standardize
                self._standards[name] = kept_standard(workdir, name, reward, source)

    def said(self) -> dict[str, str]:
        """What there is to say of each, by name."""
        found = {}
        for name, config in self._configs.items():
            parts = [config.model or config.function or config.server, f"weight {config.weight:g}"]
            if name in self._standards:
                parts.append(str(self._standards[name]))
            found[name] = ", ".join(parts)
        return found

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], Attributes]:
        """See `Reward`.

        Raises:
          UserError: one of them fails, or no response has a reward.
        """
        total = np.zeros((len(prompts), len(responses[0])))
        attributes: list[list[dict[str, float]]] = [[{} for _ in texts] for texts in responses]
        for name, reward in self._rewards.items():
            values, own = reward(prompts, responses)
            for place in np.ndindex(values.shape):
                row, sample = place
                if not np.isnan(values[place]):
                    attributes[row][sample][name] = float(values[place])
                parts = own[row][sample] if own else None
                for part, value in (parts or {}).items():
                    attributes[row][sample][f"{name}/{part}"] = value
            with np.errstate(over="ignore"):  # which is an error below
                if name in self._standards:
                    standard = self._standards[name]
                    values = (values - standard.mean) / standard.deviation
                if self._configs[name].weight:
                    values = self._configs[name].weight * values
                    total += values
            if np.isinf(values).any() or np.isinf(total).any():
                raise UserError(
                    f"config.rewards.{name}: as it is standardized and weighted it is too large "
                    "for a number; lower it, or its weight"
                )
        if np.isnan(total).all():
            raise UserError(
                f"no response has a reward of each of {', '.join(self._rewards)}: an empty one, or "
                "one that a model's context cannot hold, has none"
            )
        return total, [[found or None for found in row] for row in attributes]


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
    ) -> tuple[Float64[np.ndarray, "P n"], Attributes | None]:
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
    ) -> tuple[Float64[np.ndarray, "P n"], Attributes]:
        """See `Reward`."""
        rewards = np.full((len(prompts), len(responses[0])), np.nan)
        attributes: Attributes = [[None] * len(r) for r in responses]
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
        return rewards, attributes
