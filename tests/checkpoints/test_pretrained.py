import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.checks import known
from helpers.damage import BAD_ORBAX, empty_chunk, garbled_chunk, truncated_chunk
from helpers.hf_models import NAMES, edit_json, edit_tensors, hf_arrays, same_bits, save_hf
from helpers.models import make_model, one_device, tiny_llama
from rmjax.checkpoints import loading
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.errors import UserError
from rmjax.models.init import random_head, random_params
from rmjax.models.parameters import flatten
from rmjax.models.rewards.aggregation import model_rule
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
    model = make_model(source.decoder, len(NAMES), Sharding(make_mesh(MeshConfig(**mesh))))
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
        load_params(source, make_model(source.decoder, len(NAMES)), seed=0, dtype=jnp.float32)
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


# ---- which label is the reward ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "problem_type", "scalar"),
    [
        (("reward",), None, {"reward": 1.0}),
        (("reward",), "single_label_classification", {"reward": 1.0}),
        (("help", "length"), "regression", {"help": 1.0}),
        (NAMES, "regression", {NAMES[0]: 1.0}),
        (("bad", "good"), None, {}),
        (("bad", "good"), "single_label_classification", {}),
        (("insult", "threat"), "multi_label_classification", {}),
        (("negative", "neutral", "positive"), None, {}),
    ],
    ids=str,
)
def test_only_attributes_have_a_first_that_is_the_value(names, problem_type, scalar, tmp_path):
    source = save_hf(tmp_path / "hf", names=names)
    edit_json(source / "config.json", problem_type=problem_type)
    spec = known(open_pretrained(str(source)).spec)
    assert (spec.attributes, spec.scalar) == (names, scalar)


def test_a_classifiers_value_is_asked_for(tmp_path):
    source = save_hf(tmp_path / "hf", names=("bad", "good"))
    edit_json(source / "config.json", problem_type=None)
    example = r'give value, .* {"bad": -1, "good": 1} is the difference of two logits, .*--value'
    with pytest.raises(UserError, match=rf"a classifier \(bad, good\) and does not .*{example}"):
        model_rule(known(open_pretrained(str(source)).spec))
    weights = {"bad": -1.0, "good": 1.0}
    rule = model_rule(known(open_pretrained(str(source)).spec), weights)
    # In the order of the probability that transformers' pipeline reports.
    logits = np.random.default_rng(0).standard_normal((50, 2))
    probability = torch.softmax(torch.from_numpy(logits), -1)[:, 1].numpy()
    assert (np.argsort(rule.values(logits)) == np.argsort(probability)).all()

    # A conversion passes the question on, or answers it for all that is made of it.
    notes = hf_to_orbax(str(source), str(tmp_path / "open"))
    assert notes[1] == "no value: the labels are classes; say here or when scoring which is good"
    notes = hf_to_orbax(str(source), str(tmp_path / "closed"), value=weights)
    assert notes[1] == "value: -1*bad +1*good"
    for name, scalar in (("open", {}), ("closed", weights)):
        orbax_to_hf(str(tmp_path / name), str(tmp_path / f"{name}_back"))
        for form in (name, f"{name}_back"):
            assert known(open_pretrained(str(tmp_path / form)).spec).scalar == scalar


# ---- a decoder alone --------------------------------------------------------------------------


def save_decoder(directory: Path, **tensors: torch.Tensor) -> Path:
    """What transformers' AutoModel saves: no head, and keys without `model.`."""
    causal = save_hf(directory / "causal", LLAMA, causal=True)
    decoder = transformers.AutoModel.from_pretrained(causal)
    decoder.save_pretrained(directory / "bare")
    for file in causal.glob("*token*"):
        shutil.copy(file, directory / "bare")
    shutil.copy(causal / "chat_template.jinja", directory / "bare")
    edit_tensors(directory / "bare", **tensors)
    return directory / "bare"


