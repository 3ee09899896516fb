"""ExPO: the formula against numpy, whole models of every form, kills, and the search for alpha."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import rmjax
from helpers import forked
from helpers.conversions import watch, weights_of
from helpers.hf_models import NAMES, TALK, decoder_of, edit_json, edit_tensors, save_hf, tensors_of
from helpers.models import make_model, tiny_llama
from rmjax import extrapolate
from rmjax.checkpoints import orbax_arrays
from rmjax.checkpoints.conversion import extrapolation
from rmjax.checkpoints.conversion.extrapolation import extrapolated, open_parents
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.hf_mapping import hf_index, our_index
from rmjax.checkpoints.hf_weights import SafetensorsWeights
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.manager import Checkpoints
from rmjax.checkpoints.model_files import read_spec
from rmjax.checkpoints.orbax_weights import OrbaxWeights
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.evaluation import alpha_search
from rmjax.evaluation.alpha_search import AlphaSearch, Trial, best_trial
from rmjax.evaluation.metrics import wilson_interval
from rmjax.models.decoder_config import LoraConfig
from rmjax.models.parameters import flatten
from rmjax.models.rewards.aggregation import scalar_rule
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.experiment import first_params
from rmjax.training.step import TrainState

LLAMA = tiny_llama(attention_bias=True, mlp_bias=True, max_position_embeddings=256)
TENSORS = 3 * 16 + 3  # of three layers, each with its biases; embedding, last norm and head
ALPHAS = (-0.5, 0.0, 0.3, 0.5, 1.0, 1.52, 2.0)


def as_run(source: Path, workdir: Path) -> Path:
    """A run whose last checkpoint holds the weights of `source`, float32, of eight devices."""
    opened = open_pretrained(str(source))
    model = make_model(opened.decoder, len(NAMES), Sharding(make_mesh(MeshConfig())))
    params = load_params(opened, model, seed=0, dtype=jnp.float32)
    checkpoints = Checkpoints(workdir)
    state = TrainState(jax.device_put(np.int32(7)), params, ())
    checkpoints.save(7, state.items(), position={}, config={}, evaluation=None)
    checkpoints.close()
    hf_to_orbax(str(source), str(workdir / "model"))
    shutil.rmtree(workdir / "model" / "checkpoint")
    return workdir


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> dict[str, Path]:
    """Two models by form: what the weak and the strong one are called, with different weights."""
    base, found = tmp_path_factory.mktemp("parents"), {}
    for seed, name in enumerate(("weak", "strong")):
        for dtype in ("float32", "bfloat16"):
            hf = save_hf(base / f"{name}-{dtype}", LLAMA, dtype=getattr(torch, dtype), seed=seed)
            found[f"{name} hf {dtype}"] = hf
            hf_to_orbax(str(hf), str(base / f"{name}-{dtype}-orbax"))
            found[f"{name} orbax {dtype}"] = base / f"{name}-{dtype}-orbax"
        found[f"{name} run float32"] = as_run(found[f"{name} hf float32"], base / f"{name}-run")
    return found


def numbers(hf: Path) -> dict[str, torch.Tensor]:
    return load_file(hf / "model.safetensors")


def back(target: Path) -> Path:
    """The model exported to Hugging Face, for other eyes."""
    orbax_to_hf(str(target), str(target.with_name("back")))
    return target.with_name("back")


# ---- the formula --------------------------------------------------------------------------------


def hard_numbers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours, opposites, zeros of both signs, tiny and large numbers."""
    weak = rng.standard_normal(4000).astype(np.float32) * np.float32(10.0) ** rng.integers(
        -6, 6, 4000
    ).astype(np.float32)
    strong = weak + rng.standard_normal(4000).astype(np.float32) * np.float32(1e-3)
    strong[:1000] = -weak[:1000]
    strong[1000:1500] = rng.permutation(weak)[:500]
    weak[1500:1504], strong[1500:1504] = [0.0, -0.0, 0.0, -0.0], [0.0, 0.0, -0.0, -0.0]
    weak[1504], strong[1505] = 1e-45, -1e-45
    return weak, strong


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_the_formula_in_fractions(kind, alpha, rng):
    weak, strong = hard_numbers(rng)
    found = np.asarray(extrapolated(kind(weak), kind(strong), alpha))
    assert found.dtype == np.float32
    for w, s, value in zip(map(Fraction, weak.tolist()), map(Fraction, strong.tolist()), found):
        exact = w + Fraction(alpha) * (s - w)
        # Four roundings of half a unit in the last place: the difference, the factor, their product
        # (each of the size of the step from the nearer of the two) and the sum.
        step = min(abs(Fraction(alpha)), abs(Fraction(alpha) - 1)) * abs(s - w)
        allowed = (3 * step + abs(exact)) * Fraction(1.0001 * 2.0**-24) + Fraction(2.0**-148)
        assert abs(Fraction(float(value)) - exact) <= allowed, (w, s)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_zero_and_one_are_the_parents_to_the_bit(kind, rng):
    weak, strong = hard_numbers(rng)
    for alpha, parent in ((0.0, weak), (1.0, strong)):
        found = np.asarray(extrapolated(kind(weak), kind(strong), alpha))
        np.testing.assert_array_equal(found.view(np.uint32), parent.view(np.uint32))
    # Which the formula as it is written does not give.
    assert ((weak + np.float32(1) * (strong - weak)) != strong).any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_is_equal_in_both_stays(alpha, rng):
    weak, _ = hard_numbers(rng)
    np.testing.assert_array_equal(extrapolated(weak, weak.copy(), alpha), weak)


