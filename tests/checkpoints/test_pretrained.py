import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.checks import known
from helpers.damage import BAD_ORBAX, empty_chunk, garbled_chunk, truncated_chunk
from helpers.hf_models import NAMES, edit_json, edit_tensors, hf_arrays, same_bits, save_hf
from helpers.models import make_model, one_device, tiny_llama
from rmjax.checkpoints import hub, loading
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.convert import hf_to_orbax
from rmjax.errors import UserError
from rmjax.models.init import random_head, random_params
from rmjax.models.parameters import flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LLAMA = tiny_llama(attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def models(request, tmp_path_factory) -> dict[str, Path]:
    """One model as Hugging Face and as Orbax."""
    base = tmp_path_factory.mktemp(request.param)
    hf = save_hf(base / "hf", LLAMA, dtype=getattr(torch, request.param), max_shard_size=20_000)
    hf_to_orbax(str(hf), str(base / "orbax"))
    return {"hf": hf, "orbax": base / "orbax"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mesh_and_form_gives_the_same_numbers(form, mesh, dtype, models):
    expected = hf_arrays(models["hf"], LLAMA)
    source = open_pretrained(str(models[form]))
    assert known(source.spec).attributes == NAMES
    model = make_model(source.llama, len(NAMES), Sharding(make_mesh(MeshConfig(**mesh))))
    params = flatten(load_params(source, model, seed=0, dtype=jnp.dtype(dtype)))
    for path, array in params.items():
        kind = "float32" if path == "head" or "norm" in path else dtype
        assert len(array.sharding.device_set) == 8
        assert same_bits(array, expected[path].astype(kind)), path


def test_a_head_that_is_not_wanted_is_made_anew(models, monkeypatch):
    model = make_model(LLAMA, 2)
    fresh = np.ones((32, 2), np.float32)
    monkeypatch.setattr(loading, "random_head", lambda model, seed: seed * fresh)
    for form in models.values():
        source = open_pretrained(str(form)).without_head()
        params = load_params(source, model, seed=3, dtype=jnp.float32)
        assert same_bits(params["head"], 3 * fresh)
        expected = hf_arrays(models["hf"], LLAMA)["embed"].astype(np.float32)
        assert same_bits(params["embed"], expected)


def test_a_fresh_head_is_that_of_a_fresh_model():
    model = make_model(LLAMA, 2)
    assert same_bits(random_head(model, 3), np.asarray(random_params(model, 3)["head"]))


@pytest.fixture
def orbax_copy(tmp_path_factory, tmp_path) -> Path:
    source = save_hf(tmp_path / "hf")
    hf_to_orbax(str(source), str(tmp_path / "copy"))
    return tmp_path / "copy"


# A tokenizer that is wrong is found by `tokenizer()`; the rest by opening or by loading.
@pytest.mark.parametrize(
    "damage",
    [f for f in BAD_ORBAX if "tokenizer" not in f.__name__ and "template" not in f.__name__],
    ids=lambda f: f.__name__,
)
def test_a_damaged_orbax_model_is_one_message(damage, orbax_copy):
    damage(orbax_copy)
    with pytest.raises(UserError) as error:
        source = open_pretrained(str(orbax_copy))
        load_params(source, make_model(source.llama, len(NAMES)), seed=0, dtype=jnp.float32)
    assert str(orbax_copy) in str(error.value)
    if damage in (truncated_chunk, empty_chunk, garbled_chunk):
        assert "incomplete or damaged" in str(error.value)
        assert "layers.up" in str(error.value)


def test_a_file_must_be_a_gguf_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"a file, but not a \.gguf one; name the model's direc"):
        open_pretrained(str(tmp_path / "model.safetensors"))


def test_labels_without_names_are_numbered(tmp_path):
    """transformers writes no id2label where there are two labels without names."""
    source = save_hf(tmp_path / "hf", names=("LABEL_0", "LABEL_1"))
    edit_json(source / "config.json", id2label=None)
    assert known(open_pretrained(str(source)).spec).attributes == ("LABEL_0", "LABEL_1")
    edit_json(source / "config.json", num_labels="two")
    with pytest.raises(UserError, match="'num_labels'"):
        open_pretrained(str(source))


def test_more_than_ten_labels_keep_their_order(tmp_path):
    names = tuple(f"a{i}" for i in range(12))
    assert known(open_pretrained(str(save_hf(tmp_path, names=names))).spec).attributes == names


def test_a_model_without_architectures_is_causal(tmp_path):
    source = save_hf(tmp_path / "hf", causal=True)
    edit_json(source / "config.json", architectures=None)
    opened = open_pretrained(str(source))
    assert opened.spec is None


def test_a_lost_lm_head_is_no_loss(tmp_path):
    source = save_hf(tmp_path / "hf", causal=True)
    edit_tensors(source, **{"lm_head.weight": None})
    assert open_pretrained(str(source)).unused == ()


# ---- the hub ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nobody/there", "runs/quickstart", "there", "./nobody/there", "a/b.gguf", "a/b/c", ""]
)
def test_what_is_nowhere_is_one_message_and_fast(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        open_pretrained(name)
    assert time.monotonic() - started < 5
    assert len(str(error.value)) < 1000


def test_a_hub_id_is_its_snapshot(tmp_path, monkeypatch):
    """The hub's cache is links from snapshots/<commit>/ to blobs/."""
    plain, cache = save_hf(tmp_path / "plain"), tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(plain.iterdir()):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    asked = {}

    def snapshot_download(name, **options):
        asked[name] = options
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    source = open_pretrained("org/name")
    assert known(source.spec).attributes == NAMES
    assert source.tokenizer().get_vocab()
    hf_to_orbax("org/name", str(tmp_path / "orbax"))
    assert known(open_pretrained(str(tmp_path / "orbax")).spec).source == "org/name"

    (patterns,) = {tuple(options["allow_patterns"]) for options in asked.values()}
    import fnmatch

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    for file in plain.iterdir():
        assert wanted(file.name), file.name
    for name in ("model-00001-of-00030.safetensors", "model.safetensors.index.json"):
        assert wanted(name)
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "training_args.bin", "x.py"):
        assert not wanted(name)


@pytest.mark.parametrize("name", ["a b", "50%", "a%20b", "q?x#y", "[x]"])
def test_any_path_will_do_relative_or_not(name, models, tmp_path, monkeypatch):
    shutil.copytree(models["orbax"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / name, name, f"./{name}/"):
        source = open_pretrained(str(place))
        params = load_params(source, make_model(LLAMA, len(NAMES)), seed=0, dtype=jnp.float32)
        assert same_bits(
            params["final_norm"], hf_arrays(models["hf"], LLAMA)["final_norm"].astype("f4")
        )


def test_one_device_reads_what_eight_do(models):
    source = open_pretrained(str(models["orbax"]))
    eight = make_model(source.llama, len(NAMES), Sharding(make_mesh(MeshConfig())))
    one = make_model(source.llama, len(NAMES), one_device())
    first, second = (load_params(source, m, seed=0, dtype=jnp.float32) for m in (eight, one))
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: same_bits(a, np.asarray(b)), first, second))
    )