def test_a_decoder_alone_is_read(tmp_path):
    source = save_decoder(tmp_path)
    stored = load_file(source / "model.safetensors")
    assert "norm.weight" in stored and not any(key.startswith("model.") for key in stored)
    opened = open_pretrained(str(source))
    assert opened.spec is None
    params = load_params(opened, make_model(LLAMA, 2), seed=0, dtype=jnp.float32)
    assert same_bits(params["embed"], stored["embed_tokens.weight"].numpy())

    notes = hf_to_orbax(str(source), str(tmp_path / "orbax"), attributes=("a",))
    assert notes[0] == "fresh head, seed 0: a" and len(notes) == 2
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    exported = load_file(tmp_path / "back" / "model.safetensors")
    del exported["score.weight"]
    assert exported.keys() == {f"model.{key}" for key in stored}
    assert all(torch.equal(exported[f"model.{key}"], tensor) for key, tensor in stored.items())
    with pytest.raises(UserError, match=r"1 tensor\(s\) missing: lm_head.weight"):
        hf_to_orbax(str(source), str(tmp_path / "no"), language_model=True)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_decoder_with_a_head_is_a_reward_model(rows, tmp_path):
    head = torch.randn(rows, 32)
    source = save_decoder(tmp_path, **{"score.weight": head})
    spec = known(open_pretrained(str(source)).spec)
    assert spec.attributes == tuple(f"LABEL_{n}" for n in range(rows))
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["score.weight"], head)


def test_both_spellings_of_a_tensor_are_two_models(tmp_path):
    source = save_decoder(tmp_path, **{"model.norm.weight": torch.ones(32)})
    with pytest.raises(UserError, match=r"with and without 'model\.' .*'embed_tokens.*'model\.nor"):
        open_pretrained(str(source))


# ---- directories with names like ours ---------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoints", "checkpoint"])
def test_a_directory_of_that_name_makes_no_run_and_no_orbax_model(name, tmp_path):
    source = save_hf(tmp_path / "hf")
    (source / name / "step_100").mkdir(parents=True)
    (source / name / "step_100" / "state.pt").write_text("theirs")
    assert known(open_pretrained(str(source)).spec).attributes == NAMES
    hf_to_orbax(str(source), str(tmp_path / "orbax"))


def test_an_orbax_model_beside_a_hugging_face_one_is_an_error(orbax_copy, tmp_path):
    shutil.copy(tmp_path / "hf" / "model.safetensors", orbax_copy)
    with pytest.raises(UserError, match=r"two models, an Orbax one in checkpoint/ and a Hugging"):
        open_pretrained(str(orbax_copy))


def test_a_run_is_known_by_its_record(orbax_copy, tmp_path):
    """Its checkpoints alone make one too: a run that lost its record can still be exported."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for record in (None, {"format": "rmjax-run"}):
        if record:
            (run / "config.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="no complete checkpoint in this run yet"):
            open_pretrained(str(run))
    # A converted model stays one.
    (orbax_copy / "checkpoints").mkdir()
    assert known(open_pretrained(str(orbax_copy)).spec).attributes == NAMES


# ---- chat templates ---------------------------------------------------------------------------


def test_a_template_that_was_chosen_goes_along(tmp_path):
    """What is made of the model has that one alone, and needs no name."""
    source = save_hf(tmp_path / "hf")
    (source / "additional_chat_templates").mkdir()
    named = source / "additional_chat_templates" / "loud.jinja"
    named.write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}")
    default = open_pretrained(str(source))
    loud = open_pretrained(str(source), "loud")
    assert loud.tokenizer().chat_template == named.read_text() != default.tokenizer().chat_template
    before = loud.state()
    assert before != default.state()  # or scores of one would be taken for the other's
    hf_to_orbax(str(source), str(tmp_path / "orbax"), chat_template="loud")
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    for form in ("orbax", "back"):
        found = open_pretrained(str(tmp_path / form)).tokenizer().chat_template
        assert found == named.read_text()
    named.write_text(named.read_text().replace("!", "!!"))
    assert open_pretrained(str(source), "loud").state() != before
    with pytest.raises(UserError, match="no chat template 'quiet'; there are: default, loud"):
        hf_to_orbax(str(source), str(tmp_path / "no"), chat_template="quiet")


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

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
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
    eight = make_model(source.decoder, len(NAMES), Sharding(make_mesh(MeshConfig())))
    one = make_model(source.decoder, len(NAMES), one_device())
    first, second = (load_params(source, m, seed=0, dtype=jnp.float32) for m in (eight, one))
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: same_bits(a, np.asarray(b)), first, second))
    )