# ---- whole models -------------------------------------------------------------------------------

FORMS = {
    "hf, hf": ("hf float32", "hf float32"),
    "run, orbax": ("run float32", "orbax float32"),
    "orbax, run": ("orbax float32", "run float32"),
    "float32, bfloat16": ("run float32", "orbax bfloat16"),
    "bfloat16, float32": ("hf bfloat16", "run float32"),
    "bfloat16": ("orbax bfloat16", "hf bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FORMS)
@pytest.mark.parametrize("alpha", [1.52, -0.25, 0.4])
def test_models_of_every_form_by_hand(case, alpha, parents, tmp_path):
    """Every tensor from the parents' safetensors, by torch, in Hugging Face's layout."""
    first, second = FORMS[case]
    notes = extrapolate.extrapolate(
        str(parents[f"weak {first}"]), str(parents[f"strong {second}"]), str(tmp_path / "model"),
        alpha=alpha,
    )  # fmt: skip
    assert f"verified: {TENSORS} tensors" in notes
    assert not any("warning" in note for note in notes)
    weak = numbers(parents[f"weak hf {first.split()[1]}"])
    strong = numbers(parents[f"strong hf {second.split()[1]}"])
    found = numbers(back(tmp_path / "model"))
    assert found.keys() == weak.keys() == strong.keys() and len(found) == TENSORS
    for key, tensor in found.items():
        one, other = weak[key].float(), strong[key].float()
        if alpha > 0.5:
            expected = other + torch.tensor(alpha - 1, dtype=torch.float32) * (other - one)
        else:
            expected = one + torch.tensor(alpha, dtype=torch.float32) * (other - one)
        assert torch.equal(tensor, expected.to(strong[key].dtype)), key
        exact = one.double() + alpha * (other.double() - one.double())
        unit = 2.0**-8 if tensor.dtype == torch.bfloat16 else 2.0**-22
        torch.testing.assert_close(tensor.double(), exact, rtol=unit, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("alpha", "parent"), [(0.0, "weak"), (1.0, "strong")])
def test_zero_and_one_are_the_models_to_the_bit(dtype, alpha, parent, parents, tmp_path):
    target = tmp_path / "model"
    weak, strong = (str(parents[f"{name} orbax {dtype}"]) for name in ("weak", "strong"))
    extrapolate.extrapolate(weak, strong, str(target), alpha=alpha)
    assert tensors_of(back(target)) == tensors_of(parents[f"{parent} hf {dtype}"])
    assert weights_of(target).keys() == weights_of(parents[f"{parent} orbax {dtype}"]).keys()


def test_the_result_is_a_model_like_any_other(parents, tmp_path):
    """Its spec, its scores, its export, and training from it."""
    strong = Path(shutil.copytree(parents["strong orbax float32"], tmp_path / "second"))
    edit_json(strong / "rmjax.json", scalar={"care": 0.5, "wit": -1.0}, max_length=99, data="abc")
    target = tmp_path / "model"
    weak = parents["weak hf float32"]
    extrapolate.extrapolate(str(weak), str(strong), str(target), alpha=1.52)
    spec = read_spec(target)
    assert spec.source == f"{weak.name} + 1.52 * (second - {weak.name})"
    assert (spec.attributes, spec.max_length, spec.data) == (NAMES, 99, "abc")
    assert spec.scalar == {"care": 0.5, "wit": -1.0}
    assert decoder_of(target) == LLAMA

    ours, exported = rmjax.load(target), rmjax.load(back(target))
    scores = [scorer.score_many(TALK) for scorer in (ours, exported)]
    assert [s.attributes for s in scores[0]] == [s.attributes for s in scores[1]]
    assert scores[0][0].rule == "+0.5*care -1*wit"
    assert scores[0][0].attributes != rmjax.load(strong).score(TALK[0]).attributes

    source = open_pretrained(str(target))
    model = make_model(source.decoder, len(NAMES))
    config = Config(
        workdir=str(tmp_path / "run"),
        data=DataConfig(train="generated:8", attributes=NAMES),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=8,
        init=str(target),
    )
    params, said = first_params(config, source, model)
    assert said.endswith("with its head")
    expected = numbers(tmp_path / "back")["score.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(params["head"]).T, expected)


def test_frozen_parameters_stay_and_equal_models_are_warned_of(parents, tmp_path):
    weak = parents["weak hf float32"]
    strong = Path(shutil.copytree(weak, tmp_path / "strong"))
    notes = extrapolate.extrapolate(str(weak), str(strong), str(tmp_path / "same"), alpha=1.5)
    assert any("warning: WEAK and STRONG do not differ in any number" in note for note in notes)
    edit_tensors(strong, **{"score.weight": numbers(weak)["score.weight"] + 1})
    notes = extrapolate.extrapolate(str(weak), str(strong), str(tmp_path / "model"), alpha=1.5)
    assert not any("warning" in note for note in notes)
    ours, theirs = tensors_of(back(tmp_path / "model")), tensors_of(weak)
    assert [key for key in ours if ours[key] != theirs[key]] == ["score.weight"]


def test_tensors_larger_than_a_piece_are_cut(parents, tmp_path, monkeypatch):
    """In many files, of a run whose chunks lie across them: still the same numbers."""
    arguments = str(parents["weak run float32"]), str(parents["strong hf float32"])
    extrapolate.extrapolate(*arguments, str(tmp_path / "whole"), alpha=1.3)
    monkeypatch.setattr(orbax_arrays, "FILE_BYTES", 700)
    monkeypatch.setattr(orbax_arrays, "CHUNK_BYTES", 100)
    read, _ = watch(monkeypatch, ToOrbax)
    extrapolate.extrapolate(*arguments, str(tmp_path / "cut"), alpha=1.3)
    assert len(read) > 3 * TENSORS
    expected = tensors_of(back(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "back")
    assert tensors_of(back(tmp_path / "cut")) == expected


# ---- what is refused ----------------------------------------------------------------------------


def other_width(directory: Path) -> Path:
    return save_hf(directory, tiny_llama(intermediate_size=48, max_position_embeddings=256))


def other_names(directory: Path) -> Path:
    return save_hf(directory, LLAMA, names=(*NAMES[1:], NAMES[0]))


def other_template(directory: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|> ")
    return save_hf(directory, LLAMA, tokenizer=tokenizer)


def other_vocabulary(directory: Path) -> Path:
    save_hf(directory, LLAMA)
    file = directory / "tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(words))
    return directory


def without_a_head(directory: Path) -> Path:
    return save_hf(directory, LLAMA, causal=True)


REFUSED = {
    other_width: r"different architectures: intermediate_size is 64 and 48, attention_bias is True",
    other_names: r"heads for different attributes: zeal, care, .*; and care, wit,",
    other_template: r"different tokenizers \(chat template\)",
    other_vocabulary: r"different tokenizers \(vocabulary\)",
    without_a_head: r"a causal model without a reward head",
}


@pytest.mark.parametrize("make", REFUSED)
def test_models_that_do_not_belong_together_are_refused(make, parents, tmp_path):
    strong, target = make(tmp_path / "strong"), tmp_path / "model"
    with pytest.raises(UserError, match=REFUSED[make]):
        extrapolate.extrapolate(
            str(parents["weak orbax float32"]), str(strong), str(target), alpha=1.5
        )
    assert [path.name for path in tmp_path.iterdir()] == ["strong"]


def test_adapters_must_be_merged_first(parents, monkeypatch):
    with_adapters = dataclasses.replace(
        open_pretrained(str(parents["weak run float32"])), lora=LoraConfig(rank=4)
    )
    monkeypatch.setattr(extrapolation, "open_pretrained", lambda name: with_adapters)
    with pytest.raises(UserError, match="run: trained with LoRA; merge its adapters first"):
        open_parents("run", "run")


def test_another_pad_token_is_the_same_tokenizer(parents, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|system|>"
    strong = save_hf(tmp_path / "strong", LLAMA, tokenizer=tokenizer, seed=1)
    open_parents(str(parents["weak orbax float32"]), str(strong))


@pytest.mark.parametrize("alpha", [np.nan, np.inf, -np.inf, 4e38])
def test_alpha_must_be_finite(alpha, parents, tmp_path):
    with pytest.raises(UserError, match=r"alpha = (nan|inf|-inf|4e\+38): expected a finite number"):
        extrapolate.extrapolate("nowhere", "nowhere", str(tmp_path / "model"), alpha=alpha)


def test_targets_are_refused_that_exist_or_are_in_a_parent(parents, tmp_path):
    weak, strong = str(parents["weak hf float32"]), str(parents["strong hf float32"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        extrapolate.extrapolate(weak, strong, str(tmp_path / "full"), alpha=1.5)
    for parent in (weak, strong):
        with pytest.raises(UserError, match="inside of the source"):
            extrapolate.extrapolate(weak, strong, f"{parent}/model", alpha=1.5)


def test_a_lost_file_of_a_parent_is_one_message(parents, tmp_path):
    strong = Path(shutil.copytree(parents["strong orbax float32"], tmp_path / "strong"))
    next(file for file in (strong / "checkpoint").rglob("c/0/*") if file.is_file()).unlink()
    with pytest.raises(UserError, match=r"has \d+ of its \d+ files"):
        extrapolate.extrapolate(
            str(parents["weak hf float32"]), str(strong), str(tmp_path / "model"), alpha=1.5
        )


# ---- kills --------------------------------------------------------------------------------------


def test_an_interrupted_one_is_recognised_and_continued(parents, tmp_path, monkeypatch):
    weak, strong = str(parents["weak run float32"]), str(parents["strong orbax float32"])
    target, whole = tmp_path / "model", tmp_path / "whole"
    extrapolate.extrapolate(weak, strong, str(whole), alpha=1.52)
    with monkeypatch.context() as patch:
        _, written = watch(patch, ToOrbax, 11)
        with pytest.raises(KeyboardInterrupt) as raised:
            extrapolate.extrapolate(weak, strong, str(target), alpha=1.52)
    assert "the same command continues it" in raised.value.__notes__[0]
    partial = tmp_path / "model.partial"
    assert not target.exists() and partial.is_dir()
    with pytest.raises(UserError, match="an unfinished conversion; give the same command"):
        open_pretrained(str(partial))
    with pytest.raises(UserError):
        open_pretrained(str(partial / "model"))

    read, _ = watch(monkeypatch, ToOrbax)
    notes = extrapolate.extrapolate(weak, strong, str(target), alpha=1.52)
    assert set(read) == set(range(TENSORS)) - set(written)
    assert any(note.startswith("continued: ") for note in notes)
    assert weights_of(target) == weights_of(whole)
    assert not partial.exists()


def test_another_alpha_and_exchanged_parents_begin_anew(parents, tmp_path, monkeypatch):
    models = [str(parents[f"{name} hf float32"]) for name in ("weak", "strong")]
    others = {"alpha, model": (models, 1.3), "files of the source, model": (models[::-1], 1.52)}
    for number, (said, (again, alpha)) in enumerate(others.items()):
        target = tmp_path / str(number)
        with monkeypatch.context() as patch:
            watch(patch, ToOrbax, 11)
            with pytest.raises(KeyboardInterrupt):
                extrapolate.extrapolate(models[0], models[1], str(target), alpha=1.52)
        notes = extrapolate.extrapolate(again[0], again[1], str(target), alpha=alpha)
        assert f"begun anew: the unfinished conversion had other {said}" in notes


_KILLED = """
    import os, signal
    from rmjax import extrapolate
    from rmjax.checkpoints.conversion.journal import Journal

    record, count = Journal.record, 0

    def dying(*arguments, **options):
        global count
        record(*arguments, **options)
        count += 1
        if count == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = dying
    extrapolate._main()
"""


def start(*how: str) -> subprocess.CompletedProcess:
    return forked.run(how)


@pytest.mark.slow
def test_a_killed_one_is_continued_by_the_same_command(parents, tmp_path):
    target = tmp_path / "model"
    arguments = [str(parents[f"{name} orbax float32"]) for name in ("weak", "strong")]
    arguments += [str(target), "--alpha=1.52"]
    assert start("-c", textwrap.dedent(_KILLED), *arguments).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["model.partial"]
    with pytest.raises(UserError, match="an unfinished conversion"):
        open_pretrained(str(tmp_path / "model.partial"))
    done = start("-m", "rmjax.extrapolate", *arguments)
    assert done.returncode == 0, done.stderr
    assert "continued: " in done.stdout and f"written: {target}" in done.stdout
    extrapolate.extrapolate(arguments[0], arguments[1], str(tmp_path / "whole"), alpha=1.52)
    assert weights_of(target) == weights_of(tmp_path / "whole")


# ---- Orbax under Hugging Face's names -----------------------------------------------------------


@pytest.mark.parametrize("form", ["orbax float32", "orbax bfloat16", "run float32"])
def test_orbax_reads_like_safetensors(form, parents):
    source = open_pretrained(str(parents[f"weak {form}"]))
    assert isinstance(source.weights, Path)
    ours = OrbaxWeights(source.weights, LLAMA, source.head)
    theirs = SafetensorsWeights(parents[f"weak hf {form.split()[1]}"])
    assert ours.keys() == theirs.keys() and len(ours.keys()) == TENSORS
    for key in ours.keys():  # noqa: SIM118  (not a mapping)
        assert (ours.shape(key), ours.dtype(key)) == (theirs.shape(key), theirs.dtype(key))
        head = slice(8, 24) if "_proj" in key else slice(1, 3)
        for index in ((), (head,), (slice(None),)):
            found, expected = ours.read(key, index), theirs.read(key, index)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert found.tobytes() == expected.tobytes(), (key, index)
    assert ours.files()


def test_a_run_that_is_read_in_bands_keeps_its_chunks(parents):
    """Each band has a part of every chunk, which are read from the disk once all the same."""
    import tensorstore as ts

    source = open_pretrained(str(parents["weak run float32"]))
    assert isinstance(source.weights, Path)
    weights = OrbaxWeights(source.weights, LLAMA, source.head)
    key = "model.layers.1.mlp.up_proj.weight"
    assert weights._arrays["layers/up"].chunk_layout.read_chunk.shape == (1, 4, 64)

    def read_so_far() -> int:
        name = "/tensorstore/kvstore/ocdbt/read"
        return sum(
            value["value"]
            for metric in ts.experimental_collect_matching_metrics(name)
            for value in metric["values"]
        )

    weights.read(key, (slice(0, 8),))
    before = read_so_far()
    bands = [weights.read(key, (slice(n, n + 8),)) for n in range(0, 64, 8)]
    assert read_so_far() == before
    expected = numbers(parents["weak hf float32"])[key].numpy()
    np.testing.assert_array_equal(np.concatenate(bands), expected)


def test_our_index_is_the_inverse_of_hf_index():
    sizes = make_model(LLAMA, len(NAMES)).sizes
    for row in make_model(LLAMA).parameters:
        first = row.hf_axes.replace("(", "").split()[0].rstrip(")")
        band = {first: slice(1, 2)}
        assert our_index(row, hf_index(row, band, sizes)[:1], sizes) == band
    (query,) = (row for row in make_model(LLAMA).parameters if row.path == "layers/q")
    with pytest.raises(ValueError, match="not a whole number of 'heads'"):
        our_index(query, (slice(0, 4),), sizes)


# ---- the search ---------------------------------------------------------------------------------

TRIED = (1.2, 1.5, 1.8, 2.2)


def words(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("abcdefgh ijk"), rng.integers(4, 30)))


def write_pairs(file: Path, pairs: list[tuple[str, str, str]]) -> Path:
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def values(model: Path, pairs: list[tuple[str, str, str]]) -> np.ndarray:
    """Value of the second and third of each, [pairs, 2] float64, scored through the REPL's way."""
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, *responses in pairs
        for response in responses
    ]
    found = rmjax.load(model).score_many(talks)
    return np.asarray([score.value for score in found]).reshape(-1, 2)


@pytest.fixture(scope="module")
def searched(parents, tmp_path_factory):
    """Two models that differ in the head alone, and pairs as that at 1.5 would choose.

    A value is then linear in alpha, so every number of the search follows from the two parents'.
    """
    base = tmp_path_factory.mktemp("searched")
    weak = parents["weak hf float32"]
    strong = Path(shutil.copytree(weak, base / "strong"))
    edit_tensors(strong, **{"score.weight": numbers(parents["strong hf float32"])["score.weight"]})
    rng = np.random.default_rng(3)
    pairs = [(words(rng), words(rng), words(rng)) for _ in range(160)]
    first, second = values(weak, pairs), values(strong, pairs)
    at = first + 1.5 * (second - first)
    swap = at[:, 0] < at[:, 1]
    pairs = [(p, b, a) if s else (p, a, b) for (p, a, b), s in zip(pairs, swap)]
    first, second = (np.where(swap[:, None], v[:, ::-1], v) for v in (first, second))
    margins = {
        alpha: (first + alpha * (second - first)) @ [1.0, -1.0] for alpha in (0.0, 1.0, *TRIED)
    }
    return weak, strong, write_pairs(base / "validation.jsonl", pairs), margins


def command(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["extrapolate", *map(str, arguments)])
    extrapolate._main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_search_finds_the_alpha_that_made_the_pairs(searched, tmp_path, monkeypatch, capsys):
    weak, strong, pairs, margins = searched
    accuracy = {alpha: float((m > 0).mean()) for alpha, m in margins.items()}
    assert all((accuracy[alpha] == 1) == (alpha == 1.5) for alpha in accuracy), accuracy
    target = tmp_path / "model"
    search = "--search=" + ",".join(map(str, (2.2, 1.5, *TRIED)))  # in any order, some twice
    said = command(monkeypatch, capsys, weak, strong, target, search, f"--pairs={pairs}")

    lines = (line for line in said.splitlines() if " to " in line)
    rows = [re.findall(r"[+-]?\d+\.?\d*", line) for line in lines]
    rows = [row for row in rows if len(row) == 6]
    assert [float(row[0]) for row in rows] == [0.0, 1.0, *TRIED]
    for row in rows:
        alpha, share, low, high, margin, loss = map(float, row)
        m = margins[alpha]
        interval = stats.binomtest(int((m > 0).sum()), len(m)).proportion_ci(method="wilson")
        assert share == pytest.approx(accuracy[alpha], abs=6e-4)
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=6e-4)
        assert margin == pytest.approx(m.mean(), abs=2e-4)
        assert loss == pytest.approx(np.mean(np.log1p(np.exp(-m))), abs=2e-4)
    assert "WEAK" in said and "STRONG" in said
    assert re.search(r"^ *1\.5 .* best\s*$", said, re.MULTILINE)
    assert "alpha 1.5 was fitted on these 160 pairs: as the best of 6" in said
    assert "itself" not in said
    assert f"written: {target}" in said

    spec = read_spec(target)
    name = f"{weak.name} + 1.5 * (strong - {weak.name})"
    assert spec.source == f"{name}, 1.5 chosen on validation.jsonl"
    expected = numbers(weak)["score.weight"].double()
    expected += 1.5 * (numbers(strong)["score.weight"].double() - expected)
    found = numbers(back(target))["score.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_without_a_target_nothing_is_written(searched, tmp_path, monkeypatch, capsys):
    weak, strong, pairs, _ = searched
    monkeypatch.chdir(tmp_path)
    said = command(monkeypatch, capsys, weak, strong, "--search=1.5", f"--pairs={pairs}")
    assert "written" not in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "forms", [("run float32", "hf float32"), ("run float32", "orbax bfloat16")], ids=str
)
def test_what_is_tried_is_what_is_written(forms, searched, parents, tmp_path):
    """Models that differ everywhere, on eight devices: the margins are those of the file."""
    weak, strong = (parents[f"{n} {form}"] for n, form in zip(("weak", "strong"), forms))
    opened = open_parents(str(weak), str(strong))
    search = AlphaSearch(opened, str(searched[2]))
    assert search.differ
    assert len({leaf.sharding for leaf in jax.tree.leaves(search.params(1.3))}) > 1
    extrapolate.extrapolate(str(weak), str(strong), str(tmp_path / "model"), alpha=1.3)
    rows = [json.loads(line) for line in searched[2].read_text().splitlines()]
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    expected = values(tmp_path / "model", pairs) @ [1.0, -1.0]
    np.testing.assert_allclose(search._margins(1.3), expected, atol=2e-5)

    source = open_pretrained(str(tmp_path / "model"))
    arrays = flatten(load_params(source, make_model(LLAMA, 5), seed=0, dtype=jnp.float32))
    for path, tried in flatten(search.params(1.3)).items():
        bits = jnp.finfo(tried.dtype).nmant + 1
        np.testing.assert_allclose(
            np.asarray(tried, np.float32), arrays[path], rtol=2.0**-bits * 2, atol=1e-7
        )


def test_the_models_own_rule_is_what_is_compared(searched, tmp_path):
    weak, strong, pairs, margins = searched
    converted = [tmp_path / "first", tmp_path / "second"]
    for source, target in zip((weak, strong), converted):
        hf_to_orbax(str(source), str(target))
    edit_json(converted[1] / "rmjax.json", scalar={NAMES[0]: -2.0})
    search = AlphaSearch(open_parents(*map(str, converted)), str(pairs))
    assert search.rule == scalar_rule({NAMES[0]: -2.0}, NAMES)
    np.testing.assert_allclose(search._margins(1.5), -2 * margins[1.5], atol=2e-5)


def test_parents_are_read_and_pairs_packed_once(searched, monkeypatch, capsys):
    weak, strong, pairs, _ = searched
    calls = []
    for name in ("load_params", "load_tokenized", "pair_batches"):
        original = getattr(alpha_search, name)

        def counting(*arguments, _name=name, _original=original, **options):
            calls.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(alpha_search, name, counting)
    command(monkeypatch, capsys, weak, strong, "--search=1.2,1.3,1.4", f"--pairs={pairs}")
    assert sorted(calls) == ["load_params", "load_params", "load_tokenized", "pair_batches"]


def test_equal_models_are_warned_of_by_the_search(searched, tmp_path, monkeypatch, capsys):
    weak, _, pairs, _ = searched
    same = shutil.copytree(weak, tmp_path / "same")
    said = command(monkeypatch, capsys, weak, same, "--search=1.5", f"--pairs={pairs}")
    assert "warning: WEAK and STRONG do not differ" in said
    assert "It is STRONG itself: no other was better." in said


def test_pairs_that_are_too_long_are_dropped_and_counted(searched, tmp_path, monkeypatch, capsys):
    weak, strong, _, _ = searched
    pairs = [("p", "a", "b"), ("p", "c" * 100, "d"), ("p", "e", "f")]
    pairs = write_pairs(tmp_path / "pairs.jsonl", pairs)
    arguments = (weak, strong, "--search=1.5", f"--pairs={pairs}", "--max-length=50")
    said = command(monkeypatch, capsys, *arguments)
    assert f"{pairs}: 3 read, 1 dropped: too long, 2 kept" in said
    assert "2 pairs; alpha counts from WEAK" in said


def test_scores_that_are_not_finite_name_the_alpha(searched):
    weak, strong, pairs, _ = searched
    search = AlphaSearch(open_parents(str(weak), str(strong)), str(pairs))
    with pytest.raises(
        UserError, match=r"alpha = 1e\+38: the scores of \d+ samples are not finite"
    ):
        list(search.trials([1.0, 1e38]))


def test_of_equal_trials_the_one_nearest_to_strong_is_best():
    def trial(alpha: float, accuracy: float) -> Trial:
        return Trial(alpha, accuracy, (0.0, 1.0), 0.0, 0.0)

    trials = [trial(0.0, 0.7), trial(1.0, 0.6), trial(1.3, 0.8), trial(1.1, 0.8), trial(2.0, 0.8)]
    assert best_trial(trials).alpha == 1.1


@pytest.mark.parametrize("found", range(0, 31, 3))
def test_wilson_intervals_are_scipys(found):
    expected = stats.binomtest(found, 30).proportion_ci(method="wilson")
    assert wilson_interval(found, 30) == pytest.approx((expected.low, expected.high), abs=1e-6)


WRONG = {
    (): "give --alpha=NUMBER to write a model, or --search",
    ("d", "--alpha=1", "--search=1"): "give --alpha=NUMBER to write a model, or --search",
    ("--alpha=1.5",): "--alpha needs DST",
    ("--search=1.5",): "--search needs --pairs",
    ("d", "--alpha=1.5", "--pairs=p"): "--pairs goes with --search",
    ("d", "--alpha=1.5", "--max-length=9"): "--max-length goes with --search",
    ("--search=1.5,x", "--pairs=p"): "--search=1.5,x: expected numbers",
    ("--search=1.5,nan", "--pairs=p"): "alpha = nan: expected a finite number",
    ("--search=1.5", "--pairs=nowhere.jsonl"): "nowhere.jsonl: there is no such file",
    ("--search=1.5", "--pairs=p", "--max-length=999"): "--max-length=999: expected 1 to 256",
    ("--search=1.5", "--pairs=p", "--max-length=-1"): "--max-length=-1: expected 1 to 256",
}


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_options_that_do_not_fit_are_refused(options, searched, monkeypatch, capsys):
    with pytest.raises(UserError, match=re.escape(WRONG[options])):
        command(monkeypatch, capsys, *searched[:2], *options)


def test_a_target_that_exists_is_refused_before_the_search(searched, monkeypatch, capsys):
    weak, strong, pairs, _ = searched
    monkeypatch.setattr(extrapolate, "search_alpha", None)
    with pytest.raises(UserError, match="already exists and is not empty"):
        command(monkeypatch, capsys, weak, strong, weak, "--search=1.5", f"--pairs={pairs}")
