"""A process that makes tokens for another one.

    python -I token_worker.py

`token_workers.py` begins it. Through its standard input come a path to import from, what makes
tokens, and portions, each answered through its standard output. It ends when its input does, so
whoever began it cannot leave it behind. It imports neither jax nor the script that is run, which
need not be made for that.
"""

import os
import pickle
import sys
import traceback
from typing import BinaryIO


def main() -> None:
    """The process."""
    asked = sys.stdin.buffer
    # What a library prints must not come between the answers.
    with os.fdopen(os.dup(1), "wb") as answers, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            _answer_all(asked, answers)
        except (EOFError, BrokenPipeError):
            os._exit(0)  # nobody asks or listens any more


def _answer_all(asked: BinaryIO, answers: BinaryIO) -> None:
    sys.path[:] = pickle.load(asked)  # from the process that began this one, as all that comes
    from rmjax.data.portion import Answer
    from rmjax.errors import UserError

    encode = pickle.load(asked)
    unread = encode.encoder.unread
    while True:
        entries, encode.encoder.kinds = pickle.load(asked)
        unread.clear()
        try:
            answer = Answer(encode(entries), unread)
        except UserError as error:
            answer = Answer([], unread, error)
        except Exception:
            answer = Answer([], unread, None, traceback.format_exc())
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()
