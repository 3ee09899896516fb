import datetime
import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers import forked
from helpers.damage import BAD_HF, BAD_ORBAX, empty_chunk, garbled_chunk, no_pad, truncated_chunk
from helpers.families import FAMILY_MODELS
from helpers.hf_models import (
    DATED_TEMPLATE,
    NAMES,
    TALK,
    decoder_of,
    edit_json,
    edit_tensors,
    save_hf,
    snapshot,
    tensors_of,
)
from helpers.models import ROPES, make_model, tiny_llama
from helpers.paths import ROOT
from rmjax import convert
from rmjax.checkpoints.conversion.to_huggingface import ToHuggingFace
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.orbax_arrays import read_array
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.conversation import Conversation
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.data.tokenizer import byte_tokenizer, encode
from rmjax.errors import UserError
from rmjax.inference.score_step import make_score
from rmjax.models.heads import RewardHead, model_parameters
from rmjax.runtime.files import read_json
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.experiment import first_params
from rmjax.training.experiment import make_model as make_trained_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def orbax(hf, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("orbax") / "model"
    hf_to_orbax(str(hf), str(target))
    return target


@pytest.fixture
def hf_copy(hf, tmp_path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "copy"))


@pytest.fixture
def orbax_copy(orbax, tmp_path) -> Path:
    return Path(shutil.copytree(orbax, tmp_path / "copy"))


# ---- both ways, bit for bit -------------------------------------------------------------------

ROUND_TRIPS = {
    "float32": ({}, torch.float32, {}),
    "bfloat16": ({}, torch.bfloat16, {}),
    "float16": ({}, torch.float16, {}),
    "float64": ({}, torch.float64, {}),
    "sharded": ({}, torch.bfloat16, {"max_shard_size": 20_000}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, torch.float32, {}),
    "attention_bias": ({"attention_bias": True}, torch.bfloat16, {"max_shard_size": 9_000}),
    "tied": ({"tie_word_embeddings": True}, torch.float16, {}),
    "one_kv_head": ({"num_key_value_heads": 1, "rms_norm_eps": 1e-6}, torch.float32, {}),
    "wide_heads": ({"head_dim": 16, "num_hidden_layers": 1}, torch.float32, {}),
    **{f"rope_{name}": ({"rope": rope}, torch.bfloat16, {}) for name, rope in ROPES.items()},
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip_is_bit_for_bit(case, tmp_path):
    changes, dtype, save = ROUND_TRIPS[case]
    decoder = tiny_llama(**changes)
    source = save_hf(tmp_path / "hf", decoder, dtype=dtype, **save)
    if save:
        assert (source / "model.safetensors.index.json").exists()
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))

    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert (
        decoder_of(tmp_path / "back")
        == decoder_of(tmp_path / "orbax")
        == decoder_of(source)
        == decoder
    )
    config = read_json(tmp_path / "back" / "config.json")
    assert list(config["id2label"].items()) == [(str(i), n) for i, n in enumerate(NAMES)]
    assert config["label2id"] == {name: i for i, name in enumerate(NAMES)}
    assert config["num_labels"] == len(NAMES)
    assert config["problem_type"] == "regression"
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert config["pad_token_id"] not in (None, config["eos_token_id"], config["bos_token_id"])

    model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype="auto"
    )
    assert not any(loading.values()), loading
    assert model.dtype == dtype
    ours, theirs = model.config, transformers.AutoConfig.from_pretrained(source)
    same = (*changes.keys() - {"rope"}, "rope_parameters", "id2label", "num_labels", "head_dim")
    assert {k: getattr(ours, k) for k in same} == {k: getattr(theirs, k) for k in same}

    # And once more from the other end: what was exported converts to the same Orbax model.
    hf_to_orbax(str(tmp_path / "back"), str(tmp_path / "again"))
    for row in model_parameters(decoder, RewardHead(len(NAMES))):
        first, second = (
            read_array(tmp_path / n / "checkpoint" / "params", row.path) for n in ("orbax", "again")
        )
        assert first.dtype == second.dtype
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_goes_both_ways(name, tmp_path):
    """Bit for bit; and transformers finds every tensor of its own class in the export."""
    decoder, causal = FAMILY_MODELS[name], name in ("gemma3_text", "qwen2_windows")
    source = save_hf(tmp_path / "hf", decoder, dtype=torch.bfloat16, causal=causal)
    hf_to_orbax(str(source), str(tmp_path / "orbax"), language_model=causal)
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert decoder_of(tmp_path / "back") == decoder_of(source) == decoder
    theirs, ours = (read_json(tmp_path / x / "config.json") for x in ("hf", "back"))
    assert ours["architectures"] == theirs["architectures"]
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    model, loading = getattr(transformers, auto).from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype="auto"
    )
    assert not any(loading.values()), loading
    expected = transformers.AutoConfig.from_pretrained(source)
    for field in ("rope_parameters", "sliding_window", "layer_types", "query_pre_attn_scalar"):
        assert getattr(model.config, field, None) == getattr(expected, field, None), field


