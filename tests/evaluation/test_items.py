import gzip
import json

import pytest

from rmjax.errors import UserError
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmarks import BENCHMARKS

ASK = [{"role": "user", "content": "Why?"}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(name, source, **options) -> BenchmarkData:
    return BenchmarkData(BENCHMARKS[name], str(source), **options)


def test_reward_bench(tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 7}
    row |= {"chosen_model": "m", "rejected_model": "n"}
    (found,) = read("reward-bench", write(tmp_path / "filtered.jsonl", [row])).items
    assert (found.id, found.subset, found.responses, found.good) == ("7", "hep-go", ("a", "b"), 1)
    assert found.prompt == ASK and found.gold == (1.0, 0.0)


def test_a_directory_as_the_hub_lays_it_out(tmp_path):
    import pyarrow
    from pyarrow import parquet

    row = {"id": "1", "prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c", "d"]}
    table = pyarrow.Table.from_pylist([row | {"subset": "Math"}])
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    (found,) = read("reward-bench-2", tmp_path).items
    assert (found.subset, found.responses, found.good) == ("Math", ("a", "b", "c", "d"), 1)


def test_rm_bench_takes_the_domain_or_the_files_name(tmp_path):
    row = {"id": 1, "prompt": "Why?", "chosen": list("abc"), "rejected": list("def")}
    named = write(tmp_path / "total_dataset.json", [row | {"domain": "safety-refuse"}])
    assert read("rm-bench", named).items[0].subset == "safety"
    by_file = write(tmp_path / "safety-response_filtered.json", [row | {"subset": "xstest"}])
    assert read("rm-bench", by_file).items[0].subset == "safety"
    assert read("rm-bench", write(tmp_path / "rm_bench_chat.json", [row])).items[0].subset == "chat"
    write(tmp_path / "math_filtered.json", [row])
    found = [item.subset for item in read("rm-bench", tmp_path).items]  # as in its repository
    assert found == ["math", "safety"]


def test_judge_bench_puts_the_preferred_response_first(tmp_path):
    row = {"pair_id": "x", "source": "mmlu-pro-law", "question": "Why?", "response_A": "a"}
    row |= {"response_B": "b"}
    rows = [row | {"label": "A>B"}, row | {"label": "B>A", "source": "livecodebench"}]
    first, second = read("judge-bench", write(tmp_path / "gpt.jsonl", rows)).items
    assert (first.responses, first.subset) == (("a", "b"), "knowledge")
    assert (second.responses, second.subset) == (("b", "a"), "coding")
    with pytest.raises(UserError, match="row 1: field 'label' is 'A=B', expected"):
        read("judge-bench", write(tmp_path / "bad.jsonl", [row | {"label": "A=B"}]))


def test_llmbar_is_a_directory_of_subsets(tmp_path):
    row = {"input": "Why?", "output_1": "a", "output_2": "b"}
    write(tmp_path / "Natural" / "dataset.json", [row | {"label": 2}])
    write(tmp_path / "Adversarial" / "Manual" / "dataset.json", [row | {"label": 1}])
    found = {item.subset: item.responses for item in read("llmbar", tmp_path).items}
    assert found == {"Natural": ("b", "a"), "Manual": ("a", "b")}
    with pytest.raises(UserError, match="a clone of its repository"):
        read("llmbar", tmp_path / "nothing")


