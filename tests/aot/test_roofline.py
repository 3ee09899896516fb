"""FLOPs by hand, times by hand, and arithmetic that must agree with counting."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import make_model, one_device, tiny_llama
from rmjax.aot.costs import Collective, StepWork
from rmjax.aot.costs import work as work_of
from rmjax.aot.estimate import estimate
from rmjax.aot.hardware import CHIPS, gpu_target
from rmjax.aot.program import Workload
from rmjax.aot.roofline import network, predict
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.inference.score_step import make_score
from rmjax.models.flops import model_flops
from rmjax.models.heads import LanguageModelHead, RewardHead
from rmjax.models.init import random_params
from rmjax.models.log_probabilities import CHUNK_LOOP
from rmjax.runtime.sharding import MeshConfig, mesh_shape

REWARD = RewardHead(5)


def test_model_flops_by_hand():
    decoder = tiny_llama(num_hidden_layers=2)
    # A layer: q and o 32 x (4 x 8), k and v 32 x (2 x 8), gate, up and down 32 x 64.
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    pairs = 3 * 4 // 2 + 5 * 6 // 2
    forward = 2 * (2 * (3 + 5) * weights + 2 * 2 * pairs * 4 * 8) + 2 * 2 * 32 * 5
    assert model_flops(decoder, 5, [(0, [3]), (0, [5])], training=False) == forward
    assert model_flops(decoder, 5, [(0, [3]), (0, [5])], training=True) == 3 * forward
    # Both begin with two tokens: two tokens and 2 x 3 / 2 pairs need no second computation.
    spared = 2 * (2 * 2 * weights + 2 * 2 * 3 * 4 * 8)
    assert model_flops(decoder, 5, [(2, [3, 5])], training=False) == forward - spared
    # A head that reads six places and gives 70 numbers at each, as a policy's with 70 words.
    words = forward - 2 * 2 * 32 * 5 + 2 * 6 * 32 * 70
    assert model_flops(decoder, 70, [(0, [3]), (0, [5])], training=False, read=6) == words


def test_model_flops_of_70b_are_six_a_parameter_and_token():
    """The rule of thumb of arXiv 2001.08361, of which attention is a few per cent at 4,096."""
    from helpers.models import LLAMA_70B

    embeddings = 128256 * 8192
    found = model_flops(LLAMA_70B, 5, [(0, [4096])], training=True)
    dense = 6 * (70_553_706_496 - 2 * embeddings) * 4096
    attention = 3 * 4 * (4096 * 4097 / 2) * 80 * 64 * 128
    assert found == pytest.approx(dense + attention, rel=1e-4)
    assert 0.02 < attention / dense < 0.05


@pytest.mark.optimized
@pytest.mark.parametrize("samples", [1, 3])
def test_the_program_computes_the_models_flops_and_attentions_masked_half(samples):
    """Compiled for the CPU: dense products to the FLOP, attention over whole blocks."""
    length = 128
    decoder = tiny_llama(max_position_embeddings=length)
    model = make_model(decoder, sharding=one_device())
    shape = RowShape(samples, length, 1)
    rows = make_rows([[Segment([np.arange(length, dtype=np.int32)])]] * samples, samples, shape)
    params = jax.eval_shape(lambda: random_params(model, 0))
    text = make_score(model).lower(params, rows).compile().as_text()
    counted = sum(item.times * item.flops for item in work_of(text, 1))
    causal = model_flops(decoder, 5, [(0, [length])] * samples, training=False)
    masked = 4 * samples * 3 * 4 * 8 * (length * length - length * (length + 1) // 2)
    assert counted == causal + masked


@pytest.mark.optimized
def test_a_policys_program_computes_its_head_where_tokens_are_predicted():
    """Compiled for the CPU, which computes a chunk of places at a time."""
    length, samples = 128, 20  # 2,560 places, in chunks of a quarter
    decoder = tiny_llama(max_position_embeddings=length)
    model = make_model(decoder, sharding=one_device())
    model = dataclasses.replace(model, head=LanguageModelHead(tied=False))
    shape = RowShape(samples, length, 1)
    rows = make_rows([[Segment([np.arange(length, dtype=np.int32)])]] * samples, samples, shape)
    params = jax.eval_shape(lambda: random_params(model, 0))
    places = np.ones((samples, length), bool)
    text = make_score(model).lower(params, rows, places).compile().as_text()
    counted = sum(item.times * item.flops for item in work_of(text, 1, {CHUNK_LOOP: 4}))
    groups, words = [(0, [length])] * samples, decoder.vocab_size
    causal = model_flops(decoder, words, groups, training=False, read=4 * 640)
    masked = 4 * samples * 3 * 4 * 8 * (length * length - length * (length + 1) // 2)
    assert counted == causal + masked


def test_chunks_of_places_that_predict():
    alone = Workload(8, tokens=100, predicted=60)
    assert alone.read(8) == 480
    # A row of 1,000 holds ten samples, so 600 places. A chunk is a quarter of what is held: 250,
    # 750; of eight rows it would be 2,000, and is 1,024.
    assert [alone.chunks(1000, rows, context=1) for rows in (1, 3, 8)] == [3, 3, -(-4800 // 1024)]
    pairs = Workload(8, tokens=100, prompt=40, responses=2, predicted=59)
    # 40 + 2 x 60 places a pair, eight pairs in a row of 1,280: 944 places, of 1,280.
    assert pairs.chunks(1280, 1, context=1) == 3 and pairs.chunks(1280, 4, context=1) == 4
    # The first half of a row of one sample predicts all 60; chunks are no larger than what is held.
    assert Workload(8, tokens=120, predicted=60).chunks(120, 1, context=2) == 1
    assert Workload(8, tokens=4096, predicted=4095).chunks(4096, 2, context=2) == 4
    assert Workload(8, tokens=100).read(8) is None


# ---- networks ------------------------------------------------------------------------------------


def torus(shape: tuple[int, ...], mesh: MeshConfig, slices: int = 1) -> Any:
    """Devices of a torus in row-major order, as a mesh's `devices` and `shape`."""
    found = [
        SimpleNamespace(coords=coords, slice_index=slice_, process_index=0)
        for slice_ in range(slices)
        for coords in np.ndindex(*shape)
    ]
    sizes = mesh_shape(mesh, len(found))
    devices = np.empty(len(found), object)
    devices[:] = found
    return SimpleNamespace(devices=devices.reshape(tuple(sizes.values())), shape=sizes)


