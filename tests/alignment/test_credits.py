"""What samples count by other ways than advantages: losses by torch, distributions by scipy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from rmjax.alignment.advantages import generalized_advantages
from rmjax.alignment.credits import Samples, best, log_likelihood, pair, posterior
from rmjax.config import (
    AlignConfig,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
)
from rmjax.data.batch import Rollouts
from rmjax.data.tokenized import TokenReturns, TokenValues
from rmjax.errors import UserError
from rmjax.training.objectives.objective import make_critic_objective, make_rollout_objective
from rmjax.training.objectives.rollouts import chosen_method

LOGITS = np.asarray([0.3, -0.5, 1.1])


def config_of(method: str, **settings) -> AlignConfig:
    return AlignConfig(
        "w",
        DataConfig("x", attributes=()),
        OptimizerConfig(1e-3),
        8,
        objective=method,
        rewards={"teacher": RewardConfig(model="m")},
        policy_gradient=PolicyGradientConfig(**settings),
    )


def samples_of(rewards, **changes) -> Samples:
    rewards = np.asarray(rewards, float)
    names, shape = ("old", "now", "reference", "absolutes"), rewards.shape
    fields: dict[str, Any] = {name: np.zeros(shape) for name in names} | {"rewards": rewards}
    fields |= {name: np.ones(shape, bool) for name in ("ended", "learnable")}
    fields |= {"lengths": np.ones(shape)} | changes
    return Samples(**fields)


def gradient_of_credits(credit, tokens, config) -> np.ndarray:
    """By the logits, of the loss on samples of one token each."""
    objective = make_rollout_objective(config.objective, config.policy_gradient)
    arrays = (np.zeros(credit.credits.shape), credit.credits, credit.learned)
    old, credits, shares = (x.astype(np.float32).reshape(1, -1) for x in arrays)
    values = TokenValues(old, old, credits, shares)
    slots = np.arange(credits.size, dtype=np.int32)[None]
    targets: Any = Rollouts._make([np.ones(credits.shape, bool), slots, values])

    def loss(logits):
        scores = jax.nn.log_softmax(logits)[tokens.ravel()][None, :, None]
        return objective.loss(scores, targets, objective.weights(targets))

    return np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))


def torch_gradient(loss) -> np.ndarray:
    theta = torch.tensor(LOGITS, requires_grad=True)
    loss(torch.log_softmax(theta, 0)).backward()
    assert theta.grad is not None
    return theta.grad.numpy()


def test_online_dpo_has_the_gradient_of_dpo():
    tokens = np.asarray([[0, 1, 2], [2, 2, 0], [1, 1, 1]])
    rewards = np.asarray([[1.0, 3.0, -1.0], [0.5, np.nan, 0.25], [2.0, 2.0, 2.0]])
    log_policy = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum())
    log_reference = np.log([0.2, 0.5, 0.3])
    config = config_of("online_dpo", kl=0.7)
    method = chosen_method("online_dpo", config.policy_gradient)
    samples = samples_of(rewards, now=log_policy[tokens], reference=log_reference[tokens])
    found = pair(samples, method, config)
    assert found.learned.tolist() == [[False, True, True], [True, False, True], [False] * 3]

    def dpo(logs):  # the pairs: token 1 over 2, token 2 over 0; the third prompt has none
        change = logs - torch.from_numpy(log_reference)
        margins = 0.7 * torch.stack([change[1] - change[2], change[2] - change[0]])
        return -torch.nn.functional.logsigmoid(margins).mean()

    ours = gradient_of_credits(found, tokens, config)
    np.testing.assert_allclose(ours, torch_gradient(dpo), rtol=1e-5, atol=1e-7)
    assert found.numbers["dpo_loss"] == pytest.approx(dpo(torch.from_numpy(log_policy)).item())


def test_rejection_sampling_imitates_the_best():
    tokens = np.asarray([[0, 1, 2], [2, 2, 0]])
    rewards = [[1.0, 3.0, -1.0], [np.nan, np.nan, np.nan]]
    config = config_of("rejection_sampling")
    learnable = np.asarray([[True, False, True], [True] * 3])
    method = chosen_method("rejection_sampling", config.policy_gradient)
    found = best(samples_of(rewards, learnable=learnable), method, config)
    assert found.learned.tolist() == [[True, False, False], [False] * 3]
    ours = gradient_of_credits(found, tokens, config)
    np.testing.assert_allclose(ours, torch_gradient(lambda logs: -logs[0]), rtol=1e-5)


RATED = [[{"good": 4.0}, {"good": 2.5}, {"good": 0.5}]]


def likelihoods() -> np.ndarray:
    """P(the rating is 4) of the three, by scipy's distribution."""
    found = []
    for rating in (0.99, 2.5 / 4, 0.5 / 4):  # the mean of a rating of 4 is held to .99
        beta = scipy.stats.beta(24 * rating, 24 * (1 - rating))
        found.append(beta.sf(3.5 / 4))
    return np.asarray(found)


