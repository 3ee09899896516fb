"""The ridge against normal equations written out, and against fits without each prompt."""

import numpy as np
import pytest

from rmjax.errors import UserError
from rmjax.training.probing.ridge import STRENGTHS, fit_ridge

NAMES = ("a", "b", "c")


def problem(rng: np.random.Generator, count: int, width: int):
    """Features with a large mean, ratings around 3 of which some are missing, three a prompt."""
    features = rng.standard_normal((count, width)) * np.geomspace(3, 0.1, width) + 2
    labels = 3 + features @ rng.standard_normal((width, 3)) / width
    labels += 0.3 * rng.standard_normal(labels.shape)
    labels[rng.random(labels.shape) < 0.2] = np.nan
    labels[:, 2] = labels[:, 1]  # attributes with the same ratings missing
    features, labels = features.astype(np.float32), labels.astype(np.float32)
    return features, labels, np.arange(count) // 3


def by_hand(features, y, relative):
    """The head, the unit mean feature and the penalty: `(F'F + strength (1 - mm')) w = F'y`."""
    mean = features.mean(axis=0)
    m = mean / np.sqrt(mean @ mean)
    penalised = np.eye(len(m)) - np.outer(m, m)
    along = features @ m
    rest = (np.eye(len(y)) - np.outer(along, along) / (along @ along)) @ features @ penalised
    strength = relative * np.linalg.eigvalsh(rest.T @ rest).max()
    penalty = strength * penalised
    return np.linalg.solve(features.T @ features + penalty, features.T @ y), penalty


def left_out_by_hand(features, y, groups, relative):
    _, penalty = by_hand(features, y, relative)
    scores = np.empty(len(y))
    for group in np.unique(groups):
        own = groups == group
        f = features[~own]
        scores[own] = features[own] @ np.linalg.solve(f.T @ f + penalty, f.T @ y[~own])
    return scores


@pytest.mark.parametrize("count, width", [(90, 12), (30, 50)])
def test_the_head_solves_the_normal_equations(count, width, rng):
    features, labels, groups = problem(rng, count, width)
    found = fit_ridge(features, labels, groups, NAMES)
    for column in range(3):
        there = ~np.isnan(labels[:, column])
        f, y, own = (
            features[there].astype(float),
            labels[there, column].astype(float),
            groups[there],
        )
        errors = [np.square(left_out_by_hand(f, y, own, s) - y).mean() for s in STRENGTHS]
        best = STRENGTHS[int(np.argmin(errors))]
        assert found.strengths[column] == best
        expected, penalty = by_hand(f, y, best)
        np.testing.assert_allclose(found.head[:, column], expected, rtol=2e-4, atol=2e-6)
        hat = f @ np.linalg.solve(f.T @ f + penalty, f.T)
        assert found.freedom[column] == pytest.approx(np.trace(hat), rel=1e-6)
        scores = left_out_by_hand(f, y, own, best)
        np.testing.assert_allclose(found.left_out[there, column], scores, rtol=1e-5, atol=1e-5)
        assert np.isnan(found.left_out[~there, column]).all()


def test_a_constant_costs_nothing(rng):
    """Ratings that are all 3.5, and features whose mean is all they share: no shrinking to 0."""
    features = np.concatenate([np.full((40, 1), 7.0), rng.standard_normal((40, 5))], axis=1)
    features[:, 1:] -= features[:, 1:].mean(axis=0)
    labels = np.full((40, 1), 3.5, np.float32)
    found = fit_ridge(features.astype(np.float32), labels, np.arange(40), ("a",))
    np.testing.assert_allclose(features @ found.head, labels, rtol=1e-5)


def test_one_prompt_cannot_be_left_out(rng):
    features, labels, _ = problem(rng, 6, 4)
    with pytest.raises(UserError, match=r"attribute '[abc]' has ratings for fewer than 2 prompts"):
        fit_ridge(features, labels, np.zeros(6, int), NAMES)