def over(mesh, *axes: str, kind="all-gather") -> Collective:
    """A collective over some mesh axes."""
    ids = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    index = tuple(slice(None) if name in axes else 0 for name in mesh.shape)
    return Collective(kind, 1e9, tuple(ids[index].ravel().tolist()), False)


@pytest.mark.parametrize(
    ("chip", "shape", "mesh", "axes", "name", "links"),
    [
        ("v5p", (4, 4, 4), MeshConfig(), ("fsdp",), "fsdp", 6),
        ("v5p", (4, 4, 4), MeshConfig(fsdp=16, tensor=4), ("fsdp",), "fsdp", 4),
        ("v5p", (4, 4, 4), MeshConfig(fsdp=16, tensor=4), ("tensor",), "tensor", 2),
        ("v5p", (2, 2, 1), MeshConfig(), ("fsdp",), "fsdp", 2),
        ("v5e", (4, 4), MeshConfig(fsdp=4, tensor=4), ("tensor",), "tensor", 1),
        ("v5e", (16, 16), MeshConfig(fsdp=16, tensor=16), ("tensor",), "tensor", 2),
        ("v6e", (16, 16), MeshConfig(), ("fsdp",), "fsdp", 4),
    ],
)
def test_links_of_a_group_on_a_torus(chip, shape, mesh, axes, name, links):
    where = torus(shape, mesh)
    found = network(over(where, *axes), where, CHIPS[chip])
    assert (found.name, found.bandwidth) == (name, links * CHIPS[chip].link)


