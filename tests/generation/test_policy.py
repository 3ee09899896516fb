"""Samples against transformers, and against themselves on other meshes, in other company."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import rmjax
from helpers.families import FAMILY_MODELS
from helpers.hf_models import edit_json, edit_tensors, save_hf
from helpers.models import ROPES, one_device, tiny_llama
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import encode
from rmjax.errors import UserError
from rmjax.generation import programs
from rmjax.generation.completions import Completion
from rmjax.generation.policy import Policy, load_policy
from rmjax.generation.prompts import prompt_tokens
from rmjax.generation.sampler import Sampler
from rmjax.models.heads import language_model_head
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

PROMPTS = ["Why?", "A much longer question: what becomes of a row that is over?", "Hm", "Name two."]


def flat(found: list[list[Completion]]) -> list[Completion]:
    return [completion for samples in found for completion in samples]


def on_one_device(directory: Path, rows: int = 64, usual: Sequence[int] = ()) -> Policy:
    source = open_pretrained(str(directory))
    options = ModelOptions(one_device(), attention="cpu_flash")
    model = Model(source.decoder, options, source.head)
    params = load_params(source, model, seed=0, dtype=jnp.float32)
    tokenizer = source.tokenizer()
    return Policy(model, params, tokenizer, end_tokens(source.files, tokenizer), rows, usual=usual)


def equal(one: list[list[Completion]], other: list[list[Completion]]) -> None:
    """The same tokens, texts and ends, and log-probabilities within 1e-5."""
    assert len(one) == len(other)
    for found, expected in zip(flat(one), flat(other), strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert (found.text, found.reason) == (expected.text, expected.reason)
        np.testing.assert_allclose(
            found.log_probabilities, expected.log_probabilities, rtol=1e-5, atol=1e-5
        )


def reference(directory: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


def prompt_ids(tokenizer, prompt) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def greedy(model, ids: list[int], most: int, ends: tuple[int, ...]) -> list[int]:
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=most,
            pad_token_id=0,
            eos_token_id=list(ends),
        )
    return found[0, len(ids) :].tolist()


def logits_of(model, ids: list[int], tokens: np.ndarray) -> torch.Tensor:
    """Logits of each sampled token's place [T, V], in one pass over prompt and sample."""
    with torch.inference_mode():
        whole = model(torch.tensor([[*ids, *tokens.tolist()]])).logits[0]
    return whole[len(ids) - 1 : -1]


# ---- the numbers ------------------------------------------------------------------------------


def test_greedy_samples_equal_transformers(causal, policy):
    model, tokenizer = reference(causal)
    found = policy.sample(PROMPTS, temperature=0, max_tokens=40)
    for prompt, (completion,) in zip(PROMPTS, found):
        assert completion.tokens.tolist() == greedy(
            model, prompt_ids(tokenizer, prompt), 40, policy.end_tokens
        )


@pytest.mark.parametrize(
    "variant", ["llama3", "biases", "tied", "one_kv_head", "qwen3_windows", "gemma2", "gemma3_text"]
)
@pytest.mark.slow
def test_log_probabilities_of_every_architecture_equal_transformers(variant, tmp_path):
    """The samples are longer than any family's window, and so is the second prompt."""
    families = {
        name: dataclasses.replace(decoder, max_position_embeddings=128)
        for name, decoder in FAMILY_MODELS.items()
    }
    decoder = families | {
        "llama3": tiny_llama(rope=ROPES["llama3"], max_position_embeddings=128),
        "biases": tiny_llama(attention_bias=True, mlp_bias=True, max_position_embeddings=128),
        "tied": tiny_llama(tie_word_embeddings=True, max_position_embeddings=128),
        "one_kv_head": tiny_llama(num_key_value_heads=1, max_position_embeddings=128),
    }
    directory = save_hf(tmp_path, decoder[variant], causal=True)
    one = on_one_device(directory)
    model, tokenizer = reference(directory)
    # So many tokens that the cache grows, and is written around its end.
    found = one.sample(PROMPTS[:2], n=2, max_tokens=100, temperature=1.2, seed=3)
    for prompt, completions in zip(PROMPTS, found):
        for completion in completions:
            logits = logits_of(model, prompt_ids(tokenizer, prompt), completion.tokens)
            expected = torch.log_softmax(logits, -1).numpy()
            picked = expected[np.arange(len(completion.tokens)), completion.tokens]
            np.testing.assert_allclose(completion.log_probabilities, picked, atol=1e-4)


