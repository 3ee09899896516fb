"""vLLM's `/classify`, `/pooling`, `/score` and `/rerank`; `/classify` takes SGLang's bodies, too.

After vLLM 0.33's protocols (`vllm/entrypoints/pooling/*/protocol.py`). There `probs` holds one
number a label, and clients such as verl take the last of them for the reward. Here it holds the
value alone, unless `"attributes": true` asks for all of them.

What a body asks for beyond that and cannot be had is refused, such as a prompt cut on the right,
where the reward is read. Numbers are raw whatever `use_activation` says, as they are in vLLM for
the regression models that rmjax exports.
"""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

from rmjax.data.conversation import parse_conversation
from rmjax.serving.questions import (
    Asked,
    Body,
    Endpoint,
    Item,
    Refusal,
    Result,
    Served,
    check_model,
    head,
    new_id,
    numbers,
    pair_item,
    text_item,
    usage,
)
from rmjax.serving.schemas import (
    FLAG,
    MESSAGES,
    NUMBER,
    TEXT,
    TEXTS,
    TOKENS,
    TOOLS,
    WHOLE,
    Schema,
    one_of,
    optional,
    record,
)
from rmjax.serving.sglang import SGLANG_FIELDS, is_sglang, parse_sglang

_CUT = one_of({"enum": [-1]}, {"type": "integer", "minimum": 1})
_COMMON: dict[str, Schema] = {
    "model": optional(TEXT, "must be the served model's name"),
    "user": optional(TEXT),
    "request_id": optional(TEXT),
    "truncate_prompt_tokens": optional(_CUT, "keeps so many of the last tokens; -1: all that fit"),
    "use_activation": optional(FLAG, "passed over: numbers are raw"),
}
_ATTRIBUTES = optional(FLAG, "every attribute's number, not the value alone")
_INPUT = one_of(TEXT, TOKENS, TEXTS, {"type": "array", "items": TOKENS})
_SAID: dict[str, Schema] = {
    "input": optional(_INPUT, "texts that a chat template wrote, or token ids"),
    "messages": optional(MESSAGES, "one conversation; instead of input"),
    "tools": optional(TOOLS, "of the conversation"),
    "attributes": _ATTRIBUTES,
}
_USAGE = record({"prompt_tokens": WHOLE, "total_tokens": WHOLE}, {"cut_tokens": WHOLE})


def _wants(name: str, *values: Any) -> Callable[[Body], bool]:
    return lambda body: body.get(name) not in (None, *values)


# What a body may ask for and cannot have: the field, when, and why.
_REFUSED: list[tuple[str, Callable[[Body], bool], str]] = [
    ("truncation_side", _wants("truncation_side", "left"), "the reward is read at the right end"),
    (
        "add_generation_prompt",
        _wants("add_generation_prompt", False),
        "the reward is read where the response ends",
    ),
    (
        "continue_final_message",
        _wants("continue_final_message", False),
        "the reward is read where the response ends",
    ),
    ("chat_template", _wants("chat_template"), "the template is the model's own"),
    ("chat_template_kwargs", _wants("chat_template_kwargs", {}), "the template is the model's own"),
    ("priority", _wants("priority", 0), "requests are scored as they come"),
    ("task", _wants("task", "classify"), "this is a reward model: its task is 'classify'"),
    ("dimensions", _wants("dimensions"), "numbers are the model's"),
    (
        "encoding_format",
        _wants("encoding_format", "float", "base64"),
        "there are 'float' and 'base64'",
    ),
]


def _checked(body: Body, served: Served) -> int | None:
    """Refuses what cannot be had. The most tokens, if the body says it."""
    check_model(body, served)
    for name, wanted, why in _REFUSED:
        if wanted(body):
            raise Refusal(f"{name!r} cannot be {body[name]!r}: {why}", param=name)
    most = body.get("truncate_prompt_tokens")
    if most is None:
        return None
    longest = served.scorer.max_length
    if most > longest:
        raise Refusal(
            f"'truncate_prompt_tokens' is {most}, and the model reads up to {longest}",
            param="truncate_prompt_tokens",
        )
    return longest if most == -1 else most


