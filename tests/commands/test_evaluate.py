import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

import rmjax
from helpers import forked
from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from rmjax.errors import UserError
from rmjax.evaluate import report_evaluation
from rmjax.evaluation.benchmark_data import BenchmarkData, read_benchmarks
from rmjax.evaluation.benchmark_metrics import ScoredBenchmark, model_comparison
from rmjax.evaluation.benchmarks import BENCHMARKS
from rmjax.evaluation.fit_weights import fit_weights, read_weights, write_weights
from rmjax.evaluation.model_evaluation import all_rules, evaluate_model
from rmjax.evaluation.model_scores import (
    ModelScores,
    ScoringSettings,
    length_scores,
    read_scores,
    score_model,
)
from rmjax.evaluation.score_cache import ItemScores, ScoreCache, score_items
from rmjax.inference.scorer import Scorer
from rmjax.models.rewards.aggregation import PUBLISHED, ScalarRule, scalar_rule
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.runtime.sharding import MeshConfig

HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SETTINGS = ScoringSettings(0, "truncate_left", "auto", "", MeshConfig())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    decoder = tiny_llama(max_position_embeddings=256)
    return str(save_hf(tmp_path_factory.mktemp("hf"), decoder, names=HELPSTEER2))


@pytest.fixture(scope="module")
def scorer(model):
    return rmjax.load(model, over_long="truncate_left")


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict]:
    return [
        {"prompt": f"Question {i}?", "chosen": f"yes {'a' * (i % 5)}", "rejected": f"no {i % 3}"}
        for i in range(count)
    ]


def read(name, source, **options) -> BenchmarkData:
    return BenchmarkData(BENCHMARKS[name], source, **options)


# ---- scores, once -------------------------------------------------------------------------------


class Counting(Scorer):
    """A scorer that counts what it is asked, and may be killed."""

    def __init__(self, scorer, quota=10**9):
        self.scorer, self.quota, self.asked = scorer, quota, []
        self.model, self.encode, self.encoder = scorer.model, scorer.encode, scorer.encoder

    def score_encoded(self, encoded):
        if len(self.asked) >= self.quota:
            raise KeyboardInterrupt
        self.asked += [e.tokens.tobytes() for e in encoded]
        return self.scorer.score_encoded(encoded)


def test_no_text_is_scored_twice(scorer, tmp_path):
    rows = pairs(6)
    rows += [rows[0], {"prompt": rows[1]["prompt"], "chosen": "no 1", "rejected": "new"}]
    both = [
        read("best-of-n", write(tmp_path / "a.jsonl", rows)),
        read("pairs", write(tmp_path / "b.jsonl", rows[:3])),
    ]
    counting = Counting(scorer)
    found = score_items(counting, both, ScoreCache(tmp_path / "s.jsonl", scorer.attributes))
    assert len(counting.asked) == len(set(counting.asked)) == 13
    np.testing.assert_array_equal(found[0][0].scores, found[0][6].scores)
    np.testing.assert_array_equal(found[0][1].scores, found[1][1].scores)
    direct = scorer.score_many([c.messages for c in both[0].items[2].conversations])
    expected = [list(score.attributes.values()) for score in direct]
    np.testing.assert_allclose(found[0][2].scores, expected, atol=1e-5)