def test_bfloat16_is_close(causal):
    one = load_policy(causal, dtype="bfloat16")
    model, tokenizer = reference(causal)
    found = one.sample(PROMPTS[:1], max_tokens=20)[0][0]
    logits = logits_of(model, prompt_ids(tokenizer, PROMPTS[0]), found.tokens)
    expected = torch.log_softmax(logits, -1).numpy()
    picked = expected[np.arange(len(found.tokens)), found.tokens]
    np.testing.assert_allclose(found.log_probabilities, picked, atol=0.15)


@pytest.mark.slow
@pytest.mark.optimized
def test_greedy_samples_of_real_weights_equal_transformers(smollm2):
    """Until the two best logits are as close as float32's rounding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    one = on_one_device(smollm2)
    prompts = ["What is the capital of France?", "Why is the sky blue?", "Count to ten."]
    found = one.sample(prompts, temperature=0, max_tokens=24)
    for prompt, (completion,) in zip(prompts, found):
        ids = prompt_ids(one.tokenizer, prompt)
        expected = greedy(model, ids, 24, (2,))
        tokens = completion.tokens.tolist()
        if tokens != expected:
            same = next(i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b)
            best = logits_of(model, ids, np.asarray(expected))[same].topk(2).values
            assert best[0] - best[1] < 1e-4
    assert found[0][0].text == "The capital of France is Paris."
    assert found[0][0].reason == "end"


# ---- what a sample depends on -----------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(policy) -> list[list[Completion]]:
    return policy.sample(PROMPTS, n=3, max_tokens=70, seed=5)


def test_samples_differ_and_a_seed_repeats_them(policy, expected):
    texts = [completion.text for completion in flat(expected)]
    assert len(set(texts)) == len(texts)
    equal(policy.sample(PROMPTS, n=3, max_tokens=70, seed=5), expected)
    other = policy.sample(PROMPTS, n=3, max_tokens=70, seed=6)
    assert not {c.text for c in flat(other)} & set(texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)],
    ids=str,
)
def test_every_mesh_gives_the_same_samples(mesh, causal, expected):
    other = load_policy(causal, mesh=MeshConfig(**mesh))
    equal(other.sample(PROMPTS, n=3, max_tokens=70, seed=5), expected)


@pytest.mark.slow
def test_layers_in_a_loop_give_the_same_samples(causal, expected, monkeypatch):
    """As on accelerators; on CPUs the layers are taken apart."""
    monkeypatch.setattr(programs, "platform", lambda sharding: "tpu")
    other = load_policy(causal, mesh=MeshConfig(fsdp=4, tensor=2))
    equal(other.sample(PROMPTS, n=3, max_tokens=70, seed=5), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_the_number_of_rows_changes_nothing(rows, causal, expected):
    """With few rows, those that are over make room for the next; with many, none waits."""
    one = on_one_device(causal, rows)
    equal(one.sample(PROMPTS, n=3, max_tokens=70, seed=5), expected)


def test_the_order_of_prompts_and_the_company_change_nothing(policy, expected):
    order = [2, 0, 3, 1]
    found = policy.sample([PROMPTS[i] for i in order], keys=order, n=3, max_tokens=70, seed=5)
    equal(found, [expected[i] for i in order])
    equal(policy.sample(PROMPTS[1:2], keys=[1], n=3, max_tokens=70, seed=5), expected[1:2])
    # A sample does not depend on how many there are of its prompt.
    equal(policy.sample(PROMPTS, n=1, max_tokens=70, seed=5), [found[:1] for found in expected])


def test_a_shorter_limit_cuts_the_same_sample(policy, expected):
    for short, long in zip(policy.sample(PROMPTS, n=3, max_tokens=9, seed=5), expected):
        for one, other in zip(short, long):
            assert one.tokens.tolist() == other.tokens[:9].tolist()
            assert one.ended == (other.ended and len(other.tokens) <= 9)


def test_a_key_decides_the_noise(policy, expected):
    equal(policy.sample(PROMPTS[:1], keys=[0], n=3, max_tokens=70, seed=5), expected[:1])
    other = policy.sample(PROMPTS[:1], keys=[7], n=3, max_tokens=70, seed=5)
    assert other[0][0].text != expected[0][0].text


# ---- when a sample is over ----------------------------------------------------------------------


def test_an_end_token_is_part_of_the_sample_and_not_of_its_text(policy):
    found = flat(policy.sample(PROMPTS, n=16, max_tokens=200, seed=1))
    ended = [completion for completion in found if completion.ended]
    assert ended
    for completion in ended:
        assert completion.reason == "end"
        assert completion.tokens[-1] in policy.end_tokens
        assert not set(completion.tokens[:-1].tolist()) & set(policy.end_tokens)
        assert "<|end|>" not in completion.text
        assert completion.text == policy.tokenizer.decode(completion.tokens[:-1])
    assert all(len(c.tokens) == len(c.log_probabilities) for c in found)


def test_a_text_ends_a_sample_and_is_cut_away(policy, expected):
    whole = expected[0][0].text
    stop = whole[20:22]
    first = whole.find(stop)
    (found,), *_ = policy.sample(PROMPTS[:1], keys=[0], max_tokens=70, seed=5, stop=(stop, "\0"))
    assert found.text == whole[:first]
    assert (found.reason, found.stop, found.ended) == ("stop", stop, True)
    # Its tokens are those up to the one that made the text complete.
    text = policy.tokenizer.decode(found.tokens)
    assert stop in text and stop not in policy.tokenizer.decode(found.tokens[:-1])
    assert len(found.log_probabilities) == len(found.tokens)


def test_the_context_ends_a_sample(policy):
    tokenizer = policy.tokenizer
    prompt = "long " * 30
    room = 256 - len(prompt_ids(tokenizer, prompt))
    (found,), *_ = policy.sample([prompt], temperature=0, max_tokens=1000)
    assert len(found.tokens) <= room
    if not found.ended:
        assert len(found.tokens) == room


def test_a_prompt_without_room_is_an_error_that_names_it(policy):
    with pytest.raises(UserError, match=r"prompt 1: 3\d\d tokens.* 256"):
        policy.sample(["short", "x" * 300])


# ---- prompts and settings -----------------------------------------------------------------------


def test_a_prompt_may_be_text_messages_or_tokens(policy, expected):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    tokens = np.asarray(prompt_ids(policy.tokenizer, messages))
    assert tokens[0] == policy.tokenizer.bos_token_id != tokens[1]
    for prompt in (messages, tokens):
        equal(policy.sample([prompt], n=3, max_tokens=70, seed=5), expected[:1])


def test_a_prompt_of_one_token(policy):
    (found,), *_ = policy.sample([np.asarray([7])], max_tokens=3)
    assert len(found.tokens) <= 3


def test_a_prompt_is_what_stands_before_an_answer_in_training(policy):
    """The prompt's tokens begin those of the conversation that is judged."""
    messages = [{"role": "user", "content": "Why?"}]
    prompt = prompt_tokens(policy.tokenizer, messages, 0, 300)
    whole = encode(
        policy.tokenizer, Conversation([*messages, {"role": "assistant", "content": "So."}])
    )
    assert whole[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("", "prompt 0 has no user turn"),
        ([{"role": "assistant", "content": "x"}], "prompt 0 has no user turn"),
        (7, "prompt 0 is int"),
        (np.asarray([[1, 2]]), "prompt 0: an array of shape"),
        (np.asarray([0.5]), "prompt 0: an array of"),
        (np.asarray([5, 999]), "prompt 0: tokens from 5 to 999"),
    ],
)
def test_what_is_no_prompt_is_an_error(prompt, said, policy):
    with pytest.raises(UserError, match=said):
        policy.sample([prompt])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"n": 0}, "n = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1e-39}, "temperature = 1e-39: expected 0, or 1e-06 or more"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2**31}, "top_k = 2147483648"),
        ({"n": 1.5}, "n = 1.5: expected a whole number"),
        ({"n": 10**12}, "n = 1000000000000: expected from 1 to 65,536"),
        ({"stop": [1]}, "stop = .1,.: expected texts"),
        ({"keys": ["x"]}, "keys: the one of prompt 0 is 'x'"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"stop": "."}, "stop = '.'"),
        ({"stop": ("",)}, "stop = "),
        ({"seed": -1}, "seed = -1"),
        ({"keys": [1, 2]}, "2 of them for 1 prompts"),
        ({"keys": [-1]}, "of prompt 0 is -1"),
        ({"warmth": 1}, "warmth"),
    ],
)
def test_a_wrong_setting_is_an_error(settings, said, policy):
    with pytest.raises(UserError, match=said):
        policy.sample(["x"], **settings)


