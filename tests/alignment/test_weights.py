"""Parameters between the meshes of a step: the same numbers, and no copy of what is there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import tiny_llama
from rmjax.alignment.weights import changes, copied, move_program, moved
from rmjax.models.heads import LanguageModelHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LLAMA = tiny_llama(vocab_size=264, num_hidden_layers=2, num_key_value_heads=4)


def on(dtype="float32", **mesh) -> Model:
    options = ModelOptions(Sharding(make_mesh(MeshConfig(**mesh))), dtype=jnp.dtype(dtype))
    return Model(LLAMA, options, LanguageModelHead(tied=False))


def shapes(model: Model):
    return model.abstract(model.options.dtype)


def some(model: Model):
    """Random parameters of a model."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            random.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding
        ),
        shapes(model),
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (dict(fsdp=4, tensor=2), dict(data=2, fsdp=1, tensor=4)),
        (dict(fsdp=2, context=2, tensor=2), dict(data=4, fsdp=1, tensor=2)),
    ],
)
def test_weights_that_move_are_the_same(before, after):
    params, wanted = some(on(**before)), shapes(on("bfloat16", **after))
    found = flatten(moved(params | {"not the model's": jnp.zeros(3)}, wanted))
    assert found.keys() == flatten(wanted).keys()
    for path, to in flatten(wanted).items():
        array, expected = found[path], np.asarray(flatten(params)[path])
        assert array.dtype == to.dtype and array.sharding.is_equivalent_to(to.sharding, array.ndim)
        np.testing.assert_array_equal(np.asarray(array), expected.astype(to.dtype), err_msg=path)


def test_weights_move_in_one_loop():
    """Several at once waited for each other on eight devices of a CPU, until XLA gave up."""
    params, wanted = flatten(some(on(fsdp=2, tensor=4))), shapes(on(data=8, fsdp=1))
    program = move_program(changes(params, wanted))
    assert program.lower(params).compile().as_text().count(" while(") == 1


def test_weights_that_are_there_are_not_copied():
    model = on(fsdp=4, context=2)
    params = some(model)
    # The same devices hold the same parts, whatever the axes of their mesh are called.
    wanted = shapes(on(fsdp=8))
    assert not changes(params, wanted)
    for ours, theirs in zip(jax.tree.leaves(moved(params, wanted)), jax.tree.leaves(params)):
        assert ours is theirs
    # Norms are float32 in every dtype.
    half = shapes(dataclasses.replace(model, options=on("bfloat16", fsdp=8).options))
    assert flatten(half).keys() - changes(params, half) == {
        "final_norm",
        "layers/attention_norm",
        "layers/mlp_norm",
    }


def test_a_copy_outlives_what_it_is_of():
    params = some(on(fsdp=8))
    expected = jax.tree.map(np.asarray, params)
    kept = copied(params, shapes(on(fsdp=8)))
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, kept, expected)
