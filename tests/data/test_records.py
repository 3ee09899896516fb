import dataclasses
import gzip
import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rmjax.data.readers import Row
from rmjax.data.records import pairs_of_ratings, read_pairs, read_responses, read_samples
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError

HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def row(**changes):
    return {"prompt": "p", "response": "r", "helpful": 1} | changes


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def read(path, split="train", attributes=("helpful",), label_range=(0.0, 4.0)):
    """The samples of a source of ratings."""
    records = read_samples(str(path), split, attributes, label_range).all()
    return [sample for (sample,) in records.entries]


def pairs_in(source, split="train"):
    """The pairs of a source."""
    return read_pairs(str(source), split).all().entries


def labels(samples):
    return [sample.labels for sample in samples]


def write(path, rows):
    """The same rows in whichever format the name asks for."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        content = lines(*rows)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])


@SUFFIXES
def test_every_format_reads_the_same(suffix, tmp_path):
    rows = [
        row(prompt="a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", response="é\u2028 x\n"),
        row(helpful=2.5),
        row(helpful=None),
    ]
    path = write(tmp_path / f"data{suffix}", rows)
    first, second, third = read(path)
    assert [m["content"] for m in first.conversation.prompt] == ["a", "b", "c"]
    assert first.conversation.response == "é\u2028 x\n"
    assert (first.labels, second.labels) == ((1.0,), (2.5,))
    assert math.isnan(third.labels[0])
    assert [s.where for s in (first, third)] == [f"{path} row 1", f"{path} row 3"]


@SUFFIXES
def test_messages_as_prompts_read_the_same(suffix, tmp_path):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert (
        read(write(tmp_path / f"x{suffix}", [row(prompt=messages)]))[0].conversation.prompt
        == messages
    )


@SUFFIXES
def test_a_prompt_and_its_completion_are_a_conversation(suffix, tmp_path):
    """TRL's layout, as texts and as messages; a policy needs no rating."""
    asked, said = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    for prompt, completion in (("x", "x"), ([asked], [said])):
        rows = [{"prompt": prompt, "completion": completion, "helpful": 3}]
        path = write(tmp_path / f"data{suffix}", rows)
        ((sample,),) = read_responses(str(path), "train").all().entries
        assert sample.conversation.messages == [asked, said]
        assert labels(read(path)) == [(3.0,)]


PAIRED = {
    "pair": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "preference": {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1},
    "ranking": {"prompt": "p", "responses": ["a", "b"]},
}


@pytest.mark.parametrize("form", PAIRED)
def test_pairs_are_not_responses_to_imitate(form, tmp_path):
    path = write(tmp_path / "x.jsonl", [PAIRED[form]])
    with pytest.raises(UserError, match=r"x\.jsonl row 1: .*'sft' .* use 'dpo', or .*'messages'"):
        read_responses(str(path), "train").all()


@pytest.mark.parametrize("value", ["NaN", "null", "-100", "-100.0"])
def test_masked_labels(value, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": "p", "response": "r", "a": {value}, "b": 2}}\n')
    ((a, b),) = labels(read(path, attributes=("a", "b")))
    assert math.isnan(a)
    assert b == 2.0


def test_nan_and_minus_hundred_are_masked_in_parquet(tmp_path):
    path = write(tmp_path / "x.parquet", [row(helpful=math.nan), row(helpful=-100.0)])
    assert np.isnan(labels(read(path))).all()


def test_attributes_come_in_the_order_asked_for(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(a=1, b=2, c=3)])
    assert labels(read(path, attributes=("c", "a"))) == [(3.0, 1.0)]


def test_prompts_may_be_text_in_one_row_and_messages_in_the_next(tmp_path):
    rows = [row(), row(prompt=[{"role": "user", "content": "p"}])]
    first, second = read(write(tmp_path / "x.jsonl", rows))
    assert first.conversation.prompt == second.conversation.prompt


ROW_ERRORS = {
    "above the range": (row(helpful=5), "field 'helpful' is 5, outside 0 to 4"),
    "below the range": (row(helpful=-1), "field 'helpful' is -1, outside"),
    "infinite": (row(helpful=math.inf), "field 'helpful' is inf, outside"),
    "beyond floats": (row(helpful=10**400), r"field 'helpful' is 10+\.\.\., outside"),
    "number as text": (row(helpful="3"), "field 'helpful' is '3', expected a number"),
    "truth": (row(helpful=True), "field 'helpful' is True, expected a number"),
    "list of numbers": (row(helpful=[1]), r"field 'helpful' is \[1\], expected a number"),
    "no rating column": ({"prompt": "p", "response": "r"}, "field 'helpful' is missing"),
    "no response column": ({"prompt": "p", "helpful": 1}, "field 'response' is missing"),
    "no prompt column": ({"response": "p", "helpful": 1}, "field 'prompt' is missing"),
    "response as number": (row(response=3), "field 'response' is int"),
    "no prompt": (row(prompt=None), "field 'prompt' is null"),
    "prompt ends wrongly": (row(prompt="a\n<extra_id_1>Assistant\nb"), "field 'prompt' ends"),
}