def test_no_prompts_no_samples(policy):
    assert policy.sample([]) == []


def test_calls_of_about_the_same_size_are_compiled_once(causal):
    one = on_one_device(causal)
    sizes = []
    for count in (5, 6, 8):
        one.sample(["x" * i for i in range(1, count + 1)], max_tokens=40 + count)
        sizes.append(one._sampler.programs.sample._cache_size())  # pyright: ignore
    assert sizes == [1, 1, 1]


def test_calls_with_prompts_that_are_known_are_compiled_once(causal):
    """Whatever their lengths, and none of them as long as the longest that is known."""
    texts = ["x" * length for length in (3, 4, 5, 30, 60, 90)]
    found = {}
    for usual in ((), tuple(range(20, 200))):
        one, sizes = on_one_device(causal, usual=usual), []
        for first in (0, 1, 2, 3):
            one.sample(texts[first : first + 3], n=2, max_tokens=8)
            programs = one._sampler.programs
            sizes.append(programs.sample._cache_size() + programs.insert._cache_size())  # pyright: ignore
        found[bool(usual)] = sizes
    assert found[True] == [2, 2, 2, 2] and found[False][-1] > 2


def test_a_text_in_place_of_prompts_is_an_error(policy):
    with pytest.raises(UserError, match="expected several"):
        policy.sample("hello")


