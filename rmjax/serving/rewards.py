"""rmjax's own form: conversations, or a prompt with responses; attributes by name, and the value.

It says what the others have no place for: the rule that the value follows, what was cut of each
conversation, and what of it the chat template does not show.
"""

from typing import Any

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
    response_item,
    text_item,
    usage,
)
from rmjax.serving.schemas import (
    FLAG,
    MESSAGES,
    NUMBER,
    TEXT,
    TEXTS,
    TOOLS,
    WHOLE,
    one_of,
    optional,
    record,
)

_WRAPPED = record(
    {"messages": MESSAGES},
    {"tools": optional(TOOLS), "system": optional(TEXT)},
)


def _parse(body: Body, served: Served) -> Asked:
    check_model(body, served)
    if (body.get("conversations") is None) == (body.get("prompt") is None):
        raise Refusal("expected either 'conversations' or 'prompt' with 'responses'")
    if body.get("prompt") is not None:
        if body.get("responses") is None:
            raise Refusal("'prompt' needs 'responses' beside it", param="responses")
        items = [_response(body, i, served) for i in range(len(body["responses"]))]
        groups = [len(items)]
    else:
        items = [_whole(each, i, served) for i, each in enumerate(body["conversations"])]
        groups = [1] * len(items)

    def write(results: list[Result], notes: list[str]) -> Any:
        data = [
            {
                "index": i,
                "attributes": result.score.attributes,
                "value": result.value,
                "tokens": result.score.tokens,
                "cut_tokens": result.score.cut,
            }
            for i, result in enumerate(results)
        ]
        found = head("rewards", body, served) | {"object": "list"}
        return found | {
            "rule": served.scorer.rule.name,
            "data": data,
            "notes": notes,
            "usage": usage(results),
        }

    cut_to = served.scorer.max_length if body.get("truncate") else None
    return Asked(items, groups, write, needs_value=False, cut_to=cut_to)


def _response(body: Body, number: int, served: Served) -> Item:
    prompt, response = body["prompt"], body["responses"][number]
    where = "prompt", f"responses[{number}]"
    beside = {name: body[name] for name in ("system", "tools") if body.get(name)}
    return response_item(prompt, response, where, served, **beside)


def _whole(value: Any, number: int, served: Served) -> Item:
    where = f"conversations[{number}]"
    if isinstance(value, str):
        return text_item(value, where, served)
    try:
        return Item(parse_conversation(value), where)
    except ValueError as error:
        raise Refusal(f"field {where!r} {error}", param=where) from error


REWARDS = Endpoint(
    ("/v1/rewards",),
    "Attributes by name, the value and its rule, of conversations or of responses to a prompt.",
    record(
        {},
        {
            "model": optional(TEXT, "must be the served model's name"),
            "conversations": optional(
                {"type": "array", "items": one_of(MESSAGES, _WRAPPED, TEXT)},
                "messages; messages with tools and system; or texts that a chat template wrote",
            ),
            "prompt": optional(one_of(TEXT, MESSAGES), "instead of conversations"),
            "responses": optional(
                one_of(
                    {**TEXTS, "minItems": 1},
                    {
                        "type": "array",
                        "items": one_of(TEXT, {"type": "object"}, MESSAGES),
                        "minItems": 1,
                    },
                ),
                "to the prompt",
            ),
            "system": optional(TEXT, "turn before the prompt"),
            "truncate": optional(FLAG, "cut the first tokens of what is too long; false: refuse"),
            "tools": optional(TOOLS, "that the prompt allows"),
        },
    ),
    record(
        {
            "id": TEXT,
            "model": TEXT,
            "rule": TEXT,
            "data": {
                "type": "array",
                "items": record(
                    {
                        "index": WHOLE,
                        "attributes": {"type": "object", "additionalProperties": NUMBER},
                        "value": optional(NUMBER, "null if the model only compares responses"),
                        "tokens": WHOLE,
                        "cut_tokens": WHOLE,
                    }
                ),
            },
            "notes": TEXTS,
            "usage": {"type": "object"},
        }
    ),
    _parse,
    {"prompt": "Name a prime.", "responses": ["Seven.", "Nine."]},
)
