"""Conversion between Hugging Face's format and Orbax models, both ways and bit for bit.

    python -m rmjax.convert hf-to-orbax SRC DST [--attributes=a,b] [--seed=0]
    python -m rmjax.convert hf-to-orbax SRC DST --head='{"reward": {"0": 1}}'
    python -m rmjax.convert hf-to-orbax SRC DST --head='{"Yes": 1, "No": -1}' --suffix-turn=QUESTION
    python -m rmjax.convert hf-to-orbax SRC DST --head=value_head
    python -m rmjax.convert hf-to-orbax SRC DST --language-model
    python -m rmjax.convert orbax-to-hf SRC DST [--dtype=bfloat16] [--value=RULE]
    python -m rmjax.convert orbax-to-peft SRC DST

hf-to-orbax keeps the head of a classification model. A causal model gets a fresh head, or one that
--head makes of the logits of tokens or of its value head, or remains a language model.
orbax-to-hf exports all outputs of a reward head, or with --value one number made of them.
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
        help="outputs of a fresh head of a causal model; by default HelpSteer2's five",
    )
    to_orbax.add_argument("--seed", type=int, default=0, help="of a fresh head")
    to_orbax.add_argument(
        "--value",
        metavar="RULE",
        help="the model's value: an attribute, a published vector, {JSON} weights, or weights.json",
    )
    to_orbax.add_argument(
        "--chat-template", default="", metavar="NAME", help="which of several named ones"
    )
    own = to_orbax.add_mutually_exclusive_group()
    own.add_argument(
        "--head",
        help=f"where a causal model's reward is: value_head ({VALUE_HEAD}, or v_head.* tensors), "
        "or JSON of tokens with the weights of their logits, by output",
    )
    own.add_argument("--language-model", action="store_true", help="keep a causal model's own head")
    to_orbax.add_argument(
        "--suffix-turn",
        default="",
        metavar="QUESTION",
        help="what a user asks after the response; the reward is read where the answer would begin",
    )
    to_hf = commands.add_parser("orbax-to-hf", help="an Orbax model or a run to Hugging Face")
    to_hf.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
    to_hf.add_argument(
        "--value",
        metavar="RULE",
        help="make the value by this rule the only output; rules are those of hf-to-orbax",
    )
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
from jaxtyping import Float32

from rmjax.checkpoints.causal_heads import (
    FROM_VALUE_HEAD,
    HeadChoice,
    parse_head,
    with_head,
)
from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.to_huggingface import ToHuggingFace
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.hf_weights import HeadedWeights, check_tensors
from rmjax.checkpoints.model_files import CAUSAL, write_adapter_config, write_model_files
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained, public_name
from rmjax.checkpoints.safetensors_file import DTYPES
from rmjax.checkpoints.value_head import VALUE_HEAD_KEYS
from rmjax.config import HELPSTEER2
from rmjax.evaluation.fit_weights import parse_value
from rmjax.models.decoder_config import NO_LORA, DecoderConfig
from rmjax.models.heads import RewardHead
from rmjax.models.rewards.aggregation import ScalarRule, fold_spec, model_rule
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
    head: HeadChoice | None = None,
    suffix_turn: str = "",
    value: str | Mapping[str, float] | None = None,
    chat_template: str = "",
) -> list[str]:
    """Converts a Hugging Face directory, hub id or GGUF file to an Orbax model.

    A classification model keeps its head and its names. A causal model gets a fresh reward head,
    unless `language_model` or `head` names what it has.

    Args:
      src: what to convert.
      dst: directory to make; must not exist or be empty.
      attributes: names of the outputs of a fresh head; by default `HELPSTEER2`.
      seed: of the fresh head.
      language_model: make no reward model of a causal model.
      head: where a causal model's reward is; see `causal_heads.with_head`.
      suffix_turn: likewise.
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
    if language_model and (head is not None or suffix_turn):
        raise UserError("language_model, head and suffix_turn: a language model has no reward head")
    source = open_pretrained(src, chat_template)
    if isinstance(source.weights, Path):
        raise UserError(f"{src}: already an Orbax model or a run; the other way is orbax-to-hf")
    if language_model:
        return _language_model_to_orbax(source, dst)
    tokenizer = source.tokenizer()
    source, origin = _with_reward_head(source, attributes, seed, head, suffix_turn)
    spec = dataclasses.replace(source.reward_spec(), source=public_name(src))
    notes = [f"{origin}: {', '.join(spec.attributes)}"]
    if value is not None:
        rule = model_rule(spec, value)
        assert isinstance(rule, ScalarRule)  # of general preferences there is an error
        spec = dataclasses.replace(spec, scalar=rule.weights)
        notes.append(f"value: {rule.name}")
    elif not spec.scalar and not spec.general_preference:
        notes.append("no value: the labels are classes; say here or when scoring which is good")
    taken = VALUE_HEAD_KEYS if head == FROM_VALUE_HEAD else ()
    left = [key for key in source.unused if key not in taken]
    if left:
        notes.append(f"left out, a reward model has no use for them: {', '.join(left[:3])}")
    assert not isinstance(source.weights, Path)
    work = ToOrbax(source.weights, source.decoder, source.head)
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
    src: str,
    dst: str,
    *,
    dtype: str | None = None,
    value: str | Mapping[str, float] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> list[str]:
    """Exports an Orbax model or a run's best checkpoint.

    A reward model becomes a `LlamaForSequenceClassification`, a language model a
    `LlamaForCausalLM`.

    Args:
      src: an Orbax model or a run.
      dst: directory to make; must not exist or be empty.
      dtype: of the weights except the head; the stored one if not given.
      value: a scalar rule, see `aggregation.scalar_rule`, which becomes the only output of the
        head, as most trainers want it; by default all outputs are exported.
      shard_bytes: most bytes of one safetensors file.

    Returns:
      Lines to print about the conversion.

    Raises:
      UserError: the source is incomplete, the rule names what it does not have, or the target is
        not empty.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: there are {', '.join(DTYPES)}")
    source, params = _open_orbax(src)
    tokenizer, lora, spec = source.tokenizer(), source.lora, source.spec
    fold = None
    if value is not None:
        spec, fold = _folded(source, value)
    work = ToHuggingFace(params, source.decoder, source.head, dtype, shard_bytes, lora, fold=fold)
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
    if spec and len(spec.attributes) > 1:
        notes.append(
            f"{len(spec.attributes)} labels: rmjax, transformers and vLLM's /classify and /pooling "
            "give all of them; TRL, OpenRLHF, verl, RewardBench and vLLM's /score take a model of "
            "one, which --value=RULE makes"
        )
    if spec and spec.suffix_turn:
        notes.append(
            f"the reward is read in the answer to {spec.suffix_turn!r}: rmjax asks that by itself, "
            "other programs have to be given it as a user's turn, and a generation prompt"
        )
    if lora.rank:
        notes.append(f"merged into the weights: adapters for {', '.join(lora.targets)}")
    return notes + convert_slices(work, [source], dst, plan, write_files)


def _folded(
    source: Pretrained, value: str | Mapping[str, float]
) -> tuple[RewardSpec, Float32[np.ndarray, "A"]]:
    """The spec of a head that is the value by a rule, and the weights that make it of the head."""
    if source.spec is None:
        raise UserError(f"{source.name}: a language model, which has no value; leave --value out")
    rule = model_rule(source.spec, value)
    assert isinstance(rule, ScalarRule)  # of general preferences there is an error
    return fold_spec(source.spec, rule), rule.vector(source.spec.attributes)


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


def _with_reward_head(
    source: Pretrained,
    attributes: Sequence[str] | None,
    seed: int,
    head: HeadChoice | None,
    suffix_turn: str,
) -> tuple[Pretrained, str]:
    """A source with a reward head, its own or a fresh one; and where that is from."""
    if attributes is not None and (source.spec or head is not None):
        raise UserError(
            f"{source.name}: --attributes names the outputs of a fresh head, and here "
            + ("the model has one" if source.spec else "--head says which it is and what it is of")
        )
    if source.spec or head is not None or suffix_turn:
        return with_head(source, head, suffix_turn)
    if source.value_head:
        raise UserError(
            f"{source.name}: there is a value head ({source.value_head}). --head=value_head makes "
            "it the reward head; --language-model leaves it out; for a fresh head remove it"
        )
    assert not isinstance(source.weights, Path)
    names = tuple(attributes or HELPSTEER2)
    spec = RewardSpec(names, {names[0]: 1.0}, seed=seed)
    weights = HeadedWeights(source.weights, _fresh_head(source.decoder, len(names), seed))
    return dataclasses.replace(source, spec=spec, weights=weights), f"fresh head, seed {seed}"


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
            head=None if args.head is None else parse_head(args.head),
            suffix_turn=args.suffix_turn,
            value=parse_value(args.value)[0],
            chat_template=args.chat_template,
        )
    elif args.command == "orbax-to-hf":
        value = parse_value(args.value)[0]
        notes = orbax_to_hf(args.src, args.dst, dtype=args.dtype, value=value)
    else:
        notes = orbax_to_peft(args.src, args.dst)
    print("\n".join([*notes, f"written: {args.dst}"]))


if __name__ == "__main__":
    exit_with_message(_main)
