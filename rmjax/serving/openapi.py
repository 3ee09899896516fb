"""The OpenAPI 3.1 document of the endpoints, from the table that serves them."""

from collections.abc import Sequence
from typing import Any

from rmjax.serving.questions import Endpoint
from rmjax.serving.schemas import TEXT, WHOLE, Schema, optional, record
from rmjax.serving.service import Limits

ERROR: Schema = record(
    {
        "error": record(
            {"message": TEXT, "type": TEXT, "param": optional(TEXT), "code": WHOLE},
        )
    }
)
_STATUSES = {
    400: "the body is not what was asked for; the message says what and where",
    401: "the key is missing or wrong",
    404: "the body names another model",
    408: "the body came too slowly",
    413: "the body, or its list, is too long",
    415: "the body is not JSON",
    500: "the server failed",
    503: "too much waits; Retry-After says for how many seconds",
    504: "it took too long",
}
_LOOKS: dict[str, tuple[str, Schema, tuple[int, ...]]] = {
    "/health": (
        "Whether every program is compiled and the last batches did not fail.",
        record({"status": TEXT}),
        (503,),
    ),
    "/v1/models": (
        "The served model: its name, attributes, rule and length.",
        record({"object": TEXT, "data": {"type": "array"}}),
        (401,),
    ),
    "/version": ("The version of rmjax.", record({"version": TEXT}), (401,)),
    "/openapi.json": ("This document.", record({"openapi": TEXT}), (401,)),
}


def document(
    endpoints: Sequence[Endpoint], limits: Limits, version: str, keyed: bool
) -> dict[str, Any]:
    """The document.

    Args:
      endpoints: the table.
      limits: of the server; they are said in words.
      version: of rmjax.
      keyed: whether requests need a key.
    """
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        for path in endpoint.paths:
            paths[path] = {"post": _post(endpoint, path)}
    for path, (summary, reply, statuses) in _LOOKS.items():
        paths[path] = {"get": _operation(summary, path, reply, statuses)}
    text = {"text/plain": {"schema": TEXT}}
    found = {"200": {"description": "Prometheus' text format", "content": text}}
    paths["/metrics"] = {
        "get": {"summary": "Counts.", "operationId": "metrics", "responses": found}
    }
    described = (
        f"A request may have {limits.body_bytes:,} bytes and {limits.conversations:,} "
        "conversations. Fields that are not listed are passed over."
    )
    made = {
        "openapi": "3.1.0",
        "info": {"title": "rmjax", "version": version, "description": described},
        "paths": paths,
    }
    if keyed:
        made["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        made["security"] = [{"key": []}]
        for path in ("/health", "/metrics"):
            paths[path]["get"]["security"] = []
    return made


def _post(endpoint: Endpoint, path: str) -> dict[str, Any]:
    content = {"schema": endpoint.request, "example": endpoint.example}
    body = {"required": True, "content": {"application/json": content}}
    found = _operation(endpoint.summary, path, endpoint.reply, tuple(_STATUSES))
    return found | {"requestBody": body}


def _operation(summary: str, path: str, reply: Schema, statuses: tuple[int, ...]) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {"description": "the reply", "content": {"application/json": {"schema": reply}}}
    }
    for status in statuses:
        schema = record({"status": TEXT}) if path == "/health" else ERROR
        content = {"application/json": {"schema": schema}}
        responses[str(status)] = {"description": _STATUSES[status], "content": content}
    name = path.strip("/").replace("/", "_").replace(".", "_")
    return {"summary": summary, "operationId": name, "responses": responses}
