"""PPE, RMB, M-RewardBench and HelpSteer3, laid out as their authors publish them."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from rmjax.errors import UserError
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmark_rows import row_places
from rmjax.evaluation.benchmarks import BENCHMARKS

PPE = ("PPE-MMLU-Pro-Best-of-K", "PPE-MATH-Best-of-K", "PPE-GPQA-Best-of-K")
PPE += ("PPE-MBPP-Plus-Best-of-K", "PPE-IFEval-Best-of-K")


def read(name, source) -> BenchmarkData:
    return BenchmarkData(BENCHMARKS[name], str(source))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("name", "source", "places"),
    [
        ("ppe-correctness", "", [f"lmarena-ai/{name}" for name in PPE]),
        ("ppe-correctness", f"lmarena-ai/{PPE[2]}", [f"lmarena-ai/{PPE[2]}"]),
        ("helpsteer3", "", ["nvidia/HelpSteer3/preference"]),
        ("helpsteer3", "nvidia/HelpSteer3:train", ["nvidia/HelpSteer3/preference:train"]),
        ("helpsteer3", "me/HelpSteer3/preference", ["me/HelpSteer3/preference"]),
        ("m-reward-bench", "me/mrb/deu_Latn", ["me/mrb/deu_Latn"]),
        ("reward-bench", "", ["allenai/reward-bench"]),
    ],
)
def test_places_on_the_hub(name, source, places):
    benchmark = BENCHMARKS[name]
    assert row_places(benchmark, source or benchmark.source) == places


# ---- PPE ----------------------------------------------------------------------------------------


def test_votes_without_ties(tmp_path):
    row = {"prompt": "Why?", "response_1": "a", "response_2": "b", "language": "English"}
    row |= {"model_a": "m", "model_b": "n", "hard_prompt": True}
    winners = ("model_a", "tie", "model_b", "tie (bothbad)")
    rows = [row | {"question_id": f"q{i}", "winner": w} for i, w in enumerate(winners)]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    data = read("ppe-preference", tmp_path)
    found = [(item.id, item.responses, item.good) for item in data.items]
    assert found == [("q0", ("a", "b"), 1), ("q2", ("b", "a"), 1)]
    assert data.dropped == {"a tie": 2}
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row | {"winner": "a"}])
    with pytest.raises(UserError, match="row 1: field 'winner' is 'a', expected 'model_a' or"):
        read("ppe-preference", tmp_path)


def graded(scores, pairs, **more):
    samples = {f"response_{i}": f"answer {i}" for i in range(1, len(scores) + 1)}
    return {"prompt": "Why?", "scores": scores, "sampled_conflict_pairs": pairs, **samples, **more}


def test_samples_that_are_right_or_wrong(tmp_path):
    row = graded([False, True, False, True], [[0, 1], [3, 2]], question_id=7, model_name="m")
    for name in PPE:
        write_parquet(tmp_path / name / "data" / "train-00000-of-00001.parquet", [row])
    data = read("ppe-correctness", tmp_path)
    assert [i.subset for i in data.items] == ["MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval"]
    first = data.items[0]
    assert (first.id, first.good) == ("7/m", 2)
    assert first.responses == ("answer 2", "answer 4", "answer 1", "answer 3")  # right ones first
    assert first.pairs == ((0, 2), (1, 3))
    assert not data.notes and not data.dropped
    (alone,) = read("ppe-correctness", tmp_path / "PPE-GPQA-Best-of-K").items
    assert alone.subset == "GPQA"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (graded([1, 0.5], [[0, 1]]), "field 'scores' is not a list of 0 and 1"),
        (graded([1], []), "field 'scores' is not a list of 0 and 1"),
        (graded([1, 0], [[0, 2]]), "field 'sampled_conflict_pairs' is not a list of pairs"),
        (graded([1, 0], [[0]]), "field 'sampled_conflict_pairs' is not a list of pairs"),
        ({**graded([1, 0], []), "scores": None}, "field 'scores' is not"),
    ],
)
def test_rows_that_do_not_say_what_is_right(row, said, tmp_path):
    file = write_json(tmp_path / "PPE-MATH-Best-of-K" / "train.json", [row])
    with pytest.raises(UserError, match=f"row 1: {said}"):
        read("ppe-correctness", file)


def test_a_part_is_known_by_its_directory(tmp_path):
    rows = [graded([1, 0], [[1, 0], [0, 0]])]
    named = write_json(tmp_path / "PPE-MATH-Best-of-K" / "train.json", rows)
    data = read("ppe-correctness", named)
    assert data.items[0].subset == "MATH" and data.items[0].pairs == ((0, 1),)
    assert data.dropped == {"a pair of equal scores": 1}
    with pytest.raises(UserError, match="which part of PPE Correctness is it"):
        read("ppe-correctness", write_json(tmp_path / "other" / "train.json", rows))


# ---- RMB ----------------------------------------------------------------------------------------


def rmb_row(path, asked="Why?", best="a", others=("b",)):
    turns = [{"role": "user", "content": asked, "language": "English"}]
    row = {"conversation_input": turns, "category_path": path}
    answers = [{"llm_name": "m", "answer": text} for text in (best, *others)]
    if path.startswith("BoN"):
        return row | {"bon_uid": "7", "bon_best": answers[0], "loser_list": answers[1:]}
    return row | {"pair_uid": "7", "chosen": answers[0], "reject": answers[1]}


def test_pairs_and_lists_of_every_goal(tmp_path):
    harm, help = "Harmlessness/S1", "Helpfulness/Code/Data Management"
    for path in (f"Pairwise_set/{harm}", f"BoN_set/{help}"):
        rows = [rmb_row(path, others=("b", "c")), rmb_row(path, " ")]
        write_json(tmp_path / "RMB_dataset" / f"{path}.json", rows)
    for source in (tmp_path, tmp_path / "RMB_dataset"):  # a clone, or the data in it
        data = read("rmb", source)
        found = [(item.subset, item.responses, item.good) for item in data.items]
        assert found == [
            ("BoN/Code", ("a", "b", "c"), 1),
            ("Pairwise/S1", ("a", "b"), 1),
        ]
        assert data.items[0].prompt == [{"role": "user", "content": "Why?"}]
        assert data.dropped == {"an empty prompt": 2} and not data.notes


def test_what_is_no_clone_is_said(tmp_path):
    with pytest.raises(UserError, match="RMB is read from the directory RMB_dataset of a clone"):
        read("rmb", tmp_path / "nothing")
    row = rmb_row("Pairwise_set/Harmlessness/S1") | {"reject": "b"}
    with pytest.raises(UserError, match=r"S1\.json row 1, reject: field 'answer' is missing"):
        read("rmb", write_json(tmp_path / "S1.json", [row]))


# ---- M-RewardBench ------------------------------------------------------------------------------


def test_languages_are_directories(tmp_path):
    row = {"id": 1, "prompt": "Warum?", "chosen": "a", "rejected": "b", "subset": "math-prm"}
    for language in ("deu_Latn", "zho_Hans", "translation"):  # translations are none of them
        write_parquet(tmp_path / language / "test-00000-of-00001.parquet", [row])
        write_json(tmp_path / language / "filtered.json", [row, row])  # of its first version
    items = read("m-reward-bench", tmp_path).items
    assert [item.subset for item in items] == ["deu_Latn/math-prm", "zho_Hans/math-prm"]
    (alone,) = read("m-reward-bench", f"{tmp_path / 'zho_Hans'}:test").items
    assert alone.subset == "zho_Hans/math-prm"
    assert len(read("m-reward-bench", f"{tmp_path}:filtered").items) == 4
    with pytest.raises(UserError, match="which part of M-RewardBench is it"):
        read("m-reward-bench", tmp_path / "translation")


# ---- HelpSteer3 ---------------------------------------------------------------------------------


def test_preferences_by_domain(tmp_path):
    row = {"context": [{"role": "user", "content": "Why?"}], "response1": "a", "response2": "b"}
    row |= {"language": "english", "individual_preference": []}
    rows = [row | {"domain": d, "overall_preference": p} for d, p in (("code", -3), ("stem", 1))]
    rows.append(row | {"domain": "stem", "overall_preference": 0})
    (tmp_path / "preference").mkdir()
    for name in ("train", "validation"):
        with gzip.open(tmp_path / "preference" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(r) + "\n" for r in rows)
    for source in (tmp_path, tmp_path / "preference"):
        data = read("helpsteer3", source)
        found = [(item.subset, item.responses, item.strength) for item in data.items]
        assert found == [("code", ("a", "b"), 3.0), ("stem", ("b", "a"), 1.0)]
        assert data.dropped == {"a tie": 1}


def test_preferences_as_nemo_rl_writes_them(tmp_path):
    said = [{"role": "assistant", "content": text} for text in "ab"]
    completions = [{"rank": 1, "completion": [said[0]]}, {"rank": 0, "completion": [said[1]]}]
    row = {"context": [{"role": "user", "content": "Why?"}], "completions": completions}
    (item,) = read("helpsteer3", write_json(tmp_path / "validation.json", [row])).items
    assert (item.responses, item.good, item.subset) == (("b", "a"), 1, "")
