"""Training, evaluation and scoring read the same conversations, to the same tokens and scores."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rmjax
from helpers.hf_models import NAMES, save_hf
from helpers.models import score_array, tiny_llama
from helpers.reference import torch_scores
from rmjax.data.conversation import parse_conversation
from rmjax.data.planning import row_shape
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmarks import BENCHMARKS
from rmjax.evaluation.model_evaluation import evaluate_model
from rmjax.evaluation.model_scores import ScoringSettings
from rmjax.evaluation.score_cache import ScoreCache, score_items
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score, score_data
from rmjax.runtime.sharding import MeshConfig

# Reads everything: tools, calls, names, results, and the reasoning of the last turn alone.
TEMPLATE = """{{ bos_token }}
{%- if tools %}<tools>{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>' }}
{%- if m.name %}({{ m.name }}){% endif %}
{%- if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}
{%- if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}
{{- call.function.arguments | tojson }}{% endfor %}{{ '<|end|>' }}
{%- endfor %}"""
LENGTH = 400
SETTINGS = ScoringSettings(0, "truncate_left", "auto", "", MeshConfig())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    decoder = tiny_llama(max_position_embeddings=LENGTH)
    return save_hf(tmp_path_factory.mktemp("hf"), decoder, names=NAMES[:2], tokenizer=tokenizer)


@pytest.fixture(scope="module")
def scorer(directory):
    return rmjax.load(str(directory))


@pytest.fixture(scope="module")
def theirs(directory):
    """transformers' tokenizer and model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    )
    return tokenizer, model.eval()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(scorer, source, pairs=True, **options):
    """The samples that training makes of a source."""
    defaults = dict(
        attributes=scorer.attributes, label_range=(0.0, 4.0), max_length=LENGTH, over_long="error"
    )
    return load_tokenized(
        source,
        "train",
        scorer.tokenizer,
        pairs=pairs,
        **(defaults | options),  # type: ignore[arg-type]
    )


def trained_scores(scorer, data):
    """Scores in the rows and by the function that training evaluates with."""
    shape = row_shape(data, rows=scorer.model.options.sharding.row_shards, length=2 * LENGTH)
    batches = evaluation_batches(data, shape)
    return score_data(
        make_score(scorer.model), scorer.params, batches, scorer.model.options.sharding
    )


# ---- random conversations ------------------------------------------------------------------------

TEXT = st.text("ab é\n<", max_size=6)
SAID = TEXT.filter(str.strip)
CALLS = st.lists(
    st.builds(
        lambda name, x: {"type": "function", "function": {"name": name, "arguments": {"x": x}}},
        st.sampled_from("fg"),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=2,
)


def message(role, content, **fields):
    return st.fixed_dictionaries({"role": st.just(role), "content": content}, optional=fields)


PARTS = st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), max_size=2)
USER = message("user", TEXT | PARTS, name=SAID)
ANSWER = message(
    "assistant", SAID | SAID.map("<think>so</think>".__add__), reasoning_content=SAID, name=SAID
)
ROUND = st.tuples(
    message("assistant", TEXT | st.none(), tool_calls=CALLS).filter(lambda m: "tool_calls" in m),
    message("tool", TEXT, tool_call_id=SAID),
)
TURNS = st.one_of(st.tuples(USER, ANSWER), st.tuples(USER, ROUND, ANSWER))
TOOLS = st.none() | st.just([{"type": "function", "function": {"name": "f"}}])


def flat(parts):
    return [m for part in parts for m in (flat(part) if isinstance(part, tuple) else [part])]


