"""Conversion between Hugging Face's format and Orbax models, both ways and bit for bit.

    python -m rmjax.convert hf-to-orbax SRC DST [--attributes=a,b] [--seed=0]
    python -m rmjax.convert hf-to-orbax SRC DST --reward-token=0
    python -m rmjax.convert hf-to-orbax SRC DST --value-head
    python -m rmjax.convert hf-to-orbax SRC DST --language-model
    python -m rmjax.convert orbax-to-hf SRC DST [--dtype=bfloat16]
    python -m rmjax.convert orbax-to-peft SRC DST

hf-to-orbax keeps the head of a classification model. A causal model gets a fresh head, the one that
gives the logit of a token, that of its value head, or remains a language model.
orbax-to-peft exports the adapters of a run with LoRA, and a reward model's head; orbax-to-hf merges
the adapters instead.

All of them stream: a few slices of at most 64 MiB are in memory at a time, whatever the model's
size. DST appears under its name only when it is complete and has been read back and compared with
the source. Until then DST.partial stands beside it, and the same command continues it after a kill.
"""

import argparse

from rmjax.checkpoints.weight_files import VALUE_HEAD
from rmjax.errors import UserError, answer_interrupts, exit_with_message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rmjax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_orbax = commands.add_parser("hf-to-orbax", help="a Hugging Face model to an Orbax model")
    to_orbax.add_argument(
        "--attributes",
        help="outputs of a causal model's head; by default HelpSteer2's five of a fresh one, and "
        "reward of another",
    )
    to_orbax.add_argument("--seed", type=int, default=0, help="of a fresh head")
    to_orbax.add_argument(
        "--value", help="the model's value: an attribute, a published vector, or {JSON} weights"
    )
    to_orbax.add_argument(
        "--chat-template", default="", metavar="NAME", help="which of several named ones"
    )
    own = to_orbax.add_mutually_exclusive_group()
    own.add_argument(
        "--reward-token",
        type=int,
        metavar="ID",
        help="a causal model's reward is this token's logit after the conversation",
    )
    own.add_argument(
        "--value-head",
        action="store_true",
        help=f"take a causal model's value head ({VALUE_HEAD}, or v_head.* tensors)",
    )
    own.add_argument("--language-model", action="store_true", help="keep a causal model's own head")
    to_hf = commands.add_parser("orbax-to-hf", help="an Orbax model or a run to Hugging Face")
    to_hf.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
    to_peft = commands.add_parser("orbax-to-peft", help="a LoRA run's adapters to PEFT's format")
    for command in (to_orbax, to_hf, to_peft):
        command.add_argument("src")
        command.add_argument("dst")
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rmjax.checkpoints.causal_heads import VALUE_HEAD_KEYS, read_value_head, token_head
from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.to_huggingface import ToHuggingFace
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.hf_weights import check_tensors
from rmjax.checkpoints.model_files import CAUSAL, write_adapter_config, write_model_files
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained, public_name
from rmjax.checkpoints.safetensors_file import DTYPES
from rmjax.config import HELPSTEER2
from rmjax.models.decoder_config import NO_LORA, DecoderConfig
from rmjax.models.heads import RewardHead
from rmjax.models.rewards.aggregation import ScalarRule, model_rule, parse_rule
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.memory import keep_freed_memory

_SHARD_BYTES = 5_000_000_000