def test_no_more_links_than_the_compiler_plans_to_use():
    where = torus((4, 4, 4), MeshConfig(fsdp=16, tensor=4))
    for planned, links in ((0, 4), (2, 2), (6, 4)):
        moved = dataclasses.replace(over(where, "fsdp"), links=planned)
        assert network(moved, where, CHIPS["v5p"]).bandwidth == links * CHIPS["v5p"].link


def test_between_slices_the_network_is_slow():
    where = torus((4, 4), MeshConfig(data=2), slices=2)
    found = network(over(where, "data"), where, CHIPS["v5e"])
    assert (found.name, found.bandwidth) == ("data (slow)", CHIPS["v5e"].slow)
    assert network(over(where, "fsdp"), where, CHIPS["v5e"]).name == "fsdp"


def test_gpus_of_a_host_are_behind_a_switch():
    where = torus((16,), MeshConfig(fsdp=2, tensor=8))
    for number, device in enumerate(where.devices.flat):
        device.process_index = number // 8
    assert network(over(where, "tensor"), where, CHIPS["h100"]).bandwidth == CHIPS["h100"].link
    assert network(over(where, "fsdp"), where, CHIPS["h100"]).bandwidth == CHIPS["h100"].slow


# ---- times ---------------------------------------------------------------------------------------


def test_a_prediction_by_hand():
    chip = dataclasses.replace(
        CHIPS["v5p"], flops=100.0, memory_bandwidth=10.0, clock=2.0, link=1.0, torus=4
    )
    where = torus((4,), MeshConfig())

    def moved(size, asynchronous, ends=""):
        return (Collective("all-gather", size, (0, 1, 2, 3), asynchronous, ends=ends),)

    work = [
        StepWork("gather", "loop", 10, 0.0, 0.0, 99, moved(2.0, False)),  # 1 s on two links
        StepWork("begin", "loop", 10, 0.0, 0.0, 0, moved(14.0, True, "end")),  # 7 s
        StepWork("product", "loop", 10, 200.0, 30.0, 8, ()),  # 4 s each, beside it
        StepWork("end", "loop", 10, 0.0, 0.0, 0, ()),
        StepWork("begin", "main", 1, 0.0, 0.0, 0, moved(4.0, True, "end")),  # 2 s, hidden
        StepWork("sum", "main", 1, 0.0, 0.0, 6, ()),  # 3 s
        StepWork("end", "main", 1, 0.0, 0.0, 0, ()),
    ]
    found = predict(work, where, chip)  # type: ignore[arg-type]
    assert found.compute == 10 * 200 / 100
    assert found.memory == 10 * 30 / 10
    assert found.operations == 10 * 4 + 3
    assert found.networks == {"fsdp": 10 * 1 + 10 * 7 + 2}
    assert found.step == 10 * (1 + 7) + 3
    assert found.floor == 82
    assert found.serial == 43 + 82
    (row,) = found.traffic
    assert (row.count, row.bytes) == (21, 20 + 140 + 4)
    assert row.asynchronous == pytest.approx(144 / 164)


