import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from orbax.checkpoint import v1 as ocp
from test_convert import NAMES, save_hf

from rmjax import convert
from rmjax.convert import hf_to_orbax
from rmjax.errors import UserError
from rmjax.parameters import abstract_params, axis_sizes, flatten, model_parameters
from rmjax.sharding import MeshConfig, Sharding, make_mesh
from rmjax.store import array_paths, create_array, open_array, read_array, write_metadata
from rmjax.weights import SafetensorsWeights, from_hf, hf_keys

LLAMA = tiny_llama(attention_bias=True, mlp_bias=True)


def eight_devices(**mesh: int) -> Sharding:
    return Sharding(make_mesh(MeshConfig(**mesh)))


def hf_arrays(source: Path) -> dict[str, np.ndarray]:
    """What the Orbax model must hold, put together without `store`."""
    weights, sizes = SafetensorsWeights(source), axis_sizes(LLAMA, len(NAMES))
    arrays = {}
    for row in model_parameters(LLAMA):
        layers = [from_hf(row, weights.read(key), sizes) for key in hf_keys(row, LLAMA)]
        arrays[row.path] = np.stack(layers) if row.stacked else layers[0]
    return arrays


def same_bits(found, expected: np.ndarray) -> bool:
    found = np.asarray(found)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_plain_orbax_restores_what_convert_wrote(dtype, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_CHUNK_BYTES", 1000)  # several chunks a layer, some uneven
    source = save_hf(tmp_path / "hf", LLAMA, dtype=dtype)
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    expected = hf_arrays(source)

    kind = str(dtype).removeprefix("torch.")
    abstract = abstract_params(LLAMA, len(NAMES), eight_devices(**mesh), jnp.dtype(kind))
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
        row.path: rng.standard_normal([axis_sizes(LLAMA, 5)[a] for a in row.all_axes]).astype(
            kinds[number % 3]
        )
        for number, row in enumerate(model_parameters(LLAMA))
    }
    tree: dict = {}
    for row in model_parameters(LLAMA):
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
        create_array(place, "x", [2, 3], np.dtype("int32"), [1, 3]).write(7).result()
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
    params = tmp_path_factory.mktemp("arrays")
    array = bits.view(dtype)
    target = create_array(params, "layers/x", shape, dtype, chunk)
    for layer in range(shape[0]):
        target[layer].write(array[layer]).result()
    assert same_bits(read_array(params, "layers/x"), array)
    assert same_bits(read_array(params, "layers/x", shape[0] - 1), array[-1])


def test_chunks_of_zeros_are_stored_and_their_loss_is_noticed(tmp_path):
    zeros = np.zeros((4, 6), np.float32)
    create_array(tmp_path, "zeros", zeros.shape, zeros.dtype, [1, 3]).write(zeros).result()
    assert same_bits(read_array(tmp_path, "zeros"), zeros)
    chunks = sorted(file for file in (tmp_path / "zeros" / "c").rglob("*") if file.is_file())
    assert len(chunks) == 8
    chunks[0].unlink()
    with pytest.raises(UserError, match="has 7 of its 8 chunks"):
        open_array(tmp_path, "zeros")


def test_metadata_name_the_parameters(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(UserError, match="not a complete Orbax checkpoint"):
        array_paths(tmp_path / "params")
    write_metadata(tmp_path, {"embed": [3, 2], "layers/q": [1, 2, 3]})
    assert array_paths(tmp_path / "params") == {"embed", "layers/q"}