def test_pairs_in_every_form_of_training(tmp_path):
    rows = [
        {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": 2},
        {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": 0},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: c", "rejected": "\n\nHuman: Why?\n\nAssistant:"},
        {"prompt": "Why?", "chosen": "same", "rejected": "same"},
        {"prompt": "Why?", "chosen": "e", "rejected": "f", "subset": "mine", "id": "q"},
    ]
    data = read("pairs", write(tmp_path / "p.jsonl", rows))
    assert [item.responses for item in data.items] == [("b", "a"), ("e", "f")]
    assert (data.items[0].strength, data.items[1].subset, data.items[1].id) == (2.0, "mine", "q")
    assert data.dropped == {
        "a tie": 1,
        "an empty response": 1,
        "chosen equals rejected": 1,
    }


def test_helpsteer2_preferences_of_the_wanted_split(tmp_path):
    row = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -1}
    rows = [row | {"split": "train"}, row | {"split": "val", "response_1": "c"}]
    with gzip.open(tmp_path / "preference.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    data = read("helpsteer2-preference", tmp_path)
    assert [i.responses for i in data.items] == [("c", "b")]
    assert data.dropped == {"of another split (train)": 1} and not data.notes  # the column is used


def test_a_subset_is_no_split_whatever_it_is_called(tmp_path):
    pair = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    rows = [pair | {"subset": name} for name in ("test", "math", "train")]
    data = read("pairs", write(tmp_path / "x.jsonl", rows))
    assert [item.subset for item in data.items] == ["test", "math", "train"] and not data.dropped


def test_a_fold_is_no_rating(tmp_path):
    rows = [{"prompt": "p", "response": f"r{i}", "fold": i % 2, "good": i} for i in range(4)]
    data = read("ratings", f"{write(tmp_path / 'x.jsonl', rows)}:1")
    assert (data.gold, [item.gold for item in data.items]) == ("good", [(1, 3)])


@pytest.mark.parametrize("name", ["pairs", "rm-bench", "llmbar"])
@pytest.mark.parametrize("source", ["~nobody-has-this-name/x.jsonl", "x" * 5000])
def test_a_source_that_cannot_be_a_path_is_named(name, source):
    with pytest.raises(UserError) as caught:
        read(name, source)
    assert str(caught.value).startswith(f"{source}: ")


def test_responses_to_one_prompt_are_one_item(tmp_path):
    row = {"prompt": "Why?", "verbosity": 1, "helpfulness": 3, "index": 9, "good": True}
    rows = [
        row | {"response": "a"},
        {"prompt": "How?", "response": "b", "helpfulness": 0},
        row | {"response": "c", "helpfulness": None, "verbosity": 2},
    ]
    data = read("ratings", write(tmp_path / "r.jsonl", rows))
    first, second = data.items
    assert first.responses == ("a", "c") and second.responses == ("b",)
    assert first.ratings == ({"verbosity": 1.0, "helpfulness": 3.0}, {"verbosity": 2.0})
    assert data.gold == "helpfulness" and first.gold[0] == 3.0 and first.gold[1] != first.gold[1]
    assert read("ratings", tmp_path / "r.jsonl", gold="verbosity").items[0].gold == (1.0, 2.0)
    with pytest.raises(UserError, match=r"no rating 'truth'; there are verbosity, helpfulness"):
        read("ratings", tmp_path / "r.jsonl", gold="truth")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "row 1: field 'prompt' is missing"),
        ({"prompt": "Why?", "chosen": "a"}, "row 1: field 'rejected' is missing"),
        ({"prompt": "Why?", "chosen": [], "rejected": "b"}, "field 'chosen' is empty"),
        ({"prompt": "Why?", "chosen": 3, "rejected": "b"}, "field 'chosen' is int, expected"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "field 'prompt' has no user turn"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read("reward-bench", write(tmp_path / "filtered.jsonl", [row]))


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json row 1: field 'prompt' is missing"):
        read("best-of-n", tmp_path / "x.json")


def test_an_item_without_a_word_is_dropped(tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": " "}
    with pytest.raises(UserError, match="no item is left of 1"):
        read("best-of-n", write(tmp_path / "x.jsonl", [row]))


def test_real_data(shared_data):
    styles = read("rm-bench", shared_data / "rm_bench_chat.json")
    assert {(i.subset, i.good, len(i.responses)) for i in styles.items} == {("chat", 3, 6)}
    ratings = read("ratings", shared_data / "topical_chat_ratings.jsonl")
    assert [len(item.responses) for item in ratings.items] == [6] * 60
    pairs = read("pairs", shared_data / "hh_harmless_base_test.jsonl.gz")
    assert len(pairs.items) + sum(pairs.dropped.values()) == 2312


def test_which_of_several_ratings_decides_is_asked(tmp_path):
    rows = [
        {"prompt": "Why?", "response": r, "turn": 1, "prompt_id": 3, "score": n}
        for n, r in enumerate("ab")
    ]
    path = write(tmp_path / "r.jsonl", rows)
    with pytest.raises(UserError, match="--gold=NAME, one of turn, prompt_id, score"):
        read("ratings", path)
    assert read("ratings", path, gold="score").items[0].gold == (0.0, 1.0)
    alone = [{name: r[name] for name in ("prompt", "response", "score")} for r in rows]
    assert read("ratings", write(tmp_path / "s.jsonl", alone)).gold == "score"


def test_a_ranked_list_is_several_items(tmp_path):
    rows = [{"prompt": "Why?", "responses": ["a", "b", "c"], "id": "x", "note": 1}]
    data = read("pairs", write(tmp_path / "r.jsonl", rows))
    assert [(i.id, i.responses) for i in data.items] == [
        ("x.1", ("a", "b")),
        ("x.2", ("a", "c")),
        ("x.3", ("b", "c")),
    ]
    assert len({item.where for item in data.items}) == 3
    assert data.notes == ("columns that are not used: note",)


def test_conversations_that_part_early_are_shown_from_there(tmp_path):
    said = [["hi", "Paris.", "more?", "Yes"], ["hi", "Rome.", "more?", "Well"]]
    sides = [
        [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
        for texts in said
    ]
    rows = [{"chosen": sides[0], "rejected": sides[1]}]
    (item,) = read("pairs", write(tmp_path / "p.jsonl", rows)).items
    assert item.prompt == sides[0][:1]
    assert item.responses[1] == "assistant: Rome.\n\nuser: more?\n\nassistant: Well"


def test_a_missing_rating_is_none_of_the_ratings(tmp_path):
    """As in training: null, NaN and -100 say that there is none."""
    rows = [{"prompt": "p", "response": f"r{i}", "helpfulness": n} for i, n in enumerate("abcd")]
    path = tmp_path / "r.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for letter, number in zip("abcd", ("-100", "NaN", "null", "3")):
        text = text.replace(f'"{letter}"', number)
    path.write_text(text)
    (item,) = read("ratings", path).items
    assert item.ratings == ({}, {}, {}, {"helpfulness": 3.0})
    rows = [
        {"prompt": "p", "response": r, "helpfulness": n, "n": 1} for r, n in (("a", 1), ("b", "3"))
    ]
    with pytest.raises(UserError, match="row 2: field 'helpfulness' is '3', expected a number"):
        read("ratings", write(tmp_path / "s.jsonl", rows))


def test_an_empty_response_is_left_out_of_its_prompt(tmp_path):
    rows = [{"prompt": "p", "response": r, "overall": n} for n, r in enumerate(["a", " ", "b"])]
    data = read("ratings", write(tmp_path / "r.jsonl", rows))
    assert [item.responses for item in data.items] == [("a", "b")]
    assert data.dropped == {"an empty response": 1}


def test_best_of_n_in_messages(tmp_path):
    said = [[{"role": "assistant", "content": t}] for t in "ab"]
    whole = [{"role": "user", "content": "Why?"}, said[0][0]]
    rows = [
        {"prompt": "Why?", "chosen": said[0], "rejected": [said[1][0], said[0][0]], "id": None},
        {"prompt": "Why?", "chosen": ["x"], "rejected": [said[1], said[0]], "subset": 0},
        {"prompt": None, "chosen": whole, "rejected": whole[:1] + said[1]},
    ]
    found = read("best-of-n", write(tmp_path / "r.jsonl", rows)).items
    assert [(i.id, i.subset, i.responses) for i in found] == [
        ("1", "", ("a", "b", "a")),
        ("2", "0", ("x", "b", "a")),
        ("3", "", ("a", "b")),
    ]
