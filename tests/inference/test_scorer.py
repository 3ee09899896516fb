import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import rmjax
from helpers.checks import known
from helpers.hf_models import NAMES, TALK, edit_json, save_hf
from helpers.models import LLAMA_70B, ROPES, make_model, score_array, tiny_llama
from helpers.reference import torch_scores
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.orbax_arrays import read_array
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.conversation import Conversation
from rmjax.data.tokenized import in_memory
from rmjax.data.tokenizer import encode
from rmjax.errors import UserError
from rmjax.inference.batching import ScoringShapes, bucket
from rmjax.inference.scorer import Scorer
from rmjax.inference.scores import Comparison, Score
from rmjax.models.parameters import flatten
from rmjax.models.parts import computed_places
from rmjax.models.rewards.aggregation import PUBLISHED, model_rule
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LLAMA = tiny_llama(max_position_embeddings=256)
READS = 131072
LONG = tiny_llama(max_position_embeddings=READS)
HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def talk(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("hf"), LLAMA, names=HELPSTEER2)


@pytest.fixture(scope="module")
def scorer(hf) -> Scorer:
    """On all eight devices."""
    return rmjax.load(str(hf))


def load_again(scorer: Scorer, path: Path, **options) -> Scorer:
    """A model of the same shape, with what is already compiled."""
    loaded = rmjax.load(str(path), **options)
    loaded._score_rows, loaded._shapes = scorer._score_rows, scorer._shapes
    return loaded


def transformers_scores(directory: Path, conversations) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    ids = [
        np.asarray(tokenizer.apply_chat_template(c, tokenize=True, return_dict=False))
        for c in conversations
    ]
    return torch_scores(model, ids)


# ---- the numbers ------------------------------------------------------------------------------


def test_scores_of_every_form_equal_transformers(hf, scorer, tmp_path):
    expected = transformers_scores(hf, TALK)
    assert scorer.attributes == HELPSTEER2
    np.testing.assert_allclose(score_array(scorer.score_many(TALK)), expected, atol=1e-4)

    hf_to_orbax(str(hf), str(tmp_path / "orbax"))
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    np.testing.assert_allclose(transformers_scores(tmp_path / "back", TALK), expected, atol=1e-6)
    for form in ("orbax", "back"):
        loaded = load_again(scorer, tmp_path / form)
        assert loaded.attributes == HELPSTEER2
        np.testing.assert_allclose(score_array(loaded.score_many(TALK)), expected, atol=1e-4)


def test_one_device_gives_the_scores_of_eight(hf, scorer):
    source = open_pretrained(str(hf))
    model = make_model(source.decoder, 5)
    params = load_params(source, model, seed=0, dtype=np.float32)
    alone = Scorer(model, params, source.tokenizer(), known(source.spec), scorer.rule, "error")
    assert len(jax.tree.leaves(params)[0].sharding.device_set) == 1
    assert len(jax.tree.leaves(scorer.params)[0].sharding.device_set) == 8
    np.testing.assert_allclose(
        score_array(alone.score_many(TALK)), score_array(scorer.score_many(TALK)), atol=1e-5
    )
    assert alone.compare("which?", "this one", "this one").preferred == "tie"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"fsdp": 2, "context": 4}], ids=str)
def test_other_meshes_give_the_same_scores(mesh, hf, scorer):
    loaded = rmjax.load(str(hf), mesh=MeshConfig(**{"fsdp": 1} | mesh))
    np.testing.assert_allclose(
        score_array(loaded.score_many(TALK)), score_array(scorer.score_many(TALK)), atol=1e-5
    )


