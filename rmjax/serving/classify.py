"""vLLM's `/classify` and `/pooling`; `/classify` takes SGLang's bodies, too.

In vLLM 0.33 `probs` holds one number a label, and clients such as verl take the last of them for
the reward. Here it holds the value alone, unless `"attributes": true` asks for all of them.
"""

import base64
from typing import Any

import numpy as np

from rmjax.data.conversation import parse_conversation
from rmjax.data.fields import LARGEST
from rmjax.serving.questions import (
    Asked,
    Body,
    Endpoint,
    Item,
    Refusal,
    Result,
    Served,
    head,
    numbers,
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
    Schema,
    one_of,
    optional,
    record,
)
from rmjax.serving.sglang import SGLANG_FIELDS, is_sglang, parse_sglang
from rmjax.serving.vllm import COMMON, USAGE, check_body

_ATTRIBUTES = optional(FLAG, "every attribute's number, not the value alone")
_INPUT = one_of(TEXT, TOKENS, TEXTS, {"type": "array", "items": TOKENS})
_FORMATS: Schema = {"enum": ["float", "base64", None]}
_SAID: dict[str, Schema] = {
    "input": optional(_INPUT, "texts that a chat template wrote, or token ids"),
    "messages": optional(MESSAGES, "one conversation; instead of input"),
    "tools": optional(TOOLS, "of the conversation"),
    "attributes": _ATTRIBUTES,
}


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
    if said and isinstance(said[0], int | float):
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
        check_body(body, served),
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
        check_body(body, served),
        _items(body, served),
        bool(body.get("attributes")),
    )
    packed = body.get("encoding_format") == "base64"

    def write(results: list[Result], notes: list[str]) -> Any:
        data: list[Any] = [numbers(result, every) for result in results]
        if packed:  # float32 in the machine's order, as vLLM has it
            if not all(abs(value) <= LARGEST for each in data for value in each):
                raise Refusal(
                    f"a value is larger than float32's {LARGEST:.3g}: ask for encoding_format "
                    "'float'",
                    param="encoding_format",
                )
            data = [base64.b64encode(np.asarray(x, "<f4").tobytes()).decode() for x in data]
        found = head("pool", body, served) | {"object": "list", "usage": usage(results)}
        return found | {
            "data": [{"index": i, "object": "pooling", "data": x} for i, x in enumerate(data)]
        }

    return Asked(items, [1] * len(items), write, needs_value=not every, cut_to=cut_to)


_CHAT = [
    {"role": "user", "content": "Name a prime."},
    {"role": "assistant", "content": "Seven."},
]
CLASSIFY = Endpoint(
    ("/classify", "/v1/classify", "/encode"),
    "Values of conversations, for vLLM's and SGLang's clients.",
    record({}, {**_SAID, **COMMON, **SGLANG_FIELDS}),
    one_of(
        record({"id": TEXT, "data": {"type": "array"}, "usage": USAGE}),
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
    record(
        {},
        {
            **_SAID,
            **COMMON,
            "task": optional(TEXT),
            "encoding_format": _FORMATS,
        },
    ),
    record({"id": TEXT, "data": {"type": "array"}, "usage": USAGE}),
    _parse_pooling,
    {"messages": _CHAT, "attributes": True},
)
