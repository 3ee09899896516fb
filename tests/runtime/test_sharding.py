import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import LLAMA_70B, make_model, one_device, tiny_llama
from rmjax.config import OptimizerConfig
from rmjax.data.batch import BATCH_AXES
from rmjax.errors import UserError
from rmjax.models.inputs import ROWS_AXES
from rmjax.models.parameters import PARAMETERS, flatten
from rmjax.runtime.sharding import (
    MeshConfig,
    Sharding,
    abstract_mesh,
    check_divisible,
    make_mesh,
    mesh_shape,
)
from rmjax.training.optimizer import make_optimizer, make_schedule
from rmjax.training.step import abstract_state


def on(devices: int, **mesh) -> Sharding:
    return Sharding(abstract_mesh(MeshConfig(**mesh), devices))


@pytest.mark.parametrize("kind", ["parameter", "activation"])
def test_an_unknown_axis_raises(kind):
    with pytest.raises(ValueError, match=f"{kind} axis 'embedd' is not in the table"):
        getattr(one_device(), kind)(("embedd", "heads"))


def test_a_mesh_axis_used_twice_raises():
    with pytest.raises(ValueError, match="'tensor' twice"):
        one_device().parameter(("heads", "mlp"))
    with pytest.raises(ValueError, match="'tensor' twice"):
        one_device().activation(("row", "length", "heads", "mlp"))


def test_every_axis_of_every_array_is_in_the_tables():
    sharding = one_device()
    for row in PARAMETERS:
        sharding.parameter(row.all_axes)
    targets: Any = BATCH_AXES.targets
    named: list[Any] = [*BATCH_AXES.rows, *targets.ratings, *targets.pairs, *BATCH_AXES[2:]]
    for axes in [*named, *ROWS_AXES]:
        sharding.activation(axes)


def test_constraining_names_every_axis():
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        one_device().constrain(jnp.zeros((2, 3)), ("row",))


@pytest.mark.parametrize(
    ("mesh", "parameter", "axis", "size"),
    [
        (dict(fsdp=5), "embed", "fsdp", 32),
        (dict(fsdp=1, tensor=3), "embed", "tensor", 262),
        (dict(fsdp=1, tensor=4), "embed", "tensor", 262),
    ],
)
def test_a_size_that_does_not_divide_is_named(mesh, parameter, axis, size):
    with pytest.raises(UserError) as error:
        make_model(tiny_llama(), 5, on(math.prod(mesh.values()), **mesh)).abstract()
    message = str(error.value)
    assert message.startswith(f"parameter {parameter}: ")
    assert f"size {size}," in message and f"{axis} = {mesh[axis]}" in message


def test_kv_heads_bound_the_tensor_axis():
    decoder = tiny_llama(vocab_size=264)
    with pytest.raises(UserError, match=r"parameter layers/k: axis 2 has size 2.*tensor = 4"):
        make_model(decoder, 5, on(4, fsdp=1, tensor=4)).abstract()


def test_a_product_of_axes_is_checked_whole():
    rows = on(8, data=2, fsdp=4).activation(("row", "length"))
    check_divisible("rows", (16, 7), rows)
    with pytest.raises(UserError, match=r"rows: axis 0 has size 12.*data x fsdp = 8"):
        check_divisible("rows", (12, 7), rows)


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        (dict(), 1, (1, 1, 1, 1)),
        (dict(), 8, (1, 8, 1, 1)),
        (dict(data=-1, fsdp=2), 8, (4, 2, 1, 1)),
        (dict(fsdp=2, context=-1, tensor=2), 8, (1, 2, 2, 2)),
        (dict(data=2, fsdp=2, context=1, tensor=2), 8, (2, 2, 1, 2)),
        (dict(tensor=-1, fsdp=8), 8, (1, 8, 1, 1)),
    ],
)
def test_mesh_sizes(mesh, devices, shape):
    sizes = mesh_shape(MeshConfig(**mesh), devices)
    assert tuple(sizes.values()) == shape
    assert tuple(sizes) == ("data", "fsdp", "context", "tensor")
    built = make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    assert built.shape == abstract_mesh(MeshConfig(**mesh), devices).shape == sizes
    assert Sharding(built).row_shards == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (dict(fsdp=3), "'fsdp': 3.*8 devices"),
        (dict(fsdp=-1, tensor=3), "'tensor': 3.*8 devices"),
        (dict(data=16), "'data': 16.*8 devices"),
        (dict(data=-1), "at most one may be -1"),
        (dict(tensor=0), "must be positive"),
        (dict(fsdp=-2), "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**mesh), jax.devices())


def test_each_device_holds_its_part_only():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    leaves = flatten(make_model(tiny_llama(), 5, Sharding(mesh)).abstract())
    for path, leaf in leaves.items():
        parts = 1 if re.fullmatch(r".*norm", path) else 2 if path == "head" else 4
        array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        held = {shard.data.size for shard in array.addressable_shards}
        assert held == {array.size // parts}, path


def device_bytes(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(
    ("mesh", "fsdp", "tensor"), [(dict(), 64, 1), (dict(tensor=8), 8, 8), (dict(data=4), 16, 1)]
)
def test_bytes_of_70b_on_64_devices(mesh, fsdp, tensor):
    sharding = on(64, **mesh)
    config = OptimizerConfig(learning_rate=1e-6)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    state = abstract_state(make_model(LLAMA_70B, 5, sharding), optimizer, (".*",))

    whole = 8192 // fsdp  # the residual stream, a device's share
    layer = (
        whole * (64 // tensor) * 128 * 2  # queries and output
        + whole * (8 // tensor) * 128 * 2  # keys and values
        + whole * (28672 // tensor) * 3  # gate, up, down
        + 8192 * 2  # norms, whole on every device
    )
    params = 80 * layer + (128256 // tensor) * whole + 8192 + whole * 5
    assert device_bytes(state.params) == 4 * params
    # AdamW: two moments; and three counters: our step, Adam's and the schedule's.
    assert device_bytes(state) == 3 * 4 * params + 3 * 4


def test_70b_has_as_many_parameters_as_published():
    """70.6 billion with the language model's head, which a reward model has not."""
    leaves = jax.tree.leaves(make_model(LLAMA_70B, 5, on(1)).abstract())
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert count - 5 * 8192 + 128256 * 8192 == 70_553_706_496
