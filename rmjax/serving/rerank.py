"""vLLM's `/score` and `/rerank`: documents as responses to a query.

After vLLM 0.33's `vllm/entrypoints/pooling/scoring/protocol.py`, with all its names for both sides.
There a model must have one label; here it is the value of any.
"""

from typing import Any

from rmjax.serving.questions import (
    Asked,
    Body,
    Endpoint,
    Refusal,
    Result,
    Served,
    head,
    new_id,
    response_item,
    usage,
)
from rmjax.serving.schemas import ALL_SAID, SAID, TEXT, one_of, optional, record
from rmjax.serving.vllm import COMMON, USAGE, check_body

# The names that vLLM has for the two sides of `/score`.
_SIDES = (
    ("queries", "documents"),
    ("queries", "items"),
    ("text_1", "text_2"),
    ("data_1", "data_2"),
)


def _parse_score(body: Body, served: Served) -> Asked:
    cut_to = check_body(body, served)
    given = [s for s in _SIDES if all(body.get(name) is not None for name in s)]
    if len(given) != 1:
        there = ", ".join(" with ".join(map(repr, sides)) for sides in _SIDES)
        raise Refusal(f"expected one of {there}")
    first, second = given[0]
    texts = [[x] if isinstance(x, str) else x for x in (body[first], body[second])]
    if len(texts[0]) not in (1, len(texts[1])):
        raise Refusal(
            f"{len(texts[0])} {first!r} and {len(texts[1])} {second!r}: expected one or as many",
            param=first,
        )
    one = len(texts[0]) == 1
    items = [
        response_item(
            texts[0][0 if one else i],
            response,
            (f"{first}[{0 if one else i}]", f"{second}[{i}]"),
            served,
        )
        for i, response in enumerate(texts[1])
    ]

    def write(results: list[Result], notes: list[str]) -> Any:
        found = head("score", body, served) | {"object": "list", "usage": usage(results)}
        return found | {
            "data": [
                {"index": i, "object": "score", "score": result.value}
                for i, result in enumerate(results)
            ]
        }

    groups = [len(items)] if one else [1] * len(items)
    return Asked(items, groups, write, cut_to=cut_to)


def _parse_rerank(body: Body, served: Served) -> Asked:
    cut_to, documents = check_body(body, served), body["documents"]
    items = [
        response_item(body["query"], document, ("query", f"documents[{i}]"), served)
        for i, document in enumerate(documents)
    ]

    def write(results: list[Result], notes: list[str]) -> Any:
        order = sorted(range(len(results)), key=lambda i: -(results[i].value or 0.0))
        top = int(body.get("top_n") or len(order))
        return {
            "id": new_id("rerank", body),
            "model": served.name,
            "usage": usage(results),
            "results": [
                {
                    "index": i,
                    "document": {"text": documents[i]},
                    "relevance_score": results[i].value,
                }
                for i in order[:top]
            ],
        }

    return Asked(items, [len(items)], write, cut_to=cut_to)


_SIDE = optional(one_of(SAID, {**ALL_SAID, "minItems": 1}))
SCORE = Endpoint(
    ("/score", "/v1/score"),
    "Values of documents as responses to queries: one query with all, or each with its own.",
    record({}, {**{name: _SIDE for sides in _SIDES for name in sides}, **COMMON}),
    record({"id": TEXT, "data": {"type": "array"}, "usage": USAGE}),
    _parse_score,
    {"queries": "Name a prime.", "documents": ["Seven.", "Nine."]},
)
RERANK = Endpoint(
    ("/rerank", "/v1/rerank", "/v2/rerank"),
    "Documents as responses to a query, the best first.",
    record(
        {"query": SAID, "documents": {**ALL_SAID, "minItems": 1}},
        {"top_n": optional({"type": "integer", "minimum": 0}, "0: all"), **COMMON},
    ),
    record({"id": TEXT, "results": {"type": "array"}, "usage": USAGE}),
    _parse_rerank,
    {"query": "Name a prime.", "documents": ["Nine.", "Seven."], "top_n": 1},
)
