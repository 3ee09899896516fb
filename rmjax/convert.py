"""Conversion between Hugging Face's format and Orbax models, both ways and bit for bit.

    python -m rmjax.convert hf-to-orbax SRC DST [--attributes=a,b] [--seed=0]
    python -m rmjax.convert hf-to-orbax SRC DST --language-model
    python -m rmjax.convert orbax-to-hf SRC DST [--dtype=bfloat16]
    python -m rmjax.convert orbax-to-peft SRC DST

The last exports the adapters and the head of a run with LoRA; orbax-to-hf merges them instead.

All of them stream: a few slices of at most 64 MiB are in memory at a time, whatever the model's
size. DST appears under its name only when it is complete and has been read back and compared with
the source. Until then DST.partial stands beside it, and the same command continues it after a kill.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.to_huggingface import ToHuggingFace
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.hf_weights import check_tensors
from rmjax.checkpoints.model_files import CAUSAL, write_adapter_config, write_model_files
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained, public_name
from rmjax.checkpoints.safetensors_file import DTYPES
from rmjax.config import HELPSTEER2
from rmjax.errors import UserError, exit_with_message
from rmjax.models.decoder_config import NO_LORA, LlamaConfig
from rmjax.models.heads import RewardHead
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.memory import keep_freed_memory

_SHARD_BYTES = 5_000_000_000


def hf_to_orbax(
    src: str,
    dst: str,
    *,
    attributes: Sequence[str] = HELPSTEER2,
    seed: int = 0,
    language_model: bool = False,
) -> list[str]:
    """Converts a Hugging Face directory, hub id or GGUF file to an Orbax model.

    A classification model keeps its head and its names. A causal model gets a fresh reward head,
    or keeps its own with `language_model`.

    Args:
      src: what to convert.
      dst: directory to make; must not exist or be empty.
      attributes: names of the fresh head's outputs.
      seed: of the fresh head.
      language_model: make no reward model of a causal model.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the source does not match its config, or the target is not empty.
    """
    _check_names(attributes)
    source = open_pretrained(src)
    if isinstance(source.weights, Path):
        raise UserError(f"{src}: already an Orbax model or a run; the other way is orbax-to-hf")
    tokenizer, notes, head = source.tokenizer(), [], None
    if language_model:
        return _language_model_to_orbax(source, dst)
    if source.spec:
        spec = dataclasses.replace(source.spec, source=public_name(src))
        notes.append(f"head kept: {', '.join(spec.attributes)}")
    else:
        spec = RewardSpec(
            tuple(attributes), {attributes[0]: 1.0}, seed=seed, source=public_name(src)
        )
        head = _fresh_head(source.llama, len(spec.attributes), seed)
        notes.append(f"fresh head, seed {seed}: {', '.join(spec.attributes)}")
    if source.unused:
        shown = ", ".join(source.unused[:3])
        notes.append(f"left out, a reward model has no use for them: {shown}")
    work = ToOrbax(source.weights, source.llama, RewardHead(len(spec.attributes)), head)
    plan = {"command": "hf-to-orbax", "model": dataclasses.asdict(spec)}

    def write_files(files: Path) -> None:
        write_model_files(files, source.llama, tokenizer, spec)

    return notes + convert_slices(work, [source], dst, plan, write_files)


def _language_model_to_orbax(source: Pretrained, dst: str) -> list[str]:
    assert not isinstance(source.weights, Path)
    if source.spec:
        raise UserError(f"{source.name}: a reward model, which has no language-model head")
    check_tensors(source.weights, source.llama, source.head)
    tokenizer = source.tokenizer()
    work = ToOrbax(source.weights, source.llama, source.head)
    plan = {"command": "hf-to-orbax", "model": CAUSAL}

    def write_files(files: Path) -> None:
        write_model_files(files, source.llama, tokenizer, None)

    tied = "the embedding" if source.llama.tie_word_embeddings else "lm_head"
    return [
        f"language model kept; head: {tied}",
        *convert_slices(work, [source], dst, plan, write_files),
    ]


def orbax_to_hf(
    src: str, dst: str, *, dtype: str | None = None, shard_bytes: int = _SHARD_BYTES
) -> list[str]:
    """Exports an Orbax model or a run's best checkpoint.

    A reward model becomes a `LlamaForSequenceClassification`, a language model a
    `LlamaForCausalLM`.

    Args:
      src: an Orbax model or a run.
      dst: directory to make; must not exist or be empty.
      dtype: of the weights except the head; the stored one if not given.
      shard_bytes: most bytes of one safetensors file.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the source is incomplete, or the target is not empty.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: there are {', '.join(DTYPES)}")
    source, params = _open_orbax(src)
    tokenizer, lora, spec = source.tokenizer(), source.lora, source.spec
    work = ToHuggingFace(params, source.llama, source.head, dtype, shard_bytes, lora)
    plan = {
        "command": "orbax-to-hf",
        "model": dataclasses.asdict(spec) if spec else CAUSAL,
        "dtype": work.dtype.name,
        "shard_bytes": shard_bytes,
    }

    def write_files(files: Path) -> None:
        merged = dataclasses.replace(spec, lora=NO_LORA) if spec else None
        write_model_files(files, source.llama, tokenizer, merged, dtype=work.dtype.name)

    notes = [
        f"{work.dtype.name}, {len(work.keys)} tensors in {work.files} file(s); head: "
        + (", ".join(spec.attributes) if spec else "language model")
    ]
    if lora.rank:
        notes.append(f"merged into the weights: adapters for {', '.join(lora.targets)}")
    return notes + convert_slices(work, [source], dst, plan, write_files)


