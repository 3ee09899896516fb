import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.official import load_official
from rmjax.data.conversation import Conversation
from rmjax.errors import UserError
from rmjax.evaluation import scoring_rules
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmark_metrics import ScoredBenchmark, benchmark_metrics, score_record
from rmjax.evaluation.benchmarks import BENCHMARKS
from rmjax.evaluation.bootstrap import bootstrap_scores, percentile_interval, sign_test
from rmjax.evaluation.comparisons import Comparisons, best_of_n_curve, by_length, calibration
from rmjax.evaluation.items import Item
from rmjax.evaluation.metrics import calibration_error
from rmjax.evaluation.score_cache import ItemScores
from rmjax.evaluation.scoring_rules import Credits, weighted_mean
from rmjax.models.rewards.aggregation import scalar_rule

SAID = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}])


def item(good: int, responses: int, id: str = "1", gold=None) -> Item:
    worth = gold or [float(i < good) for i in range(responses)]
    return Item(id, "", (SAID,) * responses, good, f"file row {id}", gold=tuple(worth))


def score(rule, items, values, ties=0.0) -> float:
    return rule(items, [np.asarray(v, float) for v in values], ties).score


# ---- by hand ------------------------------------------------------------------------------------


def test_a_tie_is_wrong_or_counts_one_half():
    items = [item(1, 2)] * 4
    values = [[2, 1], [1, 2], [1, 1], [0.5, 0.25]]
    assert score(scoring_rules.pairs, items, values) == 2 / 4
    assert score(scoring_rules.pairs, items, values, ties=0.5) == 2.5 / 4


def test_best_of_four_shares_the_credit_of_a_tie():
    items = [item(1, 4)] * 5
    values = [[4, 1, 2, 3], [4, 4, 2, 3], [4, 4, 4, 4], [1, 4, 2, 3], [3, 3, 3, 1]]
    assert score(scoring_rules.best_of, items, values) == pytest.approx(
        (1 + 1 / 2 + 1 / 4 + 0 + 1 / 3) / 5
    )


def test_styles_are_the_triangles_of_the_matrix():
    # chosen (concise, detailed, markdown) against rejected likewise
    values = [[1, 3, 5], [2, 2, 4]]
    # 1 > (2, 2, 4): no no no; 3: yes yes no; 5: yes yes yes
    credits = scoring_rules.styles([item(3, 6)], [np.asarray([*values[0], *values[1]], float)], 0.0)
    easy, normal, hard = 3 / 3, (0 + 1 + 1) / 3, (0 + 0 + 0) / 3
    np.testing.assert_allclose(credits.table, [[easy, normal, hard]])
    assert credits.score == pytest.approx((easy + normal + hard) / 3)
    with pytest.raises(UserError, match="file row 1: 1 chosen and 1 rejected"):
        scoring_rules.styles([item(1, 2)], [np.zeros(2)], 0.0)


def test_ties_by_hand():
    # Prompt 0: tied right answers 5 and 4 over a wrong 1: gap 3, spread 1. Reference: 9 over 7.
    # Prompt 1: tied 3 and 1 over a wrong 2: gap -1, spread 2. Reference: 1 over 2.
    items = [item(2, 3, "tied:0"), item(1, 2, "ref:0"), item(2, 3, "tied:1"), item(1, 2, "ref:1")]
    values = [[5, 4, 1], [9, 7], [3, 1, 2], [1, 2]]
    margins = [math.tanh(min(2, 3) / 1 - 1), math.tanh(min(-1, -1) / 2 - 1)]
    expected = 0.3 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * np.mean(margins)
    assert score(scoring_rules.ties, items, values) == pytest.approx(expected)
    with pytest.raises(UserError, match="'nine', expected 'ref:N' or 'tied:N'"):
        scoring_rules.ties([item(1, 2, "nine")], [np.zeros(2)], 0.0)
    with pytest.raises(UserError, match="is there twice"):
        scoring_rules.ties([item(1, 2, "ref:1")] * 2, [np.zeros(2)] * 2, 0.0)