def _items(body: Body, served: Served) -> list[Item]:
    """The conversations of `input` or `messages`."""
    given = [name for name in ("input", "messages") if body.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(map(repr, given)) or "none"
        raise Refusal(f"expected one of 'input', 'messages', 'text' and 'input_ids', found {found}")
    if given == ["messages"]:
        try:
            return [Item(parse_conversation(body["messages"], tools=body.get("tools")), "messages")]
        except ValueError as error:
            raise Refusal(f"field 'messages' {error}", param="messages") from error
    said = body["input"]
    if isinstance(said, str):
        return [text_item(said, "input", served)]
    if said and isinstance(said[0], int):
        return [Item(said, "input")]
    return [
        text_item(each, f"input[{i}]", served)
        if isinstance(each, str)
        else Item(each, f"input[{i}]")
        for i, each in enumerate(said)
    ]


def _parse_classify(body: Body, served: Served) -> Asked:
    if is_sglang(body):
        return parse_sglang(body, served)
    cut_to, items, every = (
        _checked(body, served),
        _items(body, served),
        bool(body.get("attributes")),
    )

    def write(results: list[Result], notes: list[str]) -> Any:
        names = list(served.attributes) if every else [served.scorer.rule.name]
        data = []
        for index, result in enumerate(results):
            probs = numbers(result, every)
            label = names[int(np.argmax(probs))]
            item = {"index": index, "label": label, "probs": probs, "num_classes": len(probs)}
            data.append(item | ({"labels": names} if every else {}))
        found = head("classify", body, served)
        return found | {"object": "list", "data": data, "usage": usage(results)}

    return Asked(items, [1] * len(items), write, needs_value=not every, cut_to=cut_to)


def _parse_pooling(body: Body, served: Served) -> Asked:
    cut_to, items, every = (
        _checked(body, served),
        _items(body, served),
        bool(body.get("attributes")),
    )
    packed = body.get("encoding_format") == "base64"

    def write(results: list[Result], notes: list[str]) -> Any:
        data: list[Any] = [numbers(result, every) for result in results]
        if packed:  # float32 in the machine's order, as vLLM has it
            data = [base64.b64encode(np.asarray(x, "<f4").tobytes()).decode() for x in data]
        found = head("pool", body, served) | {"object": "list", "usage": usage(results)}
        return found | {
            "data": [{"index": i, "object": "pooling", "data": x} for i, x in enumerate(data)]
        }

    return Asked(items, [1] * len(items), write, needs_value=not every, cut_to=cut_to)


# The names that vLLM has for the two sides of `/score`.
_SIDES = (
    ("queries", "documents"),
    ("queries", "items"),
    ("text_1", "text_2"),
    ("data_1", "data_2"),
)


def _parse_score(body: Body, served: Served) -> Asked:
    cut_to = _checked(body, served)
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
        pair_item(
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
    cut_to, documents = _checked(body, served), body["documents"]
    items = [
        pair_item(body["query"], document, ("query", f"documents[{i}]"), served)
        for i, document in enumerate(documents)
    ]

    def write(results: list[Result], notes: list[str]) -> Any:
        order = sorted(range(len(results)), key=lambda i: -(results[i].value or 0.0))
        top = body.get("top_n") or len(order)
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


_CHAT = [
    {"role": "user", "content": "Name a prime."},
    {"role": "assistant", "content": "Seven."},
]
CLASSIFY = Endpoint(
    ("/classify", "/v1/classify", "/encode"),
    "Values of conversations, for vLLM's and SGLang's clients.",
    record({}, {**_SAID, **_COMMON, **SGLANG_FIELDS}),
    one_of(
        record({"id": TEXT, "data": {"type": "array"}, "usage": _USAGE}),
        record({"embedding": {"type": "array", "items": NUMBER}}),
        {"type": "array"},
        description="vLLM's; or SGLang's, where the body has `text` or `input_ids`",
    ),
    _parse_classify,
    {"messages": _CHAT},
)
POOLING = Endpoint(
    ("/pooling",),
    "Values of conversations, for vLLM's clients.",
    record({}, {**_SAID, **_COMMON, "task": optional(TEXT), "encoding_format": optional(TEXT)}),
    record({"id": TEXT, "data": {"type": "array"}, "usage": _USAGE}),
    _parse_pooling,
    {"messages": _CHAT, "attributes": True},
)
_SIDE = optional(one_of({**TEXT, "minLength": 1}, {**TEXTS, "minItems": 1}))
SCORE = Endpoint(
    ("/score", "/v1/score"),
    "Values of documents as responses to queries: one query with all, or each with its own.",
    record({}, {**{name: _SIDE for sides in _SIDES for name in sides}, **_COMMON}),
    record({"id": TEXT, "data": {"type": "array"}, "usage": _USAGE}),
    _parse_score,
    {"queries": "Name a prime.", "documents": ["Seven.", "Nine."]},
)
RERANK = Endpoint(
    ("/rerank", "/v1/rerank", "/v2/rerank"),
    "Documents as responses to a query, the best first.",
    record(
        {"query": {**TEXT, "minLength": 1}, "documents": {**TEXTS, "minItems": 1}},
        {"top_n": optional({"type": "integer", "minimum": 0}, "0: all"), **_COMMON},
    ),
    record({"id": TEXT, "results": {"type": "array"}, "usage": _USAGE}),
    _parse_rerank,
    {"query": "Name a prime.", "documents": ["Nine.", "Seven."], "top_n": 1},
)
