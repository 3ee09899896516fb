"""A critic: a reward model that learns what is to be expected of a sample, token by token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.config import EVERYTHING, AlignConfig
from rmjax.data.batches import Batches
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.evaluation.fit_weights import parse_value
from rmjax.inference.score_step import make_token_scores, score_tokens
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import RewardHead
from rmjax.models.model import Model
from rmjax.models.parameters import HEAD, Params
from rmjax.models.rewards.aggregation import ScalarRule, model_rule
from rmjax.training.objectives.objective import make_critic_objective
from rmjax.training.step import Program, TrainState, make_program

CRITIC = "critic"  # of a checkpoint, what holds its state


class Critic:
    """A reward model's decoder with a head of one number at every token, and its optimizer.

    Attributes:
      name: of the reward model.
      state: its parameters and its optimizer's.
    """

    def __init__(self, config: AlignConfig, policy: Model, tokenizer: Tokenizer, steps: int):
        """Opens the reward model; nothing is loaded yet.

        Args:
          config: of the run.
          policy: whose samples it reads, and whose mesh and kernels it uses.
          tokenizer: the policy's.
          steps: optimizer steps there will be.

        Raises:
          UserError: there is no such model, or it has other tokens than the policy.
        """
        named, teacher = config.critic, config.only_model
        if teacher and not named.init:
            value = named.value or teacher.value
            named = dataclasses.replace(named, init=teacher.model, value=value)
        self.name, (self._value, _) = named.init, parse_value(named.value)
        self._source = open_pretrained(self.name)
        self._source.reward_spec()  # which a language model does not have
        if self._source.tokenizer().get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"config.critic.init: {self.name} has other tokens than the policy, and a critic "
                "reads the policy's; give a reward model with the policy's tokenizer"
            )
        longest = self._source.decoder.max_position_embeddings
        if config.data.max_length > longest:
            raise UserError(
                f"config.data.max_length = {config.data.max_length}: the critic, {self.name}, was "
                f"made for up to {longest} tokens"
            )
        self._sharding = policy.options.sharding
        self.model = critic_model(self._source.decoder, policy)
        self.program = critic_program(config, self.model, steps)
        self._scores = make_token_scores(self.model)
        self.state: Any = None

    def start(self) -> None:
        """Its state before the first step: what the reward model says of a sample so far."""
        self.state = self.program.start(first_values(self._source, self.model, self._value))

    def items(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {CRITIC: dict(self.state.items())}

    def abstract(self) -> dict[str, Any]:
        """The shapes of `items`."""
        return {CRITIC: dict(self.program.abstract.items())}

    def resume(self, items: dict[str, Any]) -> None:
        """Takes its state from a checkpoint's items."""
        self.state = TrainState.from_items(items[CRITIC])

    def values(self, batches: Batches) -> np.ndarray:
        """What it expects before each of the data's tokens; 0 of the prompts'."""
        return score_tokens(self._scores, self.state.params, batches, self._sharding)[0]


def critic_model(decoder: DecoderConfig, policy: Model) -> Model:
    """A critic of this architecture, computed as the policy is."""
    return Model(decoder, policy.options, RewardHead(1, everywhere=True))


def critic_program(config: AlignConfig, model: Model, steps: int) -> Program:
    """Its step; see `make_program`."""
    objective = make_critic_objective(config.critic.clip)
    return make_program(
        model, objective, config.critic.optimizer, steps=steps, trainable=EVERYTHING
    )


def first_values(
    source: Pretrained, model: Model, value: str | Mapping[str, float] | None
) -> Params:
    """A reward model's parameters in float32, its head folded into one number by a rule.

    A constant that is added to the head's numbers is left out: a critic learns it.

    Args:
      source: the reward model.
      model: the critic.
      value: the rule; see `rmjax.load`.

    Raises:
      UserError: its numbers are not a sum of weighted attributes.
    """
    spec = source.reward_spec()
    rule = model_rule(spec, value)
    if not isinstance(rule, ScalarRule) or spec.ordinal:
        raise UserError(
            f"config.critic.init: {source.name} is of ordinal ratings or general preferences, "
            "which do not fold into one linear head; give another reward model"
        )
    whole = dataclasses.replace(model, head=RewardHead(len(spec.attributes), everywhere=True))
    params = load_params(source, whole, seed=0, dtype=jnp.float32)
    weights = jnp.asarray(rule.vector(spec.attributes))[:, None]
    return params | {HEAD.path: params[HEAD.path] @ weights}
