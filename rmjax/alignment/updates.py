"""The updates of a step: what models say of its samples, and optimizer steps of parts of them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rmjax.alignment.critic import Critic
from rmjax.alignment.learning import Known, credited, described, expected_by_critic
from rmjax.alignment.reference import Reference
from rmjax.alignment.rollouts import Rollout
from rmjax.alignment.steps import StepRows
from rmjax.config import AlignConfig
from rmjax.data.batch import batch_axes
from rmjax.data.batches import Batches
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData, subset
from rmjax.inference.score_step import make_token_scores, score_tokens
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import Sharding, put
from rmjax.training.objectives.rollouts import chosen_method
from rmjax.training.step import Metrics, Program, TrainState


class Learned(NamedTuple):
    """What the updates of a step leave.

    Attributes:
      state: after them.
      numbers: means over the updates.
      tokens: that were computed.
      padded: token positions that were computed.
    """

    state: TrainState
    numbers: dict[str, float]
    tokens: int
    padded: int


class Learner:
    """Learns from the samples of a step by the method of a config.

    Attributes:
      method: it.
      updates: optimizer steps of a step.
    """

    def __init__(
        self,
        config: AlignConfig,
        model: Model,
        program: Program,
        critic: Critic | None,
        shape: RowShape,
    ):
        """Nothing is compiled yet.

        Args:
          config: of the run.
          model: the policy.
          program: its step.
          critic: of a method that has one.
          shape: of the rows.
        """
        self.method = chosen_method(config.objective, config.policy_gradient)
        self.updates = updates_of(config)
        self._config, self._program, self._critic = config, program, critic
        self._rows, self._sharding = StepRows(config, shape), model.options.sharding
        self._token_scores = make_token_scores(model)

    def known(
        self, params: Params, reference: Reference, rollout: Rollout, data: TokenizedData
    ) -> Known:
        """What the policy with `params`, the reference and the sampler say of the samples."""
        old, entropy = self._say(params, data)
        kept = reference.scores(params, self._rows.whole(data))
        return Known(old, entropy, kept, rollout.sampled_log_probabilities(data))

    def __call__(
        self, state: TrainState, rollout: Rollout, data: TokenizedData, known: Known
    ) -> Learned:
        """Makes the updates of a step; the states of the policy and its critic are donated.

        Args:
          state: the policy's.
          rollout: the samples.
          data: their tokens, in the same order.
          known: what models say of them.
        """
        found, counted = list[dict[str, float]](), Counter[str]()
        of_policy, of_critic, numbers = data, data, described(rollout, data, known)
        if self._critic:
            expected = self._critic.values(self._rows.whole(data))
            of_policy, of_critic, more = expected_by_critic(
                rollout, data, known, expected, self.method, self._config
            )
            numbers |= more
        elif not self.method.fresh:
            now = known.old
            of_policy, more = credited(rollout, data, known, now, self.method, self._config)
            numbers |= more
        for part, samples in self._parts(rollout, data):
            batch, more = subset(of_policy, samples), dict[str, float]()
            if self.method.fresh:
                own = _of_tokens(known, data, samples)
                now = self._say(state.params, batch)[0]
                batch, more = credited(part, batch, own, now, self.method, self._config)
            batches = self._rows.update(batch)
            state, metrics = _step(self._program, state, batches, self._sharding)
            found.append(metrics | more)
            counted.update(tokens=batches.tokens(0), padded=batches.padded_tokens(0))
            if self._critic:
                of_part = self._rows.update(subset(of_critic, samples))
                self._critic.state, metrics = _step(
                    self._critic.program, self._critic.state, of_part, self._sharding
                )
                found[-1] |= {f"critic_{name}": value for name, value in metrics.items()}
        numbers |= _means(found)
        if self.method.fresh:  # counted in each part of the step, in every pass
            numbers["without_advantage"] *= self._config.policy_gradient.minibatches
        return Learned(state, numbers, counted["tokens"], counted["padded"])

    def _say(self, params: Params, data: TokenizedData) -> list[np.ndarray]:
        """Log-probabilities and entropies of tokens."""
        return score_tokens(self._token_scores, params, self._rows.whole(data), self._sharding)

    def _parts(self, rollout: Rollout, data: TokenizedData) -> Iterator[tuple[Rollout, np.ndarray]]:
        """The part of each update, and which samples it has; prompts are kept together."""
        gradient = self._config.policy_gradient
        prompts = np.split(np.arange(len(rollout.numbers)), gradient.minibatches)
        samples = np.split(np.arange(len(data)), gradient.minibatches)
        for _ in range(gradient.passes):
            for which, numbers in zip(prompts, samples):
                yield rollout.of_prompts(which), numbers


def updates_of(config: AlignConfig) -> int:
    """How many optimizer steps a step has."""
    return config.policy_gradient.minibatches * config.policy_gradient.passes


def _step(
    program: Program, state: TrainState, batches: Batches, sharding: Sharding
) -> tuple[TrainState, dict[str, float]]:
    batch = put(batches[0], batch_axes(batches[0]), sharding)
    state, metrics = program.step(state, batch)
    return state, {name: float(getattr(metrics, name)) for name in Metrics._fields}


def _of_tokens(known: Known, data: TokenizedData, samples: np.ndarray) -> Known:
    """What is known of the tokens of some samples."""
    return Known._make(
        np.concatenate([data.of_sample(values, i) for i in samples]) for values in known
    )


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number, over those that have it."""
    names = list(dict.fromkeys(name for numbers in found for name in numbers))
    return {
        name: float(np.mean([numbers[name] for numbers in found if name in numbers]))
        for name in names
    }
