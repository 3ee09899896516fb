"""Messages as chat templates take them, from the forms in which people write them.

What a message says besides its role and its content is kept as it is, since templates read it:
`tool_calls`, `tool_call_id`, `name`, `reasoning_content` and others.
"""

import json
from collections.abc import Mapping
from typing import Any

from rmjax.runtime.json_object import unique_keys

Message = dict[str, Any]

# ShareGPT's names of roles.
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
SAYS = ("reasoning_content", "tool_calls", "function_call")  # fields that are said, as content is
_TEXTS = ("text", "input_text", "output_text")  # types of a content's parts


def parse_messages(value: Any) -> list[Message]:
    """Messages in the writing of OpenAI, `role` and `content`, or of ShareGPT, `from` and `value`.

    Raises:
      ValueError: what is wrong with them, in words that follow "field 'prompt' ".
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"is {type(value).__name__}, expected a text or a list of messages")
    return [_message(item, f"has a message {number}") for number, item in enumerate(value, 1)]


def message_text(message: Message) -> str:
    """What a message says, for people: its content, and calls and the like by name, as JSON."""
    content = message.get("content")
    lines = [content] if content else []
    for name in SAYS:
        said = message.get(name)
        if said is None or (isinstance(said, str | list | tuple | dict) and not said):
            continue
        text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


def _message(item: Any, where: str) -> Message:
    if isinstance(item, Mapping) and {"from", "value"} <= set(item):
        item = _sharegpt(item, where)
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise ValueError(f"{where} that is {str(item)[:100]}, expected 'role' and 'content'")
    # Tables write null where a message lacks a field.
    message = {str(k): v for k, v in item.items() if v is not None or k == "content"}
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = message["content"] = "".join(_part(part, where) for part in content)
    if content is None and not any(message.get(field) is not None for field in SAYS):
        raise ValueError(f"{where} of {item['role']!r} without content")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{where} whose content is {type(content).__name__}, expected a text")
    return message


def _part(part: Any, where: str) -> str:
    """The text of one part of a content; parts follow each other with nothing between them."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXTS or not isinstance(part.get("text"), str):
        raise ValueError(
            f"{where} whose content has a part of the type {kind!r}: a text is all that is read"
        )
    return part["text"]


def _sharegpt(item: Mapping[str, Any], where: str) -> Message:
    name, text = item["from"], item["value"]
    if not isinstance(name, str) or name not in _SHAREGPT:
        raise ValueError(f"{where} from {str(name)[:100]!r}; known: {', '.join(_SHAREGPT)}")
    if item.get("content") is not None or item.get("role") is not None:
        raise ValueError(f"{where} that is written twice, with 'from' and with 'role'")
    others = {k: v for k, v in item.items() if k not in ("from", "value", "role", "content")}
    if name != "function_call":
        return {"role": _SHAREGPT[name], "content": text, **others}
    try:
        calls = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} from 'function_call' that is no JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": None, "tool_calls": calls, **others}