def test_ratings_count_each_prompt_once():
    items = [item(0, 3, gold=[3, 1, 2]), item(0, 2, gold=[1, 1]), item(0, 2, gold=[0, math.nan])]
    values = [[5, 5, 1], [1, 2], [1, 2]]  # 3>1: a tie, 3>2: right, 2>1: wrong; no other pair
    assert score(scoring_rules.ratings, items, values) == pytest.approx((0.5 + 1 + 0) / 3)


def test_correctness_counts_the_pairs_that_are_named():
    right, wrong = 2, 3
    one = dataclasses.replace(item(right, right + wrong), pairs=((0, 2), (1, 3), (1, 4), (0, 2)))
    none = item(0, 2)  # all samples are wrong: there is nothing to compare
    values = [[3, 1, 2, 0, 1], [4, 4]]  # 3 > 2 twice, 1 > 0; 1 and 1 tie
    rule = scoring_rules.correctness
    credits = rule([one, none], [np.asarray(v, float) for v in values], 0.0)
    np.testing.assert_array_equal(credits.table, [[3 / 4, 1], [np.nan, 0]])
    assert credits.score == 3 / 4  # the end score has no weight
    shared = rule([one], [np.asarray([2, 2, 2, 0, 1], float)], 0.5)
    np.testing.assert_allclose(shared.table, [[(0.5 + 1 + 1 + 0.5) / 4, 2 / 3]])


# What the authors of RM-R1 published of RM-R1-DeepSeek-Distilled-Qwen-32B on RMB, as the numbers
# of pairs and lists that are right, in the order of the table (eval/result of their repository);
# and the accuracies that their program made of them.
RM_R1 = (
    (749, 516, 130, 723, 1035, 898, 1186, 972, 352, 281, 410, 655),
    (374, 843, 538, 409, 466, 238, 364, 390, 420, 277, 713, 393),
    (118, 85, 20, 117, 200, 148, 188, 160, 61, 42, 65, 103),
    (83, 166, 93, 84, 84, 48, 64, 75, 81, 49, 123, 86),
)
RM_R1_SCORES = (0.78544, 0.76798, 0.61972, 0.61777)


def test_rmb_gives_what_was_published():
    benchmark = BENCHMARKS["rmb"]
    blank = {"Pairwise/Translation": 5, "Pairwise/S5": 2}
    values = {}
    for section, numbers in zip(benchmark.sections, RM_R1, strict=True):
        for subset, right in zip(section.subsets, numbers, strict=True):
            count = subset.count + blank.get(subset.name, 0)
            values[subset.name] = np.repeat([[1, 0], [0, 1]], [right, count - right], axis=0)
    metrics = benchmark_metrics(judged(benchmark, values), scalar_rule("x", ("x",)))
    scores = metrics.scores()
    sections = [metrics.of_section(scores, section) for section in metrics.sections]
    assert sections == pytest.approx(RM_R1_SCORES, abs=4e-5)  # the seven weigh nothing here
    assert metrics.total(scores) == pytest.approx(0.69773, abs=2e-5)


def test_a_list_is_right_if_the_best_is_above_all():
    values = [[3, 1, 2], [3, 3, 2], [2, 1, 3]]
    assert score(scoring_rules.pairs, [item(1, 3)] * 3, values) == 1 / 3


def test_languages_are_scored_as_reward_bench(rng):
    """By section and language, then over languages; a language may have any accuracies."""
    benchmark, sections = BENCHMARKS["m-reward-bench"], BENCHMARKS["reward-bench"].sections
    values, expected = {}, []
    for language in benchmark.sections:
        right = {s.name.partition("/")[2]: rng.integers(0, 6) for s in language.subsets}
        counts = {s.name.partition("/")[2]: s.count for s in language.subsets}
        counts["math-prm"] = 983
        for name, n in right.items():
            values[f"{language.name}/{name}"] = np.repeat([[1, 0], [0, 1]], [n, 5 - n], axis=0)
        means = [
            np.average(
                [right[u.name] / 5 for u in s.subsets], weights=[counts[u.name] for u in s.subsets]
            )
            for s in sections
        ]
        expected.append(np.mean(means))
    metrics = benchmark_metrics(judged(benchmark, values), scalar_rule("x", ("x",)))
    found = [metrics.of_section(metrics.scores(), section) for section in metrics.sections]
    assert found == pytest.approx(expected)
    assert metrics.total(metrics.scores()) == pytest.approx(np.mean(expected))


