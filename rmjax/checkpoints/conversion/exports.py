"""Exports: an Orbax model or a run as a Hugging Face directory, or its adapters for PEFT."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.to_huggingface import ToHuggingFace
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.hub import check_push, push_export
from rmjax.checkpoints.model_card import write_model_card
from rmjax.checkpoints.model_files import write_adapter_config, write_model_files
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.checkpoints.provenance import provenance, unknown_origin
from rmjax.checkpoints.safetensors_file import DTYPES
from rmjax.errors import UserError
from rmjax.models.decoder_config import NO_LORA
from rmjax.models.rewards.aggregation import ScalarRule, fold_spec, model_rule
from rmjax.models.rewards.spec import RewardSpec

_SHARD_BYTES = 5_000_000_000


def orbax_to_hf(
    src: str,
    dst: str,
    *,
    dtype: str | None = None,
    value: str | Mapping[str, float] | None = None,
    push: str = "",
    shard_bytes: int = _SHARD_BYTES,
) -> list[str]:
    """Exports an Orbax model or a run's best checkpoint.

    A reward model becomes the classification model of its family, such as
    `LlamaForSequenceClassification`; a language model its language model, such as
    `LlamaForCausalLM`.

    Args:
      src: an Orbax model or a run.
      dst: directory to make; must not exist or be empty.
      dtype: of the weights except the head; the stored one if not given.
      value: a scalar rule, see `aggregation.scalar_rule`, which becomes the only output of the
        head, as most trainers want it; by default all outputs are exported.
      push: a model of the hub that the export is uploaded to, as `owner/name`; empty for none. One
        that is not there yet is made, as a private one.
      shard_bytes: most bytes of one safetensors file.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the source is incomplete, the rule names what it does not have, the target is not
        empty, or the hub refuses the export, which is then in `dst` all the same.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: there are {', '.join(DTYPES)}")
    if push:
        check_push(push)
    source, params = _open_orbax(src)
    tokenizer, lora, spec = source.tokenizer(), source.lora, source.spec
    fold = None
    if value is not None:
        spec, fold = _folded(source, value)
    work = ToHuggingFace(params, source.decoder, source.head, dtype, shard_bytes, lora, fold=fold)
    name = push or Path(dst).expanduser().resolve().name
    plan = {
        "command": "orbax-to-hf",
        "model": dataclasses.asdict(spec) if spec else source.decoder.row.causal,
        "dtype": work.dtype.name,
        "shard_bytes": shard_bytes,
        "name": name,
    }

    def write_files(files: Path) -> None:
        merged = dataclasses.replace(spec, lora=NO_LORA) if spec else None
        ends = () if spec else end_tokens(source.files, tokenizer)
        stored = work.dtype.name
        write_model_files(files, source.decoder, tokenizer, merged, dtype=stored, ends=ends)
        write_model_card(files, source, merged, name, stored)

    notes = [
        f"{work.dtype.name}, {len(work.keys)} tensors in {work.files} file(s); head: "
        + (", ".join(spec.attributes) if spec else "language model"),
        *(_told_apart(spec) if spec else ()),
        *unknown_origin(source, provenance(source)),
    ]
    if lora.rank:
        notes.append(f"merged into the weights: adapters for {', '.join(lora.targets)}")
    notes += convert_slices(work, [source], dst, plan, write_files)
    return notes + (push_export(dst, push) if push else [])


def _told_apart(spec: RewardSpec) -> Iterator[str]:
    """What other programs make of an export that rmjax makes something else of, in lines."""
    if spec.offset:
        yield (
            "a value head's constant is in rmjax.json alone, so other programs' numbers are less "
            "by " + ", ".join(f"{offset:g} ({name})" for name, offset in spec.offset.items())
        )
    if len(spec.attributes) > 1:
        yield (
            f"{len(spec.attributes)} labels: rmjax, transformers and vLLM's /classify and /pooling "
            "give all of them; TRL, OpenRLHF, verl and RewardBench take a model of "
            "one, which --value=RULE makes"
        )
    if spec.suffix_turn:
        yield (
            f"the reward is read in the answer to {spec.suffix_turn!r}: rmjax asks that by itself, "
            "other programs have to be given it as a user's turn, and a generation prompt"
        )


def _folded(
    source: Pretrained, value: str | Mapping[str, float]
) -> tuple[RewardSpec, Float32[np.ndarray, "A"]]:
    """The spec of a head that is the value by a rule, and the weights that make it of the head."""
    if source.spec is None:
        raise UserError(f"{source.name}: a language model, which has no value; leave --value out")
    rule = model_rule(source.spec, value)
    assert isinstance(rule, ScalarRule)  # of general preferences there is an error
    return fold_spec(source.spec, rule), rule.vector(source.spec.attributes)


def orbax_to_peft(src: str, dst: str, *, push: str = "") -> list[str]:
    """Exports the adapters of a run with LoRA, and a reward head, in PEFT's format, float32.

    PEFT adds them to the model that the run began from, which is not part of the export.

    Args:
      src: the run.
      dst: directory to make; must not exist or be empty.
      push: see `orbax_to_hf`.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the run has no adapters, or is incomplete; or the target is not empty.
    """
    if push:
        check_push(push)
    source, params = _open_orbax(src)
    spec, lora = source.spec, source.lora
    if not lora.rank:
        raise UserError(f"{src}: trained without LoRA, so it has no adapters; use orbax-to-hf")
    if not source.base:
        raise UserError(
            f"{src}: began from random weights, which nobody else has and adapters are of no use "
            "without; use orbax-to-hf"
        )
    tokenizer = source.tokenizer()
    work = ToHuggingFace(params, source.decoder, source.head, None, sys.maxsize, lora, adapter=True)
    name = push or Path(dst).expanduser().resolve().name
    plan = {
        "command": "orbax-to-peft",
        "model": dataclasses.asdict(spec) if spec else source.decoder.row.causal,
        "name": name,
    }

    def write_files(files: Path) -> None:
        ends = () if spec else end_tokens(source.files, tokenizer)
        write_model_files(files, source.decoder, tokenizer, spec, ends=ends)
        write_adapter_config(files, lora, source.base, reward=spec is not None)
        write_model_card(files, source, spec, name, "float32", adapters=True)

    head = f"; head: {', '.join(spec.attributes)}" if spec else ""
    notes = [f"{len(work.keys)} tensors for {source.base}{head}"]
    notes += unknown_origin(source, provenance(source))
    notes += convert_slices(work, [source], dst, plan, write_files)
    return notes + (push_export(dst, push) if push else [])


def _open_orbax(src: str) -> tuple[Pretrained, Path]:
    """An Orbax model or a run, and its arrays' directory; or a `UserError`."""
    source = open_pretrained(src)
    if not isinstance(source.weights, Path):
        raise UserError(f"{src}: not an Orbax model and not a run; the other way is hf-to-orbax")
    return source, source.weights / "params"
