"""Hostile and broken files: each must end in one clear line, soon, in little memory, without harm.

Every case is run twice as long and large as it may be before it is stopped, so that what is a bit
over its limit is told from what never ends.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from campaign import forks, good, hostile_caches, hostile_data, hostile_models
from campaign.ledger import Row

SECONDS = 20.0
BYTES = 1 << 30  # beyond what the good file takes
# What a terminal would obey, and what changes the direction of text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Damage that the format cannot show, or that leaves a good file: it may be read.
_MAY_BE_READ = re.compile(
    r"\(may be read\)|a byte of the header|flipped|a template with (messages|a refusal)"
    r"|rmjax\.json: |tokenizer_config|a huge integer|a deep prompt"
    r"|a pattern without end|a null byte"
    # A cache whose summary has no checksum is made again.
    r"|^tokens: summary.json: (empty|a list|deep)$"
    # Fields that need not be there, or of which the value is one of those that mean nothing.
    r"|(head_dim|num_key_value_heads|rope_\w+|id2label|num_labels|layer_types|tie_\w+) 'None'"
    r"|rope_\w+ '{}'|tie_word_embeddings 'True'"
    r"|(rope_theta|max_position_embeddings|rms_norm_eps) '(0\.5|1000000000)'"
)
_HARM = "secret that lies outside"


def run(seed: int, minutes: float, scratch: Path, show: Callable[[str], None]) -> list[Row]:
    """Tries every case, as far as the minutes go, those of each kind in turn."""
    end = time.monotonic() + 60 * minutes
    outside = scratch / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(_HARM)
    model = good.write_huggingface(scratch / "good")
    shutil.copy(model / "model.safetensors", outside)
    rows = []
    kinds = _kinds(seed, scratch, model, outside)
    for number, (promise, kind) in enumerate(kinds.items()):
        now = time.monotonic()
        until = now + (end - now) / (len(kinds) - number)  # what one leaves, the next ones have
        row = Row("hostile files", promise)
        rows.append(row)
        baseline = None
        for name, make, arguments in kind:
            if baseline is None:  # the first of each kind is the good one
                baseline = _tried(scratch, make, arguments, outside, 1 << 62)
                if baseline.code != 0:
                    raise SystemExit(f"the good file is refused: {promise}: {baseline.text}")
                continue
            if time.monotonic() > until:
                show(f"{promise}: no time left for more than {row.tried}")
                break
            most = baseline.peak + 2 * BYTES
            ended = _tried(scratch, make, arguments, outside, most)
            fault = _fault(name, ended, baseline.peak + BYTES, scratch)
            row.count(f"{name}: {fault}" if fault else "")
            last = ended.text.strip().splitlines()[-1:] or [""]
            more = (ended.peak - baseline.peak) >> 20
            show(f"{'LOST' if fault else 'ok':<4} {name}: {ended.code}, {ended.seconds:.1f} s")
            show(f"     {more:+} MiB {fault} {last[0][-160:]!r}")
    return rows


def _kinds(
    seed: int, scratch: Path, model: Path, outside: Path
) -> dict[str, Iterator[tuple[str, Callable[[Path], object], list[str]]]]:
    """By promise the cases, each with what makes it and the command that meets it."""
    convert = ["convert", "hf-to-orbax", "model", "out"]
    score = ["score", "model", "../rows.jsonl", "out.jsonl"]
    good.write_rows(scratch / "rows.jsonl", good.pair_rows(2))
    orbax = scratch / "orbax"
    made = forks.run(["convert", "hf-to-orbax", str(model), str(orbax)], scratch)
    if made.code:
        raise SystemExit(made.text)
    gguf = good.write_gguf(scratch / "model.gguf")

    def spoiled(source: Path, cases: Iterator[hostile_models.Case], arguments: list[str]):
        yield "good", lambda d: shutil.copytree(source, d / "model"), arguments
        for name, spoil in cases:

            def make(d: Path, spoil: hostile_models.Spoil = spoil) -> None:
                shutil.copytree(source, d / "model")
                spoil(d / "model")

            yield name, make, arguments

    def gguf_cases():
        data = gguf.read_bytes()
        arguments = ["convert", "hf-to-orbax", "model.gguf", "out"]

        def put(content: bytes) -> Callable[[Path], object]:
            def make(d: Path) -> None:
                (d / "model.gguf").write_bytes(content)
                for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                    shutil.copy(model / name, d)

            return make

        yield "good", put(data), arguments
        import random

        rng = random.Random(seed)
        for number in range(15):
            yield f"gguf: cut {number}", put(data[: int(rng.random() * 2000)]), arguments
        for number in range(25):
            changed = bytearray(data)
            changed[rng.randrange(24, 1200)] ^= 0xFF
            yield f"gguf: a byte changed {number} (may be read)", put(bytes(changed)), arguments
        for what, at, value in (
            ("version", 4, 9), ("10^9 tensors", 8, 10**9), ("2^63 tensors", 8, 2**63),
            ("10^9 fields", 16, 10**9), ("a key of 2^62 bytes", 24, 2**62),
        ):  # fmt: skip
            size = 4 if at == 4 else 8
            new = data[:at] + value.to_bytes(size, "little") + data[at + size :]
            yield f"gguf: {what}", put(new), arguments

    def data_cases():
        arguments = ["evaluate", "baseline:length", "pairs=pairs.jsonl", "--out=out"]
        yield (
            "good",
            lambda d: good.write_rows(d / "pairs.jsonl", good.pair_rows()) and None,
            (arguments),
        )
        for name, file, make in hostile_data.data_cases(seed):
            yield name, make, [*arguments[:2], f"pairs={file}", "--out=out"]

    return {
        "safetensors": spoiled(model, hostile_models.safetensors_cases(seed), score),
        "config.json": spoiled(model, hostile_models.config_cases(seed), convert),
        "index files, pickles": spoiled(model, hostile_models.index_cases(outside), convert),
        "rmjax.json": spoiled(model, hostile_models.spec_cases(seed), convert),
        "tokenizers": spoiled(model, hostile_models.tokenizer_cases(), score),
        "chat templates": spoiled(model, hostile_models.template_cases(), score),
        "GGUF": gguf_cases(),
        "Orbax": spoiled(
            orbax, hostile_models.orbax_cases(seed), ["convert", "orbax-to-hf", "model", "out"]
        ),
        "data": data_cases(),
        **_caches(scratch, model, outside),
        "names of files": hostile_caches.name_cases(),
    }


def _caches(scratch: Path, model: Path, outside: Path) -> dict[str, Iterator[hostile_caches.Case]]:
    """Caches, of which good ones are made first."""
    made = scratch / "made"
    made.mkdir()
    hostile_caches.write_run(made)
    shutil.copytree(model, made / "model")
    good.write_rows(made / "pairs.jsonl", good.pair_rows(2))
    cache, filled = Path(os.environ["RMJAX_CACHE"]), scratch / "filled"
    shutil.rmtree(cache, ignore_errors=True)
    for arguments in (
        hostile_caches.TRAIN,
        ["evaluate", "model", "pairs=pairs.jsonl", "--out=out"],
    ):
        ended = forks.run(arguments, made)
        if ended.code:
            raise SystemExit(ended.text)
    shutil.copytree(cache, filled)
    return {
        "caches of tokens": hostile_caches.token_cases(filled, outside),
        "caches of scores": hostile_caches.score_cases(model, made / "out"),
    }


def _tried(
    scratch: Path, make: Callable[[Path], object], arguments: list[str], outside: Path, most: int
) -> forks.Ended:
    directory = scratch / "case"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    make(directory)
    ended = forks.run(arguments, directory, seconds=2 * SECONDS, most_bytes=most, forbidden=outside)
    if list(scratch.rglob("ran")):
        return forks.Ended(98, "FORBIDDEN: ran code", ended.seconds, ended.peak)
    return ended


def _fault(name: str, ended: forks.Ended, most: int, scratch: Path) -> str:
    """What is wrong with how a case ended; empty for nothing."""
    faults = []
    if "FORBIDDEN" in ended.text or _HARM in ended.text:
        faults.append(ended.text[ended.text.find("FORBIDDEN") :][:200])
    if ended.limit or ended.seconds > SECONDS:
        faults.append(f"not done after {ended.seconds:.0f} s ({ended.limit})")
    if ended.peak > most:
        faults.append(f"{(ended.peak - most + BYTES) >> 20} MiB")
    if "Traceback" in ended.text or (ended.code or 0) < 0 or ended.code in (70, 71):
        lines = ended.text.strip().splitlines() or [""]
        faults.append(f"status {ended.code}, {lines[-1][:200]!r}")
    elif ended.code == 0 and not _MAY_BE_READ.search(name):
        faults.append("it is read as if it were good")
    elif ended.code and ended.text.count("error: ") < 1:
        faults.append(f"no line says why: {ended.text[-200:]!r}")
    if unsafe := _UNSAFE.search(ended.text):
        faults.append(f"writes {unsafe[0]!r} to the terminal")
    if any(len(line) > 4000 for line in ended.text.splitlines()):
        faults.append("a line of more than 4,000 characters")
    with contextlib.suppress(OSError):
        if sorted(p.name for p in (scratch / "outside").iterdir()) != [
            "model.safetensors", "secret.txt"]:  # fmt: skip
            faults.append("something outside was written")
    return "; ".join(faults)
