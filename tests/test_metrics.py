import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rmjax.metrics import attribute_metrics, pair_agreement, validation_loss


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
    assert validation_loss(score[:, None], label[:, None]) == pytest.approx(expected, rel=1e-12)


def test_validation_loss_is_over_labels_and_not_a_mean_of_means():
    labels = np.asarray([[0.0, np.nan], [0.0, np.nan], [0.0, 4.0]])
    scores = np.asarray([[1.0, 9.0], [1.0, 9.0], [1.0, 1.0]])
    assert validation_loss(scores, labels) == pytest.approx((1 + 1 + 1 + 9) / 4)
