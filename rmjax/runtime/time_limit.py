"""A time limit for code of others, which may hang wherever it is.

The code runs in the main thread, as it would without a limit: some of it sets alarms, which only
that thread may, and a debugger in it works as always. At the limit the thread is interrupted by a
signal, which ends sleeping, reading from a socket and any loop of Python's. What is deaf to that,
as is C code that keeps the interpreter's lock, ends the process a little later, with a traceback of
where it hangs. (A child process could be killed at any time. But it would have no devices, and
nothing could be handed to it that cannot be pickled.)
"""

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from rmjax.errors import UserError

_GRACE = 10.0  # seconds between the interruption and the end of the process
_STDERR = 2
_SIGNAL = signal.SIGUSR2  # not Ctrl-C's, which a command in the background is told to ignore


class _Expired(BaseException):
    """Nothing that catches errors catches it."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Ends its body after `seconds`; for the main thread.

    Args:
      seconds: how long it may take.
      what: it is, for the message.

    Raises:
      UserError: it took longer.
    """
    done, expired, deciding = threading.Event(), threading.Event(), threading.Lock()
    caller = threading.get_ident()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Expired

    def watch() -> None:
        if done.wait(seconds):
            return
        with deciding:
            if not done.is_set():
                expired.set()
                signal.pthread_kill(caller, _SIGNAL)

    before = signal.signal(_SIGNAL, interrupt)
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=_STDERR)
    threading.Thread(target=watch, daemon=True).start()
    try:
        try:
            yield
        finally:
            with deciding:  # from here on nothing is interrupted any more
                done.set()
    except BaseException as error:
        if expired.is_set():
            raise UserError(f"{what} was not done after {seconds:g} s") from error
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(_SIGNAL, before)
