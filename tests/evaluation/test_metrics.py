import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from rmjax.evaluation.metrics import (
    attribute_metrics,
    calibration_error,
    fit_temperature,
    mean_ratings,
    pair_agreement,
    pair_metrics,
    wilson_interval,
)


def one(score, label, groups=None, constant=0.0):
    """Metrics of a single attribute."""
    score, label = np.asarray(score, np.float32)[:, None], np.asarray(label, np.float32)[:, None]
    groups = np.arange(len(score)) if groups is None else np.asarray(groups)
    return attribute_metrics(["a"], score, label, groups, np.asarray([constant]))["a"]


def pairs_by_hand(score, label, groups):
    agreed, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(score)), 2):
        if groups[i] == groups[j] and label[i] != label[j]:
            pairs += 1
            if score[i] == score[j]:
                agreed += 0.5
            elif (score[i] > score[j]) == (label[i] > label[j]):
                agreed += 1
    return agreed, pairs


def test_by_hand():
    metrics = one([1, 2, 4], [0, 2, 1], constant=2.0)
    assert metrics.count == 3
    assert metrics.mse == pytest.approx((1 + 0 + 9) / 3)
    assert metrics.mse_constant == pytest.approx((4 + 0 + 1) / 3)
    # Deviations (-4, -1, 5)/3 and (-1, 1, 0): covariance 1, variances 14/3 and 2.
    assert metrics.pearson == pytest.approx(1 / math.sqrt(14 / 3 * 2))
    assert metrics.spearman == pytest.approx(0.5)  # ranks 1 2 3 against 1 3 2


@settings(max_examples=100, deadline=None)
@given(
    samples=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 1.5]),
            st.sampled_from([math.nan, 0.0, 1.0, 2.0]),
            st.integers(0, 4),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_against_numpy_and_brute_force_with_ties_and_gaps(samples):
    score, label, groups = (np.asarray(column) for column in zip(*samples))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing undefined is computed
        metrics = one(score, label, groups, constant=1.25)
    there = ~np.isnan(label)
    score, label, groups = score[there], label[there], groups[there]

    assert metrics.count == len(label)
    agreed, pairs = pairs_by_hand(score, label, groups)
    assert metrics.pairs == pairs
    np.testing.assert_allclose(metrics.pair_accuracy, agreed / pairs if pairs else np.nan)
    if not len(label):
        assert math.isnan(metrics.mse) and math.isnan(metrics.mse_constant)
        return
    np.testing.assert_allclose(metrics.mse, ((score - label) ** 2).mean())
    np.testing.assert_allclose(metrics.mse_constant, ((label - 1.25) ** 2).mean())
    if len(set(score)) == 1 or len(set(label)) == 1:
        assert math.isnan(metrics.pearson) and math.isnan(metrics.spearman)
    else:
        ranks = stats.rankdata(score), stats.rankdata(label)  # ties at their mean rank
        np.testing.assert_allclose(metrics.pearson, np.corrcoef(score, label)[0, 1], atol=1e-12)
        np.testing.assert_allclose(metrics.spearman, np.corrcoef(*ranks)[0, 1], atol=1e-12)


def test_each_attribute_has_its_own_column_gaps_and_constant(rng):
    scores = rng.normal(size=(40, 3)).astype(np.float32)
    labels = rng.integers(0, 5, (40, 3)).astype(np.float32)
    labels[rng.random((40, 3)) < 0.3] = np.nan
    groups = np.repeat(np.arange(20), 2)
    constants = np.asarray([1.0, 2.0, 3.0])
    table = attribute_metrics(["x", "y", "z"], scores, labels, groups, constants)
    assert list(table) == ["x", "y", "z"]
    for i, metrics in enumerate(table.values()):
        assert metrics == one(scores[:, i], labels[:, i], groups, constants[i])


def test_constant_scores_have_no_correlation_and_half_of_the_pairs():
    metrics = one([2, 2, 2, 2], [0, 1, 2, 2], groups=[0, 0, 1, 1])
    assert math.isnan(metrics.pearson) and math.isnan(metrics.spearman)
    assert (metrics.pair_accuracy, metrics.pairs) == (0.5, 1)