@pytest.mark.slow
def test_bfloat16_scores_are_near(hf, scorer):
    loaded = rmjax.load(str(hf), dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.params)} == {"bfloat16", "float32"}
    found, expected = score_array(loaded.score_many(TALK)), score_array(scorer.score_many(TALK))
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.slow
def test_score_many_keeps_the_order(scorer):
    rng = np.random.default_rng(0)
    conversations = [
        talk("p" * int(rng.integers(1, 100)), "abcdefgh"[i % 8] * int(rng.integers(1, 130)))
        for i in range(40)
    ]
    together = scorer.score_many(conversations)
    assert [score.tokens for score in together] == [
        5 + sum(len(m["content"]) for m in c) for c in conversations
    ]
    some = [0, 1, 7, 20, 39]
    alone = [scorer.score(conversations[i]) for i in some]
    np.testing.assert_allclose(score_array(together)[some], score_array(alone), atol=1e-5)
    backwards = scorer.score_many(conversations[::-1])
    np.testing.assert_allclose(score_array(backwards)[::-1], score_array(together), atol=1e-5)
    before = scorer._score_rows._cache_size()
    assert before <= 4
    scorer.score_many([*conversations[::2], *conversations[1::2]])
    assert scorer._score_rows._cache_size() == before


def test_no_conversations_have_no_scores(scorer):
    assert scorer.score_many([]) == []


@pytest.fixture(scope="module")
def alone(hf) -> Scorer:
    """On one device, in parts, with room for long conversations."""
    source = open_pretrained(str(hf))
    model = make_model(source.decoder, 5, attention="cpu_flash", parts=True)
    params = load_params(source, model, seed=0, dtype=np.float32)
    spec = dataclasses.replace(known(source.spec), max_length=5000)
    return Scorer(model, params, source.tokenizer(), spec, model_rule(spec), "error")


@pytest.mark.slow
def test_a_session_compiles_a_program_for_each_rung_and_no_more(alone):
    """However many conversations there are and however long; scores do not move with the shape."""
    compiled = alone._score_rows._cache_size
    first = alone.compare("which? " * 9, "this one", "that").a
    for words in (1, 11, 30):
        alone.compare("which? " * words, "this one " * words, "that")
        alone.score(talk("which? " * words, "x"))
    assert compiled() == 1
    texts = [talk("which? " * 9, "this one"), *(talk("p" * i, "r" * i) for i in range(1, 40))]
    assert alone.score_many(texts)[0].value == pytest.approx(first.value, abs=1e-5)
    assert compiled() == 2
    long = [talk("p" * n, "r" * 9) for n in (2500, 700, 40)]
    many = alone.score_many([*long, *texts, *(talk(f"{i}" * 300, "no") for i in range(20))])
    assert many[3].value == pytest.approx(first.value, abs=1e-5)
    assert [score.value for score in many[:3]] == pytest.approx(
        [alone.score(text).value for text in long], abs=1e-5
    )
    assert compiled() == 2
    alone.score_many([talk("p" * 4900, "r"), *texts])
    assert compiled() == 3


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3000), st.lists(st.integers(1, 3000), max_size=9))),
    mesh=st.sampled_from([{"fsdp": 8}, {"fsdp": 2, "context": 4}, {"fsdp": 1, "tensor": 8}, {}]),
    share=st.booleans(),
)
def test_plans_hold_every_conversation_once_in_few_shapes(sizes, mesh, share):
    if not any(responses for _, responses in sizes):
        return
    devices = jax.devices() if mesh else jax.devices()[:1]
    sharding = Sharding(make_mesh(MeshConfig(**mesh), devices))
    options: dict[str, Any] = {} if mesh else {"attention": "cpu_flash", "parts": True}
    model = make_model(LONG, sharding=sharding, **options)
    tokens, data, order = of_sizes(sizes)
    plan = ScoringShapes(model, READS).batches(data, share)
    placed, tokens_there, batches_there = [], 0, 0
    for batches in plan:
        shape = batches.shape
        assert shape.rows == sharding.row_shards
        for step in range(len(batches)):
            rows, samples = jax.tree.map(lambda x: x[0], batches[step].rows), batches[step].samples
            batches_there += 1
            tokens_there += (rows.segment_ids > 0).sum()
            assert samples.shape == (1, shape.rows, shape.slots)
            assert share or (rows.masked_start == rows.masked_end).all()
            for row, slot in np.argwhere(samples[0] >= 0):
                last, ids = rows.last_token_index[row, slot], rows.segment_ids[row]
                masked = slice(rows.masked_start[row, last], rows.masked_end[row, last])
                seen = (ids == ids[last]) & (np.arange(shape.length) <= last)
                seen[masked] = False
                placed.append(order[samples[0, row, slot]])
                np.testing.assert_array_equal(rows.tokens[row, seen], tokens[placed[-1]])
    assert sorted(placed) == list(range(len(tokens)))
    lengths = [batches.shape.length for batches in plan]
    assert len(set(lengths)) == len(lengths) <= 4
    if not mesh:
        assert set(lengths) <= {512, 4096, 16384}
        assert tokens_there <= computed(plan, model) < tokens_there + 32 * batches_there


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ([(60, [200, 250])], 1),  # halves would be too small
        ([(900, [60, 60])], 1),  # the prompt twice would cost more than both cores bring
        ([(100, [900]), (200, [800])], 2),
        ([(300, [100] * 16)], 1),
        ([(100, [200] * 16)], 2),
        ([(0, [1000])], 1),
        ([(0, [4000]), (0, [4000]), (10, [1990, 1990])], 4),
    ],
)
def test_on_a_cpu_steps_are_of_an_even_number(sizes, steps):
    """So that two at once are done together; each sample stands in one of them."""
    model = make_model(
        LONG,
        sharding=Sharding(make_mesh(MeshConfig(), jax.devices()[:1])),
        attention="cpu_flash",
        parts=True,
    )
    _, data, _ = of_sizes(sizes)
    plan = ScoringShapes(model, READS).batches(data)
    samples = [batches.samples(step) for batches in plan for step in range(len(batches))]
    assert len(samples) == steps
    assert sorted(np.concatenate(samples)) == list(range(len(data)))
    places = sorted(batches.tokens(step) for batches in plan for step in range(len(batches)))
    assert places[min(1, steps - 1)] <= 1.2 * places[0]