@pytest.mark.parametrize("case", ROW_ERRORS)
def test_a_bad_row_is_named_with_its_file_and_field(case, tmp_path):
    bad, said = ROW_ERRORS[case]
    path = write(tmp_path / "x.jsonl", [row(), row(), bad, row()])
    with pytest.raises(UserError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} row 3: ")


@pytest.mark.parametrize("field", ["prompt", "response", "helpful"])
def test_a_file_whose_every_row_lacks_a_field(field, tmp_path):
    rows = [{k: v for k, v in row().items() if k != field}] * 3
    for path in (write(tmp_path / "x.jsonl", rows), write(tmp_path / "x.parquet", rows)):
        with pytest.raises(UserError, match=rf"x\.\w+ row 1: field '{field}' is missing; the row"):
            read(path)


def test_generated_rows_are_pairs_and_always_the_same():
    train = read("generated:30", "train", HELPSTEER2)
    assert len(train) == 30
    # By their texts: from Python 3.13 on, a NaN makes a dataclass unequal to itself.
    assert repr(train) == repr(read("generated:30", "train", HELPSTEER2))
    assert all(
        a.conversation.prompt == b.conversation.prompt for a, b in zip(train[::2], train[1::2])
    )
    assert len({s.conversation.prompt[0]["content"] for s in train}) == 15
    other = read("generated:30", "validation", HELPSTEER2)
    assert [s.conversation.response for s in train] != [s.conversation.response for s in other]


def test_generated_ratings_follow_from_the_text():
    """By the rules in its documentation, read back from the text here."""
    samples = read("generated:400", "train", HELPSTEER2)
    for sample in samples:
        text = sample.conversation.response
        wrong = sum(text.count(s) for s in ("it is a lie!", "2+2=5!", "pigs fly!"))
        hard = sum(text.count(s) for s in ("ergo", "per quantum", "via zygotic"))
        muddled = sum(text.count(s) for s in ("uh um uh", "er um hm", "um so er"))
        good = sum(
            text.count(s) for s in ("it is so.", "that is true.", "we know it.", "it does work.")
        )
        helps = "do this:" in text
        verbosity = min(4, (wrong + hard + muddled + good) // 3)
        expected = (max(0, 4 - wrong - (not helps)), 4 - wrong, 4 - muddled, hard, verbosity)
        assert sample.labels == expected, text
    for column in zip(*labels(samples)):
        assert len(set(column)) >= 4  # something to learn in each


def test_real_ratings(shared_data):
    path = shared_data / "topical_chat_ratings.jsonl"
    names = ("overall", "groundedness")
    samples = read(path, attributes=names, label_range=(0.0, 5.0))
    raw = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert labels(samples) == [tuple(r[n] for n in names) for r in raw]
    assert [s.conversation.prompt for s in samples] == [r["prompt"] for r in raw]
    assert [s.conversation.response for s in samples] == [r["response"] for r in raw]
    with pytest.raises(UserError, match=r"field 'overall' is .*, outside 1 to 3"):
        read(path, attributes=names, label_range=(1.0, 3.0))


# ---- preference pairs ----------------------------------------------------------------------------


@SUFFIXES
def test_pairs_are_read_from_every_format(suffix, tmp_path):
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}] * 2
    rows += [{"prompt": "q", "chosen": "", "rejected": "r"}]
    pairs = pairs_in(write(tmp_path / f"data{suffix}", rows), "train")
    assert [[s.conversation.response for s in pair] for pair in pairs] == [["good", "bad"]] * 2 + [
        ["", "r"]
    ]
    assert [s.row for pair in pairs for s in pair] == [1, 1, 2, 2, 3, 3]
    assert (
        pairs[0][0].conversation.prompt
        == pairs[0][1].conversation.prompt
        == [{"role": "user", "content": "p"}]
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            {"prompt": "p", "chosen": "a"},
            "row 2: field 'rejected' is missing; the row has chosen, prompt",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "row 2: field 'rejected' is int"),
        ({"chosen": "a", "rejected": "b"}, "row 2: field 'chosen' does not begin with"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field 'prompt' is int"),
    ],
)
def test_a_broken_pair_names_file_row_and_field(bad, said, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines({"prompt": "p", "chosen": "a", "rejected": "b"}, bad))
    with pytest.raises(UserError, match=said) as error:
        pairs_in(path, "train")
    assert str(path) in str(error.value)