def test_a_killed_evaluation_goes_on(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.evaluation.score_cache._AT_ONCE", 1)  # for each of the eight devices
    data = [read("pairs", write(tmp_path / "a.jsonl", pairs(10)))]
    killed = Counting(scorer, quota=8)
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_items(killed, data, ScoreCache(path, scorer.attributes))
    with open(path, "a") as file:
        file.write('{"key": "half a li')  # a kill in the middle of a line
    again = Counting(scorer)
    found = score_items(again, data, ScoreCache(path, scorer.attributes))
    assert not set(killed.asked) & set(again.asked)
    assert len(killed.asked) + len(again.asked) == 20
    whole = score_items(scorer, data, ScoreCache(tmp_path / "t.jsonl", scorer.attributes))
    for one, other in zip(found[0], whole[0]):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    nobody = Counting(scorer)
    score_items(nobody, data, ScoreCache(path, scorer.attributes))
    assert not nobody.asked


def test_a_store_of_something_else_is_refused(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="not a line of this program's"):
        ScoreCache(tmp_path / "s.jsonl", ("a",))


def test_other_weights_or_settings_have_their_own_scores(model, tmp_path):
    data = [read("pairs", write(tmp_path / "a.jsonl", pairs(2)))]
    score_model(model, data, SETTINGS, tmp_path)
    score_model(model, data, ScoringSettings(99, "drop", "auto", "", MeshConfig()), tmp_path)
    assert len(list((tmp_path / "scores").iterdir())) == 2
    again = score_model(model, data, SETTINGS, tmp_path)
    assert again.work["conversations"] == 0 and again.work["known before"] == 4


def test_a_named_template_is_of_the_model_and_has_its_own_scores(model, tmp_path):
    named = Path(shutil.copytree(model, tmp_path / "named"))
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "short.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    data = [read("pairs", write(tmp_path / "a.jsonl", pairs(2)))]
    short = dataclasses.replace(SETTINGS, chat_template="short")
    plain = score_model(str(named), data, SETTINGS, tmp_path)
    found = evaluate_model(str(named), data, tmp_path, settings=short, against=model)
    tokens = [int(scores.items[0][0].tokens[0]) for scores in (plain, found.scores)]
    first = data[0].items[0].conversations[0].messages
    # The default has a role in front of and an end behind each of two messages.
    assert tokens[1] == 1 + sum(len(m["content"].encode()) for m in first) == tokens[0] - 4
    assert found.scores.work["known before"] == 0 and found.comparisons


# ---- scores from files --------------------------------------------------------------------------


def test_scores_of_a_file(tmp_path):
    data = [read("pairs", write(tmp_path / "a.jsonl", pairs(3)))]
    rows = [{"id": i + 1, "scores": [{"x": i, "y": 1}, {"x": 1, "y": 0}]} for i in range(3)]
    write(tmp_path / "s.jsonl", rows)
    found = read_scores(tmp_path / "s.jsonl", data)
    assert found.attributes == ("x", "y") and found.rule.name == "x"
    np.testing.assert_array_equal(found.items[0][2].scores, [[2, 1], [1, 0]])


def test_lines_end_where_json_lines_do(tmp_path):
    """Not at U+2028, which JSON leaves as it is."""
    rows = [{"prompt": "?", "chosen": "a", "rejected": "b", "id": "one\u2028two"}]
    data = [read("pairs", write(tmp_path / "a.jsonl", rows))]
    line = json.dumps({"id": rows[0]["id"], "scores": [2, 1]}, ensure_ascii=False)
    (tmp_path / "s.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_scores(tmp_path / "s.jsonl", data).items[0][0].scores.tolist() == [[2], [1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "scores": [1, 2]}], "no rows for .*row 2"),
        ([{"id": i, "scores": [1, 2]} for i in (1, 2, 2)], "2 rows for .*row 2"),
        ([{"id": i, "scores": [1]} for i in (1, 2)], "id '1' has 1 scores of score; expected 2"),
        ([{"id": 1}], "row 1: expected an object with 'id' and 'scores'"),
        ([{"id": 1, "scores": [{"a": 1}, {"b": 1}]}], "its responses differ in attributes"),
        ([], "there is no row in it"),
    ],
)
def test_bad_files_of_scores(tmp_path, rows, message):
    data = [read("pairs", write(tmp_path / "a.jsonl", pairs(2)))]
    write(tmp_path / "s.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read_scores(tmp_path / "s.jsonl", data)


def test_the_longer_response_wins(tmp_path):
    rows = [{"prompt": "?", "chosen": "abc", "rejected": "ab"}]
    rows += [{"prompt": "?", "chosen": "a", "rejected": "ab"}]
    scored = length_scores([read("pairs", write(tmp_path / "a.jsonl", rows))])
    assert [item.scores.ravel().tolist() for item in scored.items[0]] == [[3, 2], [1, 2]]


# ---- weights ------------------------------------------------------------------------------------


def made_scores(rng, count: int, weights) -> tuple[list[ItemScores], np.ndarray]:
    """Two responses an item, the preferred one first with the probability of Bradley-Terry."""
    scores = rng.normal(size=(count, 2, len(weights)))
    margins = (scores[:, 0] - scores[:, 1]) @ weights
    swapped = rng.random(count) > 1 / (1 + np.exp(-margins))
    scores[swapped] = scores[swapped][:, ::-1]
    zeros = np.zeros(2, int)
    return [ItemScores(s, zeros, zeros > 0) for s in scores], scores[:, 0] - scores[:, 1]


def test_fitted_weights_are_the_maximum_of_the_likelihood(rng, tmp_path):
    data = read("pairs", write(tmp_path / "a.jsonl", pairs(400)))
    scored, differences = made_scores(rng, len(data.items), np.asarray([1.0, -0.5, 0.0]))
    fitted = fit_weights(ScoredBenchmark.of(data, ("a", "b", "c"), scored, "drop"))
    scale = np.mean(differences**2, axis=0)
    expected = optimize.minimize(
        lambda w: np.logaddexp(0, -differences @ w).mean() + 1e-3 * scale @ w**2,
        np.zeros(3), method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 4000},
    ).x  # fmt: skip
    np.testing.assert_allclose(list(fitted.weights.values()), expected, atol=1e-3)
    assert fitted.pairs == len(data.items) and fitted.seen(data.items) == len(data.items)
    write_weights(tmp_path / "w.json", fitted)
    assert read_weights(tmp_path / "w.json") == fitted
    assert json.loads((tmp_path / "w.json").read_text())["format"] == "rmjax.weights/1"
    (tmp_path / "w.json").write_text("{}")
    with pytest.raises(UserError, match="not a file of weights"):
        read_weights(tmp_path / "w.json")