def hf_to_orbax(
    src: str,
    dst: str,
    *,
    attributes: Sequence[str] | None = None,
    seed: int = 0,
    language_model: bool = False,
    reward_token: int | None = None,
    value_head: bool = False,
    value: str | Mapping[str, float] | None = None,
    chat_template: str = "",
) -> list[str]:
    """Converts a Hugging Face directory, hub id or GGUF file to an Orbax model.

    A classification model keeps its head and its names. A causal model gets a fresh reward head,
    unless `language_model`, `reward_token` or `value_head` names what it has.

    Args:
      src: what to convert.
      dst: directory to make; must not exist or be empty.
      attributes: names of the outputs of a head that a causal model gets: by default `HELPSTEER2`
        of a fresh one, and `reward` of others.
      seed: of the fresh head.
      language_model: make no reward model of a causal model.
      reward_token: the token whose logit after the conversation is a causal model's reward.
      value_head: take the value head that is beside a causal model.
      value: the model's own scalar rule, see `aggregation.scalar_rule`; by default the first
        attribute, and none of a classifier.
      chat_template: which of the tokenizer's named templates to use; empty for its default.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the source does not match its config, or the target is not empty.
    """
    if attributes is not None:
        _check_names(attributes)
    if language_model + value_head + (reward_token is not None) > 1:
        raise UserError("language_model, reward_token, value_head: give one of them at most")
    source = open_pretrained(src, chat_template)
    if isinstance(source.weights, Path):
        raise UserError(f"{src}: already an Orbax model or a run; the other way is orbax-to-hf")
    if language_model:
        return _language_model_to_orbax(source, dst)
    tokenizer = source.tokenizer()
    spec, head, origin = _reward_head(source, attributes, seed, reward_token, value_head)
    spec = dataclasses.replace(spec, source=public_name(src))
    notes = [f"{origin}: {', '.join(spec.attributes)}"]
    if value is not None:
        rule = model_rule(spec, value)
        assert isinstance(rule, ScalarRule)  # of general preferences there is an error
        spec = dataclasses.replace(spec, scalar=rule.weights)
        notes.append(f"value: {rule.name}")
    elif not spec.scalar and not spec.general_preference:
        notes.append("no value: the labels are classes; say here or when scoring which is good")
    left = [key for key in source.unused if not (value_head and key in VALUE_HEAD_KEYS)]
    if left:
        notes.append(f"left out, a reward model has no use for them: {', '.join(left[:3])}")
    work = ToOrbax(source.weights, source.decoder, RewardHead(len(spec.attributes)), head)
    plan = {"command": "hf-to-orbax", "model": dataclasses.asdict(spec), "head": origin}

    def write_files(files: Path) -> None:
        write_model_files(files, source.decoder, tokenizer, spec)

    return notes + convert_slices(work, [source], dst, plan, write_files)


def _language_model_to_orbax(source: Pretrained, dst: str) -> list[str]:
    assert not isinstance(source.weights, Path)
    if source.spec:
        raise UserError(f"{source.name}: a reward model, which has no language-model head")
    check_tensors(source.weights, source.decoder, source.head)
    tokenizer = source.tokenizer()
    work = ToOrbax(source.weights, source.decoder, source.head)
    plan = {"command": "hf-to-orbax", "model": CAUSAL}

    def write_files(files: Path) -> None:
        ends = end_tokens(source.files, tokenizer)
        write_model_files(files, source.decoder, tokenizer, None, ends=ends)

    tied = "the embedding" if source.decoder.tie_word_embeddings else "lm_head"
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
    work = ToHuggingFace(params, source.decoder, source.head, dtype, shard_bytes, lora)
    plan = {
        "command": "orbax-to-hf",
        "model": dataclasses.asdict(spec) if spec else CAUSAL,
        "dtype": work.dtype.name,
        "shard_bytes": shard_bytes,
    }

    def write_files(files: Path) -> None:
        merged = dataclasses.replace(spec, lora=NO_LORA) if spec else None
        ends = () if spec else end_tokens(source.files, tokenizer)
        write_model_files(
            files, source.decoder, tokenizer, merged, dtype=work.dtype.name, ends=ends
        )

    notes = [
        f"{work.dtype.name}, {len(work.keys)} tensors in {work.files} file(s); head: "
        + (", ".join(spec.attributes) if spec else "language model")
    ]
    if spec and spec.offset:
        notes.append(
            "a value head's constant is in rmjax.json alone, so other programs' numbers are less "
            "by " + ", ".join(f"{offset:g} ({name})" for name, offset in spec.offset.items())
        )
    if lora.rank:
        notes.append(f"merged into the weights: adapters for {', '.join(lora.targets)}")
    return notes + convert_slices(work, [source], dst, plan, write_files)