LAST = message("user", SAID, name=SAID)
CONVERSATION = st.tuples(
    st.just(()) | st.tuples(message("system", TEXT)),
    st.lists(TURNS, max_size=2).map(tuple),
    LAST,
    st.just(()) | ROUND,
    ANSWER,
).map(flat)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pairs=st.lists(st.tuples(CONVERSATION, CONVERSATION, TOOLS), min_size=1, max_size=3))
def test_training_evaluation_and_scoring_make_the_same_tokens(pairs, scorer, theirs, tmp_path):
    rows = [{"chosen": a, "rejected": b, "tools": tools} for a, b, tools in pairs]
    source = write(tmp_path / "pairs.jsonl", rows)
    expected = [[], []]
    for row in rows:
        for side, field in enumerate(("chosen", "rejected")):
            ids = theirs[0].apply_chat_template(
                joined(row[field]), tools=row["tools"], tokenize=True, return_dict=False
            )
            expected[side].append(list(ids))
    kept = [i for i in range(len(rows)) if expected[0][i] != expected[1][i]]
    try:
        data = train(scorer, source)
        dropped = data.counts.get("dropped: chosen equals rejected", 0)
        order = np.argsort(data.rows[::2], kind="stable")
        found = [[data.sequence(2 * i + side).tolist() for i in order] for side in (0, 1)]
    except UserError as error:
        assert "no pair is left" in str(error)
        found, dropped = [[], []], len(rows)
    assert found == [[side[i] for i in kept] for side in expected]
    assert dropped == len(rows) - len(kept)
    for row, *ids in zip(rows, *expected):
        for field, tokens in zip(("chosen", "rejected"), ids):
            value = {"messages": row[field], "tools": row["tools"]}
            assert scorer.encode(parse_conversation(value), "").tokens.tolist() == tokens
    if not kept:
        return
    items = BenchmarkData(BENCHMARKS["pairs"], source).items
    tokens = [[scorer.encode(c, "").tokens.tolist() for c in item.conversations] for item in items]
    left = [pair for pair in tokens if pair[0] != pair[1]]
    assert left == [[side[i] for side in expected] for i in kept]


def joined(messages):
    """Messages with the parts of contents joined, as this template needs them."""
    contents = (
        "".join(p["text"] for p in m["content"]) if isinstance(m["content"], list) else m["content"]
        for m in messages
    )
    return [m | {"content": content} for m, content in zip(messages, contents)]


# ---- rows of every layout ------------------------------------------------------------------------


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
CHECKING = {"role": "assistant", "content": "Checking."}
FRENCH = {"role": "system", "content": "Answer in French."}
HH = "\n\nHuman: Hi there\n\nAssistant: Hello\n\nHuman: What is 2+2?\n\nAssistant:"
SUM = ("Hi there", "Hello", "What is 2+2?")
# A row of pairs, and its two conversations as messages, written by hand.
ROWS = {
    "an earlier turn differs": (
        {
            "id": "r3",
            "chosen": turns("hi", "Paris.", "more?", "Yes"),
            "rejected": turns("hi", "Rome.", "more?", "Well"),
        },
        (turns("hi", "Paris.", "more?", "Yes"), turns("hi", "Rome.", "more?", "Well")),
    ),
    "another number of turns": (
        {"chosen": turns("hi", "a"), "rejected": turns("hi", "a", "why?", "b")},
        (turns("hi", "a"), turns("hi", "a", "why?", "b")),
    ),
    "hh-rlhf's marks in the prompt": (
        {"prompt": HH, "chosen": " 4.", "rejected": " 5."},
        (turns(*SUM, "4."), turns(*SUM, "5.")),
    ),
    "a call": (
        {
            "prompt": "x?",
            "chosen": [CHECKING | {"tool_calls": CALL}],
            "rejected": [CHECKING],
        },
        ([*turns("x?"), CHECKING | {"tool_calls": CALL}], [*turns("x?"), CHECKING]),
    ),
    "the system's turn beside": (
        {"system": "Answer in French.", "prompt": "hi", "chosen": "Bonjour", "rejected": "Hello"},
        ([FRENCH, *turns("hi", "Bonjour")], [FRENCH, *turns("hi", "Hello")]),
    ),
    "HelpSteer3": (
        {
            "context": turns("a", "b", "c"),
            "response1": "d",
            "response2": "e",
            "overall_preference": 2,
        },
        (turns("a", "b", "c", "e"), turns("a", "b", "c", "d")),
    ),
    "UltraFeedback": (
        {
            "prompt": "a",
            "prompt_id": "7",
            "chosen": turns("a", "b"),
            "rejected": turns("a", "c"),
            "messages": turns("a", "b"),
            "score_chosen": 8.0,
            "score_rejected": 7.0,
        },
        (turns("a", "b"), turns("a", "c")),
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        (turns("a", "b"), turns("a", "c")),
    ),
    "ranked": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
        (turns("a", "c"), turns("a", "b")),
    ),
    "ranked, as NeMo-RL has it": (
        {
            "context": turns("a"),
            "completions": [
                {"rank": 1, "completion": turns("a", "b")[1:]},
                {"rank": 0, "completion": turns("a", "c")[1:]},
            ],
        },
        (turns("a", "c"), turns("a", "b")),
    ),
}


