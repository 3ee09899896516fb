"""The probe: features against transformers', fits against whole runs, the cache, the model."""

import os
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers import forked
from helpers.hf_models import edit_tensors, save_hf
from helpers.models import one_device, tiny_llama
from helpers.reference import torch_scores
from helpers.runs import metrics, on_one_device, run, tiny_config
from rmjax import probe
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.model_files import read_spec
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import Config
from rmjax.convert import orbax_to_hf
from rmjax.errors import UserError
from rmjax.training import features as cache
from rmjax.training.experiment import make_model
from rmjax.training.probing import fit as head_fit
from rmjax.training.probing.adamw import head_scores

LLAMA = tiny_llama(max_position_embeddings=256)
OBJECTIVES = {
    "regression": {},
    "bradley_terry": {"data__compare": "helpfulness"},
    "regression + 0.5 * bradley_terry": {
        "data__compare": "helpfulness",
        "data__pairs": "generated:64",
        "data__validation_pairs": "generated:16",
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A causal model as transformers saves it."""
    return save_hf(tmp_path_factory.mktemp("base") / "model", LLAMA, causal=True)


@pytest.fixture
def own_features(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The rows of each micro-batch that the model computes; parts are of two micro-batches."""
    found: list[int] = []
    original = cache._compute

    def counting(compute, batches, steps):
        found.extend(steps)
        return original(compute, batches, steps)

    monkeypatch.setattr(cache, "_compute", counting)
    monkeypatch.setattr(cache, "_PART", 2)
    return found


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    monkeypatch.setattr(probe, "make_mesh", on_one_device)


def make_config(base: Path, workdir: Path, **changes) -> Config:
    told = {"model": None, "tokenizer": "", "init": str(base)}
    return tiny_config(workdir, **(told | changes))


def seen(monkeypatch) -> list[head_fit.Samples]:
    """What the next probe knows of its training and its held-out samples."""
    found: list[head_fit.Samples] = []

    def remember(data, features):
        found.append(original(data, features))
        return found[-1]

    original = head_fit.Samples
    monkeypatch.setattr(head_fit, "Samples", remember)
    return found


def head_of(model: Path) -> np.ndarray:
    opened = open_pretrained(str(model))
    made = make_model(Config("", **parts_of(opened)), opened, one_device())
    return np.asarray(load_params(opened, made, seed=0, dtype=jnp.float32)["head"])


def parts_of(opened) -> dict:
    config = tiny_config("")
    config.data.attributes = opened.spec.attributes
    return {"data": config.data, "optimizer": config.optimizer, "batch_size": 8, "remat": "none"}


# ---- features -----------------------------------------------------------------------------------


def test_features_are_transformers_hidden_states(base, tmp_path, own_features, monkeypatch):
    """Packed, prompts shared, against one sequence at a time; dtype float32."""
    found = seen(monkeypatch)
    probe.probe(make_config(base, tmp_path), str(tmp_path / "model"))
    network = transformers.LlamaModel.from_pretrained(base, attn_implementation="eager").eval()
    for samples in found:
        assert samples.data.shared.any()
        for i in range(len(samples.data)):
            tokens = torch.from_numpy(samples.data.sequence(i).copy())[None].long()
            with torch.no_grad():
                expected = network(tokens).last_hidden_state[0, -1].numpy()
            np.testing.assert_allclose(samples.features[i], expected, rtol=2e-5, atol=2e-5)


# ---- fits ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_head_is_that_of_a_run(objective, base, tmp_path):
    """`rmjax.train` of the head alone: same losses step for step, same head, same choice."""
    told = {"objective": objective, "eval_every": 2, "optimizer__learning_rate": 0.05}
    told |= OBJECTIVES[objective]
    run(make_config(base, tmp_path / "run", trainable=("head",), **told))
    lines = metrics(tmp_path / "run")
    config = make_config(base, tmp_path / "unused", **told)
    with pytest.MonkeyPatch.context() as patch:
        trained = []
        original = head_fit.train_head
        patch.setattr(
            head_fit, "train_head", lambda *a: trained.append(original(*a)) or trained[-1]
        )
        probe.probe(config, str(tmp_path / "model"), "adamw")
    expected = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(trained[0].losses, expected, rtol=1e-5)
    losses = {e["step"]: e["validation_loss"] for e in lines if "validation_loss" in e}
    assert trained[0].step == min(losses, key=losses.__getitem__)
    np.testing.assert_allclose(head_of(tmp_path / "model"), head_of(tmp_path / "run"), atol=2e-5)
    assert not (tmp_path / "unused").exists()


def test_the_gradient_is_that_of_the_whole_model(base, tmp_path):
    """At the very first step; in the limit of small steps nothing else decides where they go."""
    told = {"steps": 1, "eval_every": 0, "optimizer__learning_rate": 1e-3}
    run(make_config(base, tmp_path / "run", trainable=("head",), **told))
    norms = []
    with pytest.MonkeyPatch.context() as patch:
        original = head_fit.train_head.__globals__["make_program"]

        def making(*arguments, **options):
            program = original(*arguments, **options)

            def remember(*batch):
                state, metrics = program.step(*batch)
                norms.append(float(metrics.grad_norm))
                return state, metrics

            return program._replace(step=remember)

        patch.setattr("rmjax.training.probing.adamw.make_program", making)
        probe.probe(make_config(base, tmp_path, **told), str(tmp_path / "model"), "adamw")
    (expected,) = [line["grad_norm"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert norms == [pytest.approx(expected, rel=1e-5)]


def test_a_ridge_beats_the_constant_and_the_first_head(base, tmp_path, capsys):
    config = make_config(base, tmp_path, data__train="generated:400", data__validation="")
    config.data.hold_out = 0.25
    probe.probe(config, str(tmp_path / "model"))
    said = capsys.readouterr().out
    assert "held-out data (loss" in said and "degrees of freedom" in said
    rows = [line.split() for line in said.splitlines() if line.split()[:1] == ["verbosity"]]
    mse, constant = float(rows[0][2]), float(rows[0][3])
    assert mse < 0.8 * constant


def test_without_held_out_data_prompts_are_left_out(base, tmp_path, capsys):
    config = make_config(base, tmp_path, data__validation="")
    probe.probe(config, str(tmp_path / "model"))
    said = capsys.readouterr().out
    assert "training data, each prompt left out in turn" in said and "held-out" not in said


# ---- the model ----------------------------------------------------------------------------------


def test_the_model_scores_what_the_head_says(base, tmp_path, monkeypatch, capsys):
    found = seen(monkeypatch)
    config = make_config(base, tmp_path)
    target = tmp_path / "model"
    probe.probe(config, str(target))
    assert f"written: {target}" in capsys.readouterr().out
    samples = found[1]
    expected = head_scores(samples.features, head_of(target))

    orbax_to_hf(str(target), str(tmp_path / "hf"))
    network = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    sequences = [samples.data.sequence(i) for i in range(len(samples.data))]
    np.testing.assert_allclose(torch_scores(network, sequences), expected, rtol=0, atol=1e-5)

    # Whatever is not the head is the source's to the bit.
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "hf"))
    assert {k for k in after if k not in before} == {"score.weight"}
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items() if key in before)
    spec = read_spec(target)
    assert spec.attributes == config.data.attributes
    assert spec.data == found[0].data.key and spec.source == base.name


def test_a_run_begins_with_the_probes_head(base, tmp_path, capsys):
    """`config.init` takes the model, and another probe of it begins with its head."""
    config = make_config(base, tmp_path)
    probe.probe(config, str(tmp_path / "model"))
    capsys.readouterr()
    config.init = str(tmp_path / "model")
    config.optimizer.learning_rate = 1e-12
    probe.probe(config, str(tmp_path / "again"), "adamw")
    assert f"{config.init} with its head" in capsys.readouterr().out
    np.testing.assert_allclose(
        head_of(tmp_path / "again"), head_of(tmp_path / "model"), rtol=1e-6, atol=1e-9
    )


# ---- the cache ----------------------------------------------------------------------------------


def test_features_are_computed_once(base, tmp_path, own_features, calls):
    config = make_config(base, tmp_path)
    probe.probe(config, str(tmp_path / "first"))
    count = len(calls)
    assert count > 4  # several parts
    config.objective, config.data.label_range = "regression", (0.0, 4.0)
    config.seed, config.optimizer.learning_rate = 3, 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_fit, "load_params", None)  # the weights are not even read
        probe.probe(config, str(tmp_path / "second"), "adamw")
        probe.probe(config, str(tmp_path / "third"), "ridge")
    assert len(calls) == count
    np.testing.assert_array_equal(head_of(tmp_path / "first"), head_of(tmp_path / "third"))


