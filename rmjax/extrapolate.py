"""Extrapolates reward models (ExPO, arXiv 2404.16792): weak + alpha * (strong - weak).

    python -m rmjax.extrapolate WEAK STRONG DST --alpha=1.52
    python -m rmjax.extrapolate WEAK STRONG [DST] --search=1.1,1.3,1.52,2.0 --pairs=PAIRS

STRONG was trained from WEAK with its head kept, as scaled Bradley-Terry from a regression on
helpfulness. Each is a run, an Orbax model, or a Hugging Face directory or hub id. alpha counts from
WEAK: 0 is WEAK and 1 is STRONG, both to the bit. DST becomes an Orbax model.

With --alpha the weights are streamed: a few slices of at most 64 MiB of each model are in memory at
a time, and of a run about its largest tensor (for 70B the embedding, 4.2 GB). The arithmetic is
float32; the result has STRONG's dtypes and is rounded to nearest. DST appears under its name only
when it is complete and was read back. Until then DST.partial stands beside it, and the same command
continues it after a kill.

With --search every alpha, 0 and 1 among them, scores the pairs, and DST, if given, becomes the
model that orders most of them as people did. The devices of this host hold three whole models at
once: both, and the one that is tried.
"""

import argparse

from rmjax.errors import UserError, answer_interrupts, exit_with_message
from rmjax.runtime.options import CommandParser


def _parser() -> CommandParser:
    parser = CommandParser("extrapolate", __doc__)
    parser.add_argument("weak", help="alpha 0: the earlier model")
    parser.add_argument("strong", help="alpha 1: the model that was trained from it")
    parser.add_argument("dst", nargs="?", help="directory to make")
    parser.add_argument("--alpha", type=float, help="counted from WEAK")
    parser.add_argument("--search", metavar="A,B,...", help="the alphas to try")
    parser.add_argument("--pairs", help="a file, a directory or a hub id, as in training")
    parser.add_argument(
        "--max-length", type=int, default=0, help="most tokens of a response; STRONG's by default"
    )
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.extrapolation import (
    ExtrapolatedWeights,
    Parents,
    check_alpha,
    open_parents,
)
from rmjax.checkpoints.conversion.journal import check_target
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.model_files import write_model_files
from rmjax.checkpoints.orbax_weights import named_weights
from rmjax.checkpoints.provenance import provenance, write_provenance
from rmjax.runtime.memory import keep_freed_memory

if TYPE_CHECKING:
    from rmjax.evaluation.alpha_search import Trial

_EQUAL = (
    "warning: WEAK and STRONG do not differ in any number that was read: there is nothing to "
    "extrapolate, and every alpha gives the same model"
)


def extrapolate(weak: str, strong: str, dst: str, *, alpha: float) -> list[str]:
    """Writes the Orbax model `weak + alpha * (strong - weak)`.

    Args:
      weak: the earlier model.
      strong: the model that was trained from it.
      dst: directory to make; must not exist or be empty.
      alpha: 0 is `weak`, 1 is `strong`.

    Returns:
      Lines to print about it.

    Raises:
      UserError: the models do not belong together, one is incomplete, `alpha` is not finite, or
        the target is not empty.
    """
    check_alpha(alpha)
    return write_extrapolated(open_parents(weak, strong), dst, alpha)


def write_extrapolated(parents: Parents, dst: str, alpha: float, chosen_on: str = "") -> list[str]:
    """As `extrapolate`, of opened models; `chosen_on` names the pairs `alpha` was chosen on."""
    weak, strong, spec = parents.weak, parents.strong, parents.child(alpha, chosen_on)
    weights = ExtrapolatedWeights(named_weights(weak), named_weights(strong), alpha)
    work = ToOrbax(weights, strong.decoder, strong.head)
    plan = {"command": "extrapolate", "alpha": alpha, "model": dataclasses.asdict(spec)}
    front = provenance(strong)

    def write_files(files: Path) -> None:
        write_model_files(files, strong.decoder, parents.tokenizer, spec)
        write_provenance(files, front, f"A reward model of rmjax, extrapolated: {spec.source}.")

    notes = [f"{spec.source}; head kept: {', '.join(spec.attributes)}"]
    notes += convert_slices(work, [weak, strong], dst, plan, write_files)
    return [*notes, _EQUAL] if weights.compared and not weights.differ else notes


def search_alpha(
    parents: Parents, alphas: Sequence[float], pairs: str, *, max_length: int = 0
) -> "Trial":
    """Tries `alphas`, and 0 and 1, on preference pairs, prints a table and returns the best.

    Args:
      parents: the two models.
      alphas: what to try.
      pairs: see `AlphaSearch`.
      max_length: see `AlphaSearch`.

    Raises:
      UserError: bad data, an incomplete model, or scores that are not finite.
    """
    # Here, since it brings flax and scipy, which take long to import.
    from rmjax.evaluation.alpha_search import AlphaSearch, best_trial, trial_table

    alphas = sorted({0.0, 1.0, *map(check_alpha, alphas)})
    console, progress = (Console(stderr=e, highlight=False, soft_wrap=True) for e in (False, True))
    tried = AlphaSearch(parents, pairs, max_length)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in tried.data.counts.items())
    console.print(f"pairs       {tried.data.source}: {counts}")
    console.print(f"value       {tried.rule.name}")
    trials = []
    for trial in tried.trials(alphas):
        trials.append(trial)
        progress.print(f"alpha {trial.alpha:g}: {len(trials)} of {len(alphas)} done")
    best, count = best_trial(trials), len(tried.data) // 2
    console.print()
    console.print(trial_table(trials, f"{count:,} pairs; alpha counts from WEAK"))
    console.print(
        f"alpha {best.alpha:g} was fitted on these {count:,} pairs: as the best of {len(trials)}, "
        "its accuracy on them is too high to be expected elsewhere. Judge it on other pairs."
    )
    if best.alpha in (0.0, 1.0):
        console.print(f"It is {'STRONG' if best.alpha else 'WEAK'} itself: no other was better.")
    if not tried.differ:
        console.print(_EQUAL)
    return best


def _alphas(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"--search={text}: expected numbers, separated by commas") from error


def _check(args: argparse.Namespace) -> None:
    """Raises a `UserError` unless the options make one of the two commands."""
    if (args.alpha is None) == (args.search is None):
        raise UserError("give --alpha=NUMBER to write a model, or --search=A,B,... to look for one")
    if args.alpha is not None and args.dst is None:
        raise UserError("where to? --alpha needs DST, the directory to make")
    if args.search is not None and not args.pairs:
        raise UserError("--search needs --pairs=PAIRS, preference pairs to try each alpha on")
    for option in ("pairs", "max_length"):
        if args.search is None and getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} goes with --search")


def _main() -> None:
    args = _parser().parse_args()
    _check(args)
    keep_freed_memory()
    if args.search is None:
        notes = extrapolate(args.weak, args.strong, args.dst, alpha=args.alpha)
    else:
        alphas = [check_alpha(alpha) for alpha in _alphas(args.search)]
        if args.dst is not None:
            check_target(args.dst)  # before the search, not after it
        parents, notes = open_parents(args.weak, args.strong), []
        best = search_alpha(parents, alphas, args.pairs, max_length=args.max_length)
        if args.dst is not None:
            notes = write_extrapolated(parents, args.dst, best.alpha, chosen_on=args.pairs)
    if args.dst is not None:
        notes.append(f"written: {args.dst}")
    print("\n".join(notes))


if __name__ == "__main__":
    exit_with_message(_main)