# ---- the official package -----------------------------------------------------------------------


def coarse(rng, *shape) -> np.ndarray:
    """Scores of which many are equal."""
    return np.round(rng.normal(0, 1.5, shape))


def judged(benchmark, values: dict[str, np.ndarray]) -> ScoredBenchmark:
    """Items of one good response each, by subset, with their values."""
    data = BenchmarkData.__new__(BenchmarkData)
    data.benchmark, data.label = benchmark, benchmark.name
    items = [
        dataclasses.replace(item(1, len(row)), subset=name)
        for name, rows in values.items()
        for row in rows
    ]
    scores = [
        ItemScores(row[:, None], np.zeros(len(row), int), np.zeros(len(row), bool))
        for rows in values.values()
        for row in rows
    ]
    data.items = items
    return ScoredBenchmark.of(data, ("x",), scores, "truncate_left")


def test_reward_bench_gives_the_official_table(rng):
    constants, utils = load_official()
    benchmark = BENCHMARKS["reward-bench"]
    values = {u.name: coarse(rng, u.count, 2) for s in benchmark.sections for u in s.subsets}
    # as the official program has it, sample by sample
    right = {
        name: np.mean([1 if chosen > rejected else 0 for chosen, rejected in rows])
        for name, rows in values.items()
    }
    official = utils.calculate_scores_per_section(
        constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, right
    )
    found = score_record(benchmark_metrics(judged(benchmark, values), scalar_rule("x", ("x",))))
    assert {s["name"]: s["score"] for s in found["sections"]} == pytest.approx(official, abs=1e-12)
    assert found["overall"]["score"] == pytest.approx(np.mean(list(official.values())))
    for figure in (found["overall"], *found["sections"]):
        assert figure["low"] < figure["score"] < figure["high"]


def test_judge_bench_counts_every_pair_the_same(rng):
    benchmark = BENCHMARKS["judge-bench"]
    values = {s.name: coarse(rng, s.subsets[0].count, 2) for s in benchmark.sections}
    found = score_record(benchmark_metrics(judged(benchmark, values), scalar_rule("x", ("x",))))
    every = np.concatenate(list(values.values()))
    assert found["overall"]["score"] == pytest.approx(np.mean(every[:, 0] > every[:, 1]))


def test_the_table_is_the_official_one():
    constants, _ = load_official()
    sections = BENCHMARKS["reward-bench"].sections
    weights = {subset.name: subset.weight for s in sections for subset in s.subsets}
    assert weights == constants.EXAMPLE_COUNTS
    assert {s.name: [u.name for u in s.subsets] for s in sections} == constants.SUBSET_MAPPING


def test_best_of_four_is_the_official_one(rng):
    import datasets

    _, utils = load_official()
    values = coarse(rng, 50, 4)
    rows = datasets.Dataset.from_dict(
        {"scores": values.ravel().tolist(), "id": np.repeat(np.arange(50), 4).tolist()}
    )
    official = utils.reroll_and_score_dataset(rows, [4] * 50, cols_to_combine=["scores"])
    mine = scoring_rules.best_of([item(1, 4)] * 50, list(values), 0.0)
    np.testing.assert_allclose(mine.table[:, 0], official["results"])


def test_ties_are_the_official_ones(rng):
    _, utils = load_official()
    for _ in range(20):
        items, values, samples = [], [], []
        for prompt in range(6):
            for kind, good in (("ref", 1), ("tied", int(rng.integers(1, 5)))):
                if rng.random() < 0.1:
                    continue  # a prompt that lost its counterpart
                found = coarse(rng, good + 3)
                items.append(item(good, good + 3, f"{kind}:{prompt}"))
                values.append(found)
                samples.append(
                    {"id": f"{kind}:{prompt}", "num_correct": good, "scores": found.tolist()}
                )
        _, official = utils.process_single_model(samples)
        np.testing.assert_allclose(score(scoring_rules.ties, items, values), official, atol=1e-12)


