import math

import numpy as np
import pytest

from rmjax.errors import UserError
from rmjax.models.rewards.aggregation import PUBLISHED, scalar_rule

FIVE = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        # Model cards of Llama3-70B-SteerLM-RM and Nemotron-4-340B-Reward.
        ("llama3_70b_rewardbench", [0.65, 0.8, 0.45, 0.55, -0.4]),
        ("nemotron4_340b_rewardbench", [0.3, 0.74, 0.46, 0.47, -0.33]),
        ("goodness", [0.65, 0.8, 0.45, 0, 0]),
    ],
)
def test_published_vectors(name, vector):
    rule = scalar_rule(name, FIVE)
    assert rule.name == name
    np.testing.assert_array_equal(rule.vector(FIVE), np.asarray(vector, np.float32))


def test_every_published_vector_is_tested_above_and_leads_to_no_other():
    assert len(PUBLISHED) == 3
    scalar_rule("goodness", FIVE).weights["helpfulness"] = 7.0
    assert scalar_rule("goodness", FIVE).weights["helpfulness"] == 0.65


def test_an_attribute_is_a_rule():
    rule = scalar_rule("coherence", FIVE)
    assert rule == ("coherence", {"coherence": 1.0}, FIVE)
    assert rule.vector(FIVE).tolist() == [0, 0, 1, 0, 0]
    assert scalar_rule({"coherence": 1}, FIVE) == rule


def test_weights_by_attribute_say_their_name_and_follow_the_models_order():
    rule = scalar_rule({"verbosity": -0.5, "helpfulness": 2}, FIVE)
    assert rule.name == "-0.5*verbosity +2*helpfulness"
    assert rule.vector(FIVE).tolist() == [2, 0, 0, 0, -0.5]
    assert rule.vector(FIVE[::-1]).tolist() == [-0.5, 0, 0, 0, 2]


def test_values_are_weighted_sums_whatever_the_leading_axes(rng):
    """In float64, and of each response by itself."""
    rule = scalar_rule({"verbosity": -0.5, "helpfulness": 2}, FIVE)
    scores = rng.normal(size=(2, 3, 5)).astype(np.float32)
    expected = 2 * scores[..., 0].astype(np.float64) - 0.5 * scores[..., 4].astype(np.float64)
    assert rule.values(scores).dtype == np.float64
    np.testing.assert_allclose(rule.values(scores), expected, rtol=1e-15)
    np.testing.assert_array_equal(rule.values(scores[1, :1]), rule.values(scores)[1, :1])


def test_an_attribute_goes_before_a_published_vector_of_its_name():
    assert scalar_rule("goodness", ("goodness", "x")).vector(("goodness", "x")).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rule", "attributes", "said"),
    [
        ("kindness", FIVE, "'kindness': neither an attribute .* nor a published vector"),
        ("goodness", FIVE[:2], "'goodness': the model has no attribute 'coherence'; it has helpf"),
        ({"kindness": 1.0}, FIVE, "no attribute 'kindness'"),
        ({"kindness": 2.0, "coherence": 1}, FIVE, "no attribute 'kindness'"),
        ({"goodness": 1.0}, FIVE, "no attribute 'goodness'"),
        ({}, FIVE, "a weight that is not 0"),
        ({"coherence": 0, "verbosity": 1e-60}, FIVE, "a weight that is not 0"),
        ({"coherence": math.nan}, FIVE, "the weight of 'coherence' is nan, expected a number"),
        ({"coherence": -math.inf}, FIVE, "is -inf, expected a number below"),
        ({"coherence": 10**400}, FIVE, "expected a number below"),
        ({"coherence": 1e39}, FIVE, r"is 1e\+39, expected a number below 1e\+30"),
        ({"coherence": "much"}, FIVE, "is 'much', expected a number"),
        ({"coherence": "1"}, FIVE, "is '1', expected a number"),
        ({"coherence": True}, FIVE, "is True, expected a number"),
        ({"coherence": None}, FIVE, "is None, expected a number"),
        (5, FIVE, "scalar rule 5: expected a name, or attributes with weights"),
    ],
)
def test_what_a_model_cannot_do_is_an_error(rule, attributes, said):
    with pytest.raises(UserError, match=said):
        scalar_rule(rule, attributes)
