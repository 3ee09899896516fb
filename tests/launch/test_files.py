"""The files of launch/ against their tools, schemas and stand-ins; test_run.py runs two."""

import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from absl import flags

from helpers.paths import ROOT
from rmjax.training.config_file import parse_config
from rmjax.training.validate_config import validate

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted(path for path in LAUNCH.iterdir() if path.is_file())


def named(path: Path) -> str:
    return path.name


def tool(name: str) -> str:
    """A program, also of an environment that is not activated."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"no {name}: pip install {name}-py or {name}-bin")


# ---- all files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_header_says_what_to_set_and_how_it_was_checked(path: Path):
    text = path.read_text()
    assert re.search(r"^# Checked  ", text, re.MULTILINE), "how was it checked?"
    if path.name != "tpu_worker.sh":  # only called by others
        for word in ("Set", "Watch", "Resumes"):
            assert re.search(rf"^# {word} +", text, re.MULTILINE), word
        assert re.search(r"\bStop\b", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_bash_reads_it(path: Path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_shellcheck_finds_nothing(path: Path):
    command = [tool("shellcheck"), "--severity=warning", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def command_lines() -> list:
    """Every `--config=FILE --config.field=value ...` in launch/ and its documentation."""
    found = []
    for path in [*FILES, ROOT / "docs/launch.md"]:
        text = re.sub(r"\\\n[# ]*|\n +- (?=--config)", " ", path.read_text())
        for line in text.splitlines():
            arguments = [
                # What the script or the reader fills in is a number.
                re.sub(r'(?<==)("?\$\{?\w.*|SLICES.?$)', "2", word)
                for word in re.findall(r"--config(?:\.[a-z_.]+)?=[^\s`|]*", line)
            ]
            if arguments and "FILE" not in arguments[0]:
                found.append(pytest.param(arguments, id=f"{path.name}: {' '.join(arguments)}"))
    return found


@pytest.mark.parametrize("arguments", command_lines())
def test_every_flag_is_a_field(arguments: list[str]):
    if not arguments[0].startswith("--config="):
        arguments = ["--config=configs/llama70b_regression.py", *arguments]
    line = ["train", *(word.replace("=configs/", f"={ROOT}/configs/") for word in arguments)]
    values = flags.FlagValues()
    parse_config(line, values)
    validate(values.config)


@pytest.mark.parametrize(
    ("script", "variable"),
    [
        ("slurm.sbatch", "PYTHON"),
        ("mpirun.sh", "PYTHON"),
        ("tpu_pod.sh", "NAME"),
        ("tpu_multislice.sh", "NAME"),
    ],
)
def test_a_variable_that_is_not_set_is_named(script: str, variable: str):
    path = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", LAUNCH / script], env=path, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{variable}: " in done.stderr


def test_gpu_node_passes_the_arguments_on(tmp_path: Path):
    log = stand_in(tmp_path, "python")
    settings = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    settings.pop("PYTHON", None)
    subprocess.run([LAUNCH / "gpu_node.sh", "--config=a b"], env=settings, check=True)
    assert calls(log) == [["python", "-m", "rmjax.train", "--config=a b"]]


# ---- TPU pods ------------------------------------------------------------------------------------


def stand_in(directory: Path, name: str, then: str = "") -> Path:
    """A program that notes how it was called, in the file returned."""
    log = directory / "calls"
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport json, os, subprocess, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n{then}"
    )
    path.chmod(0o755)
    return log


def calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


# gcloud, for which this machine is the pod: `scp` copies and `ssh` runs, in a home of its own.
GCLOUD = """
home = os.environ["TPU_HOME"]
verb = next(word for word in sys.argv if word in ("create", "scp", "ssh", "describe", "delete"))
if verb == "scp":
    source, target = [word for word in sys.argv[sys.argv.index("scp") + 1:] if word[0] != "-"]
    subprocess.run(["cp", source, os.path.join(home, target.split(":")[1])], check=True)
if verb == "ssh":
    [command] = [word[10:] for word in sys.argv if word.startswith("--command=")]
    subprocess.run(["bash", "-c", command], cwd=home, env={**os.environ, "HOME": home}, check=True)
