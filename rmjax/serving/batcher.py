"""The thread that computes: conversations of many requests become batches.

It alone uses the devices. A batch takes what waits, in the order of requests, up to a number of
tokens to compute; a prompt that several conversations of it begin with counts once, as it is
computed once, and its responses stay together where they can. If little waits, it waits a few
milliseconds for more. A request that does not fit in a batch goes to the end of the line with its
rest, so that a long one does not hold up others.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from rmjax.data.row_layout import common_prefix
from rmjax.errors import UserError
from rmjax.inference.encoded import Encoded
from rmjax.inference.scores import Score
from rmjax.serving.metrics import Metrics

_LOG = logging.getLogger("rmjax.serving")
_BEGINNING = 32  # tokens by which conversations are found that may share a prompt
_FAILURES = 3  # batches in a row, after which the server is not healthy
_STRETCH = 4  # times as many tokens, if they belong to prompts that are in the batch
_SMOOTHING = 0.2  # of the rate, by the newest batch


@dataclasses.dataclass(eq=False)
class Job:
    """The conversations of a request.

    Attributes:
      encoded: what to score.
      future: gets the scores, or an error, in its own event loop.
      arrived: when, by `time.monotonic`.
      scores: those that are there.
      taken: how many of the conversations are in batches.
      left: how many have no score yet.
    """

    encoded: Sequence[Encoded]
    future: "asyncio.Future[list[Score]]"
    arrived: float
    scores: list[Score | None] = dataclasses.field(default_factory=list)
    taken: int = 0
    left: int = 0


_Taken = list[tuple[Job, int]]  # conversations, each by its job and its number in it


class Batcher:
    """Scores jobs in a thread of its own.

    Attributes:
      ready: whether everything is compiled.
      failure: why it has ended; None otherwise.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Encoded]], list[Score]],
        warm_up: Callable[[], object],
        metrics: Metrics,
        batch_tokens: int,
        window: float,
    ):
        """Nothing is computed before `start`.

        Args:
          score: of encoded conversations.
          warm_up: compiles what `score` needs.
          metrics: counts what is done.
          batch_tokens: computed at once, more or less.
          window: seconds to wait for more after the first of a batch.
        """
        self._score, self._warm_up, self._metrics = score, warm_up, metrics
        self._batch_tokens, self._window = batch_tokens, window
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._failures = 0
        self._rate = 0.0  # tokens a second
        self._thread = threading.Thread(target=self._run, name="rmjax-batcher", daemon=True)
        self.ready = False
        self.failure: Exception | None = None

    @property
    def healthy(self) -> bool:
        """Whether it is ready, and the last few batches did not all fail."""
        return self.ready and self._failures < _FAILURES

    @property
    def compiling(self) -> bool:
        """Whether it has begun and is not ready yet."""
        return self._thread.is_alive() and not self.ready

    def start(self) -> None:
        """Begins: first it compiles."""
        self._thread.start()

    def stop(self) -> None:
        """Ends when the batch that is computed is done."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive() and self.ready:
            self._thread.join()

    def wait(self) -> None:
        """Returns when it has ended."""
        self._thread.join()

    def submit(self, encoded: Sequence[Encoded]) -> "asyncio.Future[list[Score]]":
        """Puts conversations, at least one, in the line; call it in an event loop."""
        future = asyncio.get_running_loop().create_future()
        job = Job(encoded, future, time.monotonic(), [None] * len(encoded), left=len(encoded))
        with self._changed:
            if self.failure is not None:
                raise self.failure
            self._jobs.append(job)
            self._changed.notify()
        future.add_done_callback(lambda _: self._drop(job))
        return future

    def seconds(self, tokens: int) -> float:
        """How long so many tokens will take, by what the last ones took."""
        return tokens / self._rate if self._rate else 1.0

    def _drop(self, job: Job) -> None:
        """Takes a job out of the line whose client is gone, or which is done."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def _run(self) -> None:
        try:
            self._warm_up()
            self.ready = True
            while (batch := self._next_batch()) is not None:
                self._compute(batch)
        except Exception as error:
            _LOG.exception("the server cannot go on")
            self.ready, self.failure = False, error
            with self._changed:
                left, self._stopped = list(self._jobs), True
            for job in left:
                self._settle(job, error)

    def _next_batch(self) -> _Taken | None:
        """What to compute next; None at the end."""
        with self._changed:
            while not self._jobs:
                if self._stopped:
                    return None
                self._changed.wait()
            # Whoever waited while the last batch was computed need not wait for company.
            until = self._jobs[0].arrived + self._window
            while not self._stopped and self._waiting() < self._batch_tokens:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._taken()

    def _waiting(self) -> int:
        return sum(len(e.tokens) for job in self._jobs for e in job.encoded[job.taken :])

    def _taken(self) -> _Taken:
        found: _Taken = []
        filled, beginnings = 0, {}
        for _ in range(len(self._jobs)):
            job = self._jobs.popleft()
            while job.taken < len(job.encoded):
                tokens = job.encoded[job.taken].tokens
                begins = tokens[:_BEGINNING].tobytes()
                like = beginnings.get(begins)
                cost = len(tokens) - (0 if like is None else common_prefix([tokens, like]))
                # To take a prompt's responses apart would compute it again.
                shares = 2 * cost < len(tokens)
                most = self._batch_tokens * (_STRETCH if shares else 1)
                if found and filled + cost > most:
                    self._jobs.append(job)
                    return found
                beginnings[begins] = tokens
                found.append((job, job.taken))
                filled += cost
                job.taken += 1
        return found

    def _compute(self, batch: _Taken) -> None:
        """Scores a batch. If it fails, each job alone, so that one does not fail the others."""
        jobs = list({id(job): job for job, _ in batch}.values())
        encoded = [job.encoded[number] for job, number in batch]
        began = time.monotonic()
        try:
            scores = self._score(encoded)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._compute([pair for pair in batch if pair[0] is job])
                return
            self._failures += 1
            if not isinstance(error, UserError):
                _LOG.exception("a batch failed")
            self._settle(jobs[0], error)
            return
        self._failures = 0
        self._count(encoded, time.monotonic() - began)
        for (job, number), score in zip(batch, scores):
            job.scores[number] = score
            job.left -= 1
        for job in jobs:
            if not job.left:
                self._settle(job)

    def _settle(self, job: Job, error: Exception | None = None) -> None:
        """Hands over a job's scores, or why there are none."""

        def settle() -> None:
            if job.future.done():  # its client is gone
                return
            if error is None:
                job.future.set_result([score for score in job.scores if score is not None])
            else:
                job.future.set_exception(error)

        try:
            job.future.get_loop().call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has ended, and with it all that waited
            _LOG.warning("a batch was done after the server had ended")

    def _count(self, encoded: Sequence[Encoded], seconds: float) -> None:
        tokens = sum(len(e.tokens) for e in encoded)
        rate = tokens / max(seconds, 1e-6)
        self._rate += (rate - self._rate) * (_SMOOTHING if self._rate else 1.0)
        self._metrics.batches.observe(seconds)
        self._metrics.batch_sizes.observe(len(encoded))
        self._metrics.conversations.add(len(encoded))
        self._metrics.tokens.add(tokens)
        self._metrics.cut.add(sum(e.cut > 0 for e in encoded))