def seconds_of(*lines: tuple[Any, ...]) -> float:
    """The step of a schedule: ("op", seconds), ("move", seconds, dimension, ends or None)."""
    chip = dataclasses.replace(CHIPS["v5p"], clock=1.0, link=1.0)
    where = torus((4, 4), MeshConfig(fsdp=4, tensor=4))
    groups = {"fsdp": (0, 4, 8, 12), "tensor": (0, 1, 2, 3)}
    work = []
    for name, kind, seconds, *more in lines:
        if kind == "op":
            work.append(StepWork(name, "main", 1, 0.0, 0.0, seconds, ()))
            continue
        axis, ends = more
        part = Collective("all-gather", 2.0 * seconds, groups[axis], bool(ends), ends=ends)
        work.append(StepWork(name, "main", 1, 0.0, 0.0, 0, (part,)))
    return predict(work, where, chip).step  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "seconds"),
    [
        # Beside what stands between its beginning and its end, and nothing else.
        ([("a", "op", 5), ("s", "move", 4, "fsdp", "d"), ("d", "op", 0), ("b", "op", 5)], 14),
        ([("s", "move", 4, "fsdp", "d"), ("a", "op", 3), ("d", "op", 0), ("b", "op", 5)], 9),
        # The second waits for the links of the first; on another dimension it does not.
        (
            [
                ("s", "move", 4, "fsdp", "d"),
                ("t", "move", 4, "fsdp", "e"),
                ("a", "op", 6),
                ("d", "op", 0),
                ("e", "op", 0),
            ],
            8,
        ),
        (
            [
                ("s", "move", 4, "fsdp", "d"),
                ("t", "move", 4, "tensor", "e"),
                ("a", "op", 1),
                ("d", "op", 0),
                ("e", "op", 0),
            ],
            4,
        ),
        # One that is in the way waits for the links, too.
        ([("s", "move", 4, "fsdp", "d"), ("t", "move", 1, "fsdp", ""), ("d", "op", 0)], 5),
        # What nobody of the body waits for ends with it.
        ([("s", "move", 4, "fsdp", "elsewhere"), ("a", "op", 1)], 4),
    ],
)
def test_a_collective_hides_behind_what_is_scheduled_beside_it(schedule, seconds):
    assert seconds_of(*schedule) == seconds


def test_without_the_compilers_cycles_an_operation_is_a_roofline():
    chip = dataclasses.replace(CHIPS["h100"], flops=100.0, memory_bandwidth=10.0)
    where = torus((1,), MeshConfig())
    work = [
        StepWork("a", "main", 2, 300.0, 20.0, 0, ()),
        StepWork("b", "main", 1, 100.0, 20.0, 0, ()),
    ]
    assert predict(work, where, chip).operations == 2 * 3 + 2  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    context=st.sampled_from([1, 2]),
    remat=st.sampled_from(["full", "attention", "dots"]),
    rows=st.sampled_from([1, 2, 4]),
)
def test_estimates_grow_with_the_work(tensor, context, remat, rows):
    from helpers.models import LLAMA_70B

    mesh = {"data": 1, "fsdp": 64 // tensor // context, "context": context, "tensor": tensor}

    def at(rows, head: Any = REWARD, predicted=0):
        return estimate(
            LLAMA_70B,
            head,
            mesh=mesh,
            chip=CHIPS["v5p"],
            chips_per_host=4,
            rows=rows,
            microbatches=2,
            length=4096,
            group=(0, [4096]),
            remat=remat,
            predicted=predicted,
        )

    one, two = at(rows), at(2 * rows)
    assert two.compute == pytest.approx(2 * one.compute)
    assert one.temporaries < two.temporaries < 2 * one.temporaries
    assert two.networks["fsdp"] == one.networks["fsdp"]
    assert two.networks["tensor"] == pytest.approx(2 * one.networks["tensor"])
    assert one.floor <= one.step
    full = model_flops(LLAMA_70B, 5, [(0, [4096])] * (2 * rows * mesh["fsdp"]), training=True)
    assert one.compute >= full / 64 / CHIPS["v5p"].flops
    policy = at(rows, LanguageModelHead(tied=False), 4096)
    more = 6 * 4096 * 8192 * 128256 * 2 * rows * mesh["fsdp"] / 64 / CHIPS["v5p"].flops
    assert policy.compute >= one.compute + 0.99 * more
    # A chunk of logits, and the matrix in bfloat16 with its gradient in float32.
    assert policy.temporaries > one.temporaries + 4 * 8192 * 128256 / tensor


def test_the_gpu_targets_are_written_for_every_gpu():
    for chip in CHIPS.values():
        if not chip.torus:
            assert f"memory_bandwidth: {chip.memory_bandwidth:.0f}" in gpu_target(chip)
