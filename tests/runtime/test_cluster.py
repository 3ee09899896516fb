import os
import socket
import subprocess
import sys

import pytest

from helpers.checks import known
from helpers.launching import free_port, run_all
from helpers.runs import QUICKSTART
from rmjax.errors import UserError
from rmjax.runtime.cluster import ClusterProcess, detect_process

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "node[007-009,011]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
OPEN_MPI_5 = {k: v for k, v in OPEN_MPI_4.items() if "orte" not in k}


def place(environment=None, coordinator=None, processes=None, process=None) -> ClusterProcess:
    return known(detect_process(environment or {}, coordinator, processes, process))


# ---- one alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # What `salloc` and a batch script have: an allocation for four tasks, and no step.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["nothing", "batch script", "one task", "mpirun -np 1"],
)
def test_one_process_is_not_many(environment):
    assert detect_process(environment, None, None, None) is None
    assert detect_process(environment, None, 1, 0) is None


# ---- flags ---------------------------------------------------------------------------------------


def test_three_flags_are_a_place():
    assert place({}, "host:1234", 2, 1) == ClusterProcess("flags", 2, 1, "host:1234")
    assert place({}, "[fe80::1]:1234", 2, 0) == ClusterProcess("flags", 2, 0, "[fe80::1]:1234")


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "named"),
    [
        ("host:1234", None, None, "--processes and --process missing"),
        ("host:1234", 2, None, "--process missing"),
        (None, 2, 0, "--coordinator missing"),
        (None, None, 0, "--coordinator and --processes missing"),
        ("host", 2, 0, "--coordinator=host: expected HOST:PORT"),
        ("http://host:1", 2, 0, "--coordinator=http"),
        ("host:1234", 0, 0, "--processes=0"),
        ("host:1234", 2, 2, "--process=2: of 2 processes"),
        ("host:1234", 2, -1, "--process=-1"),
    ],
)
def test_flags_that_do_not_fit_are_named(coordinator, processes, process, named):
    with pytest.raises(UserError, match=named):
        place({}, coordinator, processes, process)


@pytest.mark.parametrize(
    "environment", [SLURM, OPEN_MPI_4, OPEN_MPI_5], ids=["slurm", "open mpi 4", "open mpi 5"]
)
def test_flags_may_repeat_the_environment_or_name_the_coordinator(environment):
    found = place(environment, "host:1", 4, 3)
    assert (found.processes, found.process, found.coordinator) == (4, 3, "host:1")
    assert place(environment, "host:1") == found
    with pytest.raises(UserError, match=r"--processes=2, but .* process 3 of 4"):
        place(environment, "host:1", 2, 1)
    with pytest.raises(UserError, match="--process=1, but"):
        place(environment, "host:1", 4, 1)


# ---- environments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[007-009,011]", "node007"),
        ("a[1,3],b[1-2]", "a1"),
        ("rack[1-2]n3,x", "rack1n3"),
    ],
)
def test_slurm_steps(nodes, first):
    found = place(SLURM | {"SLURM_STEP_NODELIST": nodes})
    port = 61440 + (123456 + 2) % 4096
    assert found == ClusterProcess("SLURM", 4, 3, f"{first}:{port}")


def test_slurm_tasks_that_share_a_node_share_its_devices():
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"}
    assert place(shared).devices == [3]
    assert place(shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices == [3]
    # Where SLURM gave each its own, they are numbered from 0 in each.
    assert place(shared | {"SLURM_GPUS_PER_TASK": "1"}).devices is None
    assert place(shared | {"CUDA_VISIBLE_DEVICES": "3"}).devices is None


def test_open_mpi():
    found = place(OPEN_MPI_4)
    assert found.coordinator.startswith("10.96.0.1:") and found.devices == [1]
    assert (found.launcher, found.processes, found.process) == ("Open MPI", 4, 3)
    # Another job has another port, most likely; all ranks of a job have the same.
    assert place(OPEN_MPI_4 | {"OMPI_COMM_WORLD_RANK": "0"}).coordinator == found.coordinator
    six = OPEN_MPI_4 | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::b9b,fe80::3]:43370"}
    assert place(six).coordinator.startswith("[fe80::b9b]:")
    alone = place(OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert alone.devices is None


def test_open_mpi_5_on_several_hosts_needs_the_coordinator():
    with pytest.raises(UserError, match=r"does not say where process 0 runs; add --coordinator"):
        place(OPEN_MPI_5)
    on_one = place(OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "x@1"})
    assert on_one.coordinator.startswith("127.0.0.1:")


POD = """
import os
from rmjax.runtime.cluster import detect_process
print(detect_process(os.environ, None, None, None))
"""


def test_a_tpu_pod_is_found_by_what_jax_knows():
    """Kubernetes says it in variables; JAX must be started with them."""
    pod = {
        "JAX_FORCE_TPU_INIT": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "127.0.0.1,10.0.0.2",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "",
        "MEGASCALE_SLICE_ID": "",
        "MEGASCALE_COORDINATOR_ADDRESS": "",
    }
    for environment, expected in (
        (pod, ClusterProcess("TPU pod", 2, 1, "127.0.0.1:8482")),
        (
            pod
            | {
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:1234",
            },
            ClusterProcess("TPU pod", 4, 3, "127.0.0.1:8482"),
        ),
        (pod | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ):
        command = [sys.executable, "-c", POD]
        ended = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=100
        )
        assert ended.stdout.strip() == str(expected), ended.stderr


# ---- joining -------------------------------------------------------------------------------------

COUNT = """
import jax
from rmjax.training.command_line import run_with_config
run_with_config(lambda config: print(jax.process_index(), jax.process_count(), jax.device_count()))
"""


def test_two_processes_join_by_flags():
    first, second = run_all(["-c", COUNT, f"--config={QUICKSTART}"])
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out == "processes   2 (flags)\n0 2 8\n"
    assert second.out == "1 2 8\n"


def test_a_wrong_flag_is_one_line():
    (ended,) = run_all(["-c", COUNT, f"--config={QUICKSTART}", "--processes=2"], processes=1)
    assert ended.code == 1 and "Traceback" not in ended.err
    assert "--coordinator and --process missing" in ended.err


JOIN = """
import sys
from rmjax.runtime.cluster import initialize
from rmjax.errors import exit_with_message
coordinator, process = sys.argv[1], int(sys.argv[2])
exit_with_message(
    lambda: initialize(coordinator=coordinator, processes=2, process=process, join_seconds=2)
)
"""


@pytest.mark.parametrize(
    ("process", "why"), [(0, "not all of the 2 processes"), (1, "process 0 could not be reached")]
)
def test_a_process_does_not_wait_for_ever(process, why):
    arguments = ["-c", JOIN, f"127.0.0.1:{free_port()}", str(process)]
    (ended,) = run_all(arguments, processes=1)
    assert ended.code == 1, ended.err
    assert why in ended.err and "Check failure" not in ended.err


def test_a_port_in_use_is_said():
    with socket.create_server(("", 0)) as one:
        port = one.getsockname()[1]
        (ended,) = run_all(["-c", JOIN, f"127.0.0.1:{port}", "0"], processes=1)
    assert ended.code == 1
    assert f"cannot listen on port {port}" in ended.err and "Traceback" not in ended.err
