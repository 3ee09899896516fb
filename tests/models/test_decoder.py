import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checks import known
from helpers.models import ROPES, make_model, one_device, tiny_llama
from helpers.reference import hf_state, torch_model, torch_scores
from helpers.targets import only_ratings, regression
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.data.batch import Ratings
from rmjax.data.packing import pack
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.inference.score_step import make_score
from rmjax.models.decoder import REMAT
from rmjax.models.init import random_params
from rmjax.models.inputs import Rows
from rmjax.models.parameters import flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh


def sequences(rng, lengths, vocab=262):
    return [rng.integers(1, vocab, n).astype(np.int32) for n in lengths]


def packed(tokens, length, slots=8, count=None):
    rows = pack([len(t) for t in tokens], length, slots)
    arrays = make_rows(
        [[Segment([tokens[i]]) for i in row] for row in rows],
        count or len(rows),
        RowShape(len(rows), length, slots),
    )
    return arrays, rows


def unpack(scores, rows, n):
    out = np.empty((n, scores.shape[-1]), np.float32)
    for row, members in enumerate(rows):
        out[members] = scores[row, : len(members)]
    return out


VARIANTS = {
    **{f"rope_{name}": {"rope": rope} for name, rope in ROPES.items()},
    # Up to max_position_embeddings it is the default kind; longer samples are refused.
    "rope_dynamic": {"rope": ROPES["dynamic"], "max_position_embeddings": 128},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 16},
    "eps": {"rms_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            name,
            marks=[pytest.mark.optimized] * (name == "rope_llama3")
            + [pytest.mark.slow] * (name not in ("rope_default", "biases")),
        )
        for name in VARIANTS
    ],
)
def test_scores_and_gradients_equal_transformers(variant, rng):
    decoder = tiny_llama(**VARIANTS[variant])
    model = make_model(decoder)
    params = random_params(model, seed=1)
    # Biases and norms off their initial values, so that they are seen.
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
    )
    tokens = sequences(rng, [5, 17, 40, 100, 60])
    rows, places = packed(tokens, 128)
    labels = rng.uniform(0, 4, (len(tokens), 5)).astype(np.float32)

    reference = torch_model(decoder, params, 5)
    expected = torch_scores(reference, tokens)
    found = unpack(np.asarray(make_score(model)(params, rows)), places, len(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    slots = np.zeros((*rows.last_token_index.shape, 5), np.float32)
    weights = np.zeros_like(slots)
    for row, members in enumerate(places):
        slots[row, : len(members)], weights[row, : len(members)] = labels[members], 1

    def loss(params):
        scores = model(params, rows)
        targets = only_ratings(Ratings._make([slots, weights]))
        return regression.loss(scores, targets, regression.weights(targets))

    with jax.numpy_dtype_promotion("strict"):  # nothing of ours is promoted in silence
        ours = hf_state(decoder, jax.jit(jax.grad(loss))(params), 5)
    total = torch.zeros(())
    for sequence, label in zip(tokens, labels):
        scores = reference(torch.from_numpy(sequence[None]).long()).logits[0]
        total = total + ((scores - torch.from_numpy(label)) ** 2).sum()
    (total / labels.size).backward()
    for key, parameter in reference.named_parameters():
        theirs = known(parameter.grad).numpy()
        error = np.linalg.norm(ours[key] - theirs) / max(np.linalg.norm(theirs), 1e-12)
        assert error < 1e-3, (key, error)


@pytest.mark.slow
def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """Of 1,024 times the same token, computed in bfloat16, within a few of its 2^-8 of float32's.

    A sum in bfloat16 stands still long before so many.
    """
    decoder = tiny_llama(num_hidden_layers=1, max_position_embeddings=1024)
    group = [Segment([np.full(1024, 7, np.int32)])]
    rows = make_rows([group], 1, RowShape(1, 1024, 1))
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = make_model(decoder, dtype=dtype, attention="cpu_flash")
        params = random_params(model, 0)
        gradient = jax.jit(jax.grad(lambda p, m=model: m(p, rows).sum()))(params)
        found[dtype] = np.asarray(gradient["embed"])[7]
    error = np.linalg.norm(found[jnp.bfloat16] - found[jnp.float32])
    assert error < 0.03 * np.linalg.norm(found[jnp.float32])


@pytest.mark.slow
def test_real_weights_equal_transformers(smollm2, rng):
    import transformers

    source = open_pretrained(str(smollm2))
    model = make_model(source.decoder)
    params = load_params(source, model, seed=0, dtype=jnp.float32)
    causal = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    state = hf_state(source.decoder, params, 5)
    for key, tensor in causal.model.state_dict().items():
        np.testing.assert_array_equal(state[f"model.{key}"], tensor.numpy(), err_msg=key)

    tokens = sequences(rng, [7, 64, 200], source.decoder.vocab_size)
    rows, places = packed(tokens, 256)
    expected = torch_scores(torch_model(source.decoder, params, 5), tokens)
    found = unpack(np.asarray(make_score(model)(params, rows)), places, len(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    row_length=st.sampled_from([32, 48, 96]),
    left=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_a_score_does_not_depend_on_its_row(lengths, row_length, left, seed):
    """Batch size, packing, padding length and padding side: the same numbers within 1e-5."""
    tokens = sequences(np.random.default_rng(seed), lengths)
    alone = [make_rows([[Segment([t])]], 1, RowShape(1, 30, 1)) for t in tokens]
    expected = np.concatenate([_SCORE(_PARAMS, rows)[:, 0] for rows in alone])

    rows, places = packed(tokens, row_length, slots=4, count=6)
    np.testing.assert_allclose(
        unpack(np.asarray(_SCORE(_PARAMS, rows)), places, len(tokens)), expected, atol=1e-5
    )
    # The same rows with padding in front: ends move along, nothing else does.
    shift = Rows._make(
        [
            *(np.pad(np.asarray(x), ((0, 0), (left, 2 - left))) for x in rows[:3]),
            *(np.pad(np.asarray(x) + left, ((0, 0), (left, 2 - left))) for x in rows[3:5]),
            np.asarray(rows.last_token_index) + left,
        ]
    )
    np.testing.assert_allclose(
        unpack(np.asarray(_SCORE(_PARAMS, shift)), places, len(tokens)), expected, atol=1e-5
    )


_MODEL = make_model(tiny_llama(rope=ROPES["llama3"]))
_PARAMS = random_params(_MODEL, seed=0)
_SCORE = make_score(_MODEL)


def test_padding_is_known_by_mask_not_by_token(rng):
    """Whatever stands in the padding, also eos, the scores are the same to the bit."""
    tokens = sequences(rng, [9, 12])
    rows, _ = packed(tokens, 32)
    eos = int(tokens[0][-1])
    filled = rows._replace(tokens=np.where(rows.segment_ids == 0, eos, rows.tokens))
    np.testing.assert_array_equal(_SCORE(_PARAMS, rows), _SCORE(_PARAMS, filled))


@pytest.mark.slow
def test_long_rows_equal_short_ones(rng):
    """Rows of 2,560 take the path that recomputes its blocks; the score of a sample is the same."""
    tokens = sequences(rng, [600, 900])
    rows, places = packed(tokens, 2560)
    alone = [make_rows([[Segment([t])]], 1, RowShape(1, 1000, 1)) for t in tokens]
    expected = np.concatenate([_SCORE(_PARAMS, one)[:, 0] for one in alone])
    found = unpack(np.asarray(_SCORE(_PARAMS, rows)), places, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT)
def test_remat_changes_no_gradient(remat, rng):
    decoder = tiny_llama()
    rows, _ = packed(sequences(rng, [9, 12, 30]), 64)

    def grad(policy):
        model = make_model(decoder, remat=policy)
        params = random_params(model, seed=0)
        return jax.jit(jax.grad(lambda p: model(p, rows).sum()))(params)

    for ours, plain in zip(jax.tree.leaves(grad(remat)), jax.tree.leaves(grad("none"))):
        assert np.linalg.norm(ours - plain) < 1e-5 * np.linalg.norm(plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        dict(fsdp=8),
        dict(data=4, fsdp=2),
        dict(data=2, fsdp=2, tensor=2),
        dict(fsdp=2, context=2, tensor=2),
    ],
    ids=str,
)
def test_every_mesh_gives_one_devices_scores(mesh, rng):
    decoder = tiny_llama()
    rows, _ = packed(sequences(rng, rng.integers(3, 60, 20)), 64, count=16)
    single = make_model(decoder)
    expected = make_score(single)(random_params(single, seed=3), rows)
    model = make_model(decoder, sharding=Sharding(make_mesh(MeshConfig(**mesh))))
    params = random_params(model, seed=3)
    np.testing.assert_allclose(make_score(model)(params, rows), expected, rtol=1e-5, atol=1e-5)


def test_table_and_model_agree():
    decoder = tiny_llama(attention_bias=True, mlp_bias=True)
    model = make_model(decoder)
    made = flatten(random_params(model, seed=0))
    table = flatten(make_model(decoder, 5, one_device()).abstract())
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in table.items()
    }


def test_bfloat16_keeps_head_and_scores_in_float32(rng):
    decoder = tiny_llama()
    model = make_model(decoder, dtype=jnp.dtype("bfloat16"))
    params = random_params(model, seed=0)
    rows, _ = packed(sequences(rng, [20, 30]), 64)
    found = make_score(model)(params, rows)
    assert found.dtype == jnp.float32
    expected = make_score(make_model(decoder))(params, rows)
    np.testing.assert_allclose(found[0, :2], expected[0, :2], atol=0.1)