def test_sharded_export_equals_one_file(hf, orbax, tmp_path):
    notes = orbax_to_hf(str(orbax), str(tmp_path / "many"), shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and f"in {len(files)} file(s)" in notes[0]
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    # A file is over the limit only where one tensor is.
    biggest = max(len(data) for _, _, data in tensors_of(hf).values())
    for file in files:
        assert (tmp_path / "many" / file).stat().st_size < max(20_000, biggest) + 4_000
    assert tensors_of(tmp_path / "many") == tensors_of(hf)
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(tensors_of(hf))
    total = sum(len(data) for _, _, data in tensors_of(hf).values())
    assert index["metadata"]["total_size"] == total
    _, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "many", output_loading_info=True
    )
    assert not any(loading.values()), loading


def test_layers_of_unequal_precision_keep_their_values(hf_copy, tmp_path):
    """A stacked array has one dtype; the widest holds every layer's numbers exactly."""
    key = "model.layers.{}.mlp.up_proj.weight"
    tensors = load_file(hf_copy / "model.safetensors")
    changes = {
        key.format(0): tensors[key.format(0)].half(),
        key.format(1): tensors[key.format(1)].bfloat16(),
        key.format(2): tensors[key.format(2)].bfloat16(),
        "model.norm.weight": tensors["model.norm.weight"].bfloat16(),
    }
    edit_tensors(hf_copy, **changes)
    hf_to_orbax(str(hf_copy), str(tmp_path / "orbax"))
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in changes.items():
        assert torch.equal(back[name].double(), tensor.double()), name
    assert back["model.norm.weight"].dtype == torch.bfloat16


