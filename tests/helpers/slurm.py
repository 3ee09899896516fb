"""A SLURM cluster of one node on this machine, from Debian's packages slurm-wlm and munge."""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from helpers.launching import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in (*DAEMONS, "sbatch") if not _find(name)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """A running cluster; `directory` is where its jobs' outputs go."""

    def __init__(self, directory: Path, environment: Mapping[str, str]):
        self.directory = directory
        self._environment = {**os.environ, **environment}

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(
            command,
            env={**self._environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, job: str, is_there: Callable[[dict[str, str]], bool], limit: float = 480
    ) -> None:
        """Until the job is as wanted; a job that has ended otherwise never will be."""
        end = time.monotonic() + limit
        while not is_there(state := self.job(job)):
            ended = state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended and time.monotonic() < end, f"{state}\n{self.output(job)}"
            time.sleep(0.1)

    def output(self, job: str) -> str:
        """What the job printed so far."""
        path = self.directory / f"{job}.out"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def cluster() -> Iterator[Slurm]:
    """Starts the daemons, and ends them and all jobs."""
    with contextlib.ExitStack() as stack:
        # Not pytest's directory: a socket's path may have 107 characters.
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        root.chmod(0o755)
        for name in ("run", "state", "spool", "jobs"):
            (root / name).mkdir()
        key = root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        config = root / "slurm.conf"
        config.write_text(
            _CONFIG.format(
                root=root,
                host=socket.gethostname().split(".")[0],
                user=pwd.getpwuid(os.geteuid()).pw_name,
                controller_port=free_port(),
                node_port=free_port(),
            )
        )
        environment = {"SLURM_CONF": str(config)}
        own = root / "run"
        daemons = (
            ["munged", "--foreground", "--force", f"--socket={own}/munge", f"--key-file={key}"]
            + [f"--{name}-file={own}/munge.{name}" for name in ("pid", "log", "seed")],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "localhost"],
        )
        for command in daemons:
            log = stack.enter_context(open(root / f"{command[0]}.log", "wb"))
            process = subprocess.Popen(
                [_find(command[0]), *command[1:]],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
            stack.callback(_end, process)
        slurm = Slurm(root / "jobs", environment)
        _wait_for_node(slurm, root)
        stack.callback(_cancel_all, slurm)
        yield slurm


def _find(daemon: str) -> str:
    return shutil.which(daemon, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def _wait_for_node(slurm: Slurm, root: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(AssertionError):
            if slurm.run("sinfo", "--noheader", "--format=%T") == "idle":
                return
        time.sleep(0.2)
    logs = [(root / f"{name}.log").read_text()[-2000:] for name in DAEMONS]
    raise AssertionError("the cluster did not start:\n" + "\n".join(logs))


def _cancel_all(slurm: Slurm) -> None:
    end = time.monotonic() + 60
    while jobs := slurm.run("squeue", "--noheader", "--format=%i").split():
        if time.monotonic() > end:
            break
        with contextlib.suppress(AssertionError):  # it ended by itself
            slurm.run("scancel", "--signal=KILL", "--full", *jobs)
        with contextlib.suppress(AssertionError):
            slurm.run("scancel", *jobs)
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
