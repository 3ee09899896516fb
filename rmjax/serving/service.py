"""From the bytes of a request to the content of its reply; knows nothing of HTTP.

A body is read, parsed and made tokens in one thread (tokenizers must not be shared), waits for room
in the line, is scored by the batcher, and is written. The event loop only waits.
"""

import asyncio
import concurrent.futures
import json
import math
import time
from typing import Any, NamedTuple

from rmjax.data.conversation import Conversation
from rmjax.data.templated_text import OwnTemplate
from rmjax.errors import UserError, shortened
from rmjax.inference.batching import PADDED_TOKENS
from rmjax.inference.encoded import Encoded
from rmjax.inference.scorer import Scorer
from rmjax.runtime.json_object import unique_keys
from rmjax.serving.admission import Admission, Full
from rmjax.serving.batcher import Batcher
from rmjax.serving.metrics import Gauge, Metrics
from rmjax.serving.questions import Asked, Endpoint, Item, Refusal, Served, with_values
from rmjax.serving.schemas import problem

_CPU_TOKENS = 2048  # of a batch
_LONGEST_RETRY = 60  # seconds that a client is told to wait, at most


class Limits(NamedTuple):
    """What a server takes on.

    Attributes:
      batch_tokens: tokens computed at once, more or less; 0 for what suits the devices.
      window: seconds that a batch waits for more, after its first request.
      queue_tokens: tokens that may wait.
      queue_seconds: how long a request waits for room among these.
      seconds: how long a request may take in all.
      body_bytes: of a request.
      body_seconds: in which a body must have come.
      held_bytes: of the bodies of all requests that have no reply yet.
      conversations: of a request.
    """

    batch_tokens: int = 0
    window: float = 0.005
    queue_tokens: int = 1 << 20
    queue_seconds: float = 30.0
    seconds: float = 600.0
    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    held_bytes: int = 256 << 20
    conversations: int = 1024


class _Prepared(NamedTuple):
    """A request as tokens, and what the template does not show of it."""

    asked: Asked
    encoded: list[Encoded]
    empty: list[bool]
    notes: list[str]