def orbax_to_peft(src: str, dst: str) -> list[str]:
    """Exports the adapters of a run with LoRA, and a reward head, in PEFT's format, float32.

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
    plan = {"command": "orbax-to-peft", "model": dataclasses.asdict(spec) if spec else CAUSAL}

    def write_files(files: Path) -> None:
        ends = () if spec else end_tokens(source.files, tokenizer)
        write_model_files(files, source.decoder, tokenizer, spec, ends=ends)
        write_adapter_config(files, lora, source.base, reward=spec is not None)

    head = f"; head: {', '.join(spec.attributes)}" if spec else ""
    notes = [f"{len(work.keys)} tensors for {source.base}{head}"]
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


def _reward_head(
    source: Pretrained,
    attributes: Sequence[str] | None,
    seed: int,
    token: int | None,
    value_head: bool,
) -> tuple[RewardSpec, np.ndarray | None, str]:
    """The spec of a conversion, a head where `source` has none, and where it is from."""
    assert not isinstance(source.weights, Path)
    own = token is not None or value_head
    if source.spec and (own or attributes):
        raise UserError(
            f"{source.name}: a reward model, which keeps its head and the names of its outputs "
            f"({', '.join(source.spec.attributes)}); leave out --attributes, --reward-token and "
            "--value-head"
        )
    if source.spec:
        return source.spec, None, "head kept"
    if not own:
        if source.value_head:
            raise UserError(
                f"{source.name}: there is a value head ({source.value_head}). --value-head makes "
                "it the reward head; --language-model leaves it out; for a fresh head remove it"
            )
        names = tuple(attributes or HELPSTEER2)
        spec = RewardSpec(names, {names[0]: 1.0}, seed=seed)
        return spec, _fresh_head(source.decoder, len(names), seed), f"fresh head, seed {seed}"
    (name, *others) = attributes or ("reward",)
    if others:
        raise UserError(f"attributes {list(attributes or ())}: this head has one output; name one")
    if token is not None:
        found, origin = token_head(source.weights, source.decoder, token), f"logit of token {token}"
    elif source.value_head:
        found = read_value_head(source.value_head, source.weights, source.decoder)
        origin = f"value head, bias {found.bias:g}"
    else:
        raise UserError(
            f"{source.name}: no value head here. Looked for {VALUE_HEAD} and, among the model's "
            f"tensors, {VALUE_HEAD_KEYS[0]!r}; files of the hub that are pickles are not downloaded"
        )
    offset = {name: found.bias} if found.bias else None
    return RewardSpec((name,), {name: 1.0}, offset=offset), found.weight, origin


def _fresh_head(decoder: DecoderConfig, attributes: int, seed: int) -> np.ndarray:
    """The head that training from the same source with the same seed would start from."""
    # Here, since only a causal model needs them and flax takes long to import.
    import jax

    from rmjax.models.init import random_head
    from rmjax.models.layers import ModelOptions
    from rmjax.models.model import Model
    from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    return np.asarray(
        random_head(Model(decoder, ModelOptions(sharding), RewardHead(attributes)), seed)
    )


def _main() -> None:
    args = _parser().parse_args()
    keep_freed_memory()
    if args.command == "hf-to-orbax":
        notes = hf_to_orbax(
            args.src,
            args.dst,
            attributes=None if args.attributes is None else tuple(args.attributes.split(",")),
            seed=args.seed,
            language_model=args.language_model,
            reward_token=args.reward_token,
            value_head=args.value_head,
            value=None if args.value is None else parse_rule(args.value),
            chat_template=args.chat_template,
        )
    elif args.command == "orbax-to-hf":
        notes = orbax_to_hf(args.src, args.dst, dtype=args.dtype)
    else:
        notes = orbax_to_peft(args.src, args.dst)
    print("\n".join([*notes, f"written: {args.dst}"]))


if __name__ == "__main__":
    exit_with_message(_main)
