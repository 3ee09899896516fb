"""Conversions that are killed, interrupted or given a bad disk."""

import fcntl
import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers import forked
from helpers.checks import known
from helpers.conversions import watch, weights_of
from helpers.hf_models import edit_json, save_hf, tensors_of
from helpers.models import tiny_llama
from rmjax.checkpoints import orbax_arrays
from rmjax.checkpoints.conversion import parallel
from rmjax.checkpoints.conversion.journal import Journal
from rmjax.checkpoints.conversion.to_huggingface import ToHuggingFace
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.checkpoints.tensor_slices import TensorSlice
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.errors import UserError

DIRECTIONS = {"hf_to_orbax": (hf_to_orbax, ToOrbax), "orbax_to_hf": (orbax_to_hf, ToHuggingFace)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Each direction's source, and what an undisturbed conversion makes of it."""
    base = tmp_path_factory.mktemp("models")
    save_hf(base / "hf", dtype=torch.bfloat16, max_shard_size=20_000)
    hf_to_orbax(str(base / "hf"), str(base / "orbax"))
    orbax_to_hf(str(base / "orbax"), str(base / "back"))
    return {"hf_to_orbax": base / "hf", "orbax_to_hf": base / "orbax"} | {
        "hf_to_orbax done": base / "orbax",
        "orbax_to_hf done": base / "back",
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")], ids=repr)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_interrupted_conversion_is_continued(direction, error, models, tmp_path, monkeypatch):
    convert_it, work = DIRECTIONS[direction]
    source, target = str(models[direction]), tmp_path / "target"
    with monkeypatch.context() as patch:
        _, written = watch(patch, work, 11, error)
        with pytest.raises(type(error)) as raised:
            convert_it(source, str(target))
    assert "the same command continues it" in raised.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ["target.partial"]

    read, _ = watch(monkeypatch, work)
    notes = convert_it(source, str(target))
    assert set(read) == set(range(30)) - set(written) and len(read) == 19
    assert notes[-2].startswith("continued: ") and notes[-1] == "verified: 30 tensors"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert weights_of(target) == weights_of(models[f"{direction} done"])
    open_pretrained(str(target)).tokenizer()


def test_an_unfinished_model_is_not_taken_for_one(models, tmp_path, monkeypatch):
    for direction, (convert_it, work) in DIRECTIONS.items():
        with monkeypatch.context() as patch:
            watch(patch, work, 29)
            with pytest.raises(KeyboardInterrupt):
                convert_it(str(models[direction]), str(tmp_path / direction))
        partial = tmp_path / f"{direction}.partial"
        with pytest.raises(UserError, match="an unfinished conversion; give the same command"):
            open_pretrained(str(partial))
        with pytest.raises(UserError):
            open_pretrained(str(partial / "model"))
        assert not list(partial.rglob("model/**/config.json"))
        for file in partial.rglob("*.safetensors"):
            with pytest.raises(SafetensorError):
                load_file(file)


_KILLED = """
    import os, signal
    from rmjax import convert
    from rmjax.checkpoints.conversion.journal import Journal

    record, count = Journal.record, 0

    def dying(*arguments, **options):
        global count
        record(*arguments, **options)
        count += 1
        if count == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = dying
    convert._main()
"""


def command(direction: str, *arguments: object, killed: bool = False) -> list[object]:
    how = ["-c", textwrap.dedent(_KILLED)] if killed else ["-m", "rmjax.convert"]
    return [*how, direction.replace("_", "-"), *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_killed_conversion_is_continued(direction, models, tmp_path, monkeypatch):
    convert_it, work = DIRECTIONS[direction]
    source, target = models[direction], tmp_path / "target"
    killed = forked.run(command(direction, source, target, killed=True))
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["target.partial"]
    lines = (tmp_path / "target.partial" / "journal.jsonl").read_text().split()
    assert lines
    # As if it had been killed in the middle of a line, too.
    with open(tmp_path / "target.partial" / "journal.jsonl", "a") as journal:
        journal.write('\n{"slice": 29, "checks')

    read, _ = watch(monkeypatch, work)
    convert_it(str(source), str(target))
    assert len(read) <= 24  # six were done, or more
    assert weights_of(target) == weights_of(models[f"{direction} done"])


@pytest.fixture
def begun(models, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A source of our own, and a target whose conversion was interrupted."""
    source = Path(shutil.copytree(models["hf_to_orbax"], tmp_path / "hf"))
    with monkeypatch.context() as patch:
        watch(patch, ToOrbax, 11)
        with pytest.raises(KeyboardInterrupt):
            hf_to_orbax(str(source), str(tmp_path / "target"))
    return source, tmp_path / "target"


def test_a_source_that_has_changed_is_begun_anew(begun, monkeypatch):
    source, target = begun
    file = sorted(source.glob("*.safetensors"))[0]
    tensors = {key: tensor + 1 for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})  # of the same size and header
    read, _ = watch(monkeypatch, ToOrbax)
    notes = hf_to_orbax(str(source), str(target))
    assert len(read) == 30
    assert any("had other files of the source" in note for note in notes)
    orbax_to_hf(str(target), str(target.parent / "back"))
    assert tensors_of(target.parent / "back") == tensors_of(source)


def test_other_arguments_are_another_conversion(begun, tmp_path):
    source, target = begun
    edit_json(source / "config.json", id2label={str(n): f"name{n}" for n in range(5)})
    notes = hf_to_orbax(str(source), str(target))
    assert any("begun anew" in note and "model" in note for note in notes)
    assert known(open_pretrained(str(target)).spec).attributes[0] == "name0"


def test_a_kill_while_it_is_prepared_begins_anew(begun, models, monkeypatch):
    """The plan is what comes last."""
    source, target = begun
    partial = target.with_name("target.partial")
    (partial / "plan.json").unlink()
    (partial / "model" / "left.safetensors").write_text("half")
    read, _ = watch(monkeypatch, ToOrbax)
    notes = hf_to_orbax(str(source), str(target))
    assert len(read) == 30 and not any("begun anew" in note for note in notes)
    assert weights_of(target) == weights_of(models["hf_to_orbax done"])


def test_what_is_running_is_not_disturbed(begun):
    source, target = begun
    journal = target.with_name("target.partial") / "journal.jsonl"
    with open(journal, "a") as running:  # a lock of another open file is as another process's
        fcntl.flock(running, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a conversion to this target is running"):
            hf_to_orbax(str(source), str(target))
        edit_json(source / "config.json", id2label={str(n): f"name{n}" for n in range(5)})
        with pytest.raises(UserError, match="a conversion to this target is running"):
            hf_to_orbax(str(source), str(target))
        assert journal.exists()


def test_a_source_that_ends_early_is_one_message(begun, monkeypatch):
    """Cut short after it was opened, as by a download that starts again."""
    source, target = begun
    last = sorted(source.glob("*.safetensors"))[-1]
    original = ToOrbax.__init__

    def cutting(self, *arguments):
        original(self, *arguments)
        os.truncate(last, last.stat().st_size - 100)

    monkeypatch.setattr(ToOrbax, "__init__", cutting)
    with pytest.raises(UserError, match=rf"{last}: ends before byte \d+"):
        hf_to_orbax(str(source), str(target))
    assert not target.exists()


# ---- what is written is read back ---------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_write_is_found_and_mended(direction, models, tmp_path, monkeypatch):
    """A bit that flips on its way to the disk, and a block that lands in the wrong place."""
    convert_it, work = DIRECTIONS[direction]
    original, key = work.write, "model.layers.1.mlp.up_proj.weight"

    def wrong(self, model, part: TensorSlice, block):
        if part.key == key:
            block = block.copy()
            block.reshape(-1).view(np.uint8)[77] ^= 1
        original(self, model, part, block)

    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(work, "write", wrong)
        with pytest.raises(UserError, match=rf"tensor '{key}' read back from .* is not what"):
            convert_it(str(models[direction]), str(target))
    assert not target.exists()
    read, _ = watch(monkeypatch, work)
    convert_it(str(models[direction]), str(target))
    assert len(read) == 1  # that one alone is converted again
    assert weights_of(target) == weights_of(models[f"{direction} done"])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_file_that_rots_before_the_end_is_found(direction, models, tmp_path, monkeypatch):
    convert_it, work = DIRECTIONS[direction]
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_THREADS", 1)  # so that the first part is the first written
        watch(patch, work, 29)
        with pytest.raises(KeyboardInterrupt):
            convert_it(str(models[direction]), str(tmp_path / "target"))
    model = tmp_path / "target.partial" / "model"
    files = [f for f in model.rglob("*") if "embed/c/" in str(f) or f.suffix == ".safetensors"]
    flip(next(f for f in sorted(files) if f.is_file()), 5000)
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight' read back"):
        convert_it(str(models[direction]), str(tmp_path / "target"))
    convert_it(str(models[direction]), str(tmp_path / "target"))
    assert weights_of(tmp_path / "target") == weights_of(models[f"{direction} done"])


# ---- slices -------------------------------------------------------------------------------------


def test_tensors_larger_than_a_piece_are_cut(tmp_path, monkeypatch):
    """Every tensor in several files and ranges, some uneven: still the same bits."""
    from rmjax.checkpoints.conversion import to_huggingface

    monkeypatch.setattr(orbax_arrays, "FILE_BYTES", 700)
    monkeypatch.setattr(orbax_arrays, "CHUNK_BYTES", 100)
    monkeypatch.setattr(to_huggingface, "SLICE_BYTES", 600)
    monkeypatch.setattr(to_huggingface, "_LARGEST_SLICE", 900)
    decoder = tiny_llama(vocab_size=263, intermediate_size=61, attention_bias=True, mlp_bias=True)
    source = save_hf(tmp_path / "hf", decoder, dtype=torch.bfloat16, max_shard_size=20_000)
    read, _ = watch(monkeypatch, ToOrbax)
    hf_to_orbax(str(source), str(tmp_path / "orbax"))
    assert len(read) > 100
    read, _ = watch(monkeypatch, ToHuggingFace)
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert len(read) > 100
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_what_is_in_flight_is_bounded_by_bytes(models, tmp_path, monkeypatch):
    limit = 20_000
    monkeypatch.setattr(parallel, "_IN_FLIGHT_BYTES", limit)
    flying: dict[int, int] = {}
    most = 0
    original_read, original_write = ToOrbax.read, ToOrbax.write

    def reading(self, part):
        nonlocal most
        flying[part.number] = part.nbytes
        most = max(most, sum(list(flying.values())))
        return original_read(self, part)

    def writing(self, model, part, block):
        original_write(self, model, part, block)
        del flying[part.number]

    monkeypatch.setattr(ToOrbax, "read", reading)
    monkeypatch.setattr(ToOrbax, "write", writing)
    hf_to_orbax(str(models["hf_to_orbax"]), str(tmp_path / "target"))
    assert 0 < most <= limit


def test_without_a_terminal_progress_is_a_few_lines(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "_LINE_SECONDS", 0.0)
    hf_to_orbax(str(models["hf_to_orbax"]), str(tmp_path / "target"))
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) <= 20
    assert all("GB/s" in line and "s left" in line for line in lines)
    assert lines[0].startswith("hf-to-orbax: ") and lines[-1].startswith("verifying: ")


def test_a_journal_says_what_came_last(begun):
    """A slice that was found wrong is not done."""
    _, target = begun
    partial = target.with_name("target.partial")
    text = (partial / "journal.jsonl").read_text()
    done = [json.loads(line) for line in text.split("\n") if line]
    assert len(done) == 11
    with open(partial / "journal.jsonl", "a+b", buffering=0) as file:
        file.write(b"\n" + json.dumps(done[0] | {"checksum": None}).encode())
        records = Journal(partial, target, file).records
    assert set(records) == {line["slice"] for line in done[1:]}
