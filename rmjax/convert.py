"""Conversion between Hugging Face's format and Orbax models, both ways and bit for bit.

    python -m rmjax.convert hf-to-orbax SRC DST [--attributes=a,b] [--seed=0]
    python -m rmjax.convert hf-to-orbax SRC DST --head='{"reward": {"0": 1}}'
    python -m rmjax.convert hf-to-orbax SRC DST --head='{"Yes": 1, "No": -1}' --suffix-turn=QUESTION
    python -m rmjax.convert hf-to-orbax SRC DST --head=value_head
    python -m rmjax.convert hf-to-orbax SRC DST --language-model
    python -m rmjax.convert orbax-to-hf SRC DST [--dtype=bfloat16] [--value=RULE] [--push=A/B]
    python -m rmjax.convert orbax-to-peft SRC DST [--push=A/B]

hf-to-orbax, or 'hf->orbax' in quotes, keeps the head of a classification model. A causal model gets
a fresh head, or one that --head makes of the logits of tokens or of its value head, or remains a
language model.
orbax-to-hf exports all outputs of a reward head, or with --value one number made of them.
orbax-to-peft exports the adapters of a run with LoRA, and a reward model's head; orbax-to-hf merges
the adapters instead.

All of them stream: a few slices of at most 64 MiB are in memory at a time, whatever the model's
size. DST appears under its name only when it is complete and has been read back and compared with
the source. Until then DST.partial stands beside it, and the same command continues it after a kill.
"""

import argparse
import sys

from rmjax.checkpoints.weight_files import VALUE_HEAD
from rmjax.errors import UserError, answer_interrupts, exit_with_message
from rmjax.runtime.options import CommandParser


def _parser() -> CommandParser:
    parser = CommandParser("convert", __doc__)
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
    for command in (to_hf, to_peft):
        command.add_argument(
            "--push", default="", metavar="OWNER/NAME", help="upload DST to this model of the hub"
        )
    for command in (to_orbax, to_hf, to_peft):
        command.add_argument("src")
        command.add_argument("dst")
    return parser


def _parsed() -> argparse.Namespace:
    parser, words = _parser(), sys.argv[1:]
    if words and words[0] in ("hf-", "orbax-"):  # and standard output is a file by now
        parser.error(f"a shell reads '>' as the name of a file: write '{words[0]}>...' in quotes")
    return parser.parse_args([word.replace("->", "-to-") for word in words[:1]] + words[1:])


if __name__ == "__main__":
    answer_interrupts()
    _parsed()  # --help and mistakes are answered before the imports, which take long

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rmjax.checkpoints.causal_heads import (
    FROM_VALUE_HEAD,
    HeadChoice,
    parse_head,
    with_head,
)
from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.exports import orbax_to_hf, orbax_to_peft
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.hf_weights import HeadedWeights, check_tensors
from rmjax.checkpoints.model_files import write_model_files
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained, public_name
from rmjax.checkpoints.provenance import provenance, write_provenance
from rmjax.checkpoints.value_head import VALUE_HEAD_KEYS
from rmjax.config import HELPSTEER2
from rmjax.evaluation.fit_weights import parse_value
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import RewardHead
from rmjax.models.rewards.aggregation import ScalarRule, model_rule
from rmjax.models.rewards.spec import RewardSpec, check_names
from rmjax.runtime.memory import keep_freed_memory


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
        check_names(attributes, "attributes")
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

    front = provenance(source)

    def write_files(files: Path) -> None:
        write_model_files(files, source.decoder, tokenizer, spec)
        write_provenance(files, front, f"A reward model of rmjax, converted from {spec.source}.")

    converted = convert_slices(work, [source], dst, plan, write_files)
    return notes + converted


def _language_model_to_orbax(source: Pretrained, dst: str) -> list[str]:
    assert not isinstance(source.weights, Path)
    if source.spec:
        raise UserError(f"{source.name}: a reward model, which has no language-model head")
    check_tensors(source.weights, source.decoder, source.head)
    tokenizer = source.tokenizer()
    work = ToOrbax(source.weights, source.decoder, source.head)
    plan = {"command": "hf-to-orbax", "model": source.decoder.row.causal}

    front, name = provenance(source), public_name(source.name)

    def write_files(files: Path) -> None:
        ends = end_tokens(source.files, tokenizer)
        write_model_files(files, source.decoder, tokenizer, None, ends=ends)
        write_provenance(files, front, f"A language model of rmjax, converted from {name}.")

    tied = "the embedding" if source.decoder.tie_word_embeddings else "lm_head"
    return [
        f"language model kept; head: {tied}",
        *convert_slices(work, [source], dst, plan, write_files),
    ]


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
    args = _parsed()
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
        notes = orbax_to_hf(args.src, args.dst, dtype=args.dtype, value=value, push=args.push)
    else:
        notes = orbax_to_peft(args.src, args.dst, push=args.push)
    print("\n".join([*notes, f"written: {args.dst}"]))


if __name__ == "__main__":
    exit_with_message(_main)
