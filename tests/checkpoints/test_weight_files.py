"""Directories in which a model was saved over another, as transformers and hands leave them."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.damage import Bomb
from helpers.hf_models import save_hf, tensors_of
from rmjax.checkpoints.hf_weights import SafetensorsWeights
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.checkpoints.weight_files import INDEX, WHOLE, weight_files
from rmjax.errors import UserError

BOTH = r"two sets of weights, model\.safetensors, and model\.safetensors\.index\.json with model-"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An old model in shards, and another one in one file."""
    base = tmp_path_factory.mktemp("models")
    old = save_hf(base / "old", seed=1, max_shard_size=30_000)
    return {"old": old, "new": save_hf(base / "new", seed=2)}


@pytest.fixture
def mixed(models, tmp_path) -> Path:
    """Both in one directory."""
    copy = Path(shutil.copytree(models["old"], tmp_path / "mixed"))
    shutil.copy(models["new"] / WHOLE, copy)
    return copy


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def test_old_shards_beside_a_new_file_are_an_error(mixed):
    for _ in shards_of(mixed):
        with pytest.raises(UserError, match=BOTH) as error:
            open_pretrained(str(mixed))
        assert str(mixed) in str(error.value) and "delete the files" in str(error.value)
        shards_of(mixed)[0].unlink()  # some of them gone is no better, until all are


def test_how_many_are_gone_is_said(mixed):
    count = len(shards_of(mixed))
    shards_of(mixed)[1].unlink()
    with pytest.raises(UserError, match=rf"\(1 of the {count} that it names are gone\)"):
        weight_files(mixed)


def test_an_index_without_its_shards_is_not_used_and_that_is_said(mixed, models, caplog):
    for shard in shards_of(mixed):
        shard.unlink()
    with caplog.at_level(logging.WARNING):
        opened = open_pretrained(str(mixed))
    assert isinstance(opened.weights, SafetensorsWeights)
    expected = load_file(models["new"] / WHOLE)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(mixed).state_dict()
    for key, tensor in expected.items():
        assert opened.weights.read(key).tobytes() == tensor.numpy().tobytes(), key
        assert torch.equal(theirs[key], tensor)
    (line,) = caplog.messages
    assert f"{WHOLE} is read; {INDEX} names model-00001-of-" in line and "is not used" in line


def test_what_transformers_leaves_behind_is_read(tmp_path, models):
    """Saved in shards, and then again, in one file, by transformers itself."""
    source = save_hf(tmp_path / "hf", max_shard_size=30_000)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models["new"])
    model.save_pretrained(source)
    assert (source / INDEX).exists() and not shards_of(source)
    assert weight_files(source) == [WHOLE]


def test_a_model_saved_again_in_other_shards_is_read_by_its_index(models, tmp_path):
    source = Path(shutil.copytree(models["old"], tmp_path / "hf"))
    left = shards_of(source)[0]
    shutil.copy(left, source / "model-00001-of-00002.safetensors")
    assert weight_files(source) == [path.name for path in shards_of(models["old"])]
    assert tensors_of(models["old"]).keys() == SafetensorsWeights(source).keys()


def test_an_index_that_names_the_whole_file_is_used(models, tmp_path):
    source = Path(shutil.copytree(models["new"], tmp_path / "hf"))
    files = dict.fromkeys(load_file(source / WHOLE), WHOLE)
    (source / INDEX).write_text(json.dumps({"weight_map": files}))
    assert weight_files(source) == [WHOLE]


@pytest.mark.parametrize("left", [0, 1])
def test_an_index_without_all_its_files_is_an_error(left, models, tmp_path):
    source = Path(shutil.copytree(models["old"], tmp_path / "hf"))
    for shard in shards_of(source)[left:]:
        shard.unlink()
    name = shards_of(models["old"])[left].name
    with pytest.raises(UserError, match=f"{INDEX}: {name} is named there but is not in the dir"):
        weight_files(source)
    (source / INDEX).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match=f"{INDEX}: the files it should name are not in the dir"):
        weight_files(source)


def test_two_sets_without_an_index_are_an_error(mixed):
    (mixed / INDEX).unlink()
    with pytest.raises(UserError, match=r"two sets of weights, model\.safetensors, and model-0000"):
        weight_files(mixed)
    (mixed / WHOLE).unlink()
    assert weight_files(mixed) == [path.name for path in shards_of(mixed)]
    save_file({"score.weight": torch.ones(5, 32)}, mixed / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"two sets of weights, model-.*, and model-"):
        weight_files(mixed)


def test_pickles_beside_weights_do_not_matter(models, tmp_path):
    source = Path(shutil.copytree(models["new"], tmp_path / "hf"))
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (source / name).write_bytes(pickle.dumps(Bomb()))
    assert weight_files(source) == [WHOLE]


def test_the_way_out_of_a_pickle_works(models, tmp_path):
    """The command of the message, by which whoever trusts a file makes one that is read."""
    source = Path(shutil.copytree(models["new"], tmp_path / "hf"))
    tensors = load_file(source / WHOLE)
    torch.save(tensors, source / "pytorch_model.bin")
    (source / WHOLE).unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle") as error:
        weight_files(source)
    code = str(error.value).split('python -c "')[1].removesuffix('"`')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        exec(code, {})
    assert weight_files(source) == [WHOLE]
    assert load_file(source / WHOLE).keys() == tensors.keys()
