"""How long a run takes to begin, and in how much memory, with many samples.

    python benchmarks/data_scale.py [--samples=100000] [--format=jsonl] [--kind=ratings]

It makes conversations of one turn, two responses to a prompt, whose lengths are spread as those of
chats are (log-normal, 20 and 60 words in the middle), and a tokenizer of 4,096 tokens from them.
Then it does what a run does before its first step: tokens, the plan of an epoch, the choice of
rows, the rows of every step. Memory is what the process holds of its own (`RssAnon`), looked at
every 20 ms, less what it held when the data were opened; the tokens are on the disk. Memory and
CPU seconds of processes that help with tokens are not counted. The whole again with tokens in the
cache.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from rmjax.config import Config
from rmjax.data.batches import training_batches
from rmjax.data.planning import plan_steps
from rmjax.data.tokenizer import BYTES_TEMPLATE, load_tokenizer
from rmjax.models.presets import quickstart
from rmjax.runtime.sharding import Sharding, make_mesh
from rmjax.training.config_file import load_config
from rmjax.training.datasets import load_data
from rmjax.training.experiment import make_model
from rmjax.training.rows import run_shapes

_FORMATS = ("jsonl", "parquet", "arrow")
_BLOCK = 10_000  # rows made at once


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--format", choices=_FORMATS, default="jsonl")
    parser.add_argument("--kind", choices=("ratings", "pairs", "sft"), default="ratings")
    parser.add_argument("--directory", type=Path, help="keeps the data and the cache there")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ["RMJAX_CACHE"] = str(scratch / "cache")
        source = write_data(scratch, args.samples, args.format, args.kind)
        tokenizer = write_tokenizer(scratch / "tokenizer")
        print("| stage | seconds | CPU s | peak MiB | MiB then | bytes a sample |")
        print("|---|---:|---:|---:|---:|---:|")
        for again in ("", ", again"):
            for line in begin(source, tokenizer, args.kind, again):
                print(line, flush=True)


def begin(source: Path, tokenizer_path: Path, kind: str, again: str) -> Iterator[str]:
    """What a run does before its first step; a row of the table for each part."""
    config = _config(source, tokenizer_path, kind)
    sharding = Sharding(make_mesh(config.mesh))
    tokenizer = load_tokenizer(tokenizer_path)
    model = make_model(config, None, sharding)
    base = _held()
    with _watched(base) as seen:
        data, _ = load_data(config, tokenizer, config.data.share_prompts)
    count = len(data)
    yield seen.row(f"tokens{again}", count)
    with _watched(base) as seen:
        plan = plan_steps(data, batch_size=config.batch_size, seed=0, epochs=config.epochs)
    yield seen.row(f"plan of {len(plan):,} steps{again}", count)
    with _watched(base) as seen:
        shapes = run_shapes(config, model, data, None)
    yield seen.row(f"choice of {len(shapes)} shapes{again}", count)
    with _watched(base) as seen:
        batches = training_batches(data, plan, *shapes)
    yield seen.row(f"rows of {len(batches):,} steps{again}", count)
    with _watched(base) as seen:
        for step in range(min(len(batches), 100)):
            batches[step]
    yield seen.row(f"arrays of 100 steps{again}", count)
    yield f"| {count:,} samples, {len(data.tokens) / count:.0f} tokens each | | | | | |"


def _config(source: Path, tokenizer: Path, kind: str) -> Config:
    config = load_config("quickstart")
    objective = {"ratings": "regression", "pairs": "bradley_terry", "sft": "sft"}[kind]
    attributes = () if kind == "sft" else ("quality",)
    data = dataclasses.replace(
        config.data, train=str(source), validation="", max_length=1024, attributes=attributes
    )
    model = dataclasses.replace(quickstart(), vocab_size=4096, max_position_embeddings=2048)
    return dataclasses.replace(
        config, data=data, model=model, tokenizer=str(tokenizer), objective=objective,
        batch_size=128, rows_per_device=8,
    )  # fmt: skip


# ---- what is measured ----------------------------------------------------------------------------


@dataclasses.dataclass
class _Seen:
    """What a part of the work took."""

    base: int
    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    after: int = 0

    def row(self, name: str, count: int) -> str:
        """A row of the table."""
        sample = max(0, self.peak - self.base) / count
        mib = [(x - self.base) / 2**20 for x in (self.peak, self.after)]
        return (
            f"| {name} | {self.seconds:.1f} | {self.cpu:.1f} | {mib[0]:,.0f} | {mib[1]:,.0f} "
            f"| {sample:,.0f} |"
        )


@contextlib.contextmanager
def _watched(base: int) -> Iterator[_Seen]:
    seen, done = _Seen(base), threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            seen.peak = max(seen.peak, _held())

    thread = threading.Thread(target=look)
    thread.start()
    began, used = time.monotonic(), time.process_time()
    yield seen
    seen.seconds, seen.cpu = time.monotonic() - began, time.process_time() - used
    done.set()
    thread.join()
    seen.after = _held()
    seen.peak = max(seen.peak, seen.after)


def _held() -> int:
    """Bytes of memory that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


# ---- the data ------------------------------------------------------------------------------------


def write_data(scratch: Path, samples: int, kind: str, what: str) -> Path:
    """A file of so many samples, the same whenever it is made."""
    path = scratch / f"{what}-{samples}.{kind}"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    words = _words(rng)
    if kind == "jsonl":
        with open(path, "w") as file:
            for rows in _blocks(rng, words, samples, what):
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return path
    import pyarrow as pa
    from pyarrow import parquet

    writer: Any = None
    for rows in _blocks(rng, words, samples, what):
        table = pa.Table.from_pylist(rows)
        if writer is None and kind == "parquet":
            writer = parquet.ParquetWriter(path, table.schema)
        elif writer is None:
            writer = pa.ipc.new_file(str(path), table.schema)
        writer.write_table(table)
    writer.close()
    return path


def _words(rng: np.random.Generator) -> list[str]:
    letters = np.asarray(list("etaoinshrdlucmfwypvbgk"))
    return ["".join(rng.choice(letters, size=n)) for n in rng.integers(2, 10, size=5000)]


def _blocks(
    rng: np.random.Generator, words: list[str], samples: int, what: str
) -> Iterator[list[dict[str, Any]]]:
    """Rows in blocks: two responses to a prompt, each a row, or both a pair."""

    def text(median: int) -> str:
        length = int(np.clip(rng.lognormal(np.log(median), 0.7), 3, 500))
        # Frequent words are frequent, as in language.
        picked = (rng.random(length) ** 3 * len(words)).astype(int)
        return " ".join(words[i] for i in picked)

    def one(number: int) -> list[dict[str, Any]]:
        prompt, a, b = f"{number} {text(20)}", text(60), text(60)
        if what == "pairs":
            return [{"prompt": prompt, "chosen": a, "rejected": b}]
        return [
            {"prompt": prompt, "response": x, "quality": int(rng.integers(0, 5))} for x in (a, b)
        ]

    for begin in range(0, samples // 2, _BLOCK):
        numbers = range(begin, min(begin + _BLOCK, samples // 2))
        yield [row for number in numbers for row in one(number)]


def write_tokenizer(path: Path) -> Path:
    """A byte-level BPE of 4,096 tokens, learned from such words."""
    if (path / "tokenizer.json").exists():
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    words = _words(rng)
    texts = [row["prompt"] for rows in _blocks(rng, words, 2000, "pairs") for row in rows]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[3:],
        chat_template=BYTES_TEMPLATE,
    ).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
