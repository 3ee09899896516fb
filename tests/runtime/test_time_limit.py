"""Code that takes too long is ended, wherever it is."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time

import pytest

from rmjax.errors import UserError
from rmjax.runtime.time_limit import time_limit


def loops():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.001)


def test_what_is_done_in_time_is_left_alone():
    before = signal.getsignal(signal.SIGUSR2)
    with time_limit(5.0, "it"):
        pass
    with pytest.raises(ValueError, match="its own"), time_limit(5.0, "it"):
        raise ValueError("its own")
    assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.parametrize(
    "hangs", [lambda: time.sleep(60), loops, lambda: asyncio.run(asyncio.sleep(60))]
)
def test_what_is_not_is_interrupted(hangs):
    began = time.monotonic()
    said = r"the judge was not done after 0\.05 s"
    with pytest.raises(UserError, match=said), time_limit(0.05, "the judge"):
        hangs()
    assert time.monotonic() - began < 5


def test_what_cannot_be_interrupted_ends_the_process():
    """A pattern that backtracks keeps the interpreter's lock."""
    code = (
        "import re\n"
        "from rmjax.runtime import time_limit as t\n"
        "t._GRACE = 0.1\n"
        "with t.time_limit(0.1, 'it'):\n"
        "    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1 and ended.stderr.startswith("Timeout")
    assert 'File "<string>", line 5' in ended.stderr
