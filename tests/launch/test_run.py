"""launch/slurm.sbatch and launch/mpirun.sh for real, on the CPU of this machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from helpers import slurm
from helpers.paths import ROOT

LIMIT = 480.0  # seconds after which something counts as hung
STEPS = 20_000  # more than a test sees; all of them are planned at each start

RUN = (
    "--config=configs/quickstart.py",
    "--config.data.train=generated:200",
    "--config.data.validation=",
    "--config.data.max_length=128",
    "--config.data.over_long=truncate_left",
    "--config.data.row_length=128",
    "--config.batch_size=4",
    "--config.rows_per_device=1",
    "--config.epochs=0.0",
    f"--config.steps={STEPS}",
    "--config.eval_every=0",
    "--config.checkpoint_every=0",
)


def steps(workdir: Path) -> list[int]:
    """The numbers of the steps that the run has on record."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_until(is_so: Callable[[], bool], describe: Callable[[], str]) -> None:
    end = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < end, describe()
        time.sleep(0.1)


def saved(workdir: Path) -> int:
    """The step of the run's one checkpoint."""
    [step] = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    return step


def environment(python: str) -> dict[str, str]:
    return {
        "PYTHON": python,
        "PYTHONPATH": str(ROOT),
        **{name: value for name, value in os.environ.items() if name.startswith("JAX_")},
        "JAX_NUM_CPU_DEVICES": "1",
    }


# ---- SLURM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    if slurm.missing():
        pytest.skip(slurm.missing())
    with slurm.cluster() as running:
        yield running