def test_a_rating_is_as_likely_as_its_beta_distribution_says():
    found = [log_likelihood(4, rating["good"], 0, 4) for rating in RATED[0]]
    np.testing.assert_allclose(found, np.log(likelihoods()), rtol=1e-6)
    assert sum(np.exp(log_likelihood(a, 1.7, 0, 4)) for a in range(5)) == pytest.approx(1)


def test_steerlm_has_the_gradient_of_its_divergence():
    """-(w - b) x grad log Q is the gradient of KL(w, b): by torch, with Q away from Q'."""
    tokens, reference = np.asarray([[0, 1, 2]]), np.asarray([[-1.2, -0.7, -1.6]])
    old = np.asarray([[-0.9, -1.3, -1.1]])
    now = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum())[tokens]
    config = config_of("steerlm2", ratings="good:4")
    method = chosen_method("steerlm2", config.policy_gradient)
    samples = samples_of([[0.0] * 3], old=old, now=now, reference=reference, attributes=RATED)
    found = posterior(samples, method, config)
    target = torch.softmax(torch.from_numpy(np.log(likelihoods()) + reference[0] - old[0]), 0)

    def divergence(logs):
        own = torch.log_softmax(logs - torch.from_numpy(old[0]), 0)
        return (target * (target.log() - own)).sum() / 3  # a mean over three tokens

    ours = gradient_of_credits(found, tokens, config)
    np.testing.assert_allclose(ours, torch_gradient(divergence), rtol=1e-4, atol=1e-7)
    said = 3 * divergence(torch.from_numpy(now[0])).item()
    assert found.numbers["steerlm_divergence"] == pytest.approx(said)

    # A policy that is the posterior already is left as it is.
    wanted = np.exp(reference) * likelihoods()
    there = samples._replace(now=np.log(wanted / wanted.sum()))
    np.testing.assert_allclose(posterior(there, method, config).credits, 0, atol=1e-12)


def test_steerlm_without_attributes_or_with_others():
    config = config_of("steerlm2", ratings="bad:4")
    method = chosen_method("steerlm2", config.policy_gradient)
    with pytest.raises(UserError, match="asks for 'bad', and the reward has good"):
        posterior(samples_of([[0.0] * 3], attributes=RATED), method, config)
    with pytest.raises(UserError, match="the reward has no attributes"):
        posterior(samples_of([[0.0] * 3]), method, config)
    named = [[{"judge": 1.0, **{f"teacher/{k}": v for k, v in one.items()}} for one in RATED[0]]]
    config = config_of("steerlm2", ratings="good:4")
    ours = posterior(samples_of([[0.0] * 3], attributes=named), method, config)
    theirs = posterior(samples_of([[0.0] * 3], attributes=RATED), method, config)
    np.testing.assert_array_equal(ours.credits, theirs.credits)
    two = [[{"teacher/good": 1.0, "judge/good": 1.0}] * 3]
    with pytest.raises(UserError, match="asks for 'good', and the reward has teacher/good, judge"):
        posterior(samples_of([[0.0] * 3], attributes=two), method, config)
    found = posterior(samples_of([[0.0] * 3], attributes=[[None, *RATED[0][1:]]]), method, config)
    assert not found.credits[0, 0] and found.learned.tolist() == [[False, True, True]]
    unrewarded = posterior(samples_of([[0.0, np.nan, 0.0]], attributes=RATED), method, config)
    assert unrewarded.learned.tolist() == [[True, False, True]]
    none = posterior(samples_of([[0.0] * 3], attributes=[[None] * 3]), method, config)
    assert not none.credits.any() and not none.learned.any()


def test_generalized_advantages_are_the_sum_that_defines_them(rng):
    lengths, starts = np.asarray([3, 1, 4]), np.asarray([2, 7, 9])
    rewards, values = rng.normal(size=(2, 15))
    discount, smoothing = 0.9, 0.7
    expected = np.zeros(15)
    for start, length in zip(starts, lengths):
        for t in range(length):
            for k in range(length - t):
                at = start + t + k
                after = values[at + 1] if t + k + 1 < length else 0.0
                step = rewards[at] + discount * after - values[at]
                expected[start + t] += (discount * smoothing) ** k * step
    found = generalized_advantages(rewards, values, starts, lengths, discount, smoothing)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_critic_loses_the_larger_of_two_squared_errors(rng):
    found, old, returns = rng.normal(size=(3, 2, 6))
    predicting = rng.random((2, 6)) < 0.7
    shares = predicting & (rng.random((2, 6)) < 0.8)
    arrays = [x.astype(np.float32) for x in (old, returns, shares)]
    slots = np.zeros((2, 6), np.int32)
    targets: Any = Rollouts._make([predicting, slots, TokenReturns._make(arrays)])
    objective = make_critic_objective(0.2)
    ours = objective.loss(
        jnp.asarray(found, jnp.float32)[..., None], targets, objective.weights(targets)
    )
    held = np.clip(found, old - 0.2, old + 0.2)
    errors = np.maximum((found - returns) ** 2, (held - returns) ** 2)
    assert float(ours) == pytest.approx(0.5 * errors[shares].mean(), rel=1e-5)
