"""Ctrl-C while a command imports what it runs, and output that nothing takes."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

COMMANDS = sorted(
    path.stem
    for path in (ROOT / "rmjax").glob("[!_]*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)
# A library that every command imports, and beneath which Ctrl-C arrives.
_INTERRUPTED = """
import builtins, runpy, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name in ("jax", "numpy", "rich", "jinja2"):
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = sys.argv[2:]
runpy.run_module("rmjax.%s", run_name="__main__", alter_sys=True)
"""
ARGUMENTS = {
    "choose": ["a", "b", "--way=best"],
    "convert": ["hf-to-orbax", "a", "b"],
    "evaluate": ["baseline:length"],
    "extrapolate": ["a", "b", "c", "--alpha=1"],
    "report": ["a"],
    "sample": ["a", "b", "c"],
    "score": ["a", "b", "c"],
    "serve": ["a"],
}


_IN_A_FINALIZER = """
import signal, time
from rmjax.errors import answer_interrupts, exit_with_message
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

class Finalized:
    def __del__(self):
        raise KeyboardInterrupt

def main():
    Finalized()
    time.sleep(30)

answer_interrupts()
exit_with_message(main)
"""


def test_in_a_finalizer_it_is_not_swallowed():
    program = [sys.executable, "-c", _IN_A_FINALIZER]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


_IN_C = """
import hashlib, os, signal, threading
from rmjax.errors import end_when_interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
end_when_interrupted()
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
hashlib.pbkdf2_hmac("sha256", b"x", b"y", 100_000_000)  # about a minute, as a compiler
"""


def test_where_no_python_runs():
    done = subprocess.run(
        [sys.executable, "-c", _IN_C], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


_SAID = """
from rmjax.errors import answer_interrupts, exit_with_message
answer_interrupts()
exit_with_message(lambda: print("x"))
"""


def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-c", _SAID]
        done = subprocess.run(program, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the disk is full while writing standard output\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_is_one_line_and_status_130(command):
    program = [sys.executable, "-c", _INTERRUPTED % command, "-", *ARGUMENTS.get(command, [])]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