def test_export_in_another_dtype_rounds_weights_but_not_the_head(hf, orbax, tmp_path):
    orbax_to_hf(str(orbax), str(tmp_path / "back"), dtype="bfloat16")
    before, after = (load_file(d / "model.safetensors") for d in (hf, tmp_path / "back"))
    assert after.pop("score.weight").equal(before.pop("score.weight"))
    for key, tensor in after.items():
        assert tensor.equal(before[key].bfloat16()), key
    assert read_json(tmp_path / "back" / "config.json")["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="dtype = 'int8'"):
        orbax_to_hf(str(orbax), str(tmp_path / "no"), dtype="int8")


def test_tokenizer_and_template_survive(hf, orbax, tmp_path):
    orbax_to_hf(str(orbax), str(tmp_path / "back"))
    before, ours, after = (
        transformers.AutoTokenizer.from_pretrained(d) for d in (hf, orbax, tmp_path / "back")
    )
    assert before.chat_template == ours.chat_template == after.chat_template
    assert before.get_vocab() == ours.get_vocab() == after.get_vocab()
    for messages in TALK:
        expected = encode(before, Conversation(messages)).tolist()
        assert (
            encode(ours, Conversation(messages)).tolist()
            == encode(after, Conversation(messages)).tolist()
            == expected
        )
    assert before.all_special_tokens == after.all_special_tokens
    # By the names that transformers 5 gives to these, transformers 4 cannot read them.
    fields = read_json(tmp_path / "back" / "tokenizer_config.json")
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert "extra_special_tokens" not in fields


def test_card_survives(hf_copy, tmp_path):
    """What rmjax knows of a model beyond the config goes along in both directions."""
    hf_to_orbax(str(hf_copy), str(tmp_path / "orbax"))
    edit_json(tmp_path / "orbax" / "rmjax.json", scalar={"wit": 2.0}, max_length=48, data="abc")
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    hf_to_orbax(str(tmp_path / "back"), str(tmp_path / "again"))
    for directory in ("back", "again"):
        spec = read_json(tmp_path / directory / "rmjax.json")
        assert spec["attributes"] == list(NAMES)
        assert (spec["scalar"], spec["max_length"], spec["data"]) == ({"wit": 2.0}, 48, "abc")


def test_export_scores_like_the_original(tmp_path):
    """Also in a batch padded by the export's own tokenizer, whose source padded with eos."""
    tokenizer = byte_tokenizer()
    tokenizer.unk_token, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    source = save_hf(tmp_path / "hf", tokenizer=tokenizer)
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))

    opened = open_pretrained(str(tmp_path / "orbax"))
    model = make_model(opened.decoder, len(NAMES))
    params = load_params(opened, model, seed=0, dtype=np.float32)
    tokens = [encode(opened.tokenizer(), Conversation(messages)) for messages in TALK]
    rows = make_rows([[Segment([t])] for t in tokens], len(tokens), RowShape(len(tokens), 128, 1))
    expected = np.asarray(make_score(model)(params, rows))[:, 0]
    assert np.ptp(expected, axis=0).min() > 1e-2  # the conversations can be told apart

    exported = tmp_path / "back"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
    own = transformers.AutoTokenizer.from_pretrained(exported)
    texts = own.apply_chat_template(TALK, tokenize=False)
    with torch.no_grad():
        for text, scores in zip(texts, expected):
            one = own(text, add_special_tokens=False, return_tensors="pt")
            np.testing.assert_allclose(theirs(**one).logits[0].numpy(), scores, atol=1e-4)
        batch = own(
            texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        assert (batch["attention_mask"] == 0).any()
        np.testing.assert_allclose(theirs(**batch).logits.numpy(), expected, atol=1e-4)
    assert own.pad_token_id == theirs.config.pad_token_id != own.eos_token_id


def test_template_of_the_export_has_no_date(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED_TEMPLATE
    source = save_hf(tmp_path / "hf", tokenizer=tokenizer)
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))

    def rendered(directory: Path, day: int) -> str:
        from transformers.utils import chat_template_utils

        class Someday(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 5, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Someday)
        loaded = transformers.AutoTokenizer.from_pretrained(directory)
        return loaded.apply_chat_template(TALK[0], tokenize=False)

    assert "05 May 2031" in rendered(source, 5)  # the patched clock is the one that counts
    for directory in ("orbax", "back"):
        text = rendered(tmp_path / directory, 5)
        assert text == rendered(tmp_path / directory, 6)
        assert "Today Date: 26 Jul 2024" in text
    assert "strftime_now(" not in (tmp_path / "back" / "chat_template.jinja").read_text()


# ---- causal models ----------------------------------------------------------------------------


def head_of(directory: Path) -> np.ndarray:
    return read_array(directory / "checkpoint" / "params", "head")


