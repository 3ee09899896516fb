"""What multiplies the gradient of each sample's log-probability: one function for each way.

Whatever a method is called, its gradient is a sum over samples of a credit times the gradient of
log(policy). All in float64, on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float64

from rmjax.alignment.advantages import advantages_of, shaped_rewards
from rmjax.config import AlignConfig
from rmjax.errors import UserError
from rmjax.training.objectives.rollouts import Method, parse_ratings

Numbers = Float64[np.ndarray, "P n"]

_PRECISION = 24.0  # a + b of the Beta distribution of a rating (HelpSteer2, arXiv 2406.08673)
_LEAST = 1e-30  # a probability below this counts as this


class Samples(NamedTuple):
    """What is known of the samples of each prompt.

    Attributes:
      rewards: less penalties; NaN where there is none.
      ended: whether each came to an end by itself.
      learnable: which may be learned from.
      lengths: tokens of each.
      old: its log-probability by the policy that sampled it.
      now: by the policy as it is.
      reference: by the reference.
      absolutes: the sum over its tokens of abs(log(old / reference)).
      attributes: of each sample that has some, by name; else None.
    """

    rewards: Numbers
    ended: Bool[np.ndarray, "P n"]
    learnable: Bool[np.ndarray, "P n"]
    lengths: Numbers
    old: Numbers
    now: Numbers
    reference: Numbers
    absolutes: Numbers
    attributes: list[list[dict[str, float] | None]] | None = None


class Credit(NamedTuple):
    """What the samples of each prompt count.

    Attributes:
      credits: of each.
      learned: which are in the mean that the loss is.
      numbers: what else there is to say.
    """

    credits: Numbers
    learned: Bool[np.ndarray, "P n"]
    numbers: dict[str, float]


def compared(samples: Samples, method: Method, config: AlignConfig) -> Credit:
    """By how the rewards of a prompt's samples differ; see `advantages.py`."""
    change = samples.old - samples.reference
    rewards = shaped_rewards(samples.rewards, change, samples.absolutes, samples.lengths, method)
    return Credit(
        advantages_of(rewards, samples.ended, method),
        samples.learnable & ~np.isnan(rewards),
        {},
    )


def best(samples: Samples, method: Method, config: AlignConfig) -> Credit:
    """Only the best of each prompt's samples, which is imitated (rejection sampling)."""
    known, first, _ = _extremes(samples)
    learned = np.zeros(known.shape, bool)
    rows = np.flatnonzero(known.any(axis=1))
    learned[rows, first[rows]] = True
    return Credit(learned.astype(np.float64), learned, {})


def pair(samples: Samples, method: Method, config: AlignConfig) -> Credit:
    """The best and the worst of each prompt's samples, by the gradient of DPO's loss.

    The loss is -log sigmoid(m) with m = beta x (log(policy / reference) of the best less that of
    the worst), and its gradient by each of the two log-probabilities -/+ beta x sigmoid(-m)
    (arXiv 2305.18290). A prompt without two different rewards has no pair.
    """
    known, first, last = _extremes(samples)
    rows = np.arange(len(known))
    change = samples.now - samples.reference
    margins = method.kl * (change[rows, first] - change[rows, last])
    apart = known.sum(axis=1) > 1
    apart &= samples.rewards[rows, first] > samples.rewards[rows, last]
    credits = np.zeros(known.shape)
    # The loss is a mean over pairs, and what divides it counts samples.
    weights = 2 * method.kl * scipy.special.expit(-margins)
    credits[rows[apart], first[apart]] = weights[apart]
    credits[rows[apart], last[apart]] = -weights[apart]
    found = {}
    if apart.any():
        losses = np.logaddexp(0.0, -margins[apart])
        found = {"dpo_loss": losses.mean(), "dpo_accuracy": (margins[apart] > 0).mean()}
    return Credit(credits, credits != 0, {name: float(value) for name, value in found.items()})