def test_counts_are_the_published_ones():
    totals = {"reward-bench": 2985, "reward-bench-2": 1865, "rm-bench": 1327}
    totals |= {"judge-bench": 350, "llmbar": 419, "ppe-correctness": 2555}
    totals |= {
        "m-reward-bench": 23 * 2869,
        "rmb": 17_131 + 3_786 - 7,
    }  # seven have nothing to judge
    for name, total in totals.items():
        counts = [u.count for s in BENCHMARKS[name].sections for u in s.subsets]
        assert sum(counts) == total, name


# ---- statistics ---------------------------------------------------------------------------------


def expected_best(value, gold, n) -> float:
    """Over all choices of n, by enumeration; a tie is broken at random."""
    found = []
    for chosen in itertools.combinations(range(len(value)), n):
        top = max(value[i] for i in chosen)
        found.append(np.mean([gold[i] for i in chosen if value[i] == top]))
    return float(np.mean(found))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6))
def test_best_of_n_is_exact(responses):
    value, gold = np.asarray(responses, float).T
    for point in best_of_n_curve([value, value], [gold, gold]):
        assert point["chosen"] == pytest.approx(expected_best(value, gold, point["n"]))
        assert point["best"] == pytest.approx(expected_best(gold, gold, point["n"]))


def test_intervals_are_of_units_and_repeat():
    credits = Credits(("a",), (1.0,), np.arange(200)[:, None] % 2 * 1.0, ())
    first, second = bootstrap_scores(credits, (0, 1)), bootstrap_scores(credits, (0, 1))
    np.testing.assert_array_equal(first, second)
    low, high = percentile_interval(first)
    normal = 1.96 * 0.5 / np.sqrt(200)
    assert abs(low - (0.5 - normal)) < 0.01 and abs(high - (0.5 + normal)) < 0.01


def test_a_column_without_anything_counts_nothing():
    table = np.asarray([[1.0, np.nan], [0.0, np.nan]])
    assert weighted_mean(table[None], (0.5, 0.5))[0] == 0.25
    assert math.isnan(weighted_mean(np.zeros((1, 0, 2)), (0.5, 0.5))[0])


def test_the_sign_test_is_mcnemars(rng):
    first, second = rng.integers(0, 2, (2, 60)).astype(float)
    wins = int(((first == 1) & (second == 0)).sum())
    losses = int(((first == 0) & (second == 1)).sum())
    found = sign_test(first, second)
    assert (found["wins"], found["losses"]) == (wins, losses)
    # twice the smaller tail of a fair coin
    tail = stats.binom.cdf(min(wins, losses), wins + losses, 0.5)
    assert found["p"] == pytest.approx(min(1.0, 2 * tail))
    assert sign_test(first, first)["p"] == 1.0


def test_a_taste_for_length_gets_one_half():
    longer = np.asarray([5, 3, 2, -1])
    found = Comparisons(longer * 0.1, longer)  # the value is the length
    lengths = [np.asarray([n + 10, 10]) for n in longer]
    report = by_length(found, [x * 0.1 for x in lengths], lengths)
    assert report["parts"]["good is longer"] == {"pairs": 3, "accuracy": 1.0}
    assert report["parts"]["good is shorter"] == {"pairs": 1, "accuracy": 0.0}
    assert report["balanced"] == 0.5
    assert report["correlation"] == pytest.approx(1.0)
    assert [b["pairs"] for b in report["bins"]] == [1, 1, 1, 1]


def test_calibration_by_bins_is_the_metric(rng):
    margins = rng.normal(0.5, 2, 300)
    found = calibration(margins)
    gaps = [b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in found["bins"] if b["pairs"]]
    assert sum(gaps) / 300 == pytest.approx(calibration_error(margins))
    assert found["error"] == pytest.approx(calibration_error(margins))
    assert calibration(np.asarray([1.0, 2.0]))["temperature"] is None  # all right: none is best