def submit(cluster: slurm.Slurm, python: str, *arguments: str) -> str:
    return cluster.run(
        *("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={cluster.directory}/%j.out"),
        *("--ntasks-per-node=2", "--gpus-per-node=0"),
        str(ROOT / "launch/slurm.sbatch"),
        *arguments,
        environment=environment(python),
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """In Python's place: a program that ends well at SIGTERM, as training does, after a second."""
    script = tmp_path / "stand_in.sh"
    script.write_text(
        "trap 'sleep 1; echo \"task $SLURM_PROCID saved\"; exit 0' TERM\n"
        'echo "task $SLURM_PROCID: $*"\n'
        "case $3 in\n"
        # Not one long sleep: SLURM signals that too, and the script might end before its turn.
        "--wait) while :; do sleep 0.1; done ;;\n"
        "--fail) ((SLURM_PROCID == 0)) && exit 3; while :; do sleep 0.1; done ;;\n"
        "esac\n"
    )
    return f"bash {script}"


def test_slurm_passes_the_arguments_to_each_task(cluster: slurm.Slurm, stand_in: str):
    job = submit(cluster, stand_in, "--config=a file.py", "--config.workdir=b")
    cluster.wait(job, lambda job: job["JobState"] == "COMPLETED")
    for task in range(2):
        line = f"task {task}: -m rmjax.train --config=a file.py --config.workdir=b"
        assert line in cluster.output(job).splitlines()


def test_slurm_requeues_a_job_that_was_told_to_stop(cluster: slurm.Slurm, stand_in: str):
    """As the time limit tells it: the signal goes to the batch script."""
    job = submit(cluster, stand_in, "--wait")
    wait_until(lambda: cluster.output(job).count("--wait") == 2, lambda: cluster.output(job))
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait(job, lambda job: job["JobState"] == "PENDING")
    assert cluster.job(job)["Restarts"] == "1"
    assert cluster.output(job).count("saved") == 2
    cluster.run("scancel", job)


def test_slurm_ends_a_job_whose_tasks_were_told_to_stop(cluster: slurm.Slurm, stand_in: str):
    job = submit(cluster, stand_in, "--wait")
    wait_until(lambda: cluster.output(job).count("--wait") == 2, lambda: cluster.output(job))
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait(job, lambda job: job["JobState"] == "COMPLETED")
    assert cluster.output(job).count("saved") == 2


def test_slurm_does_not_requeue_a_cancelled_job(cluster: slurm.Slurm, stand_in: str):
    job = submit(cluster, stand_in, "--wait")
    wait_until(lambda: cluster.output(job).count("--wait") == 2, lambda: cluster.output(job))
    cluster.run("scancel", job)
    cluster.wait(job, lambda job: job["JobState"] == "CANCELLED")
    assert cluster.output(job).count("saved") == 2
    assert cluster.job(job)["Restarts"] == "0"
    assert cluster.run("squeue", "--noheader") == ""


def test_slurm_ends_all_tasks_when_one_fails(cluster: slurm.Slurm, stand_in: str):
    job = submit(cluster, stand_in, "--fail")
    cluster.wait(job, lambda job: job["JobState"] == "FAILED")


@pytest.mark.slow
def test_training_under_slurm_saves_resumes_and_ends_when_a_task_dies(
    cluster: slurm.Slurm, tmp_path: Path
):
    workdir = tmp_path / "run"
    job = submit(cluster, sys.executable, *RUN, f"--config.workdir={workdir}")
    output = lambda: cluster.output(job)  # noqa: E731
    wait_until(lambda: len(steps(workdir)) >= 3, output)
    assert "processes   2 (SLURM)" in output()
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait(job, lambda job: job["JobState"] == "PENDING")
    at = saved(workdir)
    assert f"stopped by SIGTERM, step {at} of {STEPS} is saved" in output()
    assert steps(workdir) == list(range(1, at + 1))

    # SLURM starts it again by itself, when the first start's credentials have expired.
    cluster.wait(job, lambda job: job["JobState"] == "RUNNING")
    wait_until(lambda: len(steps(workdir)) >= at + 3, output)
    assert f"this run's, after step {at}" in output()
    tasks = [line.split() for line in cluster.run("scontrol", "listpids", job).splitlines()[1:]]
    [last] = [int(pid) for pid, _, step, local, _ in tasks if step == "0" and local == "1"]
    os.kill(last, signal.SIGKILL)
    cluster.wait(job, lambda job: job["JobState"] == "FAILED")
    assert saved(workdir) == at
    now = steps(workdir)
    assert now == list(range(1, len(now) + 1))


# ---- Open MPI ------------------------------------------------------------------------------------


@contextlib.contextmanager
def under_mpirun(log: Path, settings: Mapping[str, str], *arguments: str):
    """A run of launch/mpirun.sh."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun: apt-get install openmpi-bin")
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PROCESSES": "2",
    }
    with open(log, "w") as out:
        process = subprocess.Popen(
            [ROOT / "launch/mpirun.sh", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment(sys.executable), **allowed, **settings},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in reversed(family(process.pid)):  # they do not end with mpirun
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        process.wait()


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def test_open_mpi_gives_the_status_of_a_process_that_fails(tmp_path: Path):
    with under_mpirun(tmp_path / "out", {}, "--config=configs/none.py") as process:
        assert process.wait(LIMIT) == 1
    assert "--config=configs/none.py: there is no such file" in (tmp_path / "out").read_text()


def family(process: int) -> list[int]:
    """The process, and all that it started."""
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        return [process, *(one for child in children(process) for one in family(child))]
    return [process]


@pytest.mark.slow
def test_training_under_open_mpi_saves_resumes_and_ends_when_a_process_dies(tmp_path: Path):
    workdir, log = tmp_path / "run", tmp_path / "out"
    arguments = (*RUN, f"--config.workdir={workdir}")
    with under_mpirun(log, {}, *arguments) as process:
        wait_until(lambda: len(steps(workdir)) >= 3, log.read_text)
        process.terminate()
        assert process.wait(LIMIT) == 0
    at = saved(workdir)
    assert "processes   2 (Open MPI)" in log.read_text()
    assert f"stopped by SIGTERM, step {at} of {STEPS} is saved" in log.read_text()
    assert "\x1b" not in log.read_text()  # no progress bar in a file

    with under_mpirun(log, {}, *arguments) as process:
        wait_until(lambda: len(steps(workdir)) >= at + 3, log.read_text)
        assert f"this run's, after step {at}" in log.read_text()
        [mpirun] = children(process.pid)
        os.kill(children(mpirun)[1], signal.SIGKILL)
        assert process.wait(LIMIT) != 0
    now = steps(workdir)
    assert now == list(range(1, len(now) + 1))
