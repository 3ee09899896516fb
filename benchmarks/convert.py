"""Time and peak memory of conversion, against `cp` of the same bytes in the same run.

    python benchmarks/convert.py --shape=8b                 # 16 GB; three times as much on the disk
    python benchmarks/convert.py --shape=70b --layers=2
    python benchmarks/convert.py --shape=405b --layers=1
    python benchmarks/convert.py --shape=tiny               # a smoke test

Makes a reward model of that shape with random bfloat16 weights, copies it with `cp -r`, converts
it to Orbax and back, each in a process of its own, and compares every tensor's bytes at the end.
Each step begins with what is on the disk and not in the kernel's memory, as far as the kernel
agrees to forget it, and ends when its output is on the disk. Peak memory is what the kernel counts
for the process (VmHWM, so on Linux only).
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape
from rmjax.checkpoints.hf_weights import SafetensorsWeights
from rmjax.checkpoints.model_files import write_model_files
from rmjax.checkpoints.safetensors_file import (
    create_file,
    file_layout,
    forget,
    write_header,
    write_range,
)
from rmjax.checkpoints.tensor_slices import cut
from rmjax.config import HELPSTEER2
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import RewardHead, model_parameters, model_sizes
from rmjax.models.rewards.spec import RewardSpec

_BUFFER = 64 << 20
_FILE_BYTES = 5_000_000_000
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# vocab, hidden, mlp, layers, heads, kv heads of Llama 3.1's models.
SHAPES = {
    "tiny": (512, 64, 128, 2, 4, 2),
    "8b": (128256, 4096, 14336, 32, 32, 8),
    "70b": (128256, 8192, 28672, 80, 64, 8),
    "405b": (128256, 16384, 53248, 126, 128, 8),
}


def llama_config(shape: str, layers: int) -> DecoderConfig:
    """The config of a shape, with that many layers (0: all)."""
    vocab, hidden, mlp, all_layers, heads, kv_heads = SHAPES[shape]
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
    )


def make_model(directory: Path, decoder: DecoderConfig) -> int:
    """Writes a model of random weights; returns its bytes."""
    spec = RewardSpec(HELPSTEER2, {"helpfulness": 1.0})
    write_model_files(directory, decoder, byte_tokenizer(), spec, dtype="bfloat16")
    head = RewardHead(len(HELPSTEER2))
    sizes = model_sizes(decoder, head)
    tensors = [
        (key, hf_shape(row, sizes), _BFLOAT16)
        for row in model_parameters(decoder, head)
        for key in hf_keys(row, decoder)
    ]
    total, rng = 0, np.random.default_rng(0)
    files: list[list[tuple[str, tuple[int, ...], np.dtype]]] = [[]]
    for tensor in tensors:
        if files[-1] and file_layout([*files[-1], tensor]).size > _FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    for number, some in enumerate(files, start=1):
        path = directory / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        layout = file_layout(some)
        create_file(path, layout)
        for key, shape, _ in some:
            size = int(np.prod(shape))
            for start, stop in cut(size, _BUFFER // 2):
                # Random signs and mantissas, and exponents as weights have them.
                bits = np.frombuffer(rng.bytes(2 * (stop - start)), np.uint16) & 0x81FF | 0x3A00
                write_range(path, layout.offsets[key] + 2 * start, bits)
        write_header(path, layout)
        total += layout.size
    return total


@dataclasses.dataclass
class Step:
    """What was measured of one command: seconds and bytes of memory."""

    seconds: float
    peak: int


def measure(command: list[str]) -> Step:
    """Runs a command to its end, its output on the disk."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    os.sync()
    return Step(time.perf_counter() - started, peak)


def high_water(process: int) -> int:
    """The most memory a process has had so far, as the kernel counts it (VmHWM)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def forget_tree(directory: Path) -> None:
    """Asks the kernel to forget the contents of all files."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                forget(file.fileno())


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two models have the same tensors to the bit."""
    ours, theirs = SafetensorsWeights(first), SafetensorsWeights(second)

    def described(weights: SafetensorsWeights) -> dict[str, object]:
        return {key: (weights.dtype(key), weights.shape(key)) for key in weights.keys()}  # noqa: SIM118

    if described(ours) != described(theirs):
        return False
    for key in ours.keys():  # noqa: SIM118
        rows, *rest = ours.shape(key)
        for band in cut(rows, max(1, _BUFFER // (2 * int(np.prod(rest))))):
            if (
                ours.read(key, [slice(*band)]).tobytes()
                != theirs.read(key, [slice(*band)]).tobytes()
            ):
                return False
    return True


@contextlib.contextmanager
def workplace(parent: str | None) -> Iterator[Path]:
    """A directory of our own, gone at the end."""
    directory = Path(tempfile.mkdtemp(prefix="convert-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=0, help="that many instead of all")
    parser.add_argument("--workdir", help="where to put what is measured (default: temporary)")
    args = parser.parse_args()
    rmjax = [sys.executable, "-m", "rmjax.convert"]
    with workplace(args.workdir) as directory:
        source, copy, orbax, back = (directory / n for n in ("hf", "copy", "orbax", "back"))
        size = make_model(source, llama_config(args.shape, args.layers))
        steps = {}
        forget_tree(source)
        steps["cp -r"] = measure(["cp", "-r", str(source), str(copy)])
        shutil.rmtree(copy)
        forget_tree(source)
        steps["hf-to-orbax"] = measure([*rmjax, "hf-to-orbax", str(source), str(orbax)])
        forget_tree(orbax)
        steps["orbax-to-hf"] = measure([*rmjax, "orbax-to-hf", str(orbax), str(back)])
        files = sum(path.is_file() for path in orbax.rglob("*"))
        same = same_tensors(source, back)
    table = Table("", "s", "GB/s", "times cp", "peak MiB")
    for name, step in steps.items():
        table.add_row(
            name,
            f"{step.seconds:.1f}",
            f"{size / 1e9 / step.seconds:.2f}",
            f"{step.seconds / steps['cp -r'].seconds:.2f}",
            f"{step.peak >> 20}",
        )
    console = Console(highlight=False)
    console.print(table)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(f"{size / 1e9:.2f} GB; the Orbax model is {files} files; load average {load}")
    console.print("round trip byte for byte the same" if same else "ROUND TRIP DIFFERS")
    sys.exit(not same)


if __name__ == "__main__":
    main()
