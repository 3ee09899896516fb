"""Makes training data of scored responses, as `python -m rmjax.score` writes them.

    python -m rmjax.choose SCORED OUT.jsonl --way=best-of    # the best of n, to imitate
    python -m rmjax.choose SCORED OUT.jsonl --way=pairs      # best and worst, to prefer
    python -m rmjax.choose SCORED OUT.jsonl --way=steerlm    # all, told their ratings
    python -m rmjax.choose SAMPLES OUT.jsonl --way=spin --given=DATA

best-of writes conversations (`messages`), pairs writes `chosen`, `rejected` and `margin`, steerlm
writes conversations whose system turn says the response's ratings. spin needs no scores: it prefers
DATA's own responses to the policy's. Responses that did not end, by a column `ended`, are left out
unless --unended is given. What is left out is counted.
"""

from rmjax.errors import UserError, answer_interrupts, exit_with_message, write_errors

if __name__ == "__main__":
    answer_interrupts()  # before the imports

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rmjax.data.choosing import WAYS, Choice, against_given, choose
from rmjax.data.readers import open_source
from rmjax.data.row_file import check_new
from rmjax.runtime.files import PARTIAL, lock_file
from rmjax.runtime.options import CommandParser

_SPIN = "spin"


def choose_file(source: str, out: str, choice: Choice) -> Counter[str]:
    """Writes the rows that are chosen of scored responses; see the top of this file.

    Args:
      source: a file of scored responses.
      out: the file to write; it is whole, or not there.
      choice: what is chosen.

    Returns:
      How many rows were read and written, and why others were not.

    Raises:
      UserError: a bad row, nothing is chosen, or the file is there.
    """
    return _written(source, out, lambda counts: choose(open_source(source, ""), choice, counts))


def spin_file(source: str, given: str, out: str, unended: bool = False) -> Counter[str]:
    """Writes pairs of given responses and a policy's own; see `against_given`.

    Args:
      source: a file of samples.
      given: whose prompts were sampled, with responses.
      out: the file to write; it is whole, or not there.
      unended: whether responses that did not end count.

    Returns:
      How many rows were read and written, and why others were not.

    Raises:
      UserError: a bad row, nothing is chosen, or the file is there.
    """
    opened = open_source(source, ""), open_source(given, "")
    return _written(source, out, lambda counts: against_given(*opened, counts, unended))


def _written(
    source: str, out: str, rows: Callable[[Counter[str]], Iterator[dict[str, Any]]]
) -> Counter[str]:
    """Writes rows to a file that is whole, or not there.

    Returns:
      How many rows were read and written, and why others were not.

    Raises:
      UserError: a bad row, nothing is chosen, or the file is there.
    """
    path = Path(out)
    check_new(path)
    partial, counts = path.with_name(path.name + PARTIAL), Counter[str]()
    with write_errors(str(partial)), open(partial, "w", encoding="utf-8") as file:
        if not lock_file(file):
            raise UserError(f"{partial}: another command is writing it; wait for it, or end it")
        for row in rows(counts):
            try:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{source}: half of a letter (a lone surrogate) is in row {counts['read']}, "
                    "which no file can hold"
                ) from error
            except ValueError as error:
                raise UserError(
                    f"{source}: NaN or infinity is in row {counts['read']}, which JSON does not "
                    "have; write null"
                ) from error
    if not counts["written"]:
        partial.unlink()
        raise UserError(f"{source}: nothing is chosen of it ({_said(counts)})")
    with write_errors(out):
        partial.rename(path)
    return counts


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def _parse_ratings(text: str) -> tuple[int, int]:
    """The lowest and the highest rating.

    Raises:
      UserError: it is not that.
    """
    try:
        low, high = map(int, text.split(","))
    except ValueError:
        low = high = 0
    if low >= high:
        raise UserError(f"--ratings={text}: expected LOW,HIGH such as 0,4, the lower one first")
    return low, high


def _main() -> None:
    parser = CommandParser("choose", __doc__)
    add = parser.add_argument
    add("source", metavar="SCORED", help="a file of scored responses")
    add("out", metavar="OUT", help="the file to write, JSON lines")
    add("--way", choices=[*WAYS, _SPIN], required=True, help="what is made of them")
    add("--first", type=int, default=0, metavar="N", help="take only a row's first N responses")
    add("--unended", action="store_true", help="responses that did not end count as well")
    add("--apart", type=float, default=0.0, help="of pairs: the least difference of the values")
    add("--ratings", metavar="LOW,HIGH", help="of steerlm: ratings are rounded to it; 0,4")
    add("--given", default="", metavar="DATA", help="of spin: the data whose prompts were sampled")
    args = parser.parse_args()
    if (args.way == _SPIN) != bool(args.given):
        raise UserError(f"--given goes with --way={_SPIN}, which needs it")
    if args.first < 0 or not args.apart >= 0:
        raise UserError("--first and --apart: expected 0 or more")
    if args.given and (args.first or args.apart):
        raise UserError(f"--first and --apart go with scores, and --way={_SPIN} reads none")
    if args.ratings and args.way != "steerlm":
        raise UserError(f"--ratings goes with --way=steerlm, and this is --way={args.way}")
    if args.given:
        counts = spin_file(args.source, args.given, args.out, args.unended)
        print(f"{_said(counts)}\n{args.out}")
        return
    ratings = _parse_ratings(args.ratings or "0,4")
    choice = Choice(args.way, args.first, args.unended, args.apart, ratings)
    print(f"{_said(choose_file(args.source, args.out, choice))}\n{args.out}")


if __name__ == "__main__":
    exit_with_message(_main)
