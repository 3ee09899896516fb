"""Policy gradients: expected gradients enumerated, losses and gradients by torch on formulas."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rmjax.alignment.advantages import advantages_of, shaped_rewards
from rmjax.config import PolicyGradientConfig
from rmjax.data.batch import Rollouts
from rmjax.data.tokenized import TokenValues
from rmjax.errors import UserError
from rmjax.training.objectives.objective import make_objective, make_rollout_objective
from rmjax.training.objectives.rollouts import METHODS, chosen_method

LOGITS = np.asarray([0.3, -0.5, 1.1])
REFERENCE = np.asarray([0.2, 0.5, 0.3])
REWARDS = np.asarray([1.0, -2.0, 0.5])
GROUP = 3  # samples of the prompt


def objective(name, **settings):
    return make_rollout_objective(name, PolicyGradientConfig(**settings))


def expected_gradient(name, **settings) -> np.ndarray:
    """Of the loss on samples of one token among three, over all groups of samples there are."""
    method = chosen_method(name, PolicyGradientConfig(**settings))
    term = objective(name, **settings)
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum()
    total = np.zeros(3)
    for group in itertools.product(range(3), repeat=GROUP):
        tokens = np.asarray(group)
        old = np.log(probabilities)[tokens]
        ratio = (old - np.log(REFERENCE)[tokens])[None]
        rewards = shaped_rewards(
            REWARDS[tokens][None], ratio, np.abs(ratio), np.ones((1, GROUP)), method
        )
        advantages = advantages_of(rewards, np.ones((1, GROUP), bool), method)

        arrays = (old, np.log(REFERENCE)[tokens], advantages[0], np.ones(GROUP))
        values = TokenValues._make(x[None].astype(np.float32) for x in arrays)
        slots = np.arange(GROUP, dtype=np.int32)[None]
        targets = Rollouts._make([np.ones((1, GROUP), bool), slots, values])
        total += probabilities[tokens].prod() * np.asarray(_gradient(term, tokens, targets))
    return total


def _gradient(term, tokens, targets):
    def loss(logits):
        scores = jax.nn.log_softmax(logits)[tokens][None, :, None]
        return term.loss(scores, targets, term.weights(targets))

    return jax.grad(loss)(jnp.asarray(LOGITS))


def gradient_of(function) -> np.ndarray:
    """By the logits, of a function of the probabilities."""
    theta = torch.tensor(LOGITS, requires_grad=True)
    function(torch.softmax(theta, 0)).backward()
    assert theta.grad is not None
    return theta.grad.numpy()


REWARD = gradient_of(lambda p: (p * torch.from_numpy(REWARDS)).sum())
REVERSE_KL = gradient_of(lambda p: (p * (p.log() - torch.from_numpy(REFERENCE).log())).sum())
FORWARD_KL = gradient_of(lambda p: -(torch.from_numpy(REFERENCE) * p.log()).sum())


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("reinforce", dict(kl=0.0), -REWARD),
        ("rloo", dict(kl=0.0), -REWARD),
        # k1 in the reward, of samples that are independent: the gradient of KL(policy, reference).
        ("rloo", dict(kl=0.7), -REWARD + 0.7 * REVERSE_KL),
        # A baseline of all samples has the sample itself in it.
        ("dr_grpo", dict(), -REWARD * (GROUP - 1) / GROUP),
        # k3 in the loss has the gradient of KL(reference, policy).
        ("dr_grpo", dict(kl=0.7), -REWARD * (GROUP - 1) / GROUP + 0.7 * FORWARD_KL),
    ],
)
def test_expected_gradients_are_those_of_the_expected_reward(name, settings, expected):
    np.testing.assert_allclose(expected_gradient(name, **settings), expected, atol=2e-6)


# ---- given samples ------------------------------------------------------------------------------

LENGTHS = np.asarray([3, 5, 1, 4])


@pytest.fixture
def samples(rng):
    """Two rows of two samples each, behind a place that predicts nothing."""
    length = 12
    slots, predicting = np.zeros((2, length), np.int32), np.zeros((2, length), bool)
    for number, count in enumerate(LENGTHS):
        row, slot = divmod(number, 2)
        first = 1 + (0 if slot == 0 else LENGTHS[number - 1] + 1)
        predicting[row, first : first + count] = True
        slots[row, first : first + count] = slot
    logs, old, reference = rng.normal(-1, 0.3, (3, 2, length))
    advantages = rng.normal(0, 1, (2, 2))[np.arange(2)[:, None], slots]
    return predicting, slots, logs, old, reference, advantages


def torch_loss(name, samples, logs, kl) -> torch.Tensor:
    """TRL 1.16's formulas, of GRPO (`loss_type="dapo"`) and RLOO; NeMo-Aligner's of REINFORCE."""
    predicting, slots, _, old, reference, advantages = map(torch.from_numpy, samples)
    numbers = torch.arange(2)[:, None] * 2 + slots
    of_sample = [(numbers == i) & predicting for i in range(4)]
    if name == "reinforce":
        return -(advantages * logs)[predicting].mean()
    if name == "rloo":
        losses = []
        for mask in of_sample:
            ratio, advantage = (logs - old)[mask].sum().exp(), advantages[mask][0]
            losses.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        return torch.stack(losses).mean()
    ratio, back = (logs - old).exp(), reference - logs
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    return (loss + kl * (back.exp() - back - 1))[predicting].mean()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("reinforce", {}), ("rloo", {}), ("grpo", dict(kl=0.3, clip_above=0.28))],
)
def test_losses_and_gradients_of_given_samples(name, settings, samples):
    predicting, slots, logs, old, reference, advantages = samples
    term, method = objective(name, **settings), METHODS[name]
    lengths = LENGTHS.reshape(2, 2)[np.arange(2)[:, None], slots]
    shares = predicting / (lengths if method.average == "sample" else 1)
    arrays = [x.astype(np.float32) for x in (old, reference, advantages, shares)]
    targets = Rollouts._make([predicting, slots, TokenValues._make(arrays)])

    def loss(scores):
        return term.loss(scores[..., None], targets, term.weights(targets))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logs, jnp.float32))
    theirs = torch.tensor(logs, requires_grad=True)
    expected = torch_loss(name, samples, theirs, settings.get("kl", 0.0))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert theirs.grad is not None
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-7)
    assert not np.asarray(gradient)[~predicting].any()


# ---- advantages ---------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = np.asarray([[1.0, 2.0, 6.0], [3.0, np.nan, 5.0], [0.1, 0.1, 0.1]])
    ended = np.asarray([[True, True, False], [True, True, True], [True, True, True]])
    others = advantages_of(rewards, ended, METHODS["rloo"])
    np.testing.assert_allclose(others, [[1 - 4, 2 - 3.5, 6 - 1.5], [-2, 0, 2], [0, 0, 0]])
    # REINFORCE's mean is over others that ended.
    found = advantages_of(rewards, ended, METHODS["reinforce"])
    np.testing.assert_allclose(found[0], [1 - 2, 2 - 1, 6 - 1.5])
    grpo = advantages_of(rewards, ended, METHODS["grpo"])
    deviation = np.std([1, 2, 6], ddof=1)
    np.testing.assert_allclose(grpo[0], (np.asarray([1, 2, 6]) - 3) / (deviation + 1e-4))
    np.testing.assert_allclose(grpo[1], np.asarray([-1, 0, 1]) / (np.sqrt(2) + 1e-4))
    # All equal: no advantage, not even what the mean is off by rounding; nothing divided by 0.
    assert not grpo[2].any() and not others[2].any()
    alone = np.asarray([[1.0, np.nan]])
    for method in (m for m in METHODS.values() if m.credit == "compared"):
        assert not advantages_of(alone, np.ones((1, 2), bool), method).any()


def test_rewards_less_the_distance_from_the_reference():
    pairs = ((1.0, 2.0), (3.0, -4.0), (5.0, 6.0), (2.0, 4.0))
    numbers: Any = [np.asarray([[x, y]]) for x, y in pairs]
    by_sum = shaped_rewards(*numbers, method=METHODS["rloo"])
    np.testing.assert_allclose(by_sum, [[1 - 0.05 * 3, 2 + 0.05 * 4]])
    by_mean = shaped_rewards(*numbers, method=METHODS["reinforce"])
    np.testing.assert_allclose(by_mean, [[1 - 0.01 * 5 / 2, 2 - 0.01 * 6 / 4]])
    np.testing.assert_allclose(shaped_rewards(*numbers, method=METHODS["grpo"]), [[1, 2]])


def test_methods_that_are_none():
    with pytest.raises(UserError, match="there are reinforce, rloo, grpo, dr_grpo"):
        make_rollout_objective("ipo", PolicyGradientConfig())
    with pytest.raises(UserError, match=r"AlignConfig to `python -m rmjax\.align`"):
        make_objective("grpo", (), Any)  # pyright: ignore