def test_weights_fitted_on_these_prompts_are_warned_of(model, tmp_path):
    rows = pairs(12)
    data = read_benchmarks([f"pairs={write(tmp_path / 'test.jsonl', rows[:8])}"])
    fit = read("pairs", write(tmp_path / "fit.jsonl", rows[6:]), label="fit")
    report = report_evaluation(model, data, tmp_path / "out", settings=SETTINGS, fit=fit)
    (found,) = report["benchmarks"]
    assert "fitted on the prompts of 2 of these 8 items" in " ".join(found["warnings"])
    assert "fitted" in found["rules"]
    # used later, from the file, it is still known
    fitted = read_weights(tmp_path / "out" / "weights.json")
    later = report_evaluation(
        model, data, tmp_path / "later", settings=SETTINGS, value=fitted.weights, known=fitted
    )
    assert "2 of these 8 items" in " ".join(later["benchmarks"][0]["warnings"])


def test_vectors_searched_on_a_benchmark_are_warned_of_there(model, tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 7}
    data = read_benchmarks([f"reward-bench={write(tmp_path / 'filtered.jsonl', [row])}"])
    report = report_evaluation(model, data, tmp_path / "out", settings=SETTINGS)
    warnings = " ".join(report["benchmarks"][0]["warnings"])
    assert "llama3_70b_rewardbench" in warnings and "goodness" not in warnings


# ---- the whole ----------------------------------------------------------------------------------


def test_one_pass_gives_every_rule(model, scorer, tmp_path):
    data = read_benchmarks([f"pairs={write(tmp_path / 'p.jsonl', pairs(20))}"])
    report = report_evaluation(model, data, tmp_path / "out", settings=SETTINGS)
    (found,) = report["benchmarks"]
    assert set(found["rules"]) == {*HELPSTEER2, *PUBLISHED}
    both = [scorer.score_many([c.messages for c in item.conversations]) for item in data[0].items]
    for name, rule in all_rules(score_model(model, data, SETTINGS, tmp_path / "out"), None).items():
        assert isinstance(rule, ScalarRule)
        weights = rule.weights
        values = [[sum(w * s.attributes[a] for a, w in weights.items()) for s in b] for b in both]
        right = np.mean([(1 + np.sign(a - b)) / 2 for a, b in values])
        assert found["rules"][name]["score"] == pytest.approx(right), name
    assert found["overall"]["score"] == found["rules"]["helpfulness"]["score"]
    again = read_scores(tmp_path / "out" / "samples.jsonl", data)
    np.testing.assert_allclose(
        again.items[0][3].scores[0], list(both[3][0].attributes.values()), atol=1e-5
    )
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500


def test_the_worst_mistakes_are_shown_with_their_text(tmp_path):
    texts = [("<b>good</b>", "bad" * 9), ("good and long", "bad"), ("ok", "bad" * 99)]
    rows = [{"prompt": "Why?", "chosen": good, "rejected": bad} for good, bad in texts]
    data = read_benchmarks([f"pairs={write(tmp_path / 'p.jsonl', rows)}"])
    report = report_evaluation("baseline:length", data, tmp_path / "out", settings=SETTINGS)
    first, second = report["benchmarks"][0]["mistakes"]
    assert (first["id"], first["margin"]) == ("3", 2 - 297.0)
    assert (second["id"], second["margin"]) == ("1", 11 - 27.0)
    assert second["better"]["text"] == "<b>good</b>" and second["worse"]["value"] == 27
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;good&lt;/b&gt;" in page and "<b>good</b>" not in page