def of_sizes(sizes):
    """Tokens of responses to prompts of these sizes, as data, and which of them is which."""
    tokens = [
        np.concatenate([np.full(prompt, g), np.full(own, 1000 + i)]).astype(np.int32)
        for g, (prompt, responses) in enumerate(sizes)
        for i, own in enumerate(responses)
    ]
    prompts = [str(g) for g, (_, responses) in enumerate(sizes) for _ in responses]
    return tokens, *in_memory(tokens, prompts)


def computed(plan, model):
    """Token positions computed for a plan."""
    return sum(
        computed_places(batches[step].rows.segment_ids[0], model.options.parts)
        for batches in plan
        for step in range(len(batches))
    )


def lengths_of(rng, mean: float, spread: float, least: int, most: int) -> int:
    """A log-normal length."""
    return int(np.clip(rng.lognormal(np.log(mean) - spread**2 / 2, spread), least, most))


# How long a prompt and its responses are, in tokens. JudgeBench's and others' are made up after
# what is published of them.
SETS = {
    "judge-bench": lambda r: (lengths_of(r, 400, 0.5, 99, 1500), r.integers(430, 1076, 2)),
    "helpsteer2": lambda r: (lengths_of(r, 180, 1, 20, 3000), r.integers(20, 730, 2)),
    "reward-bench": lambda r: (lengths_of(r, 80, 1, 20, 2000), r.integers(10, 500, 2)),
    "chat": lambda r: (0, [lengths_of(r, 40, 0.5, 22, 200)]),
    "mixed": lambda r: (0, [lengths_of(r, 500, 1.2, 20, 8000)]),
    "best of 16": lambda r: (300, r.integers(10, 200, 16)),
    **{f"all {n}": lambda r, n=n: (0, [n]) for n in (100, 513, 700, 1100, 1639, 2049, 5000)},
    "one huge": lambda r: (0, [6000 if r.random() < 0.03 else r.integers(22, 40)]),
}