"""


@pytest.fixture
def pod(tmp_path: Path):
    """Runs a script of launch/ with stand-ins; returns how these were called."""
    home = tmp_path / "home"
    log = stand_in(tmp_path, "gcloud", GCLOUD)
    for name in ("sudo", "mountpoint", "python3"):
        stand_in(tmp_path, name, "sys.exit(sys.argv[0].endswith('mountpoint'))")
    uv = stand_in(tmp_path, "home/.local/bin/uv")
    uv.touch()
    settings = dict(NAME="rm", ZONE="z", TYPE="v5p-128", VERSION="v2")
    settings |= dict(NFS="10.0.0.2:/a", SLICES="2")

    def run(*command: str) -> list[list[str]]:
        log.unlink(missing_ok=True)
        subprocess.run(
            [LAUNCH / command[0], *command[1:]],
            cwd=ROOT,
            env={
                **os.environ,
                **settings,
                "TPU_HOME": str(home),
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
            },
            check=True,
        )
        return calls(log)

    return run, home


ARGUMENTS = ("--config=configs/quickstart.py", "--config.workdir=/mnt/shared/a run")


@pytest.mark.parametrize(
    ("script", "setup", "added"),
    [
        ("tpu_pod.sh", ["create"], []),
        ("tpu_multislice.sh", ["request", "state", "setup"], ["--config.mesh.data=2"]),
    ],
)
def test_a_pod_gets_the_code_and_trains(pod, script: str, setup: list[str], added: list[str]):
    run, home = pod
    made = [call for verb in setup for call in run(script, verb)]
    committed = subprocess.run(
        ["git", "show", "HEAD:rmjax/train.py"], cwd=ROOT, capture_output=True, check=True
    )
    assert (home / "rmjax/rmjax/train.py").read_bytes() == committed.stdout
    assert ["sudo", "mount", "-t", "nfs", "10.0.0.2:/a", "/mnt/shared"] in made
    [install] = [call for call in made if call[1:3] == ["pip", "install"]]
    assert install[-1] == ".[tpu]"

    # The last commit was sent; what it says is said by the file that is here.
    shutil.copy(LAUNCH / "tpu_worker.sh", home / "rmjax/launch/tpu_worker.sh")
    [_, unit] = run(script, "train", *ARGUMENTS)
    assert unit[:2] == ["sudo", "systemd-run"]
    program = unit.index(f"{home}/rmjax/.venv/bin/python")
    assert unit[program + 1 :] == ["-m", "rmjax.train", *added, *ARGUMENTS]
    assert run(script, "stop")[-1] == ["sudo", "systemctl", "stop", "rmjax"]
    assert run(script, "watch")[-1][:2] == ["sudo", "journalctl"]
    assert "delete" in run(script, "delete")[-1]


def test_gcloud_knows_the_flags(pod):
    """Against the table with which the installed gcloud completes its own command lines."""
    gcloud = shutil.which("gcloud")
    table = gcloud and Path(gcloud).resolve().parents[1] / "data/cli/gcloud_completions.py"
    if not table or not table.exists():
        pytest.skip("no gcloud")
    tree = runpy.run_path(str(table))["STATIC_COMPLETION_CLI_TREE"]
    everywhere = {"--version", "--format"}  # --version is create's, and hidden by gcloud's own
    run, _ = pod
    made = [
        call
        for script, verbs in (
            ("tpu_pod.sh", ("create", "watch", "stop", "delete")),
            ("tpu_multislice.sh", ("request", "state", "setup", "watch", "stop", "delete")),
        )
        for verb in verbs
        for call in run(script, verb)
        if call[0] == "gcloud"
    ]
    assert len(made) > 10
    for _, *words in made:
        node = tree
        while words[0] in node.get("commands", {}):
            node = node["commands"][words.pop(0)]
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= {*node["flags"], *everywhere}, words


# ---- Kubernetes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_jobset_adds_up(jobset: dict):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    [slices] = jobset["spec"]["replicatedJobs"]
    assert set(slices) == {"name", "replicas", "template"}
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == math.prod(map(int, topology.split("x")))
    assert f"--config.mesh.data={slices['replicas']}" in container["args"]
    [claim] = pod["volumes"]
    [mount] = container["volumeMounts"]
    assert claim["name"] == mount["name"]
    [workdir] = [word for word in container["args"] if word.startswith("--config.workdir=")]
    assert workdir.split("=")[1].startswith(mount["mountPath"])


def test_kubernetes_would_take_the_job(jobset: dict):
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("no kubernetes_validate: pip install kubernetes-validate")
    import kubernetes_validate

    for slices in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
        kubernetes_validate.validate(job | slices["template"], "1.30", strict=True)


@pytest.mark.parametrize(("behaviour", "code"), [("0", 0), ("3", 3), ("stop", 75)])
def test_a_pod_that_was_stopped_does_not_count_as_done(
    jobset: dict, tmp_path: Path, behaviour: str, code: int
):
    """The JobSet's own command line, with a stand-in for Python that ends well at SIGTERM."""
    [slices] = jobset["spec"]["replicatedJobs"]
    [container] = slices["template"]["spec"]["template"]["spec"]["containers"]
    then = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    then += "open(os.environ['READY'], 'w').close()\n"
    then += "time.sleep(60)" if behaviour == "stop" else f"sys.exit({behaviour})"
    log, ready = stand_in(tmp_path, "python", then), tmp_path / "ready"
    process = subprocess.Popen(
        [*container["command"], *container["args"]],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "READY": str(ready)},
    )
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    if behaviour == "stop":
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code
    assert calls(log) == [["python", "-m", "rmjax.train", *container["args"][1:]]]


# ---- Docker --------------------------------------------------------------------------------------


def test_hadolint_finds_nothing():
    # DL3013: pip's versions are in pyproject.toml.
    command = [tool("hadolint"), "--no-color", "--ignore=DL3013", LAUNCH / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("extra", ["cpu", "cuda12", "cuda13", "tpu", "rocm"])
def test_the_image_installs_the_extra(tmp_path: Path, extra: str):
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", "")
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in shlex.split(sources))
    [install] = [line[4:] for line in text.splitlines() if line.startswith("RUN case")]
    log = stand_in(tmp_path, "pip")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", install], env={"PATH": path, "EXTRA": extra})
    if extra == "rocm":
        assert done.returncode != 0
        return
    assert calls(log)[0][-1] == ("." if extra == "cpu" else f".[{extra}]")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra == "cpu" or extra in extras["optional-dependencies"]
