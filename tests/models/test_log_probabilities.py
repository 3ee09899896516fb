"""Log-probabilities of a policy's tokens: against transformers, in any rows, on any mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checks import known
from helpers.families import FAMILY_MODELS
from helpers.hf_models import TALK, save_hf
from helpers.models import one_device, tiny_llama
from rmjax.checkpoints.hf_mapping import hf_keys, to_hf
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.data.assistant_tokens import assistant_tokens
from rmjax.data.batches import make_batch
from rmjax.data.conversation import Conversation
from rmjax.data.planning import plan_rows
from rmjax.data.predicted import predicting
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.data.tokenized import in_memory
from rmjax.models import log_probabilities as module
from rmjax.models.heads import language_model_head
from rmjax.models.init import random_params
from rmjax.models.layers import ModelOptions
from rmjax.models.log_probabilities import log_probabilities, sums_of_samples
from rmjax.models.model import Model
from rmjax.models.parameters import LM_HEAD, flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

ON_EIGHT = [
    dict(fsdp=8),
    dict(context=8),
    dict(tensor=2, data=4),
    dict(data=2, fsdp=2, context=2),
    dict(fsdp=2, context=2, tensor=2),
]


def mesh_of(sizes: dict[str, int]) -> Sharding:
    return Sharding(make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))) if sizes else one_device()


def language_model(decoder, sharding=None, **options) -> Model:
    options = ModelOptions(sharding or one_device(), **options)
    return Model(decoder, options, language_model_head(decoder))


def siblings(rng, sizes, prompt=(2, 20), response=(1, 12)):
    """Tokens of several prompts with so many responses each, which are the assistant's, and whose.

    None is the pad token of transformers' models here, whose embedding it does not differentiate.
    """
    tokens, spoken, prompts = [], [], []
    for number, size in enumerate(sizes):
        beginning = rng.integers(3, 262, rng.integers(*prompt))
        for _ in range(size):
            own = rng.integers(3, 262, rng.integers(*response))
            tokens.append(np.concatenate([beginning, own]).astype(np.int32))
            spoken.append(np.arange(len(tokens[-1])) >= len(beginning))
            prompts.append(str(number))
    return tokens, spoken, prompts


def laid_out(tokens, spoken, prompts, shape, *, share, packing) -> tuple[Any, Any, np.ndarray]:
    """Rows of all samples, the places that predict, and the sample of each slot."""
    data, order = in_memory(tokens, prompts, spoken)
    rows = plan_rows(data, np.arange(len(data)), shape, packing=packing, share=share)
    assert len(rows) <= shape.rows
    batch = jax.tree.map(lambda x: x[0], make_batch(data, rows, shape, 1, share)[:3])
    rows, _, samples = batch
    return rows, predicting(data, samples, rows), np.where(samples < 0, -1, order[samples])


def by_transformers(reference, tokens, spoken) -> torch.Tensor:
    """The log-probability of each spoken token, of one sample by itself."""
    ids = torch.from_numpy(tokens[None]).long()
    logs = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logs[torch.from_numpy(spoken[1:])]


# ---- against transformers -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "tied", "gemma2"])
def test_log_probabilities_and_gradients_equal_transformers(kind, tmp_path, rng):
    """In packed rows that share prompts, a sum of them that weighs each sample differently.

    Gemma 2 has a soft cap of the logits.
    """
    decoder = tiny_llama(num_hidden_layers=2, tie_word_embeddings=kind == "tied")
    decoder = FAMILY_MODELS[kind] if kind == "gemma2" else decoder
    path = save_hf(tmp_path, decoder, causal=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    source = open_pretrained(str(path))
    model = language_model(source.decoder)
    params = load_params(source, model, seed=0, dtype=jnp.float32)
    tokens, spoken, prompts = siblings(rng, [3, 1, 2, 4])
    rows, wanted, samples = laid_out(
        tokens, spoken, prompts, RowShape(3, 96, 8), share=True, packing=True
    )
    factors = rng.standard_normal(len(tokens)).astype(np.float32)
    slots = np.where(samples < 0, 0, factors[samples])

    def loss(params):
        found = model.log_probabilities(params, rows, wanted).tokens
        sums = sums_of_samples(found, rows)
        return jnp.sum(sums * slots), (found, sums)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    with jax.numpy_dtype_promotion("strict"):
        (_, (found, sums)), grads = gradient(params)
    total = torch.zeros(())
    for row, slot in np.argwhere(samples >= 0):
        i = samples[row, slot]
        expected = by_transformers(reference, tokens[i], spoken[i])
        end, count = rows.last_token_index[row, slot], spoken[i].sum()
        ours = found[row, end - count : end]
        np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(sums[row, slot], expected.sum().item(), rtol=1e-5)
        total = total + float(factors[i]) * expected.sum()
    assert (samples >= 0).sum() == len(tokens) and not np.asarray(sums)[samples < 0].any()

    total.backward()
    theirs = {key: p.grad.numpy() for key, p in reference.named_parameters() if p.grad is not None}
    ours = flatten(jax.device_get(grads))
    for row in model.parameters:
        for layer, key in enumerate(hf_keys(row, source.decoder)):
            array = ours[row.path][layer] if row.stacked else ours[row.path]
            error = np.linalg.norm(to_hf(row, array, model.sizes) - theirs[key])
            assert error < 1e-3 * np.linalg.norm(theirs[key]), key


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    """Real weights, whose embedding is the head: all logits of a dialogue, and both its answers.

    Logits reach 20, where float32's products are 1e-4 from float64's, here as in transformers.
    """
    source = open_pretrained(str(smollm2))
    tokenizer = source.tokenizer()
    tokens, spoken = assistant_tokens(tokenizer, Conversation(TALK[1]), every_turn=True)
    said = tokenizer.decode(tokens[spoken])
    assert said == "Rayleigh.<|im_end|>A physicist.<|im_end|>"  # no line break behind them
    model = language_model(source.decoder)
    params = load_params(source, model, seed=0, dtype=jnp.float32)
    shape = RowShape(1, len(tokens), 1)
    rows, wanted, _ = laid_out([tokens], [spoken], [""], shape, share=True, packing=True)

    def both(params):
        return model(params, rows), model.log_probabilities(params, rows, wanted)

    logits, found = jax.jit(both)(params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    with torch.no_grad():
        raw = reference(torch.from_numpy(tokens[None]).long()).logits[0]
    np.testing.assert_allclose(logits[0], raw.numpy(), rtol=1e-4, atol=1e-4)
    logs = raw[:-1].log_softmax(-1).numpy()[spoken[1:]]
    expected = logs[np.arange(len(logs)), tokens[spoken]]
    np.testing.assert_allclose(found.tokens[wanted], expected, atol=1e-4)
    np.testing.assert_allclose(found.entropy[wanted], -(np.exp(logs) * logs).sum(-1), atol=1e-4)


# ---- rows and meshes ----------------------------------------------------------------------------


@functools.cache
def computed_by(sizes: tuple[tuple[str, int], ...], tied: bool):
    """A compiled function from parameters, rows and slots to values and gradients."""
    sharding = mesh_of(dict(sizes))
    decoder = tiny_llama(num_hidden_layers=2, vocab_size=264, tie_word_embeddings=tied)
    model = language_model(decoder, sharding)

    def loss(params, rows, wanted, factors):
        found = model.log_probabilities(params, rows, wanted)
        sums, entropies = (sums_of_samples(x, rows) for x in found)
        return jnp.sum(factors * (sums + 0.1 * entropies)), (sums, entropies)

    params = random_params(model, seed=2)
    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))


def computed(tokens, spoken, prompts, shape, *, share, packing=True, sizes=None, tied=False):
    """Sums and entropies of each sample, and the gradient of a weighted sum over all."""
    params, program = computed_by(tuple((sizes or {}).items()), tied)
    rows, wanted, samples = laid_out(tokens, spoken, prompts, shape, share=share, packing=packing)
    factors = np.cos(np.arange(len(tokens))).astype(np.float32)
    slots = np.where(samples < 0, 0, factors[samples])
    (_, values), grads = program(params, rows, wanted, slots)
    found = np.zeros((2, len(tokens)))
    there = samples >= 0
    found[:, samples[there]] = np.asarray(values)[:, there]
    return found, flatten(jax.device_get(grads))


def assert_same(found, expected, *, values, gradients):
    np.testing.assert_allclose(found[0], expected[0], rtol=values, atol=values)
    for path, theirs in expected[1].items():
        error = np.linalg.norm(found[1][path] - theirs)
        assert error < gradients * np.linalg.norm(theirs), path


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    seed=st.integers(0, 10**6),
    align=st.sampled_from([1, 8]),
)
def test_shared_and_packed_rows_give_the_numbers_of_samples_alone(sizes, seed, align):
    samples = siblings(np.random.default_rng(seed), sizes)
    alone = computed(*samples, RowShape(32, 32, 1), share=False, packing=False)
    shared = computed(*samples, RowShape(12, 64, 8, align), share=True)
    assert_same(shared, alone, values=1e-5, gradients=1e-4)


FIXED = siblings(np.random.default_rng(5), [2, 4, 2, 6, 2, 2, 4, 2], (8, 20), (3, 12))


@functools.cache
def on_one_device(tied: bool):
    return computed(*FIXED, RowShape(8, 96, 8), share=True, tied=tied)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sizes", ON_EIGHT, ids=str)
def test_every_mesh_gives_one_devices_numbers(sizes, tied):
    found = computed(*FIXED, RowShape(8, 96, 8), share=True, sizes=sizes, tied=tied)
    assert_same(found, on_one_device(tied), values=1e-5, gradients=1e-5)


def test_responses_that_begin_alike_are_counted_each():
    """They share the prompt but for its last token, though their tokens are the same further on."""
    prompt, answers = [5, 17, 40, 3], ([12, 7, 8, 9], [12, 7, 9], [12, 7])
    tokens = [np.asarray(prompt + answer, np.int32) for answer in answers]
    spoken = [np.arange(len(t)) >= len(prompt) for t in tokens]
    data, _ = in_memory(tokens, ["p"] * 3, spoken)
    assert data.shared.tolist() == [3, 3, 3]
    shared = computed(tokens, spoken, ["p"] * 3, RowShape(8, 32, 4), share=True)
    alone = computed(tokens, spoken, ["a", "b", "c"], RowShape(8, 32, 4), share=True, packing=False)
    assert_same(shared, alone, values=1e-5, gradients=1e-4)


# ---- the function alone -------------------------------------------------------------------------


def numbers(rng, rows=8, length=64, width=16, words=264) -> tuple[Any, ...]:
    """States, a matrix, targets, and which places are wanted."""
    states = rng.standard_normal((rows, length, width)).astype(np.float32)
    matrix = rng.standard_normal((width, words)).astype(np.float32)
    targets = rng.integers(0, words, (rows, length)).astype(np.int32)
    return states, matrix, targets, rng.random((rows, length)) < 0.6


@pytest.mark.parametrize("sizes", [{}, *ON_EIGHT], ids=str)
def test_chunks_and_shards_give_what_a_softmax_of_all_logits_gives(sizes, rng, monkeypatch):
    """Values, entropies and all gradients, against torch; several chunks, the last one not full."""
    monkeypatch.setattr(module, "_CHUNK", 24)
    states, matrix, targets, wanted = numbers(rng)
    by_tokens, by_entropy = rng.standard_normal((2, *targets.shape)).astype(np.float32)

    h, w = (torch.from_numpy(x).double().requires_grad_() for x in (states, matrix))
    logs = (h @ w).log_softmax(-1)
    there = torch.from_numpy(wanted)
    tokens = logs.gather(2, torch.from_numpy(targets).long()[..., None])[..., 0] * there
    entropy = -(logs.exp() * logs).sum(-1) * there
    (tokens * torch.from_numpy(by_tokens) + entropy * torch.from_numpy(by_entropy)).sum().backward()

    sharding = mesh_of(sizes)
    placed = (
        jax.device_put(states, sharding.activation(("row", "length", "embed"))),
        jax.device_put(matrix, sharding.parameter(("embed", "vocab"))),
    )

    def loss(states, matrix):
        found = log_probabilities(states, matrix, targets, wanted, sharding)
        return jnp.sum(found.tokens * by_tokens + found.entropy * by_entropy), found

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, found), grads = gradient(*placed)
    for ours, theirs in zip((*found, *grads), (tokens, entropy, h.grad, w.grad), strict=True):
        np.testing.assert_allclose(ours, known(theirs).detach().numpy(), rtol=1e-5, atol=2e-5)


def test_places_that_are_not_wanted_are_not_looked_at(rng):
    """Not even a NaN there is seen, and no gradient goes there."""
    states, matrix, targets, wanted = numbers(rng)
    broken = np.where(wanted[..., None], states, np.nan)

    def loss(states, matrix):
        found = log_probabilities(states, matrix, targets, wanted, one_device())
        return jnp.sum(found.tokens + found.entropy)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    (value, grads), (expected, plain) = gradient(broken, matrix), gradient(states, matrix)
    assert value == expected and not np.asarray(grads[0])[~wanted].any()
    for ours, theirs in zip(grads, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    nothing = log_probabilities(states, matrix, targets, np.zeros_like(wanted), one_device())
    assert not nothing.tokens.any() and not nothing.entropy.any()


def test_in_bfloat16_sums_over_places_stay_in_float32(monkeypatch):
    """The matrix' gradient over 8,192 equal places is so many times that of one."""
    monkeypatch.setattr(module, "_CHUNK", 128)
    states = jnp.ones((8, 1024, 8), jnp.bfloat16)
    matrix = np.linspace(-1, 1, 8 * 24).reshape(8, 24).astype(np.float32)
    targets: Any = np.zeros((8, 1024), np.int32)

    def gradient(wanted):
        def loss(matrix):
            return jnp.sum(log_probabilities(states, matrix, targets, wanted, one_device()).tokens)

        return np.asarray(jax.jit(jax.grad(loss))(matrix))

    one, every = np.zeros((8, 1024), bool), np.ones((8, 1024), bool)
    one[3, 5] = True
    np.testing.assert_allclose(gradient(every), 8192 * gradient(one), rtol=1e-5)


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=4, tensor=2)], ids=str)
def test_memory_does_not_grow_with_places_times_words(sizes):
    """The compiled program's, forward and backward: eight times the places, and not their logits.

    Both fill a chunk of the largest size. What grows are states, targets and results, a few
    numbers of the width for each place.
    """
    sharding, width, words = mesh_of(sizes), 16, 1 << 17

    def temporary(length: int) -> int:
        def loss(states, matrix, targets, wanted):
            found = log_probabilities(states, matrix, targets, wanted, sharding)
            return jnp.sum(found.tokens + found.entropy)

        def abstract(shape, dtype, placed):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

        places = sharding.activation(("row", "length"))
        compiled = (
            jax.jit(jax.grad(loss, argnums=(0, 1)))
            .lower(
                abstract(
                    (8, length, width), jnp.float32, sharding.activation(("row", "length", "embed"))
                ),
                abstract((width, words), jnp.float32, sharding.parameter(("embed", "vocab"))),
                abstract((8, length), jnp.int32, places),
                abstract((8, length), jnp.bool, places),
            )
            .compile()
        )
        return known(compiled.memory_analysis()).temp_size_in_bytes

    small, large = temporary(2048), temporary(16384)
    places = 8 * (16384 - 2048) // sharding.row_shards
    logits = places * words // sharding.mesh.shape["tensor"] * 4
    assert large - small < places * 400 < logits / 100


@pytest.mark.optimized
def test_a_frozen_head_is_not_differentiated():
    """As with LoRA: where nobody asks for the matrix' gradient, one product less is computed."""
    model = language_model(tiny_llama(num_hidden_layers=1))
    rows = make_rows([[Segment([np.arange(1, 60, dtype=np.int32)])]], 1, RowShape(1, 64, 1))

    def products(*paths):
        def loss(free, rest):
            found = model.log_probabilities(rest | free, rows, rows.positions < 58)
            return jnp.sum(found.tokens)

        abstract = model.abstract()
        free = {path: abstract.pop(path) for path in paths}
        compiled = jax.jit(jax.grad(loss)).lower(free, abstract).compile()
        return known(compiled.as_text()).count(" dot(")

    assert products("final_norm") == products("final_norm", LM_HEAD.path) - 1