@pytest.fixture(scope="module")
def everything(scorer, theirs, tmp_path_factory):
    """The scores of all rows' conversations by transformers, training, evaluation and scoring."""
    tmp_path = tmp_path_factory.mktemp("rows")
    source = write(tmp_path / "rows.jsonl", [row for row, _ in ROWS.values()])
    messages = [c for _, pair in ROWS.values() for c in pair]
    ids = [theirs[0].apply_chat_template(c, tokenize=True, return_dict=False) for c in messages]
    data = train(scorer, source)
    assert data.counts["kept"] == len(ROWS)
    order = np.argsort(data.rows, kind="stable")
    (items,) = score_items(
        scorer,
        [BenchmarkData(BENCHMARKS["pairs"], source)],
        ScoreCache(tmp_path / "scores.jsonl", scorer.attributes),
    )
    found = {
        "training": trained_scores(scorer, data)[order],
        "evaluation": np.concatenate([item.scores for item in items]),
        "scoring": score_array(scorer.score_many(messages)),
    }
    expected = torch_scores(theirs[1], [np.asarray(i) for i in ids])
    return {"transformers": expected.reshape(len(ROWS), 2, -1)} | {
        name: scores.reshape(len(ROWS), 2, -1) for name, scores in found.items()
    }


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_scores_of_its_messages(name, everything):
    number = list(ROWS).index(name)
    expected = everything["transformers"][number]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # they are told apart
    for reader in ("training", "evaluation", "scoring"):
        np.testing.assert_allclose(everything[reader][number], expected, atol=1e-4, err_msg=reader)


def test_pairs_that_differ_in_an_earlier_turn_alone(directory, scorer, theirs, tmp_path):
    """200 of them: the accuracy of training, of evaluation, and by transformers' own scores."""
    rows = [
        {
            "chosen": turns(f"question {i}", f"yes {i % 7}", "more?", "ok"),
            "rejected": turns(f"question {i}", f"no {i % 5}", "more?", "ok"),
        }
        for i in range(200)
    ]
    source = write(tmp_path / "pairs.jsonl", rows)
    data = train(scorer, source)
    assert data.counts == {"read": 200, "kept": 200, "prompts": 200}
    assert (data.shared > 13).all()  # the first turn is computed once
    margins = trained_scores(scorer, data)[::2, 0] - trained_scores(scorer, data)[1::2, 0]
    found = evaluate_model(
        str(directory),
        [BenchmarkData(BENCHMARKS["pairs"], source)],
        tmp_path / "out",
        settings=SETTINGS,
    )
    (result,) = found.results
    assert (result["items"], result["dropped"]) == (200, {})
    assert result["accuracy"] == pytest.approx(np.mean(margins > 0))
    some = [conversation for row in rows[:20] for conversation in row.values()]
    ids = [theirs[0].apply_chat_template(c, tokenize=True, return_dict=False) for c in some]
    expected = torch_scores(theirs[1], [np.asarray(i) for i in ids])[:, 0]
    of_rows = dict(zip(data.rows[::2].tolist(), margins))
    np.testing.assert_allclose(
        [of_rows[i + 1] for i in range(20)], expected[::2] - expected[1::2], atol=2e-4
    )


def test_what_the_template_removes_makes_no_difference(directory, scorer, tmp_path):
    """Training and evaluation count such a pair by the same reason."""
    thought = {"role": "assistant", "content": "<think>hm</think>a", "reasoning_content": "so"}
    rows = [
        {
            "chosen": [*turns("q"), thought, *turns("r", "b")],
            "rejected": [*turns("q", "a"), *turns("r", "b")],
        },
        {"prompt": "q", "chosen": "a", "rejected": " "},
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    source = write(tmp_path / "pairs.jsonl", rows)
    reasons = ("chosen equals rejected", "an empty response", "a tie")
    counts = train(scorer, source).counts
    assert {f"dropped: {reason}": 1 for reason in reasons}.items() <= counts.items()
    data = BenchmarkData(BENCHMARKS["pairs"], source)
    out = evaluate_model(str(directory), [data], tmp_path / "out", settings=SETTINGS)
    assert out.results[0]["dropped"] == dict.fromkeys(reasons, 1)