def drawn(rng, kind: str, count: int):
    """Data of about so many conversations."""
    sizes: list[Any] = []
    while sum(len(responses) for _, responses in sizes) < count:
        sizes.append(SETS[kind](rng))
    return of_sizes(sizes)[1]


def filled(plan, model) -> float:
    """How much of what is computed for a plan is tokens."""
    there = sum(
        (batches[step].rows.segment_ids > 0).sum()
        for batches in plan
        for step in range(len(batches))
    )
    return there / computed(plan, model)


# In parts, and whole rows as an accelerator's kernels have them.
KERNELS = {"parts": ("cpu_flash", True), "splash": ("splash", False), "xla": ("xla", False)}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_little_of_a_set_is_padding(kind, kernel, rng):
    """About a tenth at most on one device, where a session begins with the set."""
    attention, parts = KERNELS[kernel]
    model = make_model(LLAMA_70B, attention=attention, parts=parts)
    for count in (16, 150):
        plan = ScoringShapes(model, READS).batches(drawn(rng, kind, count))
        assert filled(plan, model) >= (0.9 if parts else 0.85)
        assert len(plan) <= (3 if parts else 2)


@pytest.mark.parametrize("kind", SETS)
def test_little_of_a_large_set_is_padding_on_eight_devices(kind, rng):
    model = make_model(LONG, sharding=Sharding(make_mesh(MeshConfig())), attention="splash")
    plan = ScoringShapes(model, READS).batches(drawn(rng, kind, 800))
    assert filled(plan, model) >= 0.85


def test_sharing_can_be_turned_off(hf, scorer):
    """Best of six: one prompt, computed once or six times."""
    best_of = [talk("which of these? " * 4, f"number {i}" + "!" * i) for i in range(6)]
    apart = load_again(scorer, hf, share_prompts=False)
    np.testing.assert_allclose(
        score_array(scorer.score_many(best_of)), score_array(apart.score_many(best_of)), atol=1e-5
    )
    shared, alone = (
        [
            len(g)
            for b in planned(s, best_of)
            for step in b._steps
            for row in step.unpacked()
            for g in row
        ]
        for s in (scorer, apart)
    )
    assert shared == [6] and alone == [1] * 6


def test_attention_can_be_chosen(hf, scorer, monkeypatch):
    with pytest.raises(UserError, match=r"attention = 'splash': it is for TPUs.* of CPUs"):
        rmjax.load(str(hf), attention="splash")
    with pytest.raises(UserError, match=r"attention = 'flash': there are auto, xla"):
        rmjax.load(str(hf), attention="flash")
    # The TPUs' kernel, interpreted here: rows are made for it.
    monkeypatch.setattr(rmjax.inference.load, "choose", lambda *unused: "splash")
    kernel = rmjax.load(str(hf), mesh=MeshConfig(fsdp=4, context=2))
    texts = [talk("which? " * 9, "this " * i) for i in range(1, 5)]
    assert {batches.shape.length % 256 for batches in planned(kernel, texts)} == {0}
    np.testing.assert_allclose(
        score_array(kernel.score_many(texts)), score_array(scorer.score_many(texts)), atol=1e-5
    )


def planned(scorer, conversations):
    return scorer._plan([scorer.encode(Conversation(c), "") for c in conversations])[0]