def posterior(samples: Samples, method: Method, config: AlignConfig) -> Credit:
    """How much more probable samples should be if answers shall have certain ratings: SteerLM 2.0.

    The policy Q shall become P(y | a, x), which is proportional to P(a | x, y) P(y | x): the
    reward model's probability of the ratings a, and the reference. Of the samples of one prompt,
    drawn from the policy Q' of the step, that one has the weights w = softmax(log P(a | x, y) +
    log P(y | x) - log Q'(y | x)), and Q itself b = softmax(log Q - log Q'). The gradient is the sum
    of -(w - b) x the gradient of log Q (HelpSteer2, arXiv 2406.08673; NeMo-Aligner divides it by
    the mean number of tokens, as here).
    """
    wanted = parse_ratings(config.policy_gradient.ratings)
    likelihood = _of_ratings(samples.attributes, wanted, config.data.label_range)
    known = samples.learnable & ~np.isnan(samples.rewards) & ~np.isnan(likelihood)
    nowhere = np.where(known.any(axis=1, keepdims=True), -np.inf, 0.0)
    target = np.where(known, likelihood + samples.reference - samples.old, nowhere)
    own = np.where(known, samples.now - samples.old, nowhere)
    weights, baseline = (scipy.special.softmax(logits, axis=1) for logits in (target, own))
    found = {
        "steerlm_samples": float((1 / np.square(weights).sum(axis=1)).mean()),
        "steerlm_divergence": float(scipy.special.rel_entr(weights, baseline).sum(axis=1).mean()),
    }
    return Credit(np.where(known, weights - baseline, 0.0), known, found)


CREDITS: dict[str, Callable[[Samples, Method, AlignConfig], Credit]] = {
    "compared": compared,
    "best": best,
    "pair": pair,
    "posterior": posterior,
}


def log_likelihood(wanted: float, rating: float, low: float, high: float) -> float:
    """log P(a rating is `wanted`), if a reward model says `rating`.

    Ratings over their range have a Beta distribution with mean m and the parameters 24 m and
    24 (1 - m), with `rating` as its mean (HelpSteer2). Its density is 0 or infinite at the ends of
    the range, so here it is the mass within half a point of `wanted`.
    """
    span = high - low
    mean = min(max((rating - low) / span, 0.01), 0.99)
    edges = [min(max((wanted + half - low) / span, 0.0), 1.0) for half in (-0.5, 0.5)]
    # Of the two tails the one that is not nearly 1.
    tail = scipy.special.betaincc if edges[0] > mean else scipy.special.betainc
    one, other = tail(_PRECISION * mean, _PRECISION * (1 - mean), edges)
    return float(np.log(max(abs(other - one), _LEAST)))


def _of_ratings(
    attributes: list[list[dict[str, float] | None]] | None,
    wanted: dict[str, float],
    label_range: tuple[float, float],
) -> Numbers:
    """log P(a | x, y) of each sample, NaN where there are no attributes."""
    if attributes is None:
        raise UserError("steerlm2 asks for ratings, and the reward has no attributes")
    there = dict.fromkeys(
        name for samples in attributes for found in samples for name in found or ()
    )
    if not there:
        return np.full((len(attributes), len(attributes[0])), np.nan)
    asked = {_full_name(name, list(there)): rating for name, rating in wanted.items()}

    def of(found: dict[str, float] | None) -> float:
        if found is None or not asked.keys() <= found.keys():
            return np.nan
        return sum(log_likelihood(a, found[name], *label_range) for name, a in asked.items())

    return np.asarray([[of(found) for found in samples] for samples in attributes])


def _full_name(name: str, there: list[str]) -> str:
    """An attribute's name with that of its reward before it, which may be left out if it is clear.

    Raises:
      UserError: no reward has such an attribute, or several have.
    """
    full = [other for other in there if name in (other, other.partition("/")[2])]
    if name in full or len(full) == 1:
        return name if name in full else full[0]
    raise UserError(
        f"config.policy_gradient.ratings asks for {name!r}, and the reward has "
        + ", ".join(full or there)
        + ": ask for one of these, as it is written here"
    )


def _extremes(samples: Samples) -> tuple[Bool[np.ndarray, "P n"], np.ndarray, np.ndarray]:
    """Which samples count, and of each prompt the best and the worst of these."""
    known = samples.learnable & ~np.isnan(samples.rewards)
    first = np.where(known, samples.rewards, -np.inf).argmax(axis=1)
    last = np.where(known, samples.rewards, np.inf).argmin(axis=1)
    return known, first, last
