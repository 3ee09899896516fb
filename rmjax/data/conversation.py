"""Prompts as HelpSteer2 writes them, and as everyone else does."""

import re
from typing import Any

from rmjax.tokenizer import Message

_TURN = re.compile(r"\n?<extra_id_1>(\w+)\n")
_ROLES = {"User": "user", "Assistant": "assistant", "System": "system"}


def parse_prompt(prompt: Any) -> list[Message]:
    """Messages of a prompt, ending with the user's.

    Args:
      prompt: a string, in which HelpSteer2 marks earlier turns with `\\n<extra_id_1>Assistant\\n`
        and `\\n<extra_id_1>User\\n`, or a list of `{"role": ..., "content": ...}`.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'prompt' ".
    """
    if isinstance(prompt, str):
        messages = _split_turns(prompt)
    elif isinstance(prompt, list):
        messages = [_message(item) for item in prompt]
    else:
        raise ValueError(f"is {type(prompt).__name__}, expected a string or a list of messages")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("has no user turn")
    if messages[-1]["role"] != "user":
        raise ValueError(f"ends with a turn of {messages[-1]['role']!r}, expected the user's")
    if not messages[-1]["content"].strip():
        raise ValueError("ends with an empty user turn")
    return messages


def _split_turns(text: str) -> list[Message]:
    first, *rest = _TURN.split(text)
    messages = [{"role": "user", "content": first}] if first.strip() else []
    for name, content in zip(rest[::2], rest[1::2]):
        if name not in _ROLES:
            raise ValueError(f"has a turn of {name!r}; known: {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[name], "content": content})
    return messages


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= set(item):
        raise ValueError(f"has the message {item!r}, expected 'role' and 'content'")
    role, content = item["role"], item["content"]
    if role not in _ROLES.values():
        raise ValueError(f"has a turn of {role!r}; known: {', '.join(_ROLES.values())}")
    if not isinstance(content, str):
        raise ValueError(f"has a message whose content is {type(content).__name__}, not a string")
    return {"role": role, "content": content}