@pytest.mark.slow
def test_causal_models_get_a_fresh_head_and_say_so(tmp_path):
    untied = save_hf(tmp_path / "untied", causal=True)
    tied = save_hf(tmp_path / "tied", tiny_llama(tie_word_embeddings=True), causal=True)
    old = save_hf(tmp_path / "old", causal=True, dtype=torch.float16)
    key = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    edit_tensors(old, **{key.format(n): torch.ones(4) for n in range(3)})
    assert "lm_head.weight" in tensors_of(untied)
    assert "lm_head.weight" not in tensors_of(tied)

    names = ("good", "bad")
    notes = {
        source.name: hf_to_orbax(
            str(source), str(tmp_path / f"{source.name}_orbax"), attributes=names, seed=7
        )
        for source in (untied, tied, old)
    }
    assert all(n[0] == "fresh head, seed 7: good, bad" for n in notes.values())
    assert notes["untied"][1:-1] == [
        "left out, a reward model has no use for them: lm_head.weight",
    ]
    assert notes["tied"][1:] == ["verified: 30 tensors"]
    assert "lm_head.weight" in notes["old"][1] and "inv_freq" in notes["old"][1]

    first = head_of(tmp_path / "untied_orbax")
    assert first.dtype == np.float32 and first.shape == (32, 2)
    assert first.std() > 0
    for other in ("tied", "old"):
        assert head_of(tmp_path / f"{other}_orbax").tobytes() == first.tobytes()
    hf_to_orbax(str(untied), str(tmp_path / "other"), attributes=names, seed=8)
    assert not np.allclose(head_of(tmp_path / "other"), first)
    spec = read_json(tmp_path / "untied_orbax" / "rmjax.json")
    assert (spec["seed"], spec["attributes"]) == (7, list(names))

    # Training from the same source with the same seed starts from the same head, on any mesh.
    config = Config(
        workdir=str(tmp_path / "run"),
        data=DataConfig(train="generated:8", attributes=names, max_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=8,
        init=str(untied),
        seed=7,
    )
    source = open_pretrained(config.init)
    model = make_trained_model(config, source, Sharding(make_mesh(MeshConfig())))
    params, origin = first_params(config, source, model)
    assert np.asarray(params["head"]).tobytes() == first.tobytes()
    assert "fresh head" in origin

    # The rest is what the source has, and the export has nothing that the source lacks.
    for source in (untied, tied, old):
        back = tmp_path / f"{source.name}_back"
        orbax_to_hf(str(tmp_path / f"{source.name}_orbax"), str(back))
        exported = tensors_of(back)
        del exported["score.weight"]
        assert exported.items() <= tensors_of(source).items()
        assert tensors_of(source).keys() - exported.keys() <= {
            "lm_head.weight",
            *(key.format(n) for n in range(3)),
        }


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", ""), ("a", " b")], ids=str)
def test_outputs_must_have_names_of_their_own(names, hf, tmp_path):
    with pytest.raises(UserError, match="attributes"):
        hf_to_orbax(str(hf), str(tmp_path / "orbax"), attributes=names)


# ---- what is refused, and what it leaves behind -----------------------------------------------


@pytest.mark.parametrize("damage", BAD_HF, ids=lambda f: f.__name__)
def test_bad_huggingface_model_is_one_message(damage, hf_copy, tmp_path):
    damage(hf_copy)
    before = snapshot(hf_copy)
    with pytest.raises(UserError, match=BAD_HF[damage]) as error:
        hf_to_orbax(str(hf_copy), str(tmp_path / "target"))
    assert str(hf_copy) in str(error.value) or damage is no_pad
    assert snapshot(hf_copy) == before
    assert not list(tmp_path.glob("target*"))


@pytest.mark.parametrize("damage", BAD_ORBAX, ids=lambda f: f.__name__)
def test_bad_orbax_model_is_one_message(damage, orbax_copy, tmp_path):
    damage(orbax_copy)
    before = snapshot(orbax_copy)
    with pytest.raises(UserError, match=BAD_ORBAX[damage]) as error:
        orbax_to_hf(str(orbax_copy), str(tmp_path / "target"))
    assert str(orbax_copy) in str(error.value)
    assert snapshot(orbax_copy) == before
    assert not (tmp_path / "target").exists()
    # What is found only when a chunk is read leaves the tensors before it, and says so.
    kept = (tmp_path / "target.partial").exists()
    assert kept == (damage in (truncated_chunk, empty_chunk, garbled_chunk))
    assert kept == ("the same command continues it" in str(error.value))


def test_the_other_way_is_named(hf, orbax, tmp_path):
    with pytest.raises(UserError, match=r"already an Orbax model.*orbax-to-hf"):
        hf_to_orbax(str(orbax), str(tmp_path / "target"))
    with pytest.raises(UserError, match=r"not an Orbax model.*hf-to-orbax"):
        orbax_to_hf(str(hf), str(tmp_path / "target"))
    assert not list(tmp_path.iterdir())


def both_ways(hf: Path, orbax: Path):
    return [(hf_to_orbax, str(hf)), (orbax_to_hf, str(orbax))]


def test_a_target_in_use_is_left_alone(hf, orbax, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.tex").write_text("two years of work")
    file = tmp_path / "file"
    file.write_text("x")
    for convert_it, source in both_ways(hf, orbax):
        for name in (target, file, Path(source)):
            before = snapshot(Path(source))
            with pytest.raises(UserError, match="already exists and is not empty"):
                convert_it(source, str(name))
            assert snapshot(Path(source)) == before
        with pytest.raises(UserError, match="cannot be created"):
            convert_it(source, str(file / "below"))
    assert snapshot(tmp_path) == {"target/thesis.tex": b"two years of work", "file": b"x"}


def test_what_only_looks_unfinished_is_left_alone(hf, tmp_path):
    partial = tmp_path / "target.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"target.partial: in the way"):
        hf_to_orbax(str(hf), str(tmp_path / "target"))
    assert snapshot(tmp_path) == {"target.partial/notes.txt": b"mine"}
    (partial / "notes.txt").unlink()
    hf_to_orbax(str(hf), str(tmp_path / "target"))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_inside_of_the_source_is_refused(hf_copy, orbax_copy_2):
    for convert_it, source in both_ways(hf_copy, orbax_copy_2):
        before = snapshot(Path(source))
        with pytest.raises(UserError, match="inside of the source"):
            convert_it(source, f"{source}/below/it")
        assert snapshot(Path(source)) == before


@pytest.fixture
def orbax_copy_2(orbax, tmp_path) -> Path:
    return Path(shutil.copytree(orbax, tmp_path / "orbax_copy"))


def test_empty_targets_are_filled(hf, orbax, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    orbax_to_hf(str(orbax), str(tmp_path / "empty"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    orbax_to_hf(str(orbax), str(tmp_path / "link"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    orbax_to_hf(str(orbax), ".")
    monkeypatch.chdir(tmp_path)
    orbax_to_hf(str(orbax), "a/b/c")
    for name in ("empty", "real", "link", "here", "a/b/c"):
        assert tensors_of(tmp_path / name) == tensors_of(hf), name


def test_a_full_disk_is_one_message(hf, orbax, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for work in (ToOrbax, ToHuggingFace):
        monkeypatch.setattr(work, "write", full)
    for convert_it, source in both_ways(hf, orbax):
        with pytest.raises(UserError, match=r"the disk is full while writing .*target"):
            convert_it(source, str(tmp_path / "target"))
        assert not list(tmp_path.iterdir())  # nothing had been done


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, where this machine lets us have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system of our own cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_really_is_full_is_continued_when_there_is_room(hf, orbax, small_disk):
    target = small_disk / "target"
    for convert_it, source in both_ways(hf, orbax):
        with pytest.raises(UserError, match="a mount point"):
            convert_it(source, str(small_disk))
        with pytest.raises(UserError, match=r"the disk is full while writing .*target") as error:
            convert_it(source, str(target))
        assert [path.name for path in small_disk.iterdir()] == ["target.partial"]
        assert f"kept in {target}.partial: the same command continues" in str(error.value)

        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        assert any(note.startswith("continued: ") for note in convert_it(source, str(target)))
        assert [path.name for path in small_disk.iterdir()] == ["target"]
        shutil.rmtree(target)
        subprocess.run(["mount", "-o", "remount,size=128k", str(small_disk)], check=True)


# ---- the command line -------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess:
    return forked.run(["-m", "rmjax.convert", *arguments])


@pytest.mark.slow
def test_command_line_says_what_it_did(hf, tmp_path):
    done = run("hf-to-orbax", hf, tmp_path / "orbax")
    assert done.returncode == 0, done.stderr
    assert f"head kept: {', '.join(NAMES)}" in done.stdout
    done = run("orbax-to-hf", "--dtype=bfloat16", tmp_path / "orbax", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert "bfloat16, 30 tensors in 1 file(s); head: zeal, care" in done.stdout
    assert f"written: {tmp_path / 'back'}" in done.stdout
    assert len(tensors_of(tmp_path / "back")) == 30


def test_command_line_says_what_is_wrong_in_one_line(orbax_copy, tmp_path):
    truncated_chunk(orbax_copy)
    failed = run("orbax-to-hf", orbax_copy, tmp_path / "no")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr + failed.stdout
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_command_line_parses_its_options(monkeypatch, capsys):
    asked = {}

    def convert_it(*args, **kwargs):
        asked[args] = kwargs
        return []

    monkeypatch.setattr(convert, "hf_to_orbax", convert_it)
    monkeypatch.setattr(convert, "orbax_to_hf", convert_it)
    for line in (
        "hf-to-orbax a b",
        "hf-to-orbax c d --attributes=x,y --seed=3 --value=goodness --chat-template=rag",
        "hf->orbax i j --language-model",
        'hf-to-orbax k l --head={"reward":{"0":1}}',
        'hf-to-orbax m n --head=value_head --value={"x":2} --suffix-turn=Good?',
        "orbax->hf e f",
        "orbax-to-hf --dtype bfloat16 g h --value=care --push=me/it",
    ):
        monkeypatch.setattr(sys, "argv", ["convert", *line.split()])
        convert._main()
    default = {
        "attributes": None,
        "seed": 0,
        "language_model": False,
        "head": None,
        "suffix_turn": "",
        "value": None,
        "chat_template": "",
    }
    named = {"attributes": ("x", "y"), "seed": 3, "value": "goodness", "chat_template": "rag"}
    assert asked == {
        ("a", "b"): default,
        ("c", "d"): default | named,
        ("i", "j"): default | {"language_model": True},
        ("k", "l"): default | {"head": {"reward": {"0": 1}}},
        ("m", "n"): default | {"head": "value_head", "value": {"x": 2}, "suffix_turn": "Good?"},
        ("e", "f"): {"dtype": None, "value": None, "push": ""},
        ("g", "h"): {"dtype": "bfloat16", "value": "care", "push": "me/it"},
    }
    for line in ("hf-to-orbax a b --head=value_head --language-model", "hf- a b"):
        monkeypatch.setattr(sys, "argv", ["convert", *line.split()])
        with pytest.raises(SystemExit):
            convert._main()
    assert "a shell reads '>' as the name of a file: write 'hf->...'" in capsys.readouterr().err


# ---- memory -----------------------------------------------------------------------------------

# Memory of its own (RssAnon): pages of a mapped file are the kernel's, and come and go.
_PEAK = """
    import sys, threading, time
    from rmjax import convert

    def own():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) >> 10

    def watch():
        global peak
        while True:
            peak = max(peak, own())
            time.sleep(0.002)

    getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[4])  # a small one: imports, pools
    peak = before = own()
    threading.Thread(target=watch, daemon=True).start()
    getattr(convert, sys.argv[1])(sys.argv[3], sys.argv[5])
    print("PEAK", peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_of_a_few_tensors_and_not_of_the_model(hf, orbax, tmp_path):
    decoder = tiny_llama(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    source = save_hf(tmp_path / "hf", decoder, dtype=torch.bfloat16, max_shard_size="50MB")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) >> 20
    assert size > 150

    def peak(direction: str, small: Path, large: Path, target: str) -> int:
        done = subprocess.run(
            [
                *(sys.executable, "-c", textwrap.dedent(_PEAK), direction, small, large),
                *(tmp_path / f"small_{target}", tmp_path / target),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        return int(done.stdout.split("PEAK")[1])

    try:
        # Eight slices of 1.5 MiB at once, each about five times over, and what the allocator of
        # each thread holds back, which on a busy machine was 3 MiB: less than half of the model.
        assert peak("hf_to_orbax", hf, source, "orbax") < size / 2
        assert peak("orbax_to_hf", orbax, tmp_path / "orbax", "back") < size / 2
        assert tensors_of(tmp_path / "back") == tensors_of(source)
    finally:
        for name in ("hf", "orbax", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