LENGTHS = st.floats(0, np.log(READS)).map(lambda x: int(np.exp(x)))


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.lists(LENGTHS, min_size=1, max_size=20), min_size=1, max_size=6),
    one=LENGTHS,
    kernel=st.sampled_from(["parts", "splash", "xla"]),
    mesh=st.sampled_from([{"fsdp": 8}, {"fsdp": 4, "context": 2}, {}]),
)
def test_whatever_a_session_scores_it_has_four_shapes(calls, one, kernel, mesh):
    """And none of them is much too long for a conversation by itself, whatever came before."""
    devices = jax.devices() if mesh else jax.devices()[:1]
    sharding = Sharding(make_mesh(MeshConfig(**mesh), devices))
    attention, parts = KERNELS[kernel]
    model = make_model(LONG, sharding=sharding, attention=attention, parts=parts)
    sessions, shapes = [ScoringShapes(model, READS) for _ in range(2)], set()
    for lengths in [*calls, [one], [READS]]:
        data = of_sizes([(0, [length]) for length in lengths])[1]
        planned = [[b.shape for b in session.batches(data)] for session in sessions]
        assert planned[0] == planned[1]  # as on two processes
        shapes |= set(planned[0])
        if lengths == [one]:
            assert planned[0][0].length <= 16 * max(one, 256)
    assert len(shapes) <= 4


def test_a_set_is_not_fitted_at_the_price_of_what_may_come():
    """Shapes of an earlier set are used again where they fit, and fitted ones leave room."""
    session = ScoringShapes(make_model(LONG, attention="splash"), READS)

    def shapes(*lengths: int) -> list[int]:
        data = of_sizes([(0, [length]) for length in lengths])[1]
        return [batches.shape.length for batches in session.batches(data)]

    assert shapes(*[2049] * 16) == [2176]
    assert shapes(*[1040] * 16) == [2176]  # two of them are a row
    assert shapes(30) == [512]
    assert shapes(*[6000] * 16) != [6016]  # from there it would be too far to 131,072
    assert shapes(READS) == [READS]
    assert len(session._lengths) == 4