# ---- the model ----------------------------------------------------------------------------------


def test_a_reward_model_cannot_write(tmp_path):
    with pytest.raises(UserError, match="no language-model head"):
        rmjax.load_policy(save_hf(tmp_path))


def test_context_parallelism_is_refused(causal):
    with pytest.raises(UserError, match=r"mesh.context = 2"):
        load_policy(causal, mesh=MeshConfig(fsdp=4, context=2))


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    save_hf(tmp_path, causal=True)
    edit_tensors(tmp_path, **{"model.norm.weight": torch.full((32,), float("nan"))})
    with pytest.raises(UserError, match="prompt 0: log-probabilities are not finite"):
        load_policy(tmp_path).sample(["x"], max_tokens=3)


def test_other_parameters_take_the_place_of_a_policys(causal, tmp_path, policy):
    other = load_policy(save_hf(tmp_path, policy.model.config, causal=True, seed=9))
    expected = other.sample(PROMPTS[:1], max_tokens=9)
    mine = policy.params
    policy.params = other.params
    try:
        equal(policy.sample(PROMPTS[:1], max_tokens=9), expected)
    finally:
        policy.params = mine


def test_end_tokens_are_those_of_transformers_and_the_turns(tmp_path):
    save_hf(tmp_path, causal=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "config.json", eos_token_id=9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert theirs.eos_token_id == 9
    assert load_policy(tmp_path).end_tokens == tuple(sorted({9, end}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [20, 11]}')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert theirs.eos_token_id == [20, 11]
    assert load_policy(tmp_path).end_tokens == tuple(sorted({11, 20, end}))
    orbax, hf = (tmp_path.with_name(f"{tmp_path.name}-{form}") for form in ("orbax", "hf"))
    hf_to_orbax(str(tmp_path), str(orbax), language_model=True)
    orbax_to_hf(str(orbax), str(hf))
    for converted in (orbax, hf):
        assert load_policy(converted).end_tokens == tuple(sorted({11, 20, end}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf).generation_config
    assert theirs.eos_token_id == sorted([11, 20, end])
    edit_json(tmp_path / "generation_config.json", eos_token_id="x")
    with pytest.raises(UserError, match="field 'eos_token_id' is 'x'"):
        load_policy(tmp_path)


def test_rows_divide_over_the_devices_that_draw_tokens():
    """Otherwise each of those that share rows would draw for all of them."""
    sharding = Sharding(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4), jax.devices()))
    decoder = tiny_llama()
    model = Model(decoder, ModelOptions(sharding), language_model_head(decoder))
    for rows, n in ((26, 5), (64, 10), (7, 1), (33, 3)):
        shape = Sampler(model, rows).cache_shape([20] * 100, n)
        assert rows <= shape.groups * shape.members < rows + 8 * n
        assert shape.groups % 2 == 0 and shape.groups * shape.members % 8 == 0
