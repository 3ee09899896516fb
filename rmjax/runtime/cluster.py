"""How the processes of one run find each other; a single process needs nothing of this.

JAX can detect clusters itself (`jax._src.clusters`), but not all that are served here. In SLURM it
gives each task one device, also one that has a node of many to itself, two steps of a job share a
port, and it cannot read a node list like rack[1-2]n3. In Open MPI 5 it detects nothing. And what
goes wrong is not said so that a user can fix it. Only a TPU pod's hosts are found by JAX's code.
"""

import dataclasses
import os
import re
import socket
import sys
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from rmjax.errors import UserError

JOIN_SECONDS = 300  # in which all processes must start
HEARTBEAT_SECONDS = 100  # after which a silent process counts as dead


@dataclasses.dataclass(frozen=True)
class ClusterProcess:
    """One process among many.

    Attributes:
      launcher: what started the processes, and so says which is which.
      processes: how many there are.
      process: which of them this is, from 0.
      coordinator: HOST:PORT of process 0, to which all others connect.
      devices: the numbers of the local devices that this process uses; None for all it sees.
    """

    launcher: str
    processes: int
    process: int
    coordinator: str
    devices: list[int] | None = None


def initialize(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    join_seconds: float = JOIN_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Connects this process with the others of the run, if there are any; before JAX is used.

    Processes that SLURM (`srun`), Open MPI (`mpirun`) or a TPU pod started are numbered by it.
    Elsewhere every process needs all three arguments.

    Args:
      coordinator: HOST:PORT of process 0; with SLURM or Open MPI it may be given alone.
      processes: how many there are.
      process: which of them this is, from 0.
      join_seconds: how long to wait for the others before this process exits.
      heartbeat_seconds: how long another process may be silent before this one exits.

    Raises:
      UserError: the arguments are incomplete, or contradict each other or the environment.
    """
    own = detect_process(os.environ, coordinator, processes, process)
    if own is None:
        return
    if own.process == 0:
        _check_port(int(own.coordinator.rsplit(":", 1)[1]))
    late = threading.Timer(join_seconds, _exit_alone, (own, join_seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            own.coordinator,
            own.processes,
            own.process,
            own.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(join_seconds) + 60,  # later than ours, since JAX aborts
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    finally:
        late.cancel()
    if own.process == 0:
        print(f"processes   {own.processes} ({own.launcher})", flush=True)


def _check_port(port: int) -> None:
    """Raises a `UserError` if this process cannot listen on `port`; JAX might crash instead."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error}): choose another with "
            "--coordinator=HOST:PORT, the same for every process"
        ) from error


def _exit_alone(own: ClusterProcess, seconds: float) -> None:
    """Ends a process that waits in vain; JAX itself would abort with a stack trace."""
    try:
        host, port = own.coordinator.rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        why = f"not all of the {own.processes} processes were there"
    except OSError as error:
        why = f"process 0 could not be reached at {own.coordinator} ({error})"
    print(
        f"error: process {own.process} waited {seconds:g} s for the others; {why} "
        f"(started by {own.launcher})",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def detect_process(
    environment: Mapping[str, str],
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> ClusterProcess | None:
    """Which process of how many this is; None if there is only one.

    Raises:
      UserError: see `initialize`.
    """
    if coordinator is not None and not re.fullmatch(r"[^\s/]+:\d{1,5}", coordinator):
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
    if processes is not None and processes < 1:
        raise UserError(f"--processes={processes}: expected 1 or more")
    if process is not None and not 0 <= process < (processes or process + 1):
        raise UserError(f"--process={process}: of {processes} processes they are numbered from 0")
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    own = _of_slurm(environment) or _of_open_mpi(environment) or (_of_tpu() if missing else None)
    if own is not None:
        return _confirmed(own, given)
    if processes == 1 or len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: without SLURM, Open MPI or a TPU pod each process "
            "needs --coordinator=HOST:PORT --processes=N --process=I"
        )
    return ClusterProcess("flags", processes or 0, process or 0, coordinator or "")


def _confirmed(own: ClusterProcess, given: dict[str, Any]) -> ClusterProcess:
    """`own`, if the flags do not contradict it; they may name the coordinator."""
    for name in ("processes", "process"):
        if given[name] not in (None, getattr(own, name)):
            raise UserError(
                f"--{name}={given[name]}, but {own.launcher} started this as process "
                f"{own.process} of {own.processes}; leave the flag out"
            )
    if given["coordinator"] is not None:
        return dataclasses.replace(own, coordinator=given["coordinator"])
    if not own.coordinator:
        raise UserError(
            f"{own.launcher} does not say where process 0 runs; add --coordinator=HOST:PORT of it"
        )
    return own


def _of_slurm(environment: Mapping[str, str]) -> ClusterProcess | None:
    """A task of a job step; an allocation or a batch script alone is not one."""
    processes = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if processes == 1:
        return None
    # The first node of "node1", "node1,node2", "node[01-04,07]" or "rack[1-2]n3".
    first = re.match(
        r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,\[]*))?", environment["SLURM_STEP_NODELIST"]
    )
    assert first is not None
    host = "".join(part or "" for part in first.groups())
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
    shared = environment.get("SLURM_STEP_NUM_NODES") != str(processes)
    return ClusterProcess(
        "SLURM",
        processes,
        int(environment["SLURM_PROCID"]),
        f"{host}:{_port(job + step)}",
        _share(environment, int(environment["SLURM_LOCALID"])) if shared else None,
    )


def _of_open_mpi(environment: Mapping[str, str]) -> ClusterProcess | None:
    processes = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if processes == 1:
        return None
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", processes))
    launcher = environment.get("OMPI_MCA_orte_hnp_uri", "")  # until Open MPI 5
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^],]+)", launcher)
    host = (address[1] or f"[{address[2]}]") if address else ""
    if local == processes:
        host = "127.0.0.1"
    job = environment.get("PMIX_NAMESPACE", launcher)
    return ClusterProcess(
        "Open MPI",
        processes,
        int(environment["OMPI_COMM_WORLD_RANK"]),
        f"{host}:{_port(zlib.crc32(job.encode()))}" if host else "",
        _share(environment, int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])) if local > 1 else None,
    )


def _of_tpu() -> ClusterProcess | None:
    """A host of a TPU pod, of several slices too, on Compute Engine or Kubernetes."""
    try:
        from jax._src.clusters import cloud_tpu_cluster as tpu
    except ImportError:  # moved in a later JAX; the three flags still work
        return None
    for cluster in (tpu.GkeTpuCluster, tpu.GceTpuCluster):
        kind: Any = cluster
        try:
            if not kind.is_env_present():
                continue
        except OSError:  # no metadata server: not on Compute Engine
            continue
        try:
            processes = kind.get_process_count()
            if processes == 1:
                return None
            address = kind.get_coordinator_address(JOIN_SECONDS, None)
            return ClusterProcess("TPU pod", processes, kind.get_process_id(), address)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the hosts of this TPU pod cannot be found ({error}); name them on each with "
                "--coordinator=HOST:PORT --processes=N --process=I"
            ) from error
    return None


def _share(environment: Mapping[str, str], local: int) -> list[int] | None:
    """The one device that a process uses of a node that it shares; None if it was given its own."""
    alone = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    return None if alone or "SLURM_GPUS_PER_TASK" in environment else [local]


def _port(job: int) -> int:
    """A port that is the same for all processes of a job, and most likely no other job's."""
    return 61440 + job % 4096