@given(length=st.integers(1, 200_000), context=st.sampled_from([1, 2, 4, 8]))
def test_row_lengths_are_few_and_hold_the_conversation(length, context):
    sharding = Sharding(make_mesh(MeshConfig(fsdp=8 // context, context=context)))
    place = bucket(length, make_model(LLAMA, sharding=sharding))
    assert length <= place <= max(64, length * 1.5)
    assert place % context == 0
    assert bucket(place, make_model(LLAMA, sharding=sharding)) == place


# ---- comparing --------------------------------------------------------------------------------


def test_compare_is_two_scores_and_their_difference(scorer):
    found = scorer.compare("Which sea?", "The Baltic.", "No idea, ask someone else.")
    first = scorer.score(talk("Which sea?", "The Baltic."))
    second = scorer.score(talk("Which sea?", "No idea, ask someone else."))
    assert found.margin == pytest.approx(first.value - second.value, abs=1e-5)
    assert found.preferred == ("a" if first.value > second.value else "b")
    assert found.a.attributes == pytest.approx(first.attributes, abs=1e-5)

    other = scorer.compare("Which sea?", "No idea, ask someone else.", "The Baltic.")
    assert other.margin == pytest.approx(-found.margin, abs=1e-5)
    assert {found.preferred, other.preferred} == {"a", "b"}

    same = scorer.compare("Which sea?", "The Baltic.", "The Baltic.")
    assert (same.margin, same.preferred) == (0.0, "tie")


def test_prompts_are_strings_marked_turns_or_messages(scorer):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Which sea?"},
    ]
    marked = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhich sea?"
    scores = [scorer.compare(p, "a b", "c") for p in (messages, tuple(messages), marked)]
    assert scores[0] == scores[1] == scores[2]
    assert scorer.compare("Which sea?", "a b", "c") != scores[0]
    assert scorer.compare(messages[-1:], "a b", "c") == scorer.compare("Which sea?", "a b", "c")


@pytest.mark.parametrize("prompt", ["", "  ", [], [{"role": "assistant", "content": "x"}], None, 7])
def test_a_prompt_without_a_users_turn_is_refused(prompt, scorer):
    with pytest.raises(UserError, match="the prompt "):
        scorer.compare(prompt, "a", "b")


# ---- the scalar value -------------------------------------------------------------------------


def test_value_is_the_first_attribute_unless_told_otherwise(scorer):
    score = scorer.score(TALK[0])
    assert (score.value, score.rule) == (score.attributes["helpfulness"], "helpfulness")


@pytest.mark.parametrize("value", ["coherence", *PUBLISHED, {"coherence": 2, "verbosity": -0.5}])
def test_value_is_the_weighted_sum(value, hf, scorer):
    weights = PUBLISHED.get(value, {value: 1.0}) if isinstance(value, str) else value
    score = load_again(scorer, hf, value=value).score(TALK[0])
    assert score.attributes == scorer.score(TALK[0]).attributes
    by_hand = sum(weight * score.attributes[name] for name, weight in weights.items())
    assert score.value == pytest.approx(by_hand, abs=1e-6)
    assert score.rule == value if isinstance(value, str) else "+2*coherence -0.5*verbosity"


@pytest.mark.parametrize(
    "value", ["kindness", "", {}, {"kindness": 1.0}, {"coherence": 1.0, "kindness": 1.0}], ids=str
)
def test_value_rules_that_name_nothing_are_refused(value, hf):
    with pytest.raises(UserError, match="scalar rule"):
        rmjax.load(str(hf), value=value)


def test_published_vectors_need_their_attributes(tmp_path):
    source = save_hf(tmp_path / "hf", LLAMA, names=NAMES)
    with pytest.raises(UserError, match="'goodness': the model has no attribute 'helpfulness'"):
        rmjax.load(str(source), value="goodness")


def test_a_models_own_rule_is_kept(hf, scorer, tmp_path):
    hf_to_orbax(str(hf), str(tmp_path / "orbax"))
    edit_json(tmp_path / "orbax" / "rmjax.json", scalar={"correctness": 0.5, "verbosity": -1})
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    expected = scorer.score(TALK[0]).attributes
    for form in ("orbax", "back"):
        score = load_again(scorer, tmp_path / form).score(TALK[0])
        by_hand = 0.5 * expected["correctness"] - expected["verbosity"]
        assert score.value == pytest.approx(by_hand, abs=1e-5)


# ---- what is shown ----------------------------------------------------------------------------


def test_scores_are_readable():
    score = Score({"helpfulness": 3.25, "verbosity": -0.5}, 3.25, "helpfulness", 41)
    assert repr(score) == (
        "helpfulness        3.2500\n"
        "verbosity         -0.5000\n"
        "value              3.2500   (helpfulness; 41 tokens)"
    )
    other = Score({"helpfulness": 1.0, "verbosity": 12.0}, 1.0, "helpfulness", 9)
    assert repr(Comparison(score, other, 2.25)) == (
        "                        a        b    a - b\n"
        "helpfulness        3.2500   1.0000  +2.2500\n"
        "verbosity         -0.5000  12.0000 -12.5000\n"
        "value              3.2500   1.0000  +2.2500\n"
        "preferred: a   (value: helpfulness)"
    )


def test_a_scorer_says_what_it_is(scorer, hf):
    assert repr(scorer) == (
        f"Scorer({hf}: helpfulness, correctness, coherence, complexity, verbosity; "
        "value: helpfulness; up to 256 tokens; 8 x cpu, fsdp:8)"
    )


def test_long_names_keep_their_columns():
    score = Score({"instruction following": -23.4567, "wit": 1.0}, 1.0, "wit", 3)
    lines = repr(score).splitlines()
    assert lines[0] == "instruction following -23.4567"
    assert {line.index(".") for line in lines} == {lines[0].index(".")}
    rows = repr(Comparison(score, score, 0.0)).splitlines()[:-1]
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split() == ["instruction", "following", "-23.4567", "-23.4567", "+0.0000"]


# ---- what is refused --------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
BAD_CONVERSATIONS = {
    "nothing": [],
    "text": "hello",
    "one_message": USER,
    "none": None,
    "pairs": [("user", "x"), ("assistant", "y")],
    "no_response": [USER],
    "no_prompt": [{"role": "assistant", "content": "y"}],
    "only_a_system_prompt": [
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": "y"},
    ],
    "two_responses": [*talk("x", "y"), {"role": "assistant", "content": "z"}],
    "empty_response": talk("x", " "),
    "no_content": [USER, {"role": "assistant", "content": None}],
    "image": [USER, {"role": "assistant", "content": [{"type": "image", "url": "y"}]}],
    "number": talk("x", 5),  # type: ignore[arg-type]
    "empty_prompt": talk("", "y"),
    "no_role": [{"content": "x"}, {"role": "assistant", "content": "y"}],
    "unknown_role": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}],
    "half_a_surrogate": talk("x", "\ud800"),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_bad_conversations_are_refused_by_number(name, scorer):
    with pytest.raises(UserError) as error:
        scorer.score_many([TALK[0], BAD_CONVERSATIONS[name]])
    assert str(error.value).startswith("conversation 1: "), error.value
    with pytest.raises(UserError, match=r"^conversation 0: "):
        scorer.score(BAD_CONVERSATIONS[name])


def test_what_is_too_long_is_an_error_or_cut_when_asked(hf, scorer):
    long = talk("a" * 300, "b" * 20)
    with pytest.raises(UserError, match=r"conversation 2: 325 tokens.* 256; .*truncate_left"):
        scorer.score_many([TALK[0], TALK[1], long])
    loaded = load_again(scorer, hf, over_long="truncate_left")
    score = loaded.score(long)
    assert score.tokens == 256
    tokens = encode(loaded.tokenizer, Conversation(long))
    kept = np.concatenate([tokens[:1], tokens[-255:]])  # BOS and the end
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hf).eval()
    np.testing.assert_allclose(score_array([score]), torch_scores(model, [kept]), atol=1e-4)
    assert loaded.score(TALK[0]) == scorer.score(TALK[0])