def test_a_killed_extraction_goes_on(base, tmp_path, own_features, calls):
    config = make_config(base, tmp_path)

    class Killed(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch:
        original = cache._write

        def dying(*arguments):
            original(*arguments)
            if len(calls) >= 4:
                raise Killed

        patch.setattr(cache, "_write", dying)
        with pytest.raises(Killed):
            probe.probe(config, str(tmp_path / "model"))
    assert calls == [0, 1, 2, 3]
    (entry,) = own_features.iterdir()
    flipped = bytearray((entry / "00000.npy").read_bytes())
    flipped[200] ^= 1  # of a number, which is then another one, and finite
    (entry / "00000.npy").write_bytes(flipped)
    probe.probe(config, str(tmp_path / "model"))
    assert calls[4:8] == [0, 1, 4, 5] and calls.count(2) == 2  # the held-out data's, once
    whole = head_of(tmp_path / "model")
    shutil.rmtree(own_features)
    probe.probe(config, str(tmp_path / "anew"))
    np.testing.assert_array_equal(whole, head_of(tmp_path / "anew"))


@pytest.mark.parametrize(
    "change", ["weights", "data", "dtype", "length", "attention", "share"], ids=str
)
def test_what_changes_features_computes_them_again(
    change, base, tmp_path, own_features, calls, monkeypatch
):
    model = Path(shutil.copytree(base, tmp_path / "base"))
    file = tmp_path / "data.jsonl"
    rows = [
        f'{{"prompt": "p{i // 2}", "response": "r{i}", "helpfulness": {i % 5}}}' for i in range(16)
    ]
    file.write_text("\n".join(rows) + "\n")
    told = {"data__train": str(file), "data__attributes": ("helpfulness",)}
    told |= {"data__validation": "", "data__hold_out": 0.25}
    probe.probe(make_config(model, tmp_path, **told), str(tmp_path / "first"))
    count = len(calls)
    if change == "weights":  # one number, the file as long and as old as before
        tensors = model / "model.safetensors"
        before = tensors.stat()
        weight = load_file(tensors)["model.norm.weight"].clone()
        weight[3] += 1
        edit_tensors(model, **{"model.norm.weight": weight})
        os.utime(tensors, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert tensors.stat().st_size == before.st_size
    elif change == "data":
        file.write_text("\n".join([*rows[:-1], rows[-1].replace("r15", "s15")]) + "\n")
    else:
        told |= {
            "dtype": {"dtype": "bfloat16"},
            "length": {"data__row_length": 512},
            "attention": {"attention": "xla"},
            "share": {"data__share_prompts": False},
        }[change]
    probe.probe(make_config(model, tmp_path, **told), str(tmp_path / "second"))
    assert len(calls) > count


def test_features_that_are_not_finite_name_the_sample(base, tmp_path, own_features):
    model = Path(shutil.copytree(base, tmp_path / "base"))
    edit_tensors(model, **{"model.norm.weight": torch.full((LLAMA.hidden_size,), torch.nan)})
    with pytest.raises(
        UserError, match=r"the features of generated:64 train row \d+ are not finite"
    ):
        probe.probe(make_config(model, tmp_path), str(tmp_path / "model"))
    assert not list(own_features.glob("*/*.npy"))


# ---- what cannot be done ------------------------------------------------------------------------


WRONG = {
    "config.init is empty": {"init": ""},
    "config.lora.rank = 4: a probe trains the head alone": {"lora__rank": 4},
    "--fit=ridge with config.objective = 'bradley_terry'": OBJECTIVES["bradley_terry"]
    | {"objective": "bradley_terry"},
}


@pytest.mark.parametrize("message", WRONG)
def test_configs_that_cannot_be_probed_are_refused(message, base, tmp_path):
    told = WRONG[message]
    if "init" in told:
        told = told | {"model": LLAMA, "tokenizer": "bytes"}
    with pytest.raises(UserError, match=re.escape(message)):
        probe.probe(make_config(base, tmp_path, **told), str(tmp_path / "model"), "ridge")


def test_a_target_that_exists_is_refused_first(base, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "open_pretrained", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("")
    with pytest.raises(UserError, match="already exists and is not empty"):
        probe.probe(make_config(base, tmp_path), str(tmp_path / "model"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "DST is missing from the command line"),
        (("a", "b"), "unexpected argument 'b'"),
    ],
    ids=str,
)
def test_the_command_line(arguments, message):
    done = forked.run(["-m", "rmjax.probe", "--config=configs/quickstart.py", *arguments])
    assert done.returncode == 1 and message in done.stderr, done.stderr
