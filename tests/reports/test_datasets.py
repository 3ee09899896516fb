"""The report of data: its numbers by hand, on small files and on real ones."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from helpers.paths import ROOT
from helpers.reports import PAIRS, RATED, write_lines
from rmjax.data.records import describe, read_pairs
from rmjax.errors import UserError
from rmjax.report import report_data

DATA = Path(os.environ.get("RMJAX_TEST_DATA", ROOT.parent / "shared/data"))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """HelpSteer2's layout."""
    directory = tmp_path_factory.mktemp("set")
    write_lines(directory / "train.jsonl.gz", RATED)
    write_lines(directory / "preference.jsonl.gz", PAIRS)
    return directory


@pytest.fixture(scope="module")
def reported(both, tmp_path_factory):
    """Its report's numbers."""
    return numbers(both, tmp_path_factory.mktemp("reported"))


def numbers(source, tmp_path, **options):
    _, files = report_data(str(source), out=str(tmp_path / "out"), **options)
    return json.loads(files[2].read_text())


def test_ratings_by_hand(reported):
    data = reported
    assert data["format"] == "rmjax.report.data/1" and data["split"] == "train"
    found = data["ratings"]
    assert (found["responses"], found["prompts"]) == (6, 3)
    assert found["responses_per_prompt"] == {"1": 1, "2": 1, "3": 1}
    assert found["turns"] == {"1": 5, "3": 1}
    good = found["attributes"]["good"]
    assert good["mean"] == 2 and good["sd"] == pytest.approx(math.sqrt(10 / 6))
    assert good["histogram"] == {
        "values": [0, 1, 2, 3, 4],
        "edges": None,
        "counts": [1, 1, 2, 1, 1],
    }
    long = found["attributes"]["long"]
    assert (long["ratings"], long["missing"], long["mean"]) == (5, 1, 2.2)
    assert list(found["attributes"]) == ["good", "long"]  # the note is no number
    assert found["lengths"]["response_characters"]["mean"] == pytest.approx(25 / 6)
    assert found["lengths"]["response_characters"]["median"] == 3.5
    assert found["lengths"]["prompt_characters"]["mean"] == pytest.approx((5 * 2 + 3) / 6)