def test_the_limit_is_that_of_training(hf, scorer, tmp_path):
    hf_to_orbax(str(hf), str(tmp_path / "orbax"))
    edit_json(tmp_path / "orbax" / "rmjax.json", max_length=40)
    loaded = load_again(scorer, tmp_path / "orbax")
    assert loaded.score(talk("a" * 30, "b" * 5)).tokens == 40
    with pytest.raises(UserError, match="41 tokens, the model was trained with up to 40"):
        loaded.score(talk("a" * 31, "b" * 5))


def test_scores_that_are_not_numbers_are_refused(scorer):
    params = scorer.params | {"head": scorer.params["head"] * np.nan}
    broken = Scorer(
        scorer.model, params, scorer.tokenizer, scorer.spec, scorer.rule, scorer.over_long
    )
    broken._score_rows = scorer._score_rows
    with pytest.raises(UserError, match=r"conversation 0: its scores are \[nan"):
        broken.score_many(TALK)


def test_a_causal_model_needs_a_head_first(tmp_path):
    source = save_hf(tmp_path / "hf", LLAMA, causal=True)
    said = (
        r"without a reward head\. If it is .* --head of .*a fresh head with hf-to-orbax\. To sample"
    )
    with pytest.raises(UserError, match=said):
        rmjax.load(str(source))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over_long": "drop"}, "over_long = 'drop': there are error, truncate_left"),
        ({"dtype": "int8"}, "dtype = 'int8': there are auto, float32"),
        ({"dtype": "half"}, "dtype = 'half'"),
        ({"mesh": MeshConfig(fsdp=3)}, "does not use the 8 devices"),
        ({"mesh": MeshConfig(tensor=4)}, "divides"),
    ],
    ids=str,
)
def test_options_are_checked(options, message, hf):
    with pytest.raises(UserError, match=message):
        rmjax.load(str(hf), **options)