def orbax_to_peft(src: str, dst: str) -> list[str]:
    """Exports the adapters and the head of a run with LoRA in PEFT's format, float32.

    PEFT adds them to the model that the run began from, which is not part of the export.

    Args:
      src: the run.
      dst: directory to make; must not exist or be empty.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the run has no adapters, or is incomplete; or the target is not empty.
    """
    source, params = _open_orbax(src)
    spec = source.spec
    if not spec or not source.lora.rank:
        raise UserError(f"{src}: trained without LoRA, so it has no adapters; use orbax-to-hf")
    if not spec.source:
        raise UserError(
            f"{src}: began from random weights, which nobody else has and adapters are of no use "
            "without; use orbax-to-hf"
        )
    tokenizer = source.tokenizer()
    work = ToHuggingFace(
        params, source.llama, source.head, None, sys.maxsize, source.lora, adapter=True
    )
    plan = {"command": "orbax-to-peft", "model": dataclasses.asdict(spec)}

    def write_files(files: Path) -> None:
        write_model_files(files, source.llama, tokenizer, spec)
        write_adapter_config(files, spec)

    notes = [f"{len(work.keys)} tensors for {spec.source}; head: {', '.join(spec.attributes)}"]
    return notes + convert_slices(work, [source], dst, plan, write_files)


def _open_orbax(src: str) -> tuple[Pretrained, Path]:
    """An Orbax model or a run, and its arrays' directory; or a `UserError`."""
    source = open_pretrained(src)
    if not isinstance(source.weights, Path):
        raise UserError(f"{src}: not an Orbax model and not a run; the other way is hf-to-orbax")
    return source, source.weights / "params"


def _check_names(attributes: Sequence[str]) -> None:
    """Raises a `UserError` unless every output has a name of its own."""
    if not attributes or not all(name.strip() == name != "" for name in attributes):
        raise UserError(f"attributes {list(attributes)}: expected names, separated by a comma each")
    if len(set(attributes)) < len(attributes):
        raise UserError(f"attributes {list(attributes)}: a name is there twice")


def _fresh_head(llama: LlamaConfig, attributes: int, seed: int) -> np.ndarray:
    """The head that training from the same source with the same seed would start from."""
    # Here, since only a causal model needs them and flax takes long to import.
    import jax

    from rmjax.models.init import random_head
    from rmjax.models.layers import ModelOptions
    from rmjax.models.model import Model
    from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    return np.asarray(
        random_head(Model(llama, ModelOptions(sharding), RewardHead(attributes)), seed)
    )


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rmjax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_orbax = commands.add_parser("hf-to-orbax", help="a Hugging Face model to an Orbax model")
    to_orbax.add_argument(
        "--attributes", default=",".join(HELPSTEER2), help="outputs of a fresh head"
    )
    to_orbax.add_argument("--seed", type=int, default=0, help="of a fresh head")
    to_orbax.add_argument(
        "--language-model", action="store_true", help="keep a causal model's own head"
    )
    to_hf = commands.add_parser("orbax-to-hf", help="an Orbax model or a run to Hugging Face")
    to_hf.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
    to_peft = commands.add_parser("orbax-to-peft", help="a LoRA run's adapters to PEFT's format")
    for command in (to_orbax, to_hf, to_peft):
        command.add_argument("src")
        command.add_argument("dst")
    args = parser.parse_args()
    keep_freed_memory()
    if args.command == "hf-to-orbax":
        attributes = tuple(args.attributes.split(","))
        notes = hf_to_orbax(
            args.src,
            args.dst,
            attributes=attributes,
            seed=args.seed,
            language_model=args.language_model,
        )
    elif args.command == "orbax-to-hf":
        notes = orbax_to_hf(args.src, args.dst, dtype=args.dtype)
    else:
        notes = orbax_to_peft(args.src, args.dst)
    print("\n".join([*notes, f"written: {args.dst}"]))


if __name__ == "__main__":
    exit_with_message(_main)
