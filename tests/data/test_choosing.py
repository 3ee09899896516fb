import json
from collections import Counter

import pytest

from rmjax.choose import choose_file
from rmjax.data.choosing import Choice, against_given, choose, with_ratings
from rmjax.data.conversation import Conversation
from rmjax.data.readers import open_source
from rmjax.data.records import read_pairs
from rmjax.errors import UserError


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def row(*scores, **changes):
    texts = [f"answer {i}" for i in range(len(scores))]
    return {"prompt": "Why?", "responses": texts, "scores": [*scores]} | changes


def chosen(tmp_path, rows, **choice):
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    counts = Counter()
    return [*choose(open_source(str(path), ""), Choice(**choice), counts)], counts


def test_the_best_of_n_is_the_first_with_the_highest_value(tmp_path):
    rows = [row(1, 3, 3, 2, id="x"), row(None, None), row(5)]
    found, counts = chosen(tmp_path, rows, way="best-of")
    assert [(r["messages"], r["score"], r.get("id")) for r in found] == [
        (turns("Why?", "answer 1"), 3, "x"),
        (turns("Why?", "answer 0"), 5, None),
    ]
    assert counts == {
        **{"read": 3, "written": 2, "dropped: no response with a score": 1},
        "responses without a score": 2,
    }
    assert [r["score"] for r in chosen(tmp_path, rows, way="best-of", first=1)[0]] == [1, 5]


def test_what_did_not_end_is_not_chosen_unless_wanted(tmp_path):
    rows = [row(1, 3, ended=[True, False])]
    found, counts = chosen(tmp_path, rows, way="best-of")
    assert (found[0]["score"], counts["responses that did not end"]) == (1, 1)
    assert chosen(tmp_path, rows, way="best-of", unended=True)[0][0]["score"] == 3


def test_pairs_are_the_best_and_the_worst(tmp_path):
    rows = [
        row(1, 4, 2.5),
        row(2, 2),
        row(2, 2.25),
        row(1, 2, responses=["same", "same"]),
        row(None, 1, 0, tools=[{"name": "f"}]),
    ]
    found, counts = chosen(tmp_path, rows, way="pairs", apart=0.5)
    assert [
        (r["chosen"][-1]["content"], r["rejected"][-1]["content"], r["margin"]) for r in found
    ] == [
        ("answer 1", "answer 0", 3),
        ("answer 1", "answer 2", 1),
    ]
    assert found[1]["tools"] == [{"name": "f"}]
    assert counts["dropped: a tie"] == counts["dropped: chosen equals rejected"] == 1
    assert counts["dropped: the best and the worst are too close"] == 1


def test_training_reads_what_was_chosen(tmp_path):
    source = tmp_path / "scored.jsonl"
    source.write_text(json.dumps(row(1, 4, 2)) + "\n")
    choose_file(str(source), str(tmp_path / "pairs.jsonl"), Choice("pairs"))
    ((better, worse),) = read_pairs(str(tmp_path / "pairs.jsonl"), "train").all().entries
    assert better.conversation == Conversation(turns("Why?", "answer 1"))
    assert worse.conversation.response == "answer 0" and better.strength == 3
    # The scored file itself is a ranked list of three.
    assert len(read_pairs(str(source), "train").all().entries) == 3


def test_steerlm_tells_the_ratings(tmp_path):
    attributes = [{"help": 3.6, "verb": -2.0}, {"help": 9.0, "verb": 1.2}]
    found, _ = chosen(tmp_path, [row(1, 2, attributes=attributes)], way="steerlm")
    told = [r["messages"][0] for r in found]
    assert told == [
        {"role": "system", "content": f"Answer with these ratings: help 4, verb {v}"}
        for v in (0, 1)
    ]
    assert found[0]["messages"][1:] == turns("Why?", "answer 0")
    system = {"role": "system", "content": "Be kind."}
    assert with_ratings([system, *turns("hi")], {"help": 4})[0]["content"] == (
        "Be kind.\n\nAnswer with these ratings: help 4"
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "p", "responses": ["a"]}, "row 1: field 'scores' is missing; .*rmjax.score"),
        (row(1, 2, scores=[1]), "row 1: field 'scores' is not a list of 2"),
        (row(1, ended=True), "row 1: field 'ended' is not a list of 1"),
        (row(1, ended=["no"]), "row 1: field 'ended' has 'no' in it"),
        (row(1, ended=[0]), "row 1: field 'ended' has 0 in it"),
        (row(1, float("nan")), "row 1: field 'scores' has nan in it"),
        (row(1, float("inf")), "row 1: field 'scores' has inf in it"),
        (row("1"), "row 1: field 'scores' has '1' in it"),
        (row(1, attributes=[3]), "row 1: field 'attributes' has 3 in it"),
        (row(1, attributes=[{"help": "x"}]), "row 1: field 'attributes' has 'x' in it"),
    ],
)
def test_a_row_without_scores_is_named(bad, said, tmp_path):
    with pytest.raises(UserError, match=said):
        chosen(tmp_path, [bad], way="best-of")


def test_what_has_no_score_or_no_ratings_is_counted(tmp_path):
    found, counts = chosen(tmp_path, [row(None, 1)], way="best-of")
    assert len(found) == 1 and counts["responses without a score"] == 1
    rows = [row(1), row(1, attributes=[{"help": 3}])]
    found, counts = chosen(tmp_path, rows, way="steerlm")
    assert len(found) == 1
    assert counts["dropped: a response without ratings ('attributes')"] == 1


def test_a_file_is_whole_or_not_there(tmp_path):
    source, out = tmp_path / "s.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(row(2, 2)) + "\n")
    with pytest.raises(UserError, match=r"nothing is chosen of it .*1 dropped: a tie"):
        choose_file(str(source), str(out), Choice("pairs"))
    assert not list(tmp_path.glob("out*"))
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        choose_file(str(source), str(out), Choice("best-of"))
    assert out.read_text() == "mine"


def test_spin_prefers_the_given_response_to_the_policys_own(tmp_path):
    given = [{"prompt": "p", "response": "good", "id": 1}, {"prompt": "q", "response": "same"}]
    asked = [[{"role": "user", "content": text}] for text in "pq"]
    samples = [{"prompt": asked[0], "responses": ["own", "x"]}]
    samples += [{"prompt": asked[1], "responses": ["same"]}]

    def read(samples, **options):
        for name, rows in (("given", given), ("samples", samples)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        own, examples = (
            open_source(str(tmp_path / f"{n}.jsonl"), "") for n in ("samples", "given")
        )
        counts = Counter()
        return list(against_given(own, examples, counts, **options)), dict(counts)

    (row,), counts = read(samples)
    assert row["chosen"] == [*asked[0], {"role": "assistant", "content": "good"}]
    assert row["rejected"] == [*asked[0], {"role": "assistant", "content": "own"}]
    assert row["id"] == 1 and counts["written"] == 1 and counts["read"] == 2
    assert any("equal" in reason or "same" in reason for reason in counts)
    cut = [sample | {"ended": [False] * len(sample["responses"])} for sample in samples]
    assert read(cut)[1] == {"read": 2, "dropped: responses that did not end": 2}
    assert read(cut, unended=True)[0] == [row]
    with pytest.raises(UserError, match="its prompt is not that of"):
        read(samples[::-1])
    with pytest.raises(UserError, match="the other file has fewer rows"):
        read(samples[:1])
