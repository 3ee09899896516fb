import concurrent.futures
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checks import known
from rmjax.data import tokenize
from rmjax.data.conversation import Conversation
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenized import hold_out, join
from rmjax.data.tokenizer import byte_tokenizer, encode, truncate_left
from rmjax.errors import UserError

BYTES = byte_tokenizer()
FRAME = 5  # tokens that the byte tokenizer's template adds to one question and its answer


def row(prompt="p", response="r", **ratings):
    return {"prompt": prompt, "response": response, "a": 1, "b": 2} | ratings


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, for those that look into it."""
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def load(source, tokenizer=BYTES, split="train", **changes):
    options: dict[str, Any] = dict(
        attributes=("a", "b"), label_range=(0.0, 4.0), max_length=100, over_long="drop"
    )
    return load_tokenized(source, split, tokenizer, **(options | changes))


def contents(data):
    """Every sample as (tokens, labels), to compare data whatever their order."""
    return [(data.sequence(i).tobytes(), data.labels[i].tobytes()) for i in range(len(data))]


def test_samples_are_the_templated_conversations(tmp_path):
    rows = [row("one", "é"), row("two", "x" * 20, a=None), row("a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "d")]  # fmt: skip  # noqa: E501
    data = load(write(tmp_path / "x.jsonl", rows))
    turns = [["one", "é"], ["two", "x" * 20], ["a", "b", "c", "d"]]
    for i, said in enumerate(turns):
        roles = ["user", "assistant"] * 2
        messages = [{"role": r, "content": text} for r, text in zip(roles, said)]
        np.testing.assert_array_equal(
            data.sequence(i), BYTES.apply_chat_template(messages, return_dict=False)
        )
    np.testing.assert_array_equal(data.labels, [[1, 2], [math.nan, 2], [1, 2]])
    np.testing.assert_array_equal(data.rows, [1, 2, 3])
    assert data.counts == {"read": 3, "kept": 3, "prompts": 3}
    assert data.where(1) == f"{tmp_path / 'x.jsonl'} row 2"
    assert data.tokens.dtype == np.int32 and data.labels.dtype == np.float32


def test_the_cache_gives_the_same_without_reading_again(tmp_path, cache, monkeypatch):
    source = write(tmp_path / "x.jsonl", [row("p", str(i), a=i % 5) for i in range(20)])
    first = load(source)
    monkeypatch.setattr(tokenize, "read_samples", None)  # calling it would be an error
    again = load(source)
    for field in ("tokens", "offsets", "labels", "prompt_ids", "rows"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert (again.key, again.counts, again.source) == (first.key, first.counts, first.source)
    assert not list(cache.rglob("*.partial"))


def test_the_cache_is_keyed_by_everything_that_made_it(tmp_path):
    path = tmp_path / "x.jsonl"
    source = write(path, [row(), row(response="longer")])
    template = byte_tokenizer()
    template.chat_template = BYTES.chat_template + "{{ '' }}"
    bos = byte_tokenizer()
    bos.bos_token = "<|pad|>"
    vocabulary = byte_tokenizer()
    vocabulary.add_tokens(["longer"])
    keys = [
        load(source).key,
        load(source, max_length=99).key,
        load(source, over_long="truncate_left").key,
        load(source, attributes=("b", "a")).key,
        load(source, attributes=("a",)).key,
        load(source, label_range=(1.0, 4.0)).key,
        load(source, template).key,
        load(source, bos).key,
        load(source, vocabulary).key,
        load(write(path, [row(), row(response="longex")])).key,
        load("generated:4", attributes=("helpfulness",), max_length=500).key,
        load("generated:6", attributes=("helpfulness",), max_length=500).key,
        load("generated:6", split="validation", attributes=("helpfulness",), max_length=500).key,
    ]
    assert len(set(keys)) == len(keys)


def test_another_bos_is_not_served_from_the_cache(tmp_path):
    source = write(tmp_path / "x.jsonl", [row()])
    other = byte_tokenizer()
    other.bos_token = "<|pad|>"
    assert load(source).sequence(0)[0] == BYTES.bos_token_id
    assert load(source, other).sequence(0)[0] == BYTES.pad_token_id


def test_the_key_does_not_depend_on_what_the_tokenizer_did_before(tmp_path):
    """Encoding resets a length limit that tokenizer.json carries."""
    source = write(tmp_path / "x.jsonl", [row()])
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    before = load(source, tokenizer).key
    encode(tokenizer, Conversation([{"role": "user", "content": "hi"}]))
    assert load(source, tokenizer).key == before == load(source).key


def test_the_key_follows_the_content_and_not_the_name(tmp_path):
    rows = [row()]
    one, two = (load(write(tmp_path / name, rows)) for name in ("one.jsonl", "two.jsonl"))
    assert one.key == two.key
    assert (one.where(0), two.where(0)) == (
        f"{tmp_path / 'one.jsonl'} row 1",
        f"{tmp_path / 'two.jsonl'} row 1",
    )


def test_a_directorys_messages_name_the_file(tmp_path):
    write(tmp_path / "train.jsonl", [row()])
    assert load(str(tmp_path)).where(0) == f"{tmp_path / 'train.jsonl'} row 1"


def test_many_may_fill_the_cache_at_once(tmp_path, cache):
    source = write(tmp_path / "x.jsonl", [row("p", str(i)) for i in range(200)])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: contents(load(source, byte_tokenizer())), range(8)))
    assert all(one == found[0] for one in found)
    assert len(list((cache / "tokens").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set RMJAX_CACHE"):
        load(write(tmp_path / "x.jsonl", [row()]))


def test_over_long_samples_are_dropped_and_counted(tmp_path):
    rows = [row("p", "x" * n) for n in (10, 94, 95, 300)]  # 94 + 1 + FRAME is the longest
    data = load(write(tmp_path / "x.jsonl", rows))
    assert data.counts == {"read": 4, "kept": 2, "prompts": 1, "dropped: too long": 2}
    assert data.lengths.tolist() == [10 + 1 + FRAME, 100]


def test_over_long_samples_keep_bos_and_their_end(tmp_path):
    source = write(tmp_path / "x.jsonl", [row("q" * 50, "abc" * n) for n in (1, 40)])
    whole = load(source, max_length=1000)
    data = load(source, over_long="truncate_left")
    assert data.counts == {"read": 2, "kept": 2, "prompts": 1, "truncated on the left": 1}
    np.testing.assert_array_equal(data.sequence(0), whole.sequence(0))
    expected = [BYTES.bos_token_id, *whole.sequence(1)[-99:]]
    np.testing.assert_array_equal(data.sequence(1), expected)


def test_over_long_samples_can_be_an_error(tmp_path):
    source = write(tmp_path / "x.jsonl", [row(), row(response="x" * 95)])
    with pytest.raises(UserError, match=r"x\.jsonl row 2: 101 tokens, more than .* = 100"):
        load(source, over_long="error")


@pytest.mark.parametrize(
    ("tokens", "length", "bos", "expected"),
    [
        ([7, 1, 2, 3], 4, 7, [7, 1, 2, 3]),
        ([7, 1, 2, 3], 3, 7, [7, 2, 3]),
        ([7, 1, 2, 3], 2, 7, [7, 3]),
        ([7, 1, 2, 3], 1, 7, [3]),
        ([0, 1, 2, 3], 2, 0, [0, 3]),
        ([7, 1, 2, 3], 3, 9, [1, 2, 3]),
        ([7, 1, 2, 3], 3, None, [1, 2, 3]),
    ],
)
def test_truncation_on_the_left(tokens, length, bos, expected):
    assert truncate_left(np.asarray(tokens), length, bos).tolist() == expected


def test_a_sample_without_any_label_is_dropped_and_counted(tmp_path):
    rows = [row(a=None, b=-100), row(a=None), row(), row(a=math.nan, b=None, response="z" * 500)]
    data = load(write(tmp_path / "x.jsonl", rows))
    assert data.counts == {"read": 4, "kept": 2, "prompts": 1, "dropped: no label": 2}
    np.testing.assert_array_equal(data.rows, [2, 3])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(response="x" * 200)] * 3, "no sample is left of 3 .*3 dropped: too long"),
        ([row(a=None, b=None)] * 2, "no sample is left of 2 .*2 dropped: no label"),
    ],
)
def test_nothing_left_is_an_error(rows, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        load(write(tmp_path / "x.jsonl", rows))
    assert str(caught.value).startswith(f"{tmp_path / 'x.jsonl'}: ")


def test_a_conversation_the_template_refuses_is_named(tmp_path):
    refusing = byte_tokenizer()
    refusing.chat_template = "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}"
    refusing.chat_template += "{% for m in messages %}{{ m.content }}{% endfor %}"
    marked = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    source = write(tmp_path / "x.jsonl", [row(), row(prompt=marked)])
    with pytest.raises(UserError, match=r"x\.jsonl row 2: the chat template refuses"):
        load(source, refusing)


def test_half_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps(row()) + "\n" + json.dumps(row(response="@")).replace("@", "\\ud800") + "\n"
    )
    with pytest.raises(UserError, match=r"x\.jsonl row 2: .*not valid Unicode"):
        load(str(tmp_path / "x.jsonl"))


ROWS = st.lists(
    st.tuples(
        st.sampled_from(
            ["p", "q", "what\n<extra_id_1>Assistant\nx\n<extra_id_1>User\ny", "z" * 40]
        ),
        st.integers(1, 120),
        st.sampled_from([None, 0, 3.5]),
        st.sampled_from([None, -100, 4]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, over_long=st.sampled_from(["drop", "truncate_left"]))
def test_nothing_is_lost_and_siblings_are_adjacent(rows, over_long, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    rows = [row(p, "x" * n, a=a, b=b) for p, n, a, b in rows]
    source = write(path, rows)
    try:
        data = load(source, over_long=over_long)
    except UserError as error:
        assert "no sample is left" in str(error)
        return
    counts = data.counts
    dropped = sum(n for reason, n in counts.items() if reason.startswith("dropped"))
    assert counts["read"] == len(rows) == counts["kept"] + dropped
    assert counts["kept"] == len(data) == len(set(data.rows.tolist()))
    assert (data.lengths <= 100).all() and (data.lengths > 0).all()

    kept = [rows[n - 1] for n in data.rows]
    prompts = [r["prompt"] for r in kept]
    assert counts["prompts"] == len(set(prompts)) == data.prompt_ids.max() + 1
    assert np.isin(np.diff(data.prompt_ids), (0, 1)).all()  # ascending: members stand together
    by_group = dict(zip(data.prompt_ids.tolist(), prompts))
    assert [by_group[g] for g in data.prompt_ids.tolist()] == prompts
    expected = [[np.nan if v in (None, -100) else v for v in (r["a"], r["b"])] for r in kept]
    np.testing.assert_array_equal(data.labels, np.asarray(expected, np.float32))


def three_a_prompt(prompts=30):
    return [row(f"question {i}", f"answer {i} {j}", a=j) for i in range(prompts) for j in range(3)]


def questions(data):
    texts = [BYTES.decode(data.sequence(i)) for i in range(len(data))]
    return {text.split("<|user|>")[1].split("<|end|>")[0] for text in texts}


@pytest.mark.parametrize("share", [0.04, 0.2, 0.5, 0.97])
def test_hold_out_splits_by_prompt_and_loses_nothing(share, tmp_path):
    data = load(write(tmp_path / "x.jsonl", three_a_prompt()))
    (stays,), (held,) = hold_out([data], share)
    assert not questions(stays) & questions(held)
    assert len(questions(held)) == round(share * 30)
    assert sorted(contents(stays) + contents(held)) == sorted(contents(data))
    assert len({data.key, stays.key, held.key}) == 3
    for side in (stays, held):
        assert side.counts["read"] == 90
        assert (
            side.counts["kept"] == len(side) == 90 - side.counts["on the other side of the split"]
        )
        assert side.counts["prompts"] == len(side) / 3
        assert side.prompt_ids.tolist() == [g for g in range(len(side) // 3) for _ in range(3)]
        assert [int(n) for n in side.rows] == sorted(side.rows)
        assert side.where(0) == f"{tmp_path / 'x.jsonl'} row {side.rows[0]}"


def test_hold_out_does_not_depend_on_the_files_order(tmp_path, rng):
    rows = three_a_prompt()
    sides = []
    for n in range(3):
        data = load(write(tmp_path / f"{n}.jsonl", [rows[i] for i in rng.permutation(len(rows))]))
        sides.append([sorted(contents(side)) for (side,) in hold_out([data], 0.3)])
    assert sides[0] == sides[1] == sides[2]


def test_hold_out_tells_prompts_apart_that_truncation_made_alike(tmp_path):
    """The questions end alike, so that one answer to each became the same sample."""
    rows = [row(chr(65 + i) + "x" * 200, answer) for i in range(12) for answer in ("t", f"{i}")]
    sides = []
    for n, order in enumerate((rows, rows[::-1], rows[10:] + rows[:10])):
        data = load(write(tmp_path / f"{n}.jsonl", order), over_long="truncate_left")
        assert data.counts["prompts"] == 12
        sides.append([sorted(contents(side)) for (side,) in hold_out([data], 0.5)])
    assert sides[0] == sides[1] == sides[2]


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_hold_out_that_leaves_a_side_empty_is_an_error(share, tmp_path):
    data = load(write(tmp_path / "x.jsonl", three_a_prompt(10)))
    with pytest.raises(UserError, match=r"x\.jsonl: holding out .* of 10 prompts leaves one side"):
        hold_out([data], share)


def test_real_ratings(shared_data):
    source = str(shared_data / "topical_chat_ratings.jsonl")
    data = load(source, attributes=("overall",), label_range=(1.0, 5.0), max_length=4096)
    assert data.counts == {"read": 360, "kept": 360, "prompts": 60}
    (stays,), (held,) = hold_out([data], 0.1)
    assert (len(stays), len(held)) == (324, 36)


# ---- preference pairs ----------------------------------------------------------------------------


def pair(prompt="p", chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def load_pairs(source, **changes):
    return load(source, pairs=True, attributes=("reward",), **changes)


def test_a_pair_is_its_chosen_and_its_rejected_sample(tmp_path):
    data = load_pairs(
        write(tmp_path / "x.jsonl", [pair("a"), pair("b", "x", "yy"), pair("a", "z")])
    )
    said = [("a", "good"), ("a", "bad"), ("a", "z"), ("a", "bad"), ("b", "x"), ("b", "yy")]
    for i, (prompt, response) in enumerate(said):
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        np.testing.assert_array_equal(data.sequence(i), encode(BYTES, Conversation(messages)))
    np.testing.assert_array_equal(data.prompt_ids, [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.rows, [1, 1, 3, 3, 2, 2])
    np.testing.assert_array_equal(data.chosen, [True, False] * 3)
    assert np.isnan(data.strengths).all() and data.samples_together == 2
    assert data.counts == {"read": 3, "kept": 3, "prompts": 2}


def test_pairs_of_which_nothing_can_be_learned_are_counted(tmp_path):
    rows = [pair(), pair(chosen="same", rejected="same"), pair(chosen=""), pair(rejected="b" * 200)]
    data = load_pairs(write(tmp_path / "x.jsonl", rows))
    assert data.counts == {
        "read": 4,
        "dropped: chosen equals rejected": 1,
        "dropped: an empty response": 1,
        "dropped: too long": 1,
        "kept": 1,
        "prompts": 1,
    }
    with pytest.raises(UserError, match=r"row 4: 2\d\d tokens, more than data.max_length = 100"):
        load_pairs(write(tmp_path / "x.jsonl", rows), over_long="error")


def test_pairs_that_truncation_makes_equal_are_dropped(tmp_path):
    """The loss would stay at log 2: they differ only in what was cut."""
    rows = [pair(), pair(chosen="x" + "y" * 200, rejected="z" + "y" * 200)]
    data = load_pairs(write(tmp_path / "x.jsonl", rows), over_long="truncate_left")
    assert data.counts["dropped: chosen equals rejected"] == 1
    assert data.counts["truncated on the left"] == 1
    assert len(data) == 2


def test_pairs_are_held_out_by_prompt(tmp_path):
    rows = [pair(f"{i % 10}", f"c{i}", f"r{i}") for i in range(40)]
    (kept,), (held,) = hold_out([load_pairs(write(tmp_path / "x.jsonl", rows))], 0.3)
    assert (kept.counts["kept"], held.counts["kept"]) == (28, 12)
    assert held.counts["on the other side of the split"] == 28
    assert kept.chosen[::2].all() and held.chosen[::2].all() and len(held) == 24
    prompts = {kept.sequence(i)[:3].tobytes() for i in range(len(kept))}
    assert not prompts & {held.sequence(i)[:3].tobytes() for i in range(len(held))}


def test_real_pairs_share_many_of_their_tokens(shared_data):
    path = shared_data / "hh_harmless_base_test.jsonl.gz"
    data = load_pairs(str(path), max_length=10_000)
    assert data.counts["read"] == 2312
    assert data.counts["dropped: an empty response"] == 4
    assert (
        sum(n for reason, n in data.counts.items() if reason.startswith("dropped"))
        == 2312 - (data.counts["kept"])
    )
    first = np.diff(data.prompt_ids, prepend=-1) != 0
    assert 0.25 < data.shared[~first].sum() / data.lengths.sum() < 0.5


def test_what_siblings_share_is_kept_through_cache_and_split(tmp_path):
    rows = [row(f"prompt {i % 7}", "r" * i) for i in range(1, 30)]
    source = write(tmp_path / "x.jsonl", rows)
    load(source)
    for part in (load(source), *itertools.chain(*hold_out([load(source)], 0.3))):
        for i in range(len(part)):
            for j in np.flatnonzero(part.prompt_ids == part.prompt_ids[i]).tolist():
                n = int(part.shared[i])
                np.testing.assert_array_equal(part.sequence(i)[:n], part.sequence(j)[:n])
                assert n < len(part.sequence(j))


def test_ties_are_dropped_or_kept_and_counted(tmp_path):
    rows = [pair("a") | {"margin": 2}, pair("b") | {"margin": 0}]
    path = write(tmp_path / "x.jsonl", rows)
    dropped, kept = load_pairs(path), load_pairs(path, ties="half")
    assert dropped.counts == {"read": 2, "dropped: a tie": 1, "kept": 1, "prompts": 1}
    assert kept.counts == {"read": 2, "kept": 2, "prompts": 2}
    np.testing.assert_array_equal(kept.strengths, [2, 2, 0, 0])


def test_repeated_and_contradicting_pairs_are_counted(tmp_path):
    rows = [pair(), pair(), pair(chosen="bad", rejected="good"), pair("q")]
    data = load_pairs(write(tmp_path / "x.jsonl", rows))
    assert data.counts["kept"] == 4
    assert data.counts["of these repeat another"] == 1
    assert data.counts["of these contradict another"] == 3


def test_ratings_and_pairs_are_joined(tmp_path):
    """A prompt of both stays two; every sample keeps its tokens, labels and row."""
    rated = load(write(tmp_path / "r.jsonl", [row(prompt="p"), row(prompt="q")]))
    pairs = load(
        write(tmp_path / "p.jsonl", [pair("p") | {"margin": 3}]),
        pairs=True,
        attributes=rated.attributes,
    )
    data = join(rated, pairs)
    np.testing.assert_array_equal(data.prompt_ids, [0, 1, 2, 2])
    np.testing.assert_array_equal(data.chosen, [False, False, True, False])
    np.testing.assert_array_equal(data.strengths, [np.nan, np.nan, 3, 3])
    assert np.isnan(data.labels[2:]).all() and not np.isnan(data.labels[:2]).all()
    for i in range(4):
        part, index = (rated, i) if i < 2 else (pairs, i - 2)
        np.testing.assert_array_equal(data.sequence(i), part.sequence(index))
    assert data.counts["pairs kept"] == 1 and data.counts["ratings kept"] == 2


def test_what_the_template_does_not_read_is_said(tmp_path):
    messages = [
        {"role": "user", "content": "p", "name": "Ann"},
        {"role": "assistant", "content": "r", "reasoning_content": "so"},
    ]
    rows = [{"messages": messages, "tools": [{}], "a": 1, "b": 2}, row()]
    data = load(write(tmp_path / "x.jsonl", rows))
    assert data.notes == tuple(
        f"the chat template does not show {what}, which 1 conversations have"
        for what in ("'name' of 'user'", "'reasoning_content' of 'assistant'", "'tools'")
    )
    assert load(str(tmp_path / "x.jsonl")).notes == data.notes  # from the cache
    other = messages[1] | {"reasoning_content": "no"}
    rows = [pair() | {"chosen": [messages[1]], "rejected": [other]}, pair()]
    counts = load(write(tmp_path / "y.jsonl", rows), pairs=True).counts
    assert counts["dropped: chosen equals rejected"] == 1


def test_rows_of_another_split_are_counted(tmp_path):
    rows = [row(split="train"), row(split="test"), row(split="train", response="s")]
    data = load(write(tmp_path / "x.jsonl", rows))
    assert data.counts == {
        "read": 2,
        "skipped: of another split (test)": 1,
        "kept": 2,
        "prompts": 1,
    }
    assert data.rows.tolist() == [1, 3]
    assert not data.notes  # the column is used


def test_a_prompt_of_ratings_and_pairs_is_held_out_of_both(tmp_path):
    """Whatever responses it has there."""
    rated = load(write(tmp_path / "r.jsonl", [row(f"q{i}", f"r{i}") for i in range(60)]))
    rows = [pair(f"q{i}", f"good {i}") for i in range(30, 90)]
    paired = load(write(tmp_path / "p.jsonl", rows), pairs=True)
    kept, held = hold_out([rated, paired], 0.3)
    trained, out = (
        {text for part in side for text in map(int, part.prompt_hashes)} for side in (kept, held)
    )
    assert not trained & out and len(out) == round(0.3 * 90)
    assert {len(part) > 0 for part in (*kept, *held)} == {True}


def test_of_a_policys_data_it_is_known_what_the_assistant_says(tmp_path, cache):
    """Of one prompt both responses, from the cache too; and no rating is needed."""
    rows = [{"prompt": "p", "response": text} for text in ("so", "no")]
    source = write(tmp_path / "x.jsonl", rows)
    for _ in range(2):
        data = load(source, attributes=(), policy=True)
        assert data.labels.shape == (2, 0)
        asked = BYTES.apply_chat_template(
            [{"role": "user", "content": "p"}], add_generation_prompt=True, return_dict=False
        )
        for sample in range(2):
            expected = np.arange(len(data.sequence(sample))) >= len(asked)
            np.testing.assert_array_equal(data.spoken_in(sample), expected)
        assert data.shared.tolist() == [len(asked) - 1] * 2
    assert len(list((cache / "tokens").iterdir())) == 1
    rated = write(tmp_path / "y.jsonl", [row(), row(response="s")])
    assert load(rated).key != load(rated, attributes=(), policy=True).key
    assert load(rated).spoken is None


MARKS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def dialogue(*texts):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@pytest.mark.parametrize("marks", [True, False])
def test_every_turn_is_what_transformers_marks(marks, tmp_path):
    """By a template's own marks, and by position with one that has none."""
    marked, tokenizer = byte_tokenizer(), byte_tokenizer()
    marked.chat_template = tokenizer.chat_template = MARKS
    if not marks:
        plain = MARKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        tokenizer.chat_template = plain
    talks = [dialogue("a", "so", "b", "no", "c", "é"), dialogue("a", "so", "d", "oh")]
    source = write(tmp_path / "x.jsonl", [{"messages": talk} for talk in talks])
    data = load(source, tokenizer, attributes=(), policy=True, turns="all")
    for sample, talk in enumerate(talks):
        theirs = marked.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens = data.sequence(sample).tolist()
        assert tokens == theirs["input_ids"]
        assert data.spoken_in(sample).astype(int).tolist() == theirs["assistant_masks"]
        said = tokenizer.decode(np.asarray(tokens)[data.spoken_in(sample)])
        assert said == "".join(f"{m['content']}<|end|>" for m in talk if m["role"] == "assistant")


def test_the_last_turn_and_every_turn_are_different_data(tmp_path):
    """Of two conversations to one prompt nothing is shared that one of them learns."""
    talks = [dialogue("a", "so", "b", text) for text in ("no", "oh")]
    source = write(tmp_path / "x.jsonl", [{"messages": talk} for talk in talks])
    last, every = (
        load(source, attributes=(), policy=True, turns=turns) for turns in ("last", "all")
    )
    assert last.key != every.key == load(source, attributes=(), policy=True, turns="all").key
    assert last.key == load(source, attributes=(), policy=True).key
    assert [int(known(data.spoken).sum()) for data in (last, every)] == [2 * 3, 2 * 6]
    for data in (last, every):
        assert data.shared.tolist() == [int(np.argmax(data.spoken_in(0))) - 1] * 2


def test_a_turn_that_says_nothing_is_not_learned(tmp_path):
    talks = [dialogue("a", "", "b", "no"), dialogue("a", "so")]
    source = write(tmp_path / "x.jsonl", [{"messages": talk} for talk in talks])
    every = load(source, attributes=(), policy=True, turns="all")
    assert every.counts["dropped: an empty response"] == 1 and len(every) == 1
    assert len(load(source, attributes=(), policy=True)) == 2