def test_there_are_no_generated_pairs():
    with pytest.raises(UserError, match="generated ratings only"):
        read_pairs("generated:10", "train").all()


def preference(strength, split="train", **changes):
    fields = {"prompt": "p", "response_1": "one", "response_2": "two"}
    return fields | {"preference_strength": strength, "split": split} | changes


def test_helpsteer2_preference_has_sign_strength_and_split(tmp_path):
    """Negative: the first is better; its rows name their split; a tie is nobody's second."""
    rows = [preference(-3), preference(2), preference(0), preference(1, "validation")]
    directory = tmp_path / "HelpSteer2" / "preference"
    directory.mkdir(parents=True)
    write(directory / "preference.jsonl.gz", rows)
    found = pairs_in(directory, "train")
    said = [
        (a.conversation.response, b.conversation.response, a.strength, b.strength, a.row)
        for a, b in found
    ]
    assert said == [("one", "two", 3, 3, 1), ("two", "one", 2, 2, 2), ("one", "two", 0, 0, 3)]
    ((chosen, rejected),) = pairs_in(directory, "validation")
    assert (chosen.conversation.response, rejected.conversation.response, chosen.strength) == (
        "two",
        "one",
        1,
    )
    # The same layout as datasets reads it from the hub, where it is one directory of a repository.
    loaded = datasets.load_dataset(str(directory.parent), data_dir="preference", split="train")
    assert list(loaded) == rows


@pytest.mark.parametrize("field", ["margin", "strength"])
def test_chosen_and_rejected_may_say_how_much(field, tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "x.jsonl", [pair | {field: 1.5}, pair, pair | {field: None}])
    strengths = [chosen.strength for chosen, _ in pairs_in(path, "train")]
    assert strengths[0] == 1.5 and all(map(math.isnan, strengths[1:]))
    path = write(tmp_path / "y.jsonl", [pair | {field: -1}])
    with pytest.raises(UserError, match=rf"row 1: field '{field}' is -1: it says that 'rejected'"):
        pairs_in(path, "train")


@pytest.mark.parametrize("strength", ["2", None, math.nan, True])
def test_a_strength_is_a_number(strength, tmp_path):
    path = write(tmp_path / "x.jsonl", [preference(strength)])
    with pytest.raises(UserError, match=r"row 1: field 'preference_strength' is .*expected a num"):
        pairs_in(path, "train")


def test_ratings_become_pairs_by_their_difference(tmp_path):
    rows = [
        row(prompt=p, response=r, helpful=y)
        for p, r, y in (
            ("a", "1", 1),
            ("a", "3", 3),
            ("b", "x", 2),
            ("a", "3 too", 3),
            ("a", "?", None),
        )
    ]
    path = write(tmp_path / "x.jsonl", rows)
    records = read_samples(str(path), "train", ["helpful"], (0, 4)).all()
    found = pairs_of_ratings(records, "helpful").entries
    said = [(a.conversation.response, b.conversation.response, a.strength) for a, b in found]
    assert said == [("3", "1", 2), ("3 too", "1", 2), ("3", "3 too", 0)]
    with pytest.raises(UserError, match="no prompt has two responses with a rating of 'helpful'"):
        pairs_of_ratings(dataclasses.replace(records, entries=records.entries[2:3]), "helpful")


def test_what_is_not_used_is_said(tmp_path):
    marked = "see\n\nHuman: x\n\nAssistant: y\n\nthere"
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "source": "s", "margin": 1},
        {"prompt": marked, "chosen": "a", "rejected": marked, "id": 7},
    ]
    records = read_pairs(str(write(tmp_path / "x.jsonl", rows)), "train").all()
    unused, marks = records.notes
    assert unused == "columns that are not used: id, source"
    assert "'\\n\\nHuman:'" in marks and "2 conversations; the first: x.jsonl row 2" in marks
    rated = read_samples(
        str(write(tmp_path / "y.jsonl", [row(system="s", other=1)])), "train", ["helpful"], (0, 4)
    ).all()
    assert rated.notes == ("columns that are not used: other",)


def test_a_column_that_said_the_split_is_used(tmp_path):
    rows = [row(split="train", fold="b"), row(split="test", fold="c")]
    path = str(write(tmp_path / "x.jsonl", rows))
    assert read_samples(path, "train", ["helpful"], (0, 4)).all().notes == (
        "columns that are not used: fold",
    )
    assert read_samples(path, "", ["helpful"], (0, 4)).all().notes == (
        "columns that are not used: fold, split",
    )


def test_a_rating_that_one_row_lacks_can_be_null(tmp_path):
    lacks = row()
    del lacks["helpful"]
    path = str(write(tmp_path / "x.jsonl", [row(), lacks]))
    with pytest.raises(UserError, match=r"row 2: field 'helpful' is missing; .*, write null$"):
        read_samples(path, "train", ["helpful"], (0, 4)).all()
    write(tmp_path / "x.jsonl", [row(), lacks | {"helpful": None}])
    assert len(read_samples(path, "train", ["helpful"], (0, 4)).all().entries) == 2


