import json

import numpy as np
import pytest

import rmjax
from helpers.hf_models import NAMES, save_hf
from helpers.models import tiny_llama
from rmjax.errors import UserError
from rmjax.score import score


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    decoder = tiny_llama(max_position_embeddings=256)
    return str(save_hf(tmp_path_factory.mktemp("hf"), decoder, names=NAMES[:2]))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [
    {"prompt": "Why?", "responses": ["so", "", "because"], "id": "a"},
    {"messages": turns("hi", "hello", "how?", "well"), "when": "2020-01-01"},
    {"prompt": "p", "chosen": "x", "rejected": "y" * 300},
    {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
]


def test_every_response_has_the_scores_of_the_python_api(model, tmp_path):
    out = tmp_path / "out.jsonl"
    lines = score(model, write(tmp_path / "in.jsonl", ROWS), str(out))
    rm = rmjax.load(model, over_long="truncate_left")
    found = read(out)
    assert [{k: r[k] for k in row} for r, row in zip(found, ROWS)] == ROWS
    said = [("Why?", "so"), ("Why?", "because"), ("hi", "hello", "how?", "well"), ("p", "x")]
    said += [("p", "y" * 300), ("a", "b"), ("a", "c")]
    expected = rm.score_many([turns(*texts) for texts in said])
    scores = [s for r in found for s in r["scores"]]
    assert scores[1] is None and found[0]["attributes"][1] is None
    left = [s for s in scores if s is not None]
    np.testing.assert_allclose(left, [s.value for s in expected], atol=1e-5)
    named = [s for r in found for s in r["attributes"] if s]
    np.testing.assert_allclose(
        [[*s.values()] for s in named], [[*s.attributes.values()] for s in expected], atol=1e-5
    )
    assert found[2]["tokens"] == [7, 256] and found[2]["cut"] == [0, 50]
    printed = "\n".join(lines)
    assert "4 rows" in printed and "8 responses by zeal" in printed and "1 empty" in printed
    assert "1 lost their first tokens" in printed and "not used: id, when" in printed


def test_a_killed_one_is_continued(model, tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.inference.score_file._AT_ONCE", 1)
    rows = [{"prompt": f"q{i}", "response": "r" * i, "number": i} for i in range(1, 40)]
    source = write(tmp_path / "in.jsonl", rows)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    score(model, source, str(whole))
    asked = []

    def killed(self, encoded):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(encoded))
        return original(self, encoded)

    original = rmjax.Scorer.score_encoded
    with monkeypatch.context() as patch:
        patch.setattr(rmjax.Scorer, "score_encoded", killed)
        with pytest.raises(KeyboardInterrupt):
            score(model, source, str(out))
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(read(partial)) == sum(asked) == 16
    # As a full disk leaves them: half of the rows that are scored together, and half a line.
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[:11]) + b'{"prompt": "half a')
    with pytest.raises(
        UserError, match=r"out\.jsonl\.partial: begun with other values of max_length;"
    ):
        score(model, source, str(out), max_length=99)
    with pytest.raises(UserError, match=r"--max-length=100000: the model was made for up to"):
        score(model, source, str(tmp_path / "long"), max_length=100_000)
    assert "8 of them before" in score(model, source, str(out))[0]
    assert out.read_bytes() == whole.read_bytes()
    assert [r["number"] for r in read(out)] == [*range(1, 40)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_scores_by_another_model_are_replaced_only_if_that_is_said(model, tmp_path):
    given = [ROWS[0] | {"scores": [9.0, 9.0, 9.0], "attributes": [None] * 3}]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    score(model, write(tmp_path / "in.jsonl", ROWS[:1]), str(first))
    with pytest.raises(UserError, match="'scores' already; rename it, or say --replace"):
        score(model, write(tmp_path / "scored.jsonl", given), str(second))
    score(model, str(tmp_path / "scored.jsonl"), str(second), replace=True)
    assert read(first) == read(second)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there is no row in it"),
        ([{"prompt": "p"}], "row 1: field 'response' is missing"),
        (
            [ROWS[1], {"prompt": "p", "response": "r", "scores": 1}],
            "row 2: there is a field 'scores'",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(rows, said, model, tmp_path):
    with pytest.raises(UserError, match=said):
        score(model, write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"))
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(UserError, match="is there already"):
        score(model, write(tmp_path / "in.jsonl", ROWS), str(tmp_path / "there.jsonl"))
