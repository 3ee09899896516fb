"""NVIDIA NIM's form: a chat whose last turn is judged, answered as if the scores were said.

https://docs.nvidia.com/nim/large-language-models/latest/reward-model.html. The reply's content is
`helpfulness:1.6,correctness:1.7,...`, and each attribute stands again in `logprobs.content`, as a
token with its number, which NeMo Curator reads. It is the one common form that names attributes.
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
    usage,
)
from rmjax.serving.schemas import MESSAGES, TEXT, TOOLS, WHOLE, optional, record


def _parse(body: Body, served: Served) -> Asked:
    check_model(body, served)
    try:
        said = parse_conversation(body["messages"], tools=body.get("tools"))
    except ValueError as error:
        raise Refusal(f"field 'messages' {error}", param="messages") from error

    def write(results: list[Result], notes: list[str]) -> Any:
        attributes = results[0].score.attributes
        content = ",".join(f"{name}:{value}" for name, value in attributes.items())
        logprobs = [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []}
            for name, value in attributes.items()
        ]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": content},
            "logprobs": {"content": logprobs},
            "finish_reason": "stop",
        }
        found = head("chatcmpl", body, served) | {"object": "chat.completion"}
        return found | {"choices": [choice], "usage": usage(results)}

    return Asked([Item(said, "messages")], [1], write, needs_value=False)


CHAT = Endpoint(
    ("/v1/chat/completions",),
    "The attributes of a conversation by name, in the form of NVIDIA NIM's reward models.",
    record(
        {"messages": MESSAGES},
        {
            "model": optional(TEXT, "must be the served model's name"),
            "tools": optional(TOOLS),
            "stream": {"enum": [False, None]},
            "n": {"enum": [1, None]},
        },
    ),
    record(
        {
            "id": TEXT,
            "object": TEXT,
            "created": WHOLE,
            "model": TEXT,
            "choices": {"type": "array"},
            "usage": {"type": "object"},
        }
    ),
    _parse,
    {
        "messages": [
            {"role": "user", "content": "Name a prime."},
            {"role": "assistant", "content": "Seven."},
        ]
    },
)
