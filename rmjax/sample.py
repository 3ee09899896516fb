"""Samples responses to every prompt of a source of data from a language model.

    python -m rmjax.sample MODEL PROMPTS OUT.jsonl --n=10 --temperature=0.7 --top-p=0.9

    python -m rmjax.sample http://localhost:8000 PROMPTS OUT.jsonl --tokenizer=DIRECTORY

MODEL is whatever `rmjax.load_policy` takes, or the URL of an OpenAI-compatible server. PROMPTS is
any source of data (docs/data.md): rows with a prompt, or with a conversation, of which an answer at
its end is left out. OUT gets each row with `prompt`, `responses`, `ended` and `token_ids`.
`python -m rmjax.score` reads it.

A killed command is continued by the same command, to the same samples: OUT is OUT.partial until it
is whole.
"""

from rmjax.errors import UserError, answer_interrupts, exit_with_message
from rmjax.runtime.options import CommandParser


def _parser() -> CommandParser:
    parser = CommandParser("sample", __doc__)
    add = parser.add_argument
    add("model", help="the language model")
    add("source", metavar="PROMPTS", help="the prompts")
    add("out", metavar="OUT", help="the file to write, JSON lines")
    add("--n", type=int, default=1, help="responses to each prompt")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token")
    add("--top-p", type=float, default=1.0, help="share of the probability that is left")
    add("--top-k", type=int, default=0, help="so many most probable tokens are left; 0 for all")
    add("--max-tokens", type=int, default=512, help="of a response")
    add("--seed", type=int, default=0, help="of the noise")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a response; repeatable")
    add("--log-probabilities", action="store_true", help="write those of all tokens too")
    add("--ratings", default="", metavar="NAME:RATING,...", help="that the answers shall have")
    add("--distinct", action="store_true", help="pass over a prompt that an earlier row has")
    add("--split", default="", help="which of the rows of PROMPTS; all by default")
    add("--chat-template", metavar="NAME", help="which of MODEL's, if it has several")
    add("--dtype", help="auto (by default), float32 or bfloat16")
    add("--mesh", metavar="AXIS:SIZE,...", help="of this host's devices; fsdp:-1")
    add("--tokenizer", metavar="DIRECTORY", help="of a server's model; or its hub id")
    add("--model-name", metavar="NAME", help="a server's for the model, if it has several")
    add("--concurrency", type=int, help="requests that a server has at once; 64 by default")
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

import dataclasses
import inspect
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from rmjax.data.readers import open_source
from rmjax.data.row_file import check_new
from rmjax.generation.completions import Engine, SamplingSettings
from rmjax.generation.policy import load_policy
from rmjax.generation.sample_file import sample_file
from rmjax.generation.server import open_server
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.sharding import parse_mesh

_CONSOLE = Console(highlight=False, soft_wrap=True)


def sample(
    model: str,
    source: str,
    out: str,
    settings: SamplingSettings,
    *,
    split: str = "",
    log_probabilities: bool = False,
    ratings: dict[str, int] | None = None,
    distinct: bool = False,
    **options: Any,
) -> list[str]:
    """Writes a file of samples; see the top of this file.

    Args:
      model: the language model.
      source: the prompts.
      out: the file to write.
      settings: how to sample.
      split: which of the source's rows; empty for all.
      log_probabilities: whether each token's is written.
      ratings: that the answers shall have, of a policy that learned from `choose --way=steerlm`.
      distinct: whether rows are passed over whose prompt an earlier row has.
      options: of `load_policy`, or of `open_server`.

    Returns:
      Lines that say what was done.

    Raises:
      UserError: a model, a row or an option is bad, or the file is there.
    """
    check_new(Path(out))  # before a large model is loaded
    opened = open_source(source, split)
    engine = _engine(model, options)
    made_by = {
        "model": engine.state,
        "data": opened.fingerprint(),
        "settings": dataclasses.asdict(settings) | {"stop": list(settings.stop)},
        "log_probabilities": log_probabilities,
        "ratings": ratings or {},
        "distinct": distinct,
        "options": {name: str(option) for name, option in options.items()},
    }
    began = time.monotonic()
    done = sample_file(
        engine, opened, Path(out), settings, made_by, log_probabilities, ratings, distinct, _said
    )
    seconds = time.monotonic() - began
    lines = [f"{done.rows:,} rows"]
    if done.before:
        lines[0] += f", {done.before:,} of them before"
    lines.append(
        f"{done.responses:,} responses, {done.ended / max(1, done.responses):.1%} of them ended; "
        f"{done.tokens:,} tokens in {seconds:.1f} s"
    )
    if done.again:
        lines.append(f"{done.again:,} rows are passed over: an earlier row has their prompt")
    context = f"{engine.context or 0:,}"  # an engine that does not say counts none of these
    if done.no_room:
        lines.append(
            f"{done.no_room:,} prompts have no response: they fill the model's context of "
            f"{context} tokens"
        )
    if done.less_room:
        lines.append(
            f"{done.less_room:,} prompts leave less room than {settings.max_tokens:,} tokens "
            f"(--max-tokens) in the model's context of {context}"
        )
    return [*lines, *done.notes, out]


def _parse_ratings(text: str) -> dict[str, int]:
    """`helpfulness:4,verbosity:0` as a mapping, in this order."""
    try:
        pairs = [(name, int(value)) for name, value in (x.split(":") for x in text.split(","))]
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
    except ValueError as error:
        raise UserError(
            f"--ratings={text}: expected NAME:RATING,..., such as helpfulness:4,verbosity:0, with "
            "the names and in the order in which the policy learned them"
        ) from error
    return found


def _engine(model: str, options: dict[str, Any]) -> Engine:
    """The model in this process, or the server of a URL.

    Raises:
      UserError: an option is of the other one.
    """
    remote = model.startswith(("http://", "https://"))
    if remote:
        options = {"tokenizer": ""} | options
    opened = open_server if remote else load_policy
    wrong = options.keys() - inspect.signature(opened).parameters
    if wrong:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(wrong))
        raise UserError(
            f"{model}: {names} is of {'a model in this process' if remote else 'a server'}, and "
            f"this is {'a server' if remote else 'a model in this process'}; leave it out"
        )
    return opened(model, **options)


def _said(line: str) -> None:
    _CONSOLE.print(line, markup=False)


def _main() -> None:
    args = _parser().parse_args()
    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    settings = SamplingSettings(**{name: getattr(args, name) for name in names})
    ours = ("chat_template", "dtype", "mesh", "tokenizer", "model_name", "concurrency")
    options = {name: getattr(args, name) for name in ours if getattr(args, name) is not None}
    if args.mesh is not None:
        options["mesh"] = parse_mesh(args.mesh)
    enable_compilation_cache()
    lines = sample(
        args.model,
        args.source,
        args.out,
        settings,
        split=args.split,
        log_probabilities=args.log_probabilities,
        ratings=_parse_ratings(args.ratings) if args.ratings else None,
        distinct=args.distinct,
        **options,
    )
    _said("\n".join(lines))


if __name__ == "__main__":
    exit_with_message(_main)
