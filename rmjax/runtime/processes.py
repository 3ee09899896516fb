"""What the processes of a run do together: agree, wait for each other, stop and exit.

They communicate through JAX's coordination service, which process 0 hosts, and not through their
devices: a message can be text, and a process that waits can still be told to exit. For a single
process all of it does nothing.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from rmjax.errors import UserError, differing, exit_with_message, shown

# Long, because other things end a process that waits: a failure that another one reports, and JAX
# when another one falls silent (`cluster.HEARTBEAT_SECONDS`).
_WAIT_SECONDS = 24 * 3600.0
_POLL_SECONDS = 1.0  # between two looks whether another process failed
_FAREWELL_SECONDS = 10.0  # that a failed run waits for processes that do not answer

# Keys of the coordination service, the first two followed by the process's number.
_FAILED, _ENDED, _SAID = "rmjax/failed/", "rmjax/ended/", "rmjax/said"
_ending = threading.Lock()
_asked = itertools.count()  # how often `from_first` was


def barrier(where: str) -> None:
    """Waits until every process has reached the point of the program named `where`."""
    client = _client()
    if client is not None:
        client.wait_at_barrier(f"rmjax/barrier/{where}", round(_WAIT_SECONDS * 1000))


def broadcast(name: str, text: str) -> str:
    """The `text` of process 0, on every process.

    Args:
      name: of the message; each is sent once.
      text: the message; only that of process 0 counts.
    """
    client = _client()
    if client is None:
        return text
    if _state().process_id == 0:
        client.key_value_set(f"rmjax/broadcast/{name}", text)
        return text
    return client.blocking_key_value_get(f"rmjax/broadcast/{name}", round(_WAIT_SECONDS * 1000))


def from_first(what: str, compute: Callable[[], Any]) -> Any:
    """What process 0 computes, in JSON's types, on every process.

    What fails on process 0 ends all of them, as every failure does; see `run_together`.

    Args:
      what: its name. Each is sent under a number of its own, so every process must ask as often.
      compute: called on process 0 alone.
    """
    if _client() is None:
        return compute()
    text = json.dumps(compute()) if _state().process_id == 0 else ""
    return json.loads(broadcast(f"{what} {next(_asked)}", text))


def check_agreement(what: str, values: Mapping[str, Any]) -> None:
    """Compares the `values` (in JSON's types) of all processes; returns when all have.

    Raises:
      UserError: on each process whose values are not those of process 0; it names them.
    """
    ours = json.loads(json.dumps(values))
    theirs = json.loads(broadcast(what, json.dumps(values)))
    if differences := sorted(differing(ours, theirs).items()):
        listed = "; ".join(
            f"{key} is {own!r}, there {other!r}" for key, (own, other) in differences
        )
        raise UserError(f"its {what} differs from that of process 0: {listed}")
    barrier(what)


class Preemption:
    """Notices SIGTERM, so that the training loop can save and exit; use as a context manager.

    Whether one process gets it or all, they stop at the same step.
    """

    def __init__(self) -> None:
        self._signalled = False

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; call it once after every step."""
        if _client() is None:
            return self._signalled
        # JAX has caught the signal since the processes connected. It tells the others in the
        # background and picks a step that no process has reached, so that none has to wait.
        return multihost_utils.reached_preemption_sync_point(step)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __enter__(self) -> "Preemption":
        if _client() is None:
            self._before = signal.signal(signal.SIGTERM, self._signal)
        return self

    def __exit__(self, *unused: object) -> None:
        if _client() is None:
            signal.signal(signal.SIGTERM, self._before)


def run_together(main: Callable[[], None]) -> None:
    """Runs `main` on every process, and ends all of them when it fails on one.

    A failure is reported to all processes and printed by process 0; all exit with status 1. A
    process that was killed cannot report anything. The others then exit at once if their connection
    to it breaks. Else they wait for its devices until JAX ends them with a message about a dead
    task: after `cluster.HEARTBEAT_SECONDS`, or at once if it was process 0.
    """
    client = _client()
    if client is None:
        exit_with_message(main)
        return
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(client, done), daemon=True)
    listener.start()
    try:
        main()
        barrier("the end")  # until then, a failure is still noticed
    except BaseException as error:
        _fail(client, error)
    done.set()
    listener.join()


