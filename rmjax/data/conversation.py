"""Conversations as messages, from the forms in which data sets write prompts and responses."""

import re
from collections.abc import Callable
from typing import Any

from rmjax.data.tokenizer import Message

_DIALOGUE = re.compile(r"\n\n(Human|Assistant):[ ]?")
_TURN = re.compile(r"\n?<extra_id_1>(\w+)\n")
_ROLES = {"User": "user", "Assistant": "assistant", "System": "system"}
_DIALOGUE_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_prompt(prompt: Any) -> list[Message]:
    """Messages of a prompt, ending with the user's.

    Args:
      prompt: a string, in which HelpSteer2 marks earlier turns with `\\n<extra_id_1>Assistant\\n`
        and `\\n<extra_id_1>User\\n`, or a list of `{"role": ..., "content": ...}`.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'prompt' ".
    """
    messages = _messages(prompt, _split_turns)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("has no user turn")
    if messages[-1]["role"] != "user":
        raise ValueError(f"ends with a turn of {messages[-1]['role']!r}, expected the user's")
    if not messages[-1]["content"].strip():
        raise ValueError("ends with an empty user turn")
    return messages


def parse_response(prompt: Any, response: Any) -> tuple[list[Message], str]:
    """The prompt's messages and the response of one side of a preference pair.

    Args:
      prompt: as `parse_prompt` takes it, or None if the response holds the whole conversation.
      response: a string or a list of messages; without a prompt either the conversation's messages
        or its text in the form of hh-rlhf, whose turns begin with `\\n\\nHuman: ` and
        `\\n\\nAssistant: `. With both, a list of messages may repeat the prompt.

    Returns:
      Messages that end with the user's, and the text that answers them, which may be empty.

    Raises:
      ValueError: what is wrong, in words that follow "field 'chosen' ".
    """
    if isinstance(response, str) and prompt is not None:
        return _prompt(prompt), response
    messages = _messages(response, _split_dialogue)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("does not end with a turn of 'assistant'")
    before = messages[:-1]
    if prompt is not None:
        given = _prompt(prompt)
        if before and before != given:
            raise ValueError("begins with messages that are not those of field 'prompt'")
        before = given
    return _prompt(before), messages[-1]["content"]


def _prompt(prompt: Any) -> list[Message]:
    try:
        return parse_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"has a prompt that {error}") from error


def _messages(value: Any, split: Callable[[str], list[Message]]) -> list[Message]:
    if isinstance(value, str):
        return split(value)
    if isinstance(value, list):
        return [_message(item) for item in value]
    raise ValueError(f"is {type(value).__name__}, expected a string or a list of messages")


def _split_dialogue(text: str) -> list[Message]:
    marks = list(_DIALOGUE.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError(
            "does not begin with '\\n\\nHuman: '; without a field 'prompt' it must be a whole "
            "conversation, as messages or as such a text"
        )
    # Turns alternate. A second mark of the same speaker is part of what was said: nothing is lost.
    starts = [m for before, m in zip([None, *marks], marks) if not before or before[1] != m[1]]
    ends = [mark.start() for mark in starts[1:]] + [len(text)]
    return [
        {"role": _DIALOGUE_ROLES[mark[1]], "content": text[mark.end() : end]}
        for mark, end in zip(starts, ends)
    ]


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
