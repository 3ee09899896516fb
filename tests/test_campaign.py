"""A short form of the campaign's parts: commands killed, stopped, on bad storage; numbers."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
def test_nothing_is_lost():
    program = [sys.executable, ROOT / "benchmarks" / "reliability.py", "--minutes=0.03"]
    program += [f"--part={part}" for part in ("kills", "signals", "storage", "numbers")]
    program += ["--command=conversion to Orbax"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in (
        "kill -9 | conversion",
        "signals | Ctrl-C: conversion",
        "| storage | ",
        "| numbers | choosing",
    ):
        assert row in done.stdout