def test_general_preferences_are_judged_by_their_margins(tmp_path, rng, monkeypatch):
    rows = [{"prompt": f"{i}?", "chosen": ["a"], "rejected": ["b", "c"]} for i in range(20)]
    data = read_benchmarks([f"best-of-n={write(tmp_path / 'b.jsonl', rows)}"])
    scores = rng.normal(size=(20, 3, 4))
    items = [ItemScores(s, np.zeros(3, int), np.zeros(3, int) > 0) for s in scores]
    rule, names = GeneralPreference(beta=1.0), ("v1", "v2", "v3", "v4")
    scored = ModelScores("m", names, rule, {"kind": "made up"}, {}, [items])
    monkeypatch.setattr("rmjax.evaluation.model_evaluation.score_model", lambda *args: scored)
    report = report_evaluation("m", data, tmp_path / "out", settings=SETTINGS)
    (found,) = report["benchmarks"]
    assert set(found["rules"]) == {"general_preference"}
    v = scores / np.linalg.norm(scores, axis=-1, keepdims=True)
    margins = [  # of each over each, written out
        [[a[0] * b[1] - a[1] * b[0] + a[2] * b[3] - a[3] * b[2] for b in each] for a in each]
        for each in v
    ]
    best = np.mean(margins, axis=2).argmax(axis=1)
    assert found["overall"]["score"] == pytest.approx(np.mean(best == 0))
    with pytest.raises(UserError, match="no weighted sum of attributes"):
        report_evaluation("m", data, tmp_path / "out", settings=SETTINGS, fit=data[0])


def test_missing_subsets_are_named_and_there_is_no_whole(model, tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "id": 7}
    rows = [row | {"subset": "hep-go"}, row | {"subset": "unheard-of"}]
    data = read_benchmarks([f"reward-bench={write(tmp_path / 'filtered.jsonl', rows)}"])
    (found,) = report_evaluation(model, data, tmp_path / "out", settings=SETTINGS)["benchmarks"]
    assert not found["complete"]
    said = "; ".join(found["gaps"])
    assert (
        "Reasoning / hep-go has 1 of 164 items" in said
        and "Chat / alpacaeval-easy is missing" in said
    )
    assert "1 items of the unknown subset 'unheard-of' are left out" in said
    assert "in part" in (tmp_path / "out" / "report.md").read_text()


def test_long_responses_are_cut_or_dropped_and_counted(model, tmp_path):
    rows = [*pairs(3), {"prompt": "Why?", "chosen": "yes", "rejected": "no " * 100}]
    data = read_benchmarks([f"pairs={write(tmp_path / 'p.jsonl', rows)}"])
    (cut,) = report_evaluation(model, data, tmp_path / "a", settings=SETTINGS)["benchmarks"]
    assert (cut["items"], cut["cut"], cut["dropped"]) == (4, 1, {})
    dropping = ScoringSettings(0, "drop", "auto", "", MeshConfig())
    (less,) = report_evaluation(model, data, tmp_path / "a", settings=dropping)["benchmarks"]
    assert (less["items"], less["cut"]) == (3, 0)
    assert less["dropped"] == {"a response is too long": 1}


def test_ratings_are_correlated_with_every_attribute(model, scorer, tmp_path, rng):
    rows = [
        {"prompt": f"Why {i // 3}?", "response": f"because {'so ' * int(n)}", "verbosity": int(n)}
        for i, n in enumerate(rng.integers(0, 5, 24))
    ]
    data = read_benchmarks([f"ratings={write(tmp_path / 'r.jsonl', rows)}"])
    (found,) = report_evaluation(model, data, tmp_path / "out", settings=SETTINGS)["benchmarks"]
    texts = [c.messages for item in data[0].items for c in item.conversations]
    scores = np.asarray([list(s.attributes.values()) for s in scorer.score_many(texts)])
    labels = [r["verbosity"] for item in data[0].items for r in item.ratings]
    expected = [np.corrcoef(x, labels)[0, 1] for x in scores.T]
    rated = found["attributes"]["ratings"]
    assert rated["names"] == ["verbosity"]
    np.testing.assert_allclose(np.ravel(rated["correlations"]), expected, atol=1e-4)
    agreement = found["attributes"]["agreement"]["verbosity"]
    assert agreement["mse"] == pytest.approx(np.mean((scores[:, 4] - labels) ** 2), rel=1e-4)
    assert agreement["mse_constant"] == pytest.approx(np.var(labels))


