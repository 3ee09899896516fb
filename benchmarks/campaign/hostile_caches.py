"""Caches that somebody else wrote, and names that no file should have."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from campaign import good
from campaign.hostile_models import nested

from rmjax.data.token_cache import with_checksum

Case = tuple[str, Callable[[Path], object], list[str]]

_LONG = "a" * 5000
CONFIG = """
from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.decoder_config import DecoderConfig


def get_config(arg=None):
    return Config(
        workdir="run", tokenizer="bytes", steps=1, batch_size=4, dtype="float32", remat="none",
        data=DataConfig(train="rows.jsonl", validation="", attributes=("wit", "care")),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        model=DecoderConfig(
            vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
    )
"""
TRAIN = ["train", "--config=tiny.py"]
_EVALUATE = ["evaluate", "model", "pairs=pairs.jsonl", "--out=out"]


def write_run(directory: Path) -> None:
    """A config and its data."""
    (directory / "tiny.py").write_text(CONFIG)
    good.write_rows(directory / "rows.jsonl", _rows())


def _rows() -> list[dict[str, object]]:
    return [
        {"prompt": f"{n}?", "response": f"The answer is {n}.", "wit": n % 5, "care": 1}
        for n in range(8)
    ]


def token_cases(filled: Path, outside: Path) -> Iterator[Case]:
    """Caches of tokens: `filled` is a good one, which a run of `TRAIN` has made."""
    cache = Path(os.environ["RMJAX_CACHE"])

    def spoiled(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
        def make(directory: Path) -> None:
            write_run(directory)
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(filled, cache)
            cache.chmod(0o700)
            (entry,) = (cache / "tokens").iterdir()
            spoil(entry)
            _sign(entry)

        return make

    yield "good", spoiled(lambda entry: None), TRAIN
    (entry,) = (filled / "tokens").iterdir()
    for name in sorted(file.name for file in entry.glob("*.npy")):
        for what, spoil in _array_spoils(name, outside).items():
            yield f"tokens: {name}: {what}", spoiled(spoil), TRAIN
    for what, text in {
        "empty": "", "a list": "[]", "deep": nested(100_000), "no counts": "{}",
        "counts of texts": '{"counts": {"a": "b"}, "notes": []}',
        "notes that are none": '{"counts": {}, "notes": 5}',
    }.items():  # fmt: skip

        def put(entry: Path, text: str = text) -> None:
            (entry / "summary.json").write_text(text)

        yield f"tokens: summary.json: {what}", spoiled(put), TRAIN
    yield "tokens: summary.json: a pipe", spoiled(_pipe), TRAIN
    yield "tokens: the entry is a link", spoiled(lambda e: _link(e, outside)), TRAIN
    yield "tokens: anybody may write", spoiled(lambda e: e.parent.chmod(0o777)), TRAIN
    yield "cache: anybody may write", spoiled(lambda e: cache.chmod(0o777)), TRAIN
    yield "tokens: a link", spoiled(lambda e: _link(e.parent, outside)), TRAIN


def _sign(entry: Path) -> None:
    """Gives a summary the checksum of what is there now, as whoever means harm would."""
    summary = entry / "summary.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        if summary.is_file() and not summary.is_symlink():
            text = json.dumps(with_checksum(entry, json.loads(summary.read_text())))
            summary.write_text(text)


def _array_spoils(name: str, outside: Path) -> dict[str, Callable[[Path], object]]:
    def put(array: np.ndarray, pickled: bool = False) -> Callable[[Path], None]:
        return lambda entry: np.save(entry / name, array, allow_pickle=pickled)

    def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
        def spoil(entry: Path) -> None:
            array = change(np.load(entry / name))
            np.save(entry / name, array)

        return spoil

    def cut(entry: Path) -> None:
        data = (entry / name).read_bytes()
        (entry / name).write_bytes(data[: len(data) - 3])

    found: dict[str, Callable[[Path], object]] = {
        "missing": lambda entry: (entry / name).unlink(),
        "empty": lambda entry: (entry / name).write_bytes(b""),
        "cut": cut,
        "a pickle": put(np.asarray([{"a": os.getcwd}], object), True),
        "texts": put(np.asarray(["a", "b"])),
        "2^40 of them": lambda entry: _huge(entry / name),
        "one more": changed(lambda a: np.concatenate([a, a[-1:]])),
        "a link to outside": lambda entry: _link(entry / name, outside / "secret.txt"),
    }
    if name in ("offsets.npy", "prompt_ids.npy", "shared.npy"):
        found["negative"] = changed(lambda a: a - 10**6)
        found["beyond"] = changed(lambda a: a + 10**6)
    if name in ("labels.npy",):
        found["infinite"] = changed(lambda a: a + np.inf)
    return found


def _huge(path: Path) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i4", "fortran_order": False, "shape": (1 << 40,)}
        )


def _pipe(entry: Path) -> None:
    (entry / "summary.json").unlink()
    os.mkfifo(entry / "summary.json")


def _link(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(target)


def score_cases(model: Path, scores: Path) -> Iterator[Case]:
    """Caches of scores: `scores` is what an evaluation has left."""
    (file,) = (scores / "scores").glob("*.jsonl")
    relative, lines = file.relative_to(scores), file.read_bytes().splitlines(keepends=True)

    def planted(data: bytes) -> Callable[[Path], None]:
        def make(directory: Path) -> None:
            shutil.copytree(model, directory / "model")
            good.write_rows(directory / "pairs.jsonl", good.pair_rows(2))
            target = directory / "out" / relative
            target.parent.mkdir(parents=True)
            target.write_bytes(data)

        return make

    yield "good", planted(b"".join(lines)), _EVALUATE
    row = json.loads(lines[0])[0]
    for what, fields in {
        "NaN": {"scores": dict.fromkeys(row["scores"], float("nan"))},
        "10^400": {"scores": dict.fromkeys(row["scores"], 10**400)},
        "texts": {"scores": dict.fromkeys(row["scores"], "x\x1b[2J")},
        "a list": {"scores": [1, 2]},
        "a key that is none": {"key": []},
        "tokens that are none": {"tokens": "x\x1b[2J"},
    }.items():
        line = json.dumps([row | fields]).encode() + b"\n"
        yield f"scores: {what}", planted(line + b"".join(lines)), _EVALUATE
    for what, data in {
        "deep": nested(100_000).encode() + b"\n", "terminal codes": b"\x1b[2J\n",
        "null bytes": b"\0" * 100 + b"\n", "a huge integer": b"9" * 100_000 + b"\n",
    }.items():  # fmt: skip
        yield f"scores: {what}", planted(data), _EVALUATE


def name_cases() -> Iterator[Case]:
    """Names of files in every place of every command, of which each is told in one line."""
    yield "good", write_run, ["choose", "--help"]
    names = {
        "5,000 letters": _LONG,
        "5,000 letters in a directory": f"{_LONG}/x.py",
        "terminal codes": "\x1b[2J\u202ex",
        "..": "../../nowhere/x",
        "a file as a directory": "./rows.jsonl/x",
    }
    for what, name in names.items():
        for arguments in (
            ["train", name], ["train", f"--config={name}"], ["align", f"--config={name}"],
            ["probe", f"--config={name}", "out"], ["train", "quickstart", f"--config.init={name}"],
            ["train", "quickstart", f"--config.data.train={name}"],
            ["train", "quickstart", f"--config.tokenizer={name}"],
            ["convert", "hf-to-orbax", name, "out"], ["convert", "orbax-to-hf", name, "out"],
            ["score", name, "rows.jsonl", "out.jsonl"], ["evaluate", name, "pairs=rows.jsonl"],
            ["evaluate", "baseline:length", f"pairs={name}"],
            ["sample", name, "rows.jsonl", "out.jsonl"], ["choose", name, "out.jsonl"],
            ["report", name], ["report", f"--data={name}"], ["extrapolate", name, name, "out"],
            ["serve", name, "--port=0"],
        ):  # fmt: skip
            yield f"{what}: {' '.join(arguments).replace(name, 'NAME')}", write_run, arguments
