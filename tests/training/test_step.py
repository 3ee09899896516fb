"""One step of training on every mesh: losses, gradients and scores are those of one device."""

from itertools import pairwise

import jax
import numpy as np
import pytest

from helpers.models import make_model, one_device, tiny_llama
from helpers.targets import only_ratings, regression
from rmjax.data.batch import BATCH_AXES, Batch, Ratings
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.errors import UserError
from rmjax.models.init import random_params
from rmjax.models.parameters import flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh, put

ROWS, LENGTH, SLOTS = 8, 64, 4
MESHES = {
    "8x1": MeshConfig(fsdp=8),
    "4x2": MeshConfig(fsdp=4, tensor=2),
    "2x4": MeshConfig(fsdp=2, tensor=4),
    "context 2": MeshConfig(fsdp=4, context=2),
    "context 2, tensor 2": MeshConfig(fsdp=2, context=2, tensor=2),
    "replicas": MeshConfig(data=2, fsdp=4),
    "all axes": MeshConfig(data=2, fsdp=1, context=2, tensor=2),
}
QUICK = ("4x2", "context 2")
CASES = [
    pytest.param(
        mesh,
        id=name,
        marks=[pytest.mark.optimized] * (name == "all axes")
        + [pytest.mark.slow] * (name not in QUICK),
    )
    for name, mesh in MESHES.items()
]


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Packed rows of uneven samples, some labels missing, the last rows empty."""
    rng = np.random.default_rng(7)
    rows = [
        [rng.integers(1, 256, n).astype(np.int32) for n in rng.integers(2, LENGTH // SLOTS, count)]
        for count in (4, 1, 3, 4, 2, 4, 0, 0)
    ]
    placed = make_rows(
        [[Segment([t]) for t in row] for row in rows], ROWS, RowShape(ROWS, LENGTH, SLOTS)
    )
    filled = np.array([[slot < len(row) for slot in range(SLOTS)] for row in rows])
    present = filled[..., None] & (rng.random((ROWS, SLOTS, 5)) < 0.8)
    labels = np.where(present, rng.integers(0, 5, present.shape), 0).astype(np.float32)
    samples = np.where(filled, np.arange(ROWS * SLOTS).reshape(ROWS, SLOTS), -1).astype(np.int32)
    targets = only_ratings(Ratings._make([labels, present.astype(np.float32)]))
    arrays = (placed, targets, samples)
    return Batch._make([*jax.tree.map(lambda x: x[None], arrays), np.int32(1)])


def on(sharding: Sharding, batch: Batch):
    """Loss, gradients and scores, computed over `sharding`'s mesh."""
    decoder = tiny_llama(vocab_size=264, num_attention_heads=8, num_key_value_heads=4)
    model = make_model(decoder, sharding=sharding, remat="full")
    placed = put(batch, BATCH_AXES, sharding)

    def loss_of(params):
        micro = jax.tree.map(lambda x: x[0], placed._replace(microbatches=None))
        scores = model(params, micro.rows)
        weights = regression.weights(micro.targets)
        return regression.loss(scores, micro.targets, weights), scores

    params = random_params(model, seed=1)
    (loss, scores), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return float(loss), flatten(jax.device_get(gradients)), np.asarray(scores)


@pytest.fixture(scope="module")
def single(batch):
    return on(one_device(), batch)


@pytest.mark.parametrize("mesh", CASES)
def test_a_step_on_a_mesh_is_that_of_one_device(mesh, batch, single):
    loss, gradients, scores = on(Sharding(make_mesh(mesh)), batch)
    assert loss == pytest.approx(single[0], rel=1e-5)
    filled = batch.samples[0] >= 0
    np.testing.assert_allclose(
        scores[filled], single[2][filled], rtol=1e-5, atol=1e-5 * np.abs(single[2]).max()
    )
    for path, expected in single[1].items():
        # Relative to the array's largest entry: small ones are differences of large terms.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            gradients[path], expected, rtol=0, atol=1e-5 * scale, err_msg=path
        )


def test_kv_heads_that_do_not_divide_are_refused_by_name():
    decoder = tiny_llama(vocab_size=264, num_attention_heads=8, num_key_value_heads=2)
    model = make_model(decoder, sharding=Sharding(make_mesh(MeshConfig(fsdp=2, tensor=4))))
    with pytest.raises(UserError, match=r"parameter layers/k: axis 2 has size 2.*tensor = 4"):
        random_params(model, seed=0)


class Chip:
    """A TPU as far as placing a mesh is concerned."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index
        place = number % 16
        self.coords, self.core_on_chip = [place % 4, place // 4, 0], 0


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2), MeshConfig(data=4, tensor=4), MeshConfig(data=2, context=2)]
)
def test_only_data_crosses_slices(mesh):
    chips = [Chip(number, number // 16) for number in range(32)]
    placed = make_mesh(mesh, chips).devices
    for replica in placed.reshape(placed.shape[0], -1):
        assert len({chip.slice_index for chip in replica}) == 1
    assert len({chip.slice_index for chip in placed[:, 0, 0, 0]}) == 2
    assert len({chip.id for chip in placed.flat}) == 32


def test_slices_without_replicas_are_refused():
    chips = [Chip(number, number // 16) for number in range(32)]
    with pytest.raises(UserError, match=r"2 slices.*config.mesh.data to a multiple of 2"):
        make_mesh(MeshConfig(), chips)


def test_tensor_neighbours_are_neighbours_on_the_torus():
    chips = [Chip(number, 0) for number in range(16)]
    placed = make_mesh(MeshConfig(fsdp=4, tensor=4), chips).devices[0, :, 0, :]
    for row in placed:
        steps = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in pairwise(row)]
        assert steps == [1, 1, 1]


def test_an_axis_may_be_part_of_a_dimension():
    chips = [Chip(number, 0) for number in range(16)]
    placed = make_mesh(MeshConfig(fsdp=4, context=2, tensor=2), chips).devices
    assert placed.shape == (1, 4, 2, 2) and len({chip.id for chip in placed.flat}) == 16
