"""Every family of decoders, against its model in transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.checks import known
from helpers.families import FAMILY_MODELS
from helpers.models import make_model
from helpers.reference import hf_state, torch_model
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.models.attention.dispatch import alignment
from rmjax.models.decoder_config import LoraConfig
from rmjax.models.init import random_params
from rmjax.models.lora import merge_adapters
from rmjax.models.parameters import flatten, nest
from rmjax.models.quantization import quantize_params
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LENGTH, SLOTS = 128, 4


def seen_params(model):
    """Norms, biases and all off their initial values, so that they are seen."""
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        random_params(model, seed=1),
    )


def grouped_rows(rng, decoder, kernel, count=2):
    """Rows of samples by themselves and of samples that share a prompt, and all samples in order.

    Windows end in samples, in shared prompts, and reach from the one into the other.
    """
    align = alignment(kernel, LENGTH, decoder)
    draw = lambda n: rng.integers(1, 262, n).astype(np.int32)  # noqa: E731
    prompt, other = draw(24), draw(3)
    rows = [
        [Segment([np.concatenate([prompt, draw(n)]) for n in (3, 20, 11)], 24), Segment([draw(9)])],
        [Segment([draw(5)]), Segment([np.concatenate([other, draw(n)]) for n in (1, 40)], 3)],
    ]
    samples = [[sample for segment in row for sample in segment.samples] for row in rows]
    return make_rows(rows, count, RowShape(count, LENGTH, SLOTS, align)), samples


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_every_kernel_and_mesh_gives_the_same_scores(name, rng):
    decoder = FAMILY_MODELS[name]
    rows, _ = grouped_rows(rng, decoder, "splash")
    single = make_model(decoder, attention="cpu_flash")
    params = jax.device_get(seen_params(single))
    real = rows.last_token_index > 0
    expected = np.asarray(jax.jit(single)(params, rows))[real]
    for mesh, kernel in (
        (dict(fsdp=1), "xla"),
        (dict(fsdp=1), "splash"),
        (dict(fsdp=2, tensor=2), "splash"),
        (dict(fsdp=2, context=2, tensor=2), "cpu_flash"),
        (dict(data=2, fsdp=1, context=4), "xla"),
    ):
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        sharding = Sharding(make_mesh(MeshConfig(**mesh), devices))
        model = make_model(decoder, sharding=sharding, attention=kernel, remat="dots")
        placed = jax.device_put(params, jax.tree.map(lambda x: x.sharding, model.abstract()))
        found = np.asarray(jax.jit(model)(placed, rows))[real]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{mesh} {kernel}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_windows", "gemma3_text"])
def test_adapters_and_products_in_8_bits(name, rng):
    """Merged adapters score as unmerged ones; scores in 8 bits are near those in float32."""
    decoder, lora = FAMILY_MODELS[name], LoraConfig(rank=2)
    rows, _ = grouped_rows(rng, decoder, "cpu_flash")
    plain = make_model(decoder, attention="cpu_flash")
    adapted = dataclasses.replace(plain, lora=lora)
    params = seen_params(adapted)
    real = rows.last_token_index > 0
    unmerged = np.asarray(jax.jit(adapted)(params, rows))[real]
    merged = nest(merge_adapters(flatten(params), lora))
    found = np.asarray(jax.jit(plain)(merged, rows))[real]
    np.testing.assert_allclose(found, unmerged, atol=1e-4)
    rounded = quantize_params(merged, plain.options.sharding, "int8")
    in_8_bits = np.asarray(jax.jit(plain)(rounded, rows))[real]
    error = np.linalg.norm(in_8_bits - found) / np.linalg.norm(found)
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_scores_and_gradients_equal_transformers(name, rng):
    """Packed and with shared prompts, against one sample at a time."""
    decoder = FAMILY_MODELS[name]
    rows, samples = grouped_rows(rng, decoder, "cpu_flash")
    model = make_model(decoder, attention="cpu_flash")
    params = seen_params(model)
    weights = np.zeros((*rows.last_token_index.shape, 5), np.float32)
    for row, members in enumerate(samples):
        weights[row, : len(members)] = rng.normal(size=(len(members), 5))

    def total(params):
        scores = model(params, rows)
        return (scores * weights).sum(), scores

    with jax.numpy_dtype_promotion("strict"):
        gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)

    reference = torch_model(decoder, params, 5)
    whole = torch.zeros(())
    for row, members in enumerate(samples):
        for slot, sample in enumerate(members):
            scores = reference(torch.from_numpy(sample[None]).long()).logits[0]
            np.testing.assert_allclose(found[row, slot], scores.detach(), atol=1e-4)
            whole = whole + (scores * torch.from_numpy(weights[row, slot])).sum()
    whole.backward()
    ours = hf_state(decoder, gradient, 5)
    for key, parameter in reference.named_parameters():
        theirs = known(parameter.grad).numpy()
        error = np.linalg.norm(ours[key] - theirs) / max(np.linalg.norm(theirs), 1e-12)
        assert error < 1e-3, (key, error)