def test_no_pairs_is_not_an_accuracy_of_zero():
    metrics = one([1, 2, 3], [1, 1, 3], groups=[0, 0, 1])
    assert metrics.pairs == 0 and math.isnan(metrics.pair_accuracy)


def test_pairs_are_of_one_prompt_wherever_its_samples_stand():
    assert pair_agreement(
        np.asarray([1.0, 5.0, 2.0, 4.0]), np.asarray([1.0, 1.0, 2.0, 2.0]), np.asarray([0, 1, 0, 1])
    ) == (1.0, 2)


def test_a_mean_over_many_float32_scores_is_taken_in_float64(rng):
    score = (10_000 + rng.normal(size=5_000)).astype(np.float32)
    label = rng.integers(0, 5, len(score)).astype(np.float32)
    expected = math.fsum((float(s) - float(y)) ** 2 for s, y in zip(score, label)) / len(score)
    assert one(score, label).mse == pytest.approx(expected, rel=1e-12)


# ---- preference pairs ----------------------------------------------------------------------------


def one_pair_metrics(margins, strengths=None, lengths=None):
    margins = np.asarray(margins, np.float32)
    strengths = np.full(len(margins), np.nan) if strengths is None else np.asarray(strengths)
    lengths = np.ones((len(margins), 2), int) if lengths is None else np.asarray(lengths)
    return pair_metrics("reward", margins + 3, np.full_like(margins, 3), strengths, lengths)


def test_pair_metrics_by_hand():
    found = one_pair_metrics([2, -1, 0, 1], [1, 1, 2, 3])
    assert (found.attribute, found.pairs, found.accuracy) == ("reward", 4, 2.5 / 4)
    assert found.mean_margin == 0.5
    assert found.by_strength == {"1": (0.5, 2), "2": (0.5, 1), "3": (1.0, 1)}


def test_ties_in_the_data_are_no_pairs():
    found = one_pair_metrics([2, -1, 5], [1, 1, 0])
    assert (found.pairs, found.accuracy, found.mean_margin) == (2, 0.5, 0.5)


def test_no_pairs_have_no_numbers():
    found = one_pair_metrics([1.0], [0.0])
    numbers = dataclasses.astuple(found)[2:-1]
    assert found.pairs == 0 and all(math.isnan(x) for x in numbers) and found.by_strength == {}


def test_wilson_interval_is_the_published_one():
    """Newcombe (1998), table I: 81 of 263 and 15 of 148."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_calibration_error_by_hand():
    # Confidences .5 (a tie, half right), .6, .65 and .95; bins of .05.
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    margins = [0.0, logit(0.61), -logit(0.64), logit(0.96)]
    expected = (abs(0.5 - 0.5) + abs((1 - 0.61) + (0 - 0.64)) + abs(1 - 0.96)) / 4
    assert calibration_error(np.asarray(margins)) == pytest.approx(expected)


def test_a_reward_that_is_calibrated_has_temperature_one(rng):
    """Labels drawn from sigmoid(margin / 2.5): that temperature is found."""
    margins = rng.normal(0, 4, 200_000)
    chosen = rng.random(len(margins)) < special.expit(margins / 2.5)
    margins = np.where(chosen, margins, -margins)
    assert fit_temperature(margins) == pytest.approx(2.5, rel=0.02)
    assert calibration_error(margins / 2.5) < 0.005 < calibration_error(margins)


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], []])
def test_no_temperature_where_none_is_best(margins):
    assert math.isnan(fit_temperature(np.asarray(margins)))


def test_correlation_with_length_is_over_responses():
    found = one_pair_metrics([1, 2], lengths=[[10, 1], [20, 1]])
    expected = np.corrcoef([4, 3, 5, 3], [10, 1, 20, 1])[0, 1]
    assert found.length_correlation == pytest.approx(expected)


def test_mean_ratings_of_nothing_are_none():
    labels = np.asarray([[1.0, np.nan, 2.0], [2.0, np.nan, np.nan]])
    np.testing.assert_array_equal(mean_ratings(labels), [1.5, np.nan, 2.0])