RANKED = {"prompt": "p", "responses": ["a", "b", "c"]}


def test_a_ranked_list_makes_all_its_pairs(tmp_path):
    rows = [RANKED, RANKED | {"scores": [1, 3, 3]}]
    pairs = pairs_in(write(tmp_path / "x.jsonl", rows))
    said = [(a.conversation.response, b.conversation.response, a.strength) for a, b in pairs]
    assert [pair[:2] for pair in said[:3]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(math.isnan(strength) for *_, strength in said[:3])
    assert said[3:] == [("b", "a", 2), ("c", "a", 2), ("b", "c", 0)]
    assert pairs[3][0].where.endswith("x.jsonl row 2, responses 2 and 1")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (RANKED | {"token_ids": [[1], [2]]}, "its responses are samples .*rmjax.score"),
        (RANKED | {"responses": ["a"]}, "nothing to read in it .1 fewer than two responses"),
        (RANKED | {"responses": "a"}, "row 1: field 'responses' is str, not a list"),
        (RANKED | {"responses": ["a", None], "scores": [1, "x"]}, "field 'scores' is 'x'"),
        (RANKED | {"scores": [1, 2]}, "row 1: field 'scores' is not a list of 3 numbers"),
        (RANKED | {"scores": [1, 2, "3"]}, "row 1: field 'scores' is '3', expected a number"),
        (RANKED | {"responses": ["a", "b", 3]}, "row 1, responses 3: field 'responses' is int"),
        ({"prompt": "p", "answers": [{"rank": 1}] * 2}, "row 1, answers 1: field 'answer' is miss"),
    ],
)
def test_a_broken_ranked_list_is_named(bad, said, tmp_path):
    with pytest.raises(UserError, match=said):
        pairs_in(write(tmp_path / "x.jsonl", [bad]))


def test_a_row_of_no_layout_names_the_nearest(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"context": "c", "response1": "a", "response2": "b"}])
    with pytest.raises(UserError, match=r"'overall_preference' is missing; .* Nearest|nearest"):
        pairs_in(path)
    with pytest.raises(UserError, match=r"row 1: expected ratings, found pairs \(prompt, chosen"):
        read(write(tmp_path / "y.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}]))


# ---- prompts ----------------------------------------------------------------------------------

HI = [{"role": "user", "content": "hi"}]
HELLO = {"role": "assistant", "content": "hello"}
MORE = [*HI, HELLO, {"role": "user", "content": "and?"}]
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "hi"}, HI),
        ({"prompt": HI, "response": None}, HI),
        ({"prompt": "hi", "system": "Be brief."}, [BRIEF, *HI]),
        ({"prompt": {"messages": MORE, "system": "Be brief."}}, [BRIEF, *MORE]),
        ({"prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"}, MORE),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 2]}, HI),
        ({"context": MORE, "response1": "a", "response2": "b", "overall_preference": 1}, MORE),
        ({"messages": [*MORE, HELLO]}, MORE),
        ({"messages": MORE}, MORE),
        ({"conversations": [{"from": "human", "value": "hi"}]}, HI),
        ({"chosen": [*MORE, HELLO], "rejected": [*MORE, HELLO], "prompt": None}, MORE),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant: a",
                "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant: b",
            },
            MORE,
        ),
    ],
)
def test_the_prompt_of_a_row(fields, expected):
    reader = RowReader()
    found = reader.prompt(Row("x row 1", 1, fields | {"tools": '[{"name": "look_up"}]'}))
    assert found.messages == expected
    assert found.tools == [{"name": "look_up"}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"question": "hi"}, "x row 1: there is no prompt in it; the row has question"),
        ({"prompt": None}, "there is no prompt in it"),
        ({"prompt": " "}, "field 'prompt' has no user turn"),
        ({"prompt": [*HI, HELLO]}, "field 'prompt' ends with a turn of 'assistant'"),
        ({"messages": "hi"}, "field 'messages' does not begin with"),
        ({"messages": [HELLO]}, "field 'messages' has a prompt that has no user turn"),
        (
            {"chosen": [*HI, HELLO], "rejected": [{"role": "user", "content": "no"}, HELLO]},
            "do not begin with the same prompt",
        ),
        (
            {"chosen": [BRIEF, *HI, HELLO], "rejected": [BRIEF, *MORE[2:], HELLO]},
            "do not begin with the same prompt",
        ),
    ],
)
def test_a_row_without_a_prompt_is_named(fields, said):
    with pytest.raises(UserError, match=said):
        RowReader().prompt(Row("x row 1", 1, fields))
