"""The host's part by itself: every sample once, no row overwritten, prompts in their places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.generation.programs import CHUNK, Shape
from rmjax.generation.schedule import Request, Schedule


def requests(lengths: list[int], n: int, limit: int = 100) -> list[Request]:
    return [
        Request(i, 50 + i, np.arange(length, dtype=np.int32), limit, list(reversed(range(n))))
        for i, length in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    n=st.integers(1, 5),
    groups=st.integers(1, 4),
    members=st.integers(1, 4),
    spare=st.integers(0, 10),
    seed=st.integers(0, 9),
)
def test_every_sample_is_made_once_behind_its_own_prompt(lengths, n, groups, members, spare, seed):
    chance = np.random.default_rng(seed)
    places = max(1, max(lengths) - 1 + spare)
    schedule = Schedule(requests(lengths, n), Shape(groups, members, places, 64))
    stored = np.full((groups, places), -1)  # which prompt's token is where
    done = []
    for _ in range(1000):
        for placed in schedule.fill():
            end = placed.start + placed.request.places
            assert end <= places
            for group, _, running in schedule.running():  # nobody's prompt is written over
                resident = running.resident
                if group == placed.group and resident.start != placed.start:
                    assert resident.end <= placed.start or resident.start >= end
            stored[placed.group, placed.start : end] = placed.request.number
        busy = list(schedule.running())
        if not busy:
            break
        states = schedule.states()
        for group, row, running in busy:
            start, end = states.prompt_start[group, row], states.prompt_end[group, row]
            number = running.resident.request.number
            assert set(stored[group, start:end].tolist()) <= {number}
            assert end - start == lengths[number] - 1
            assert states.prompt_key[group, row] == 50 + number
        schedule.step += CHUNK
        for group, row, running in busy:
            if chance.random() < 0.5:
                done.append((running.resident.request.number, running.sample))
                schedule.finish(group, row)
    assert sorted(done) == [(i, s) for i in range(len(lengths)) for s in range(n)]


def test_a_prompt_is_kept_once_for_all_its_samples():
    schedule = Schedule(requests([5, 7], 4), Shape(2, 4, 8, 64))
    placed = schedule.fill()
    assert [(p.request.number, p.group, p.start) for p in placed] == [(0, 0, 0), (1, 1, 0)]
    assert len(list(schedule.running())) == 8


def test_groups_without_prompts_help_with_anothers():
    schedule = Schedule(requests([5], 8), Shape(2, 4, 8, 64))
    assert [(p.request.number, p.group) for p in schedule.fill()] == [(0, 0), (0, 1)]
    assert sorted(running.sample for _, _, running in schedule.running()) == list(range(8))


def test_a_row_that_is_over_makes_room_while_others_run():
    schedule = Schedule(requests([5, 5], 2), Shape(1, 2, 8, 64))
    schedule.fill()
    schedule.finish(0, 1)
    (placed,) = schedule.fill()
    assert (placed.request.number, placed.start) == (1, 4)
    assert [r.resident.request.number for _, _, r in schedule.running()] == [0, 1]


@pytest.mark.parametrize(
    "step, begun, limit, slots", [(0, 0, 100, 32), (64, 0, 80, 80), (64, 32, 100, 64)]
)
def test_slots_that_a_chunk_needs(step, begun, limit, slots):
    schedule = Schedule(requests([3], 1, limit), Shape(1, 1, 4, 64))
    schedule.step = begun
    schedule.fill()
    schedule.step = step
    assert schedule.slots_needed() == slots