def test_two_models_are_compared_on_the_items_of_both(tmp_path, rng):
    data = read("pairs", write(tmp_path / "a.jsonl", pairs(30)))
    rule, sides = scalar_rule("x", ("x",)), []
    for cut in (3, 5):
        scores = [
            ItemScores(rng.normal(size=(2, 1)), np.zeros(2, int), np.arange(2) * (i < cut) > 0)
            for i in range(len(data.items))
        ]
        sides.append(ScoredBenchmark.of(data, ("x",), scores, "drop"))
    found = model_comparison(sides[0], rule, sides[1], rule)
    credits = [
        [float(s.scores[0, 0] > s.scores[1, 0]) for s in side.scores][-25:] for side in sides
    ]
    assert found["units"] == 25
    assert found["difference"] == pytest.approx(np.mean(credits[0]) - np.mean(credits[1]))
    assert found["wins"] == sum(a > b for a, b in zip(*credits))
    assert found["low"] <= found["difference"] <= found["high"]
    same = model_comparison(sides[0], rule, sides[0], rule)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rewardbench"], "'rewardbench': there are reward-bench, reward-bench-2"),
        (["pairs"], "which\\? pairs=FILE"),
        (["pairs=nothing.jsonl"], "nothing.jsonl: there is no such file"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(UserError, match=message):
        read_benchmarks(names)


def test_the_command(tmp_path):
    rows = write(tmp_path / "p.jsonl", pairs(4))
    command = ["-m", "rmjax.evaluate", "baseline:length", f"pairs={rows}"]
    done = forked.run([*command, f"--out={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stderr
    assert "pairs p" in done.stdout and "report.html" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["format"] == "rmjax.report.evaluation/1"
    failed = forked.run([*command[:2], "nowhere", f"pairs={rows}"])
    assert failed.returncode == 1 and failed.stderr.startswith("error: nowhere")


def test_a_score_that_is_not_defined_is_none(model, tmp_path):
    """Every prompt has one response: there is nothing to order."""
    rows = [{"prompt": f"Why {i}?", "response": "so", "score": i} for i in range(3)]
    data = read_benchmarks([f"ratings={write(tmp_path / 'r.jsonl', rows)}"])
    out = tmp_path / "out"
    (found,) = report_evaluation(model, data, out, settings=SETTINGS)["benchmarks"]
    assert found["overall"] == {"score": None, "low": None, "high": None}
    assert any("not defined" in text for text in found["warnings"])
    assert "0.0 %" not in (out / "report.md").read_text()


def test_an_error_of_evaluation_names_file_and_row(model, tmp_path):
    rows = [*pairs(1), {"prompt": "p", "chosen": "\ud800", "rejected": "b"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"p\.jsonl row 2: the conversation is not valid Unicode"):
        score_model(model, [read("pairs", str(path))], SETTINGS, tmp_path)


def test_samples_read_back_to_the_same_figures(model, tmp_path):
    """What was dropped is dropped again: pairs too long, and pairs equal in tokens."""
    thought = [
        {"role": "assistant", "content": "x", "reasoning_content": text} for text in ("a", "b")
    ]
    rows = [*pairs(6), {"prompt": "p", "chosen": [thought[0]], "rejected": [thought[1]]}]
    rows.append({"prompt": "p", "chosen": "y" * 300, "rejected": "z"})
    source = write(tmp_path / "p.jsonl", rows)
    settings = dataclasses.replace(SETTINGS, over_long="drop")

    def report(name, out):
        data = read_benchmarks([f"pairs={source}"])
        (found,) = report_evaluation(name, data, out, settings=settings)["benchmarks"]
        return found

    first = report(model, tmp_path / "one")
    assert first["dropped"] == {"chosen equals rejected": 1, "a response is too long": 1}
    again = report(str(tmp_path / "one" / "samples.jsonl"), tmp_path / "two")
    for field in ("items", "dropped", "overall", "accuracy"):
        assert again[field] == first[field], field
