"""Scores every response of a file of conversations with a reward model.

    python -m rmjax.score MODEL IN OUT.jsonl

MODEL is whatever `rmjax.load` takes. IN is any source of data (docs/data.md): rows with a
conversation, a prompt and a response, a pair, or a list of responses, such as samples. OUT gets
each row with `scores` (the value of every response, in the row's order), `attributes`, `tokens`
and `cut`. So a row with `responses` becomes a ranked list, which training reads as pairs. Rows that
have scores are an error, unless --replace says that OUT gets these instead.

What responses begin with is computed once for them. A killed command is continued by the same
command: OUT is OUT.partial until it is whole.
"""

from rmjax.errors import answer_interrupts, exit_with_message
from rmjax.inference.load_options import add_load_options, load_options
from rmjax.runtime.options import CommandParser


def _parser() -> CommandParser:
    parser = CommandParser("score", __doc__)
    add = parser.add_argument
    add("model", help="the reward model")
    add("source", metavar="IN", help="the conversations")
    add("out", metavar="OUT", help="the file to write, JSON lines")
    add("--split", default="", help="which of the rows of IN; all by default")
    add("--value", help="scalar rule: an attribute, a published vector, {JSON}, or weights.json")
    add("--max-length", type=int, default=0, help="in tokens; by default the model's own")
    add("--replace", action="store_true", help="of scores that IN has")
    add_load_options(parser)
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from rmjax.data.readers import open_source
from rmjax.data.row_file import check_new
from rmjax.evaluation.fit_weights import parse_value
from rmjax.inference.load import load
from rmjax.inference.score_file import score_file
from rmjax.runtime.compilation import enable_compilation_cache


def score(
    model: str,
    source: str,
    out: str,
    *,
    split: str = "",
    max_length: int = 0,
    replace: bool = False,
    **options: Any,
) -> list[str]:
    """Writes a file of scores; see the top of this file.

    Args:
      model: the reward model.
      source: the conversations.
      out: the file to write.
      split: which of the source's rows; empty for all.
      max_length: most tokens of a conversation, whose first ones are cut; 0 for the model's own.
      replace: whether scores that the rows have are left out for these.
      options: of `rmjax.load`.

    Returns:
      Lines that say what was done.

    Raises:
      UserError: a model, a row or an option is bad, or the file is there.
    """
    check_new(Path(out))  # before a large model is loaded
    opened = open_source(source, split)
    scorer = load(model, over_long="truncate_left", **options)
    scorer.limit(max_length)
    made_by = {
        "model": scorer.state,
        "data": opened.fingerprint(),
        "max_length": scorer.max_length,
        "options": {name: str(option) for name, option in options.items()},
    }
    began = time.monotonic()
    written = score_file(scorer, opened, Path(out), made_by, replace)
    seconds, work = time.monotonic() - began, scorer.work
    lines = [f"{written.rows:,} rows"]
    if written.before:
        lines[0] += f", {written.before:,} of them before"
    shared = 1 - work.computed / max(1, work.tokens)
    lines.append(
        f"{written.responses:,} responses by {scorer.rule.name} in {seconds:.1f} s; "
        f"{work.tokens:,} tokens, {shared:.1%} of them shared"
    )
    if written.empty:
        lines.append(f"{written.empty:,} empty responses have no score")
    if written.cut:
        lines.append(
            f"{written.cut:,} lost their first tokens beyond {scorer.max_length:,} (--max-length)"
        )
    return [*lines, *written.notes, *scorer.encoder.notes(), out]


def _main() -> None:
    args = _parser().parse_args()
    enable_compilation_cache()
    lines = score(
        args.model,
        args.source,
        args.out,
        split=args.split,
        max_length=args.max_length,
        replace=args.replace,
        value=parse_value(args.value)[0],
        **load_options(args),
    )
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    exit_with_message(_main)
