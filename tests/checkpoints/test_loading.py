"""What a process reads of Hugging Face's files: its own devices' blocks, once."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from helpers.gguf_files import write_gguf
from helpers.hf_models import NAMES, same_bits, save_hf
from helpers.models import make_model, tiny_llama
from rmjax.checkpoints import loading, safetensors_file
from rmjax.checkpoints.contiguous import contiguous
from rmjax.checkpoints.gguf import GGUFWeights
from rmjax.checkpoints.hf_mapping import from_hf, hf_keys
from rmjax.checkpoints.hf_weights import SafetensorsWeights
from rmjax.checkpoints.loading import bounds, load_params, read_shards
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.checkpoints.safetensors_file import SafetensorsFile
from rmjax.models.parameters import (
    PARAMETERS,
    flatten,
)
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

# Rows of 16 KiB in float32, so that half of one is two pages.
LLAMA = tiny_llama(
    vocab_size=264,
    hidden_size=4096,
    intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_hidden_layers=2,
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("wide"), LLAMA, dtype=torch.float32)


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """The length of every read from now on."""
    counts: list[int] = []
    preadv = os.preadv

    def counting(file, buffers, offset):
        count = preadv(file, buffers, offset)
        counts.append(count)
        return count

    monkeypatch.setattr(safetensors_file.os, "preadv", counting)
    return counts


def weights_bytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.glob("*.safetensors"))


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}],
    ids=str,
)
def test_each_of_two_processes_reads_its_share(mesh, wide, bytes_read):
    """Devices 0 to 3 are one process's, 4 to 7 the other's."""
    devices = make_mesh(MeshConfig(**mesh))
    weights, sizes = SafetensorsWeights(wide), make_model(LLAMA, len(NAMES)).sizes
    abstract = flatten(make_model(LLAMA, 5, Sharding(devices)).abstract())
    rows = {row.path: row for row in make_model(LLAMA).parameters}
    order = list(devices.devices.flat)
    total = weights_bytes(wide)
    for own in (order[:4], order[4:]):
        bytes_read.clear()
        needed = 0
        for path, wanted in abstract.items():
            places = wanted.sharding.devices_indices_map(wanted.shape)
            indices = [places[device] for device in own]
            keys = hf_keys(rows[path], LLAMA)
            shards = read_shards(weights, rows[path], keys, wanted, sizes, indices)
            for place in {bounds(index, wanted.shape) for index in indices}:
                expected = np.stack([from_hf(rows[path], weights_of(wide)[k], sizes) for k in keys])
                expected = expected if rows[path].stacked else expected[0]
                assert same_bits(shards[place], expected[tuple(slice(*b) for b in place)]), path
                needed += shards[place].nbytes
        # Each byte that its devices hold, and nothing twice.
        assert needed <= sum(bytes_read) <= needed + total // 100
    # The processes hold halves or, where the mesh replicates, copies.
    share = needed / total
    assert 0.97 < share <= 1.0 if "data" in mesh else 0.49 < share < 0.52


_CACHE: dict[Path, dict[str, np.ndarray]] = {}


def weights_of(source: Path) -> dict[str, np.ndarray]:
    """All tensors, by safetensors' own reader."""
    if source not in _CACHE:
        from safetensors.numpy import load_file

        _CACHE[source] = load_file(source / "model.safetensors")
    return _CACHE[source]


@pytest.mark.parametrize("mesh", [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"tensor": 8, "fsdp": 1}])
def test_what_local_devices_share_is_read_once(mesh, wide, bytes_read):
    source = open_pretrained(str(wide))
    sharding = Sharding(make_mesh(MeshConfig(**mesh)))
    bytes_read.clear()
    load_params(source, make_model(LLAMA, len(NAMES), sharding), seed=0, dtype=jnp.float32)
    assert sum(bytes_read) <= weights_bytes(wide)


def test_a_gguf_tensor_is_dequantised_once(causal_state, tmp_path, monkeypatch):
    decoder, state = causal_state
    file = write_gguf(tmp_path / "m.gguf", decoder, state)
    import gguf

    rows_read = []
    dequantize = gguf.quants.dequantize

    def counting(data, kind):
        rows_read.append(len(data))
        return dequantize(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", counting)
    weights, sizes = GGUFWeights(file), make_model(decoder).sizes
    mesh = Sharding(make_mesh(MeshConfig(fsdp=2, data=2, tensor=2)))
    for path, wanted in flatten(make_model(decoder, 5, mesh).abstract()).items():
        row = next(row for row in PARAMETERS if row.path == path)
        if path != "head":
            keys = hf_keys(row, decoder)
            rows_read.clear()
            array = loading.load_parameter(weights, row, keys, wanted, sizes)
            assert sum(rows_read) == sum(len(state[key]) for key in keys)
            expected = np.stack([from_hf(row, state[key], sizes) for key in keys])
            assert same_bits(array, expected if row.stacked else expected[0]), path


def test_large_tensors_are_loaded_in_bands(wide, monkeypatch):
    monkeypatch.setattr(loading, "SLICE_BYTES", 100_000)
    sharding = Sharding(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    model = make_model(LLAMA, len(NAMES), sharding)
    params = flatten(load_params(open_pretrained(str(wide)), model, seed=0, dtype=jnp.float32))
    sizes = make_model(LLAMA, len(NAMES)).sizes
    for row in make_model(LLAMA).parameters:
        expected = [from_hf(row, weights_of(wide)[key], sizes) for key in hf_keys(row, LLAMA)]
        assert same_bits(params[row.path], np.stack(expected) if row.stacked else expected[0])


def test_bounds_of_an_index():
    assert bounds((slice(None), slice(2, 4)), (3, 8)) == ((0, 3), (2, 4))
    assert bounds(np.s_[1:, :], (3, 8)) == ((1, 3), (0, 8))
    assert jax.device_count() == 8


# ---- blocks of a file ---------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data(), width=st.sampled_from([3, 40, 5000]))
def test_any_block_of_a_tensor_is_what_numpy_cuts(data, width, tmp_path_factory):
    array = np.arange(7 * width, dtype=np.float32).reshape(7, width)
    file = tmp_path_factory.mktemp("blocks") / "x.safetensors"
    save_file({"before": np.ones(3, np.float32), "x": array, "after": np.ones(3)}, file)
    rows = slice(*sorted(data.draw(st.tuples(*[st.integers(0, 7)] * 2))))
    columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2))))
    opened = SafetensorsFile(file)
    for index in ((), (rows,), (rows, columns), (slice(None), columns)):
        assert same_bits(opened.read("x", index), np.ascontiguousarray(array[index])), index
    assert opened.read("after").dtype == np.float64


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=2),
    heads=st.integers(1, 3),
    order=st.permutations(range(3)),
    kind=st.sampled_from(["bfloat16", "float32", "float64"]),
)
def test_contiguous_is_numpys(shape, heads, order, kind):
    dtype = np.dtype(kind)
    shape = (*shape, heads, 2)[:3]
    bits = np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    array = bits.view(dtype)[..., 0].transpose(order)
    found = contiguous(array)
    assert found.flags.c_contiguous and found.dtype == dtype
    assert found.tobytes() == array.tobytes()