def test_a_path_may_be_a_path(hf, scorer, tmp_path):
    assert rmjax.load(hf).attributes == HELPSTEER2
    with pytest.raises(UserError, match="no such file or directory"):
        rmjax.load(tmp_path / "nowhere")


# ---- where models come from -------------------------------------------------------------------


def test_a_hub_id_that_cannot_be_had_is_one_message_and_fast():
    started = time.monotonic()
    with pytest.raises(UserError, match="nobody/nothing: not a local path, and the hub does not"):
        rmjax.load("nobody/nothing")
    assert time.monotonic() - started < 5


def test_a_hub_id_loads_like_a_directory(hf, scorer, monkeypatch):
    def snapshot_download(name, allow_patterns):
        assert name == "org/name"
        assert not any(p.endswith((".bin", ".pth", "*", ".py")) for p in allow_patterns)
        return str(hf)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = rmjax.load("org/name")
    loaded._score_rows = scorer._score_rows
    assert loaded.score(TALK[0]) == scorer.score(TALK[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three steps, of which the second is said to be the best on the validation data."""
    from rmjax import train

    workdir = tmp_path_factory.mktemp("run") / "run"
    config = Config(
        workdir=str(workdir),
        data=DataConfig(train="generated:24", validation="generated:8", max_length=256),
        tokenizer="bytes",
        model=dataclasses.replace(LLAMA, num_hidden_layers=2),
        batch_size=8,
        steps=3,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=0.01),
        eval_every=1,
        checkpoint_every=1,
    )
    losses = iter([3.0, 1.0, 2.0])
    real = train.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *a: real(*a)._replace(loss=next(losses)))
        train.train(config)
    return workdir


@pytest.mark.slow
def test_a_run_stands_for_its_best_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    loaded = rmjax.load("run")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
    for path, array in flatten(loaded.params).items():
        best, last = (read_array(run / "checkpoints" / n / "params", path) for n in "23")
        np.testing.assert_array_equal(array, best)
        assert not np.array_equal(array, last), path
    assert loaded.attributes == HELPSTEER2
    assert loaded.max_length == 256
    assert loaded.rule.name == "helpfulness"

    notes = orbax_to_hf("run", str(tmp_path / "exported"))
    assert notes[0].startswith("float32, 21 tensors")
    found = loaded.score_many(TALK)
    expected = transformers_scores(tmp_path / "exported", TALK)
    np.testing.assert_allclose(score_array(found), expected, atol=1e-4)
    exported = load_again(loaded, tmp_path / "exported")
    assert score_array(exported.score_many(TALK)) == pytest.approx(score_array(found), abs=1e-5)
    with pytest.raises(UserError, match="already an Orbax model or a run"):
        hf_to_orbax(str(run), str(tmp_path / "no"))


@pytest.mark.slow
def test_a_run_without_a_complete_checkpoint_is_one_message(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint in this run yet"):
        rmjax.load(str(copy))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["params/_METADATA", "params/manifest.ocdbt", "params", "model"])
def test_a_damaged_run_is_one_message(part, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    lost = copy / part if part == "model" else copy / "checkpoints" / "2" / part
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(UserError, match=str(copy)):
        rmjax.load(str(copy))


def test_dynamic_rope_is_scored_up_to_its_own_limit(tmp_path):
    """Beyond, it would stretch by the sample's length, which is not computed here."""
    rm = rmjax.load(str(save_hf(tmp_path / "hf", tiny_llama(rope=ROPES["dynamic"]))))
    rm.max_length = 1000  # as a model trained on longer samples has it
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 80}]
    with pytest.raises(UserError, match=r"'dynamic' is computed up to max_position_embeddings"):
        rm.score(talk)