def _state() -> Any:
    """JAX's own record of the processes, which is there before it looks for devices."""
    # JAX has no public way to send a text or to wait with a time limit; others use this as well.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    """JAX's connection to the coordination service; None where there is one process."""
    return _state().client


def _listen(client: Any, done: threading.Event) -> None:
    while not done.wait(_POLL_SECONDS):
        try:
            failed = client.key_value_dir_get(_FAILED)
        except jax.errors.JaxRuntimeError:
            continue  # the service is gone, which JAX notices as well
        if failed:
            _end(client)


def _fail(client: Any, error: BaseException) -> NoReturn:
    """Reports to all processes why this one cannot go on, and exits."""
    if isinstance(error, UserError | KeyboardInterrupt):
        kind, text = "user", shown(error) or "interrupted"
    elif isinstance(error, jax.errors.JaxRuntimeError):
        kind, text = "jax", traceback.format_exc()
    else:
        kind, text = "bug", traceback.format_exc()
    report = json.dumps({"kind": kind, "text": text.rstrip()})
    try:
        client.key_value_set(f"{_FAILED}{_state().process_id}", report)
    except jax.errors.JaxRuntimeError:
        _exit(text, f"error: {_lost('process 0')}")
    _end(client)


def _end(client: Any) -> NoReturn:
    """Ends this process, as all others, after one of them failed; process 0 prints why."""
    _ending.acquire()  # never released: the second thread to come here has nothing left to do
    own, everybody = _state().process_id, set(range(_state().num_processes))
    until = time.monotonic() + _FAREWELL_SECONDS
    try:
        client.key_value_set(f"{_ENDED}{own}", "")
        if own != 0:
            client.blocking_key_value_get(_SAID, round(3 * _FAREWELL_SECONDS * 1000))
            _exit()
        while (silent := everybody - set(_by_process(client, _ENDED))) and (
            time.monotonic() < until
        ):
            time.sleep(0.05)
        failures = {i: json.loads(report) for i, report in _by_process(client, _FAILED).items()}
        print(_explain(failures, sorted(silent)), file=sys.stderr, flush=True)
        client.key_value_set(_SAID, "")
        time.sleep(1)  # process 0 hosts the service, which the others still read
    except jax.errors.JaxRuntimeError:
        _exit(f"error: {_lost('process 0')}")
    _exit()


def _explain(failures: Mapping[int, Mapping[str, str]], silent: list[int]) -> str:
    """What to print: of several failures the one that a user can fix, or that explains most."""
    kinds = ("user", "bug", "jax")
    first = min(failures, key=lambda process: (kinds.index(failures[process]["kind"]), process))
    kind, text = failures[first]["kind"], failures[first]["text"]
    where = f"process {first}: " if first else ""
    if kind == "user":
        return f"error: {where}{text}"
    if not silent:
        return f"{where}{text}"
    lost = f"error: {_lost('process ' + ', '.join(map(str, silent)))}"
    if kind == "jax":  # JAX's message about a connection that broke
        return f"{lost} ({where}{text.splitlines()[-1][:300]})"
    return f"{where}{text}\n{lost}"


def _lost(names: str) -> str:
    return (
        f"{names} does not answer any more: killed, or not to be reached; see its own output. "
        "The same command continues the run after its last checkpoint"
    )


def _by_process(client: Any, prefix: str) -> dict[int, str]:
    entries = client.key_value_dir_get(prefix)
    return {int(name.removeprefix(prefix)): value for name, value in entries}


def _exit(*lines: str) -> NoReturn:
    """Ends the process now; a usual exit would wait for the other processes."""
    for line in lines:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
