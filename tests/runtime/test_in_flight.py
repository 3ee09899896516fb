"""Steps that are computed at once."""

import threading

import jax
import pytest

from rmjax.config import MeshConfig
from rmjax.runtime.in_flight import in_flight
from rmjax.runtime.sharding import make_mesh


def meshes():
    one = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    return [one, make_mesh(MeshConfig(), jax.devices("cpu")[:2])]


def test_steps_meet_on_one_cpu_device_and_come_in_their_order():
    both = threading.Barrier(2, timeout=20)
    taken = []

    def steps():
        for step in range(8):
            taken.append(threading.current_thread().name)
            yield step

    def compute(step: int) -> int:
        both.wait()  # returns only when another step is being computed
        return step * step

    found = in_flight(compute, steps(), meshes()[0])
    assert next(found) == 0
    assert len(taken) == 3  # two that are computed, and the next
    assert list(found) == [step * step for step in range(1, 8)]
    assert set(taken) == {threading.current_thread().name}


def test_on_several_devices_steps_are_one_after_the_other():
    threads = in_flight(lambda _: threading.current_thread().name, range(3), meshes()[1])
    assert set(threads) == {threading.current_thread().name}


@pytest.mark.parametrize("mesh", meshes(), ids=["one device", "two"])
def test_a_failure_is_the_callers_and_ends_it(mesh):
    begun = []

    def compute(step: int) -> int:
        begun.append(step)
        if step == 1:
            raise ValueError("step 1")
        return step

    with pytest.raises(ValueError, match="step 1"):
        list(in_flight(compute, range(100), mesh))
    assert max(begun) < 5