def test_correlations_by_numpy(reported):
    found = reported["ratings"]
    good, lengths = [4, 2, 2, 1, 3, 0], [2, 4, 6, 1, 9, 3]
    matrix = found["correlation"]["pearson"]
    assert found["correlation"]["names"] == ["good", "long", "response length"]
    present = [0, 1, 2, 4, 5]
    expected = np.corrcoef(np.array(good)[present], [0, 2, 4, 4, 1])[0, 1]
    assert matrix[0][1] == matrix[1][0] == pytest.approx(expected)
    assert matrix[0][2] == pytest.approx(np.corrcoef(good, lengths)[0, 1])
    assert [matrix[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    row = found["length_correlation"]["good"]
    assert row["pearson_characters"] == pytest.approx(np.corrcoef(good, lengths)[0, 1])
    ranks = np.corrcoef(stats.rankdata(good), stats.rankdata(lengths))[0, 1]
    assert row["spearman_characters"] == pytest.approx(ranks)
    assert "pearson_tokens" not in row


def test_responses_to_one_prompt_by_hand(reported):
    found = reported["ratings"]["siblings"]
    # good: 4, 2, 2 and 1, 3. Differences 2, 2, 0 and 2.
    good = found["good"]
    assert (good["prompts"], good["pairs"], good["equal"]) == (2, 4, 0.25)
    assert good["mean_difference"] == 1.5
    within = 4 * 4 / 9 + 2 * 4 / 9 + 2  # around 8/3, and around 2
    whole = sum((x - 2.4) ** 2 for x in (4, 2, 2, 1, 3))
    assert good["within"] == pytest.approx(within / whole)
    # long: 0, 2, 4; of the second prompt one is missing.
    assert found["long"] == {
        "prompts": 1,
        "pairs": 3,
        "equal": 0,
        "mean_difference": pytest.approx(8 / 3),
        "within": 1,
    }


def test_preferences_by_hand(reported):
    found = reported["preferences"]
    assert (found["pairs"], found["decided"], found["ties"], found["prompts"]) == (7, 6, 1, 3)
    assert found["strengths"] == {"-2": 1, "-1": 1, "0": 1, "1": 2, "3": 2}
    # Chosen and rejected: 2/4, 6/4, 9/1, 1/9, 1/2; the same text twice is left out.
    longer = found["longer_chosen"]
    assert (longer["all"]["pairs"], longer["all"]["share"]) == (5, 0.4)
    assert longer["by_strength"]["3"]["share"] == 0.5
    assert longer["by_strength"]["2"]["share"] == 0
    position = found["position"]
    assert (position["pairs"], position["share"]) == (6, pytest.approx(4 / 6))
    assert found["repeats"] == {"repeated": 1, "contradictions": 1, "identical": 1}
    assert found["lengths"]["chosen_characters"]["mean"] == pytest.approx(23 / 6)


def test_agreement_by_hand(reported):
    found = reported["agreement"]
    assert (found["pairs"], found["matched"]) == (7, 5)
    good = found["attributes"]["good"]
    assert (good["agree"], good["equal"], good["opposite"]) == (2, 1, 1)
    assert good["agreement"] == pytest.approx(2 / 3)
    assert good["mean_difference"] == pytest.approx((2 + 0 + 2 - 2) / 4)
    assert good["by_strength"]["3"]["agreement"] == 0.5
    assert good["by_strength"]["1"]["agreement"] is None  # equal ratings say nothing
    assert good["ties"] == {"pairs": 1, "equal": 0, "mean_difference": 2}
    long = found["attributes"]["long"]
    assert (long["pairs"], long["agree"], long["opposite"]) == (2, 1, 1)


def test_ratings_of_another_place(both, reported, tmp_path):
    rated = write_lines(tmp_path / "rated.jsonl", RATED)
    paired = both / "preference.jsonl.gz"
    found = numbers(paired, tmp_path, ratings=str(rated))
    assert found["agreement"] == reported["agreement"] | {"ratings": str(rated)}
    assert numbers(paired, tmp_path)["agreement"] is None
    assert numbers(both, tmp_path, attributes=("long",))["agreement"]["attributes"].keys() == {
        "long"
    }


def test_the_hub_s_directory_of_preferences(tmp_path):
    (tmp_path / "preference").mkdir()
    write_lines(tmp_path / "train.jsonl", RATED)
    write_lines(tmp_path / "preference" / "preference.jsonl.gz", PAIRS)
    assert numbers(tmp_path, tmp_path)["agreement"]["matched"] == 5


def test_pairs_without_strength_or_place(tmp_path):
    rows = [{"prompt": "p", "chosen": "long one", "rejected": "short"}] * 2
    found = numbers(write_lines(tmp_path / "pairs.jsonl", rows), tmp_path)["preferences"]
    assert found["strengths"] == {"unknown": 2} and found["position"] is None
    assert found["longer_chosen"]["all"]["share"] == 1
    assert found["repeats"] == {"repeated": 1, "contradictions": 0, "identical": 0}


def test_lengths_in_tokens(both, tmp_path):
    data = numbers(both, tmp_path, tokenizer="bytes")
    found = data["ratings"]["lengths"]
    assert found["response_tokens"] == found["response_characters"]  # a byte each
    assert found["sample_tokens"]["min"] > found["response_tokens"]["min"]
    assert data["preferences"]["lengths"]["chosen_tokens"]["max"] == 9


def test_the_report_escapes_what_the_data_say(tmp_path):
    evil = "<script>alert(1)</script>|"
    rows = [{"prompt": evil, "response": evil, evil: number} for number in (1, 2, 2)]
    source = write_lines(tmp_path / "evil.jsonl", rows)
    _, files = report_data(str(source), out=str(tmp_path / "out"))
    page, text, _ = (file.read_text() for file in files)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<script" not in text and r"&lt;/script&gt;\|" in text


def test_ratings_of_which_there_is_nothing_to_say(tmp_path):
    rows = [{"prompt": "p", "response": "r", "good": 1}]
    found = numbers(write_lines(tmp_path / "one.jsonl", rows), tmp_path)["ratings"]
    assert found["siblings"]["good"]["equal"] is None
    assert found["correlation"]["pearson"] == [[None, None], [None, None]]


@pytest.mark.parametrize(
    "rows, options, said",
    [
        ([{"prompt": "p", "response": "r"}], {}, "--attributes"),
        ([{"prompt": "p", "text": "r"}], {}, "row 1: field 'response' is missing"),
        ([{"prompt": "p", "response": "r", "good": 1}], {"attributes": ("bad",)}, "'bad'"),
        ([{"prompt": "p", "response": "r", "good": math.inf}], {}, "row 1: field 'good'"),
        ([{"prompt": "p", "response": "r", "good": 1}], {"ratings": "x"}, "holds no pairs"),
        ([{"prompt": "p", "response": "r", "good": 1}], {"tokenizer": "/none"}, "--tokenizer"),
        ([], {}, "there is no row"),
    ],
)
def test_errors_name_what_is_wrong(rows, options, said, tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=said):
        report_data(str(source), out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_either(tmp_path):
    with pytest.raises(UserError, match="there is no file of data in it"):
        report_data(str(tmp_path))


def test_columns_that_may_be_ratings(tmp_path):
    rows = [
        {"prompt": "p", "response": "r", "a": 1, "b": None, "c": "1", "d": True, "e": 1},
        {"prompt": "p", "response": "r", "a": 2.5, "b": 3, "c": "2", "d": False, "e": "x"},
    ]
    assert describe(str(write_lines(tmp_path / "x.jsonl", rows)), "train") == (
        "ratings",
        ("a", "b"),
    )


def test_where_a_preferred_response_stood(both):
    places = [(a.place, b.place) for a, b in read_pairs(str(both), "train").all().entries]
    assert places == [(1, 2), (2, 1), (2, 1), (2, 1), (1, 2), (1, 2), (2, 1)]


def test_generated_ratings_and_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, files = report_data("generated:40")
    assert files[0] == Path("report-generated-40/report.html") and files[0].exists()


def test_human_ratings_of_dialogues(tmp_path):
    source = DATA / "topical_chat_ratings.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    found = numbers(source, tmp_path)["ratings"]
    names = ["naturalness", "coherence", "engagingness", "groundedness"]
    columns = np.array([[row[name] for name in names] for row in rows])
    for name, column in zip(names, columns.T):
        assert found["attributes"][name]["mean"] == pytest.approx(column.mean())
        assert found["attributes"][name]["sd"] == pytest.approx(column.std())
    matrix = np.array(found["correlation"]["pearson"])[:4, :4]
    np.testing.assert_allclose(matrix, np.corrcoef(columns.T), atol=1e-12)
    assert found["responses_per_prompt"] == {"6": 60}


def test_human_preferences(tmp_path):
    source = DATA / "hh_harmless_base_test.jsonl.gz"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    rows = [json.loads(line) for line in gzip.decompress(source.read_bytes()).splitlines()]

    def length(text):
        answer = text.rsplit("\n\nHuman:", 1)[1].split("\n\nAssistant:", 1)[1]
        return len(answer.removeprefix(" "))

    chosen, rejected = np.array([[length(r["chosen"]), length(r["rejected"])] for r in rows]).T
    found = numbers(source, tmp_path)["preferences"]
    assert found["pairs"] == len(rows) == 2312
    longer = found["longer_chosen"]["all"]
    assert longer["pairs"] == (chosen != rejected).sum()
    assert longer["share"] == pytest.approx((chosen > rejected).sum() / longer["pairs"])
    assert found["lengths"]["chosen_characters"]["mean"] == pytest.approx(chosen.mean())
