"""Which conversations are computed together, in what order, and what becomes of failures."""

import asyncio
import threading
import time

import numpy as np
import pytest

from rmjax.errors import UserError
from rmjax.inference.encoded import Encoded
from rmjax.inference.scores import Score
from rmjax.serving.admission import Admission, Full
from rmjax.serving.batcher import Batcher
from rmjax.serving.metrics import Metrics


def conversation(number, length=10, prompt=()):
    """Tokens whose first one is their number; its score is that."""
    tokens = np.asarray([*prompt, *range(number, number + length - len(prompt))], np.int32)
    return Encoded(tokens, 0, f"conversation {number}")


def value(encoded):
    return float(encoded.tokens[-1])


class Model:
    """Scores, and remembers the batches. While `busy` is set it waits."""

    def __init__(self):
        self.batches, self.free, self.began = [], threading.Event(), threading.Event()
        self.free.set()
        self.fails = {}

    def __call__(self, encoded):
        self.began.set()
        assert self.free.wait(60)
        self.batches.append([value(e) for e in encoded])
        for e in encoded:
            if value(e) in self.fails:
                raise self.fails[value(e)]
        return [Score({"a": value(e)}, value(e), "a", len(e.tokens)) for e in encoded]


def run(work, *, batch_tokens=100, window=0.02):
    """`await work(batcher, model)` with a batcher that runs; the model."""
    model = Model()

    async def main():
        batcher = Batcher(model, lambda: None, Metrics(), batch_tokens, window)
        batcher.start()
        await asyncio.wait_for(work(batcher, model), 30)
        await asyncio.to_thread(batcher.stop)

    asyncio.run(main())
    return model


def begin(batcher, model):
    """A first job that holds the model up, so that what comes next waits."""
    model.free.clear()
    return batcher.submit([conversation(900)])


async def begun(model):
    assert await asyncio.to_thread(model.began.wait, 20)


def test_what_comes_within_the_window_is_one_batch():
    async def work(batcher, model):
        first = batcher.submit([conversation(0), conversation(10)])
        await asyncio.sleep(0.005)
        second = batcher.submit([conversation(20)])
        assert [s.value for s in await first] == [9, 19]
        assert [s.value for s in await second] == [29]

    assert run(work, window=0.5, batch_tokens=30).batches == [[9, 19, 29]]


def test_a_full_batch_does_not_wait():
    async def work(batcher, model):
        began = time.monotonic()
        await batcher.submit([conversation(i) for i in range(10)])
        assert time.monotonic() - began < 5

    run(work, window=20, batch_tokens=100)


def test_a_long_request_lets_others_pass():
    async def work(batcher, model):
        held = begin(batcher, model)
        await begun(model)
        long = batcher.submit([conversation(i) for i in range(100, 125)])
        short = batcher.submit([conversation(500)])
        model.free.set()
        await held
        assert [s.value for s in await short] == [509]
        assert not long.done()
        assert [s.value for s in await long] == list(range(109, 134))

    sizes = [len(batch) for batch in run(work).batches]
    assert sizes == [1, 10, 10, 6]  # the short one in the third, before the end of the long one


def test_a_prompt_counts_once():
    """Responses to a prompt are one batch, though they have seven times its tokens apart."""
    prompt = list(range(5000, 5040))

    async def work(batcher, model):
        held = begin(batcher, model)
        await begun(model)
        jobs = [batcher.submit([conversation(i, 43, prompt)]) for i in range(16)]
        model.free.set()
        await asyncio.gather(held, *jobs)

    assert [len(batch) for batch in run(work).batches] == [1, 16]


def test_who_goes_away_is_not_computed():
    async def work(batcher, model):
        held = begin(batcher, model)
        await begun(model)
        gone, stays = (batcher.submit([conversation(i)]) for i in (100, 200))
        gone.cancel()
        await asyncio.sleep(0)
        model.free.set()
        await asyncio.gather(held, stays)

    assert run(work).batches == [[909], [209]]


def test_one_that_fails_fails_alone(caplog):
    async def work(batcher, model):
        model.fails = {109.0: UserError("damaged"), 209.0: RuntimeError("out of memory")}
        jobs = [batcher.submit([conversation(i)]) for i in (100, 200, 300)]
        damaged, memory, fine = await asyncio.gather(*jobs, return_exceptions=True)
        assert str(damaged) == "damaged" and str(memory) == "out of memory"
        assert isinstance(fine, list) and fine[0].value == 309
        assert batcher.healthy
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await batcher.submit([conversation(200)])
        assert batcher.ready and not batcher.healthy
        await batcher.submit([conversation(300)])
        assert batcher.healthy

    run(work)
    assert "out of memory" in caplog.text  # why is in the log
    caplog.clear()


def test_what_cannot_be_compiled_is_said(caplog):
    def warm_up():
        raise MemoryError("no room")

    async def main():
        batcher = Batcher(Model(), warm_up, Metrics(), 100, 0.0)
        waits = batcher.submit([conversation(1)])
        batcher.start()
        with pytest.raises(MemoryError):
            await asyncio.wait_for(waits, 20)
        assert not batcher.ready and isinstance(batcher.failure, MemoryError)
        with pytest.raises(MemoryError):
            batcher.submit([conversation(1)])

    asyncio.run(main())
    caplog.clear()


def test_room_goes_to_who_came_first():
    async def main():
        room, order = Admission(100), []

        async def ask(name, tokens, seconds=20.0):
            await room.acquire(tokens, seconds)
            order.append(name)

        await ask("a", 60)
        tasks = [asyncio.create_task(ask(*x)) for x in (("big", 500), ("b", 30), ("c", 30))]
        await asyncio.sleep(0)
        assert room.waiting == 3  # b would fit, and does not go before who came first
        with pytest.raises(Full):
            await room.acquire(1, 0.01)
        room.release(60)
        await asyncio.sleep(0.01)
        assert order == ["a", "big"]  # larger than all, so alone
        room.release(500)
        await asyncio.gather(*tasks)
        assert order == ["a", "big", "b", "c"] and room.held == 60

    asyncio.run(main())


def test_who_stops_waiting_leaves_room():
    async def main():
        room = Admission(100)
        await room.acquire(60, 1)
        gone = asyncio.create_task(room.acquire(80, 20))
        await asyncio.sleep(0)
        behind = asyncio.create_task(room.acquire(40, 20))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait_for(behind, 5)
        assert room.held == 100 and room.waiting == 0
        late = asyncio.create_task(room.acquire(10, 20))
        await asyncio.sleep(0)
        room.release(100)  # it has room, and goes away before it knows
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert room.held == 0

    asyncio.run(main())