class Service:
    """A loaded model that answers requests.

    Attributes:
      served: the model.
      batcher: what computes.
      metrics: what was done.
      limits: what it takes on.
    """

    def __init__(self, scorer: Scorer, name: str, limits: Limits):
        """Nothing is compiled before `start`."""
        scorer.progress = False  # nobody watches
        self.served = Served(name, scorer, OwnTemplate(scorer.tokenizer), int(time.time()))
        self.metrics, self.limits = Metrics(), limits
        self.batcher = Batcher(
            scorer.score_encoded,
            scorer.compile_shapes,
            self.metrics,
            limits.batch_tokens or _suiting(scorer),
            limits.window,
        )
        self._admission = Admission(limits.queue_tokens)
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "rmjax-encoder")
        self.metrics.gauges += [
            Gauge("rmjax_ready", "1 if every program is compiled.", lambda: self.batcher.ready),
            Gauge("rmjax_queue_tokens", "Tokens in the line.", lambda: self._admission.held),
            Gauge(
                "rmjax_requests_waiting",
                "Requests that wait for room in the line.",
                lambda: self._admission.waiting,
            ),
            Gauge("rmjax_tokens_computed", "Tokens computed.", lambda: scorer.work.computed),
            Gauge(
                "rmjax_positions_computed",
                "Token positions computed, padding included.",
                lambda: scorer.work.padded_tokens,
            ),
        ]

    def start(self) -> None:
        """Begins to compile."""
        self.batcher.start()

    def stop(self) -> None:
        """Ends; what is being computed is finished."""
        self.batcher.stop()
        self._encoder.shutdown(cancel_futures=True)

    async def answer(self, endpoint: Endpoint, body: bytes) -> Any:
        """The content of a reply.

        Raises:
          Refusal: there is none.
        """
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await self._answer(endpoint, body)
        except TimeoutError as error:
            raise Refusal(f"not scored within {self.limits.seconds:g} s", 504) from error

    async def _answer(self, endpoint: Endpoint, body: bytes) -> Any:
        loop = asyncio.get_running_loop()
        ready = await loop.run_in_executor(self._encoder, self._prepare, endpoint, body)
        scores = []
        if ready.encoded:
            tokens = sum(len(encoded.tokens) for encoded in ready.encoded)
            try:
                await self._admission.acquire(tokens, self.limits.queue_seconds)
            except Full as error:
                wait = math.ceil(self.batcher.seconds(self._admission.held))
                raise Refusal(
                    f"the line is full: {self._admission.held:,} tokens wait; try again later",
                    503,
                    retry_after=min(max(wait, 1), _LONGEST_RETRY),
                ) from error
            try:
                scores = await self.batcher.submit(ready.encoded)
            except UserError as error:  # the request was read; the model fails on it
                raise Refusal(str(error), 500) from error
            finally:
                self._admission.release(tokens)
        results = with_values(scores, ready.empty, ready.asked.groups, self.served)
        return ready.asked.write(results, ready.notes)

    def _prepare(self, endpoint: Endpoint, body: bytes) -> _Prepared:
        parsed = _parsed(body)
        found = problem(parsed, endpoint.request)
        if found:
            field, what = found
            where = f"field {field!r}: " if field else "the body: "
            raise Refusal(where + what, param=field or None)
        try:
            asked = endpoint.parse(parsed, self.served)
            most = self.limits.conversations
            if len(asked.items) > most:
                raise Refusal(
                    f"{len(asked.items):,} conversations, and {most:,} are the most that one "
                    "request may have; send several",
                    413,
                )
            alone = next((i for i, size in enumerate(asked.groups) if size == 1), None)
            if self.served.compares and asked.needs_value and alone is not None:
                raise Refusal(
                    "the model compares responses and has no number for one alone; send several "
                    "responses to a prompt to /score, /rerank or /v1/rewards"
                )
            encoder = self.served.scorer.encoder
            encoder.unread.clear()
            encoded = [self._encoded(item, asked) for item in asked.items]
        except UserError as error:
            raise Refusal(str(error)) from error
        empty = [isinstance(i.said, Conversation) and i.said.is_empty for i in asked.items]
        return _Prepared(asked, encoded, empty, encoder.notes())

    def _encoded(self, item: Item, asked: Asked) -> Encoded:
        scorer, said = self.served.scorer, item.said
        if not isinstance(said, Conversation):
            return scorer.encode_tokens(said, item.where, asked.cut_to)
        if said.is_empty and not asked.loses_nothing:
            raise Refusal(f"{item.where}: the response is empty", param=item.where)
        encoded = scorer.encode(said, item.where, asked.cut_to)
        if not said.is_empty and not scorer.encoder.shows_response(said):
            raise Refusal(
                f"{item.where}: the chat template shows nothing of the response", param=item.where
            )
        return encoded


def _suiting(scorer: Scorer) -> int:
    """Tokens of a batch: as few as keep the devices busy, so that replies come early.

    On one CPU device that is soon (`Model` computes parts of 256), and an accelerator is given what
    data sets are scored with.
    """
    options = scorer.model.options
    return _CPU_TOKENS if options.parts else PADDED_TOKENS * options.sharding.row_shards


def _parsed(body: bytes) -> Any:
    """The JSON of a body."""
    if not body:
        raise Refusal("the body is empty, expected a JSON object")
    try:
        parsed = json.loads(
            body,
            object_pairs_hook=unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON ({shortened(str(error), 120)})") from error
    if not isinstance(parsed, dict):
        raise Refusal(f"the body is {type(parsed).__name__}, expected an object")
    return parsed


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text} is larger than numbers are here")
    return found
