import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from orbax.checkpoint import v1 as ocp

from helpers.hf_models import hf_arrays, same_bits, save_hf
from helpers.models import make_model, tiny_llama
from rmjax.checkpoints import orbax_arrays
from rmjax.checkpoints.orbax_arrays import (
    array_cuts,
    array_paths,
    create_array,
    open_array,
    read_array,
    write_metadata,
)
from rmjax.convert import hf_to_orbax
from rmjax.errors import UserError
from rmjax.models.parameters import (
    PARAMETERS,
    flatten,
)
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LLAMA = tiny_llama(attention_bias=True, mlp_bias=True)


def eight_devices(**mesh: int) -> Sharding:
    return Sharding(make_mesh(MeshConfig(**mesh)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_plain_orbax_restores_what_convert_wrote(dtype, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_arrays, "FILE_BYTES", 4000)  # several files a layer, some uneven
    monkeypatch.setattr(orbax_arrays, "CHUNK_BYTES", 500)
    source = save_hf(tmp_path / "hf", LLAMA, dtype=dtype)
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    expected = hf_arrays(source, LLAMA)

    kind = str(dtype).removeprefix("torch.")
    abstract = make_model(LLAMA, 5, eight_devices(**mesh)).abstract()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(kind), sharding=leaf.sharding),
        abstract,
    )
    restored = ocp.load_checkpointables(tmp_path / "orbax" / "checkpoint", {"params": abstract})
    restored, wanted = flatten(restored["params"]), flatten(abstract)
    assert restored.keys() == expected.keys()
    for path, array in restored.items():
        assert array.sharding == wanted[path].sharding
        assert len(array.sharding.device_set) == 8
        assert same_bits(array, expected[path]), path

    # Without being told anything: shapes, dtypes and tree are in the checkpoint itself.
    metadata = ocp.checkpointables_metadata(tmp_path / "orbax" / "checkpoint").metadata
    found = flatten(metadata["params"])
    assert {k: (tuple(v.shape), np.dtype(v.dtype)) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Arrays of all our dtypes, sharded over eight devices, as Orbax itself saves them."""
    rng, sharding = np.random.default_rng(0), eight_devices(fsdp=4, tensor=2)
    kinds = ["float32", "bfloat16", "float16"]
    arrays = {
        row.path: rng.standard_normal([make_model(LLAMA).sizes[a] for a in row.all_axes]).astype(
            kinds[number % 3]
        )
        for number, row in enumerate(make_model(LLAMA).parameters)
    }
    tree: dict = {}
    for row in make_model(LLAMA).parameters:
        array = jax.device_put(arrays[row.path], sharding.parameter(row.all_axes))
        *parents, name = row.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    ocp.save_checkpointables(directory, {"params": tree})
    return directory / "params", arrays


def test_what_orbax_saved_is_read_slice_by_slice(saved):
    params, arrays = saved
    assert (params / "manifest.ocdbt").exists()
    assert array_paths(params) == set(arrays)
    for path, expected in arrays.items():
        opened = open_array(params, path)
        assert tuple(opened.shape) == expected.shape
        assert opened.dtype.numpy_dtype == expected.dtype
        assert same_bits(read_array(params, path), expected), path
        for layer in range(3 if path.startswith("layers/") else 0):
            assert same_bits(read_array(params, path, layer), expected[layer]), path


@pytest.mark.parametrize("name", ["a b", "50%", "a%20b", "q?x#y", "ünï", "[x]"])
def test_any_path_will_do_relative_or_not(name, saved, tmp_path, monkeypatch):
    params, arrays = saved
    copy = Path(shutil.copytree(params, tmp_path / name / "params"))
    monkeypatch.chdir(tmp_path)
    for place in (copy, Path(name) / "params"):
        assert same_bits(read_array(place, "layers/q"), arrays["layers/q"])
    for place in (tmp_path / name / "absolute", Path(name) / "relative"):
        create_array(place, "x", [2, 3], np.dtype("int32"), [1, 3], [1, 1]).write(7).result()
        assert (place / "x" / "zarr.json").exists()
        assert (read_array(place, "x") == 7).all()


def test_orbax_files_that_are_gone_are_noticed(saved, tmp_path):
    params, arrays = saved
    with pytest.raises(UserError, match="'layers/nonsense' is missing or damaged"):
        open_array(params, "layers/nonsense")
    noticed = 0
    for number, lost in enumerate(sorted(params.rglob("d/*"))):
        for kept in (None, 0, -10):  # no file at all, an empty one, one without its end
            copy = Path(shutil.copytree(params, tmp_path / f"{number}_{kept}"))
            file = copy / lost.relative_to(params)
            whole = file.read_bytes()
            file.unlink()
            if kept is not None:
                file.write_bytes(whole[:kept])
            for path, expected in arrays.items():
                try:
                    assert same_bits(read_array(copy, path), expected), (file, kept, path)
                except UserError as error:
                    noticed += 1
                    assert path in str(error)
    assert noticed > len(arrays)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16", "float64"]))
def test_arrays_are_read_as_they_were_written(data, dtype, tmp_path_factory):
    """Any shape, any chunks, written layer by layer: the same bits, NaNs and -0.0 included."""
    dtype = np.dtype(dtype)
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=5))
    bits = data.draw(hnp.arrays(f"u{dtype.itemsize}", shape))
    chunk = [1] + [data.draw(st.integers(1, size)) for size in shape[1:]]
    file = [1] + [size * data.draw(st.integers(1, 3)) for size in chunk[1:]]
    params = tmp_path_factory.mktemp("arrays")
    array = bits.view(dtype)
    target = create_array(params, "layers/x", shape, dtype, file, chunk)
    for layer in range(shape[0]):
        target[layer].write(array[layer]).result()
    assert same_bits(read_array(params, "layers/x"), array)
    assert same_bits(read_array(params, "layers/x", shape[0] - 1), array[-1])


def test_chunks_of_zeros_are_stored_and_their_loss_is_noticed(tmp_path):
    zeros = np.zeros((4, 6), np.float32)
    array = create_array(tmp_path, "zeros", zeros.shape, zeros.dtype, [1, 3], [1, 1])
    array.write(zeros).result()
    assert same_bits(read_array(tmp_path, "zeros"), zeros)
    chunks = sorted(file for file in (tmp_path / "zeros" / "c").rglob("*") if file.is_file())
    assert len(chunks) == 8
    chunks[0].unlink()
    with pytest.raises(UserError, match="has 7 of its 8 files"):
        open_array(tmp_path, "zeros")


def test_metadata_name_the_parameters(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(UserError, match="not a complete Orbax checkpoint"):
        array_paths(tmp_path / "params")
    write_metadata(tmp_path, {"embed": [3, 2], "layers/q": [1, 2, 3]})
    assert array_paths(tmp_path / "params") == {"embed", "layers/q"}


# ---- how arrays are cut -------------------------------------------------------------------------


@settings(deadline=None)
@given(
    row=st.sampled_from(PARAMETERS),
    lengths=st.lists(st.integers(1, 1 << 18), min_size=9, max_size=9),
    head_dim=st.integers(1, 256),
    itemsize=st.sampled_from([2, 4]),
)
def test_files_and_chunks_are_small_and_of_one_layer(row, lengths, head_dim, itemsize):
    sizes = dict(zip(make_model(LLAMA).sizes, lengths)) | {"head_dim": head_dim, "heads": 64}
    sizes["kv_heads"] = 8
    file, chunk = array_cuts(row, sizes, itemsize)
    assert all(a % b == 0 for a, b in zip(file, chunk))  # as zarr's sharding codec demands
    assert np.prod(chunk, dtype=float) * itemsize <= 1 << 20
    if row.stacked:
        assert file[0] == 1
    cut = [axis for axis, size in zip(row.all_axes, file) if size < sizes[axis]]
    assert [axis for axis in cut if axis != "layers"] in (
        [],
        [row.hf_axes.replace("(", "").split()[0]],
    )
    for axis, size in zip(row.all_axes, chunk):
        assert axis != "head_dim" or size == head_dim


# Llama 3.1's; the counts are arithmetic by hand: bytes of a layer's tensor over 64 MiB, rounded up
# to a power of two, times the layers.
@pytest.mark.parametrize(
    ("hidden", "mlp", "layers", "heads", "files"),
    [
        (8192, 28672, 80, 64, 80 * (3 * 8 + 2 * 2 + 2 + 2) + 32 + 2),
        (16384, 53248, 126, 128, 126 * (3 * 32 + 2 * 8 + 2 + 2) + 64 + 2),
    ],
    ids=["70b", "405b"],
)
def test_a_large_model_is_thousands_of_files_not_more(hidden, mlp, layers, heads, files):
    decoder = tiny_llama(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
    )
    sizes, found = make_model(decoder).sizes, 0
    for row in make_model(decoder).parameters:
        file, chunk = array_cuts(row, sizes, 2)
        assert np.prod(file) * 2 <= 1.01 * (64 << 20)
        found += int(np.prod([-(-sizes[axis] // size) for axis, size in zip(row.all_axes, file)]))
        # Shards of up to 8 devices along an axis begin where chunks do.
        for axis, size in zip(row.all_axes, chunk):
            if axis in ("embed", "mlp", "heads") and row.path != "head":
                assert sizes[axis] // 8 % size == 0, (row.path, axis)
    assert found == files


def test_half_of_the_mesh_reads_half_of_the_bytes(tmp_path):
    """Whichever axis the other half is along: counted by TensorStore, of one array's one file."""
    array = np.random.default_rng(0).standard_normal((1, 1024, 2048)).astype(np.float32)
    rows = {row.path: row for row in PARAMETERS}
    sizes = make_model(tiny_llama(hidden_size=1024, intermediate_size=2048)).sizes | {"layers": 1}
    cuts = array_cuts(rows["layers/gate"], sizes, 4)
    create_array(tmp_path, "gate", array.shape, array.dtype, *cuts).write(array).result()
    halves = [np.s_[:, :512], np.s_[:, 512:], np.s_[:, :, :1024], np.s_[:, :, 1024:]]
    for half in halves:
        before = stored_bytes_read()
        assert same_bits(read_array(tmp_path, "gate", half), array[half])
        assert 0.5 <= (stored_bytes_read() - before) / array.nbytes < 0.55


def stored_bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_a_flipped_bit_is_noticed(tmp_path):
    array = np.arange(4096, dtype=np.float32).reshape(1, 64, 64)
    create_array(tmp_path, "x", array.shape, array.dtype, [1, 64, 64], [1, 16, 16]).write(
        array
    ).result()
    (file,) = (file for file in (tmp_path / "x" / "c").rglob("*") if file.is_file())
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="'x' is damaged"):
        read_array(tmp_path, "x")
