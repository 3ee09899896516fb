"""The HTTP side: routes, keys, bodies, status codes and errors, as a starlette application.

Errors have vLLM's and OpenAI's form, `{"error": {"message", "type", "param", "code"}}`. A client is
told what it did wrong; what went wrong here is logged, and it is told no more than that.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rmjax.serving.endpoints import ENDPOINTS
from rmjax.serving.openapi import document
from rmjax.serving.questions import Endpoint, Refusal
from rmjax.serving.service import Service

_LOG = logging.getLogger("rmjax.serving")
_OPEN = ("/health", "/metrics")  # without a key, for whoever watches over the server
_GONE = 499  # nginx' status of a client that went away; nobody gets it
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_TYPES = {
    401: "AuthenticationError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}

Handler = Callable[[Request], Awaitable[Response]]


class _Json(JSONResponse):
    """JSON of whatever a client has sent, half characters too, which UTF-8 does not have."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # which writes them as JSON does


def make_app(service: Service, version: str, key: str = "") -> Starlette:
    """The application.

    Args:
      service: what answers.
      version: of rmjax.
      key: that requests must have as a bearer token; empty for none.
    """
    bodies = _Bodies(service)
    routes = [
        Route(path, _handler(service, key, _scores(service, endpoint, bodies)), methods=["POST"])
        for endpoint in ENDPOINTS
        for path in endpoint.paths
    ]
    for path, handler in _looks(service, version, bool(key)).items():
        routes.append(Route(path, _handler(service, key, handler), methods=["GET"]))

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.requests.add(1, "other", str(error.status_code))
        what = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase}"
        reply = _error(Refusal(what, error.status_code))
        reply.headers.update(error.headers or {})
        return reply

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    return Starlette(routes=routes, exception_handlers={HTTPException: unknown}, lifespan=life)


def _handler(service: Service, key: str, handler: Handler) -> Handler:
    """A handler with what all of them have: the key, errors, counts."""

    async def handle(request: Request) -> Response:
        path, began = request.scope["path"], time.monotonic()
        try:
            if key and path not in _OPEN and not _has_key(request, key):
                raise Refusal("the API key is missing or wrong: Authorization: Bearer KEY", 401)
            reply = await handler(request)
        except Refusal as refusal:
            reply = _error(refusal)
        except ClientDisconnect:
            service.metrics.gone.add(1)
            reply = Response(status_code=_GONE)
        except Exception:
            _LOG.exception("%s failed", path)
            reply = _error(Refusal("the server failed; its log says why", 500))
        service.metrics.requests.add(1, path, str(reply.status_code))
        if request.method == "POST":
            service.metrics.seconds.observe(time.monotonic() - began)
        return reply

    return handle


def _has_key(request: Request, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # The time that a comparison takes tells nothing of where they differ.
    same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode())
    return same and scheme.lower() == "bearer"


def _error(refusal: Refusal) -> _Json:
    kind = _TYPES.get(refusal.status, "BadRequestError" if refusal.status < 500 else "ServerError")
    error = {"message": refusal.message, "type": kind}
    error |= {"param": refusal.param, "code": refusal.status}
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status in (408, 413):  # of whose body there may be more
        headers["Connection"] = "close"
    return _Json({"error": error}, refusal.status, headers)


def _scores(service: Service, endpoint: Endpoint, bodies: "_Bodies") -> Handler:
    async def handle(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise Refusal(f"the content type is {kind!r}, expected 'application/json'", 415)
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            raise Refusal(f"the body's encoding is {coding!r}; send it as it is", 415)
        body = await bodies.read(request)
        try:
            return await _unless_gone(request, service.answer(endpoint, body), service)
        finally:
            bodies.release(body)

    return handle


async def _unless_gone(request: Request, answer: Any, service: Service) -> Response:
    """A reply, or none where the client goes away; then nothing more is computed for it."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            service.metrics.gone.add(1)
            return Response(status_code=_GONE)
        return _Json(work.result())
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Bodies:
    """Reads bodies, each and all of them together no larger than the limits say."""

    def __init__(self, service: Service):
        self._limits, self._held = service.limits, 0

    async def read(self, request: Request) -> bytes:
        """The whole body, to be released.

        What is too long is read to its end and thrown away, for a while: a client that still sends
        would not see the reply.

        Raises:
          Refusal: it is too long or too slow, or there is too much of others.
        """
        most, seconds, body = self._limits.body_bytes, self._limits.body_seconds, bytearray()
        too_long = int(request.headers.get("content-length") or 0) > most
        if too_long and "expect" in request.headers:  # it waits to be told
            raise self._too_long()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    too_long |= len(body) + len(chunk) > most
                    if too_long:
                        self.release(body)
                        body.clear()
                    else:
                        self._hold(len(chunk))
                        body += chunk
        except TimeoutError as error:
            if not too_long:
                self.release(body)
                raise Refusal(f"the body did not come within {seconds:g} s", 408) from error
        except BaseException:
            self.release(body)
            raise
        if too_long:
            raise self._too_long()
        return bytes(body)

    def release(self, body: bytes | bytearray) -> None:
        """Says that a body is not needed any more."""
        self._held -= len(body)

    def _hold(self, size: int) -> None:
        if self._held + size > self._limits.held_bytes:
            raise Refusal("too many bodies at once; try again later", 503, retry_after=1)
        self._held += size

    def _too_long(self) -> Refusal:
        most = self._limits.body_bytes
        return Refusal(f"the body has more than {most:,} bytes; send several requests", 413)


def _looks(service: Service, version: str, keyed: bool) -> dict[str, Handler]:
    """What can be looked at, by path."""
    served, batcher = service.served, service.batcher

    async def health(request: Request) -> Response:
        if batcher.healthy:
            return _Json({"status": "ready"})
        state = "failing" if batcher.ready else "warming up"
        return _Json({"status": state}, 503, {"Retry-After": "1"})

    async def models(request: Request) -> Response:
        model = {"id": served.name, "object": "model", "created": served.created}
        model |= {"owned_by": "rmjax", "max_model_len": served.scorer.max_length}
        model |= {"attributes": list(served.attributes), "rule": served.scorer.rule.name}
        return _Json({"object": "list", "data": [model]})

    async def which(request: Request) -> Response:
        return _Json({"version": version})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=_METRICS)

    async def openapi(request: Request) -> Response:
        return _Json(document(ENDPOINTS, service.limits, version, keyed))

    return {
        "/health": health,
        "/v1/models": models,
        "/version": which,
        "/metrics": metrics,
        "/openapi.json": openapi,
    }
