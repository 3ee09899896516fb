"""Conversations that end with the response to be judged: what a reward is defined on.

Training, evaluation and scoring all make them here, from a whole conversation or from a prompt and
a response. So they read the same conversation from the same row.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.messages import SAYS, Message, message_text, parse_messages
from rmjax.data.turn_marks import has_marks, is_open_dialogue, split_turns
from rmjax.runtime.json_object import unique_keys

_MESSAGES = ("messages", "conversations", "conversation")  # what a mapping may call them
_BESIDE = ("system", "tools")  # what it may have beside them


class PromptError(ValueError):
    """What is wrong with the prompt of a conversation whose prompt and response stand apart."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, of which the last is the response.

    Attributes:
      messages: as chat templates take them.
      tools: the functions that the assistant may call, as chat templates take them.
    """

    messages: list[Message]
    tools: list[Any] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> list[Message]:
        """The messages before the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """What the last message says."""
        return message_text(self.messages[-1])

    def begun(self, messages: int) -> "Conversation":
        """The conversation up to its first so many messages."""
        return Conversation(self.messages[:messages], self.tools)

    @property
    def is_empty(self) -> bool:
        """Whether the response says nothing."""
        return not self.response.strip()

    @property
    def has_marks(self) -> bool:
        """Whether a turn contains what some data sets write between turns."""
        return any(has_marks(message.get("content") or "") for message in self.messages)


def parse_conversation(value: Any, system: Any = None, tools: Any = None) -> Conversation:
    """A whole conversation.

    Args:
      value: messages; a mapping that holds them as `messages`, perhaps with `system` and `tools`;
        or a text with marks before its turns, or with JSON of messages.
      system: the system's turn, if it stands beside the messages.
      tools: a list, or JSON of one.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'chosen' ".
    """
    value, system, tools = _unwrapped(value, system, tools)
    if not isinstance(value, str):
        return _checked(_with_system(parse_messages(value), system), tools)
    messages = split_turns(value)
    if len(messages) < 2:
        raise ValueError(
            "does not begin with '\\n\\nHuman: '; without a prompt beside it, it must be a whole "
            "conversation: messages, or such a text"
        )
    return _checked(_with_system(messages, system), tools)


def parse_response(
    prompt: Any, response: Any, system: Any = None, tools: Any = None
) -> Conversation:
    """A conversation whose prompt and response stand apart.

    Args:
      prompt: as `parse_prompt` takes it, or a mapping that holds it as `messages`.
      response: a text, a message, or messages: those that follow the prompt, or all of them.
      system: see `parse_conversation`.
      tools: likewise.

    Raises:
      PromptError: what is wrong with the prompt, in words that follow "field 'prompt' ".
      ValueError: what is wrong with the response, in words that follow "field 'response' ".
    """
    response, system, tools = _unwrapped(response, system, tools)
    prompt, system, tools = _unwrapped(prompt, system, tools)
    if response is None or isinstance(response, str):  # null is what tables have for an empty one
        response = response or ""
        if isinstance(prompt, str) and is_open_dialogue(prompt) and prompt.endswith(":"):
            response = response.removeprefix(" ")  # it belongs to the mark
        after = [{"role": "assistant", "content": response}]
    else:
        after = parse_messages([response] if isinstance(response, Mapping) else response)
    if not after:
        raise ValueError("is an empty list")
    if after[0]["role"] != "assistant":
        return _checked(_behind(prompt, _with_system(after, system), system), tools)
    return _checked([*_prompt_messages(prompt, system), *after], tools)


def _prompt_messages(prompt: Any, system: Any) -> list[Message]:
    try:
        return _with_system(parse_prompt(prompt), system)
    except ValueError as error:
        raise PromptError(*error.args) from error


def _behind(prompt: Any, whole: list[Message], system: Any) -> list[Message]:
    """Messages that repeat the prompt, with what both writings of it say."""
    if isinstance(prompt, str):  # whatever marks it has: here it is a turn's text
        raw = _with_system([{"role": "user", "content": prompt}], system)
        if list(map(_said, whole[: len(raw)])) == list(map(_said, raw)):
            return whole
    before = _prompt_messages(prompt, system)
    if list(map(_said, whole[: len(before)])) != list(map(_said, before)):
        raise ValueError("begins with messages that are not those of the prompt")
    for number, (one, other) in enumerate(zip(before, whole), start=1):
        differing = [k for k in one if k in other and one[k] != other[k]]
        if differing:
            raise ValueError(f"has a message {number} whose {differing[0]!r} is not the prompt's")
    both = [one | other for one, other in zip(before, whole)]
    return [*both, *whole[len(before) :]]


def parse_prompt(prompt: Any) -> list[Message]:
    """The messages of a prompt: a text, which is the user's turn or has marks, or messages.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'prompt' ".
    """
    if isinstance(prompt, str):
        messages = split_turns(prompt)
        if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            messages.pop()  # the mark in front of the response
    else:
        messages = parse_messages(prompt)
    _check_prompt(messages)
    return messages


def parse_question(
    value: Any, system: Any = None, tools: Any = None, whole: bool = False
) -> Conversation:
    """A prompt to be answered: a conversation that lacks its response.

    Args:
      value: as `parse_prompt` takes it, or a mapping that holds it as `messages`.
      system: see `parse_conversation`.
      tools: likewise.
      whole: whether the value is a conversation, of which an answer at its end is left out.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'prompt' ".
    """
    value, system, tools = _unwrapped(value, system, tools)
    if whole and not (isinstance(value, list | tuple) and _asks(value)):
        found = parse_conversation(value, system, tools)
        return found.begun(len(found.messages) - 1)
    return Conversation(_with_system(parse_prompt(value), system), _parse_tools(tools))


def shared_messages(conversations: Sequence[Conversation]) -> int:
    """How many messages all conversations begin with; never the last one of any."""
    most = min(len(conversation.messages) for conversation in conversations) - 1
    first, *others = conversations
    for number in range(most):
        if any(other.messages[number] != first.messages[number] for other in others):
            return number
    return most


def prompt_key(conversations: Sequence[Conversation]) -> str:
    """A text that is equal for conversations that answer one prompt: what all of them begin with.

    It holds what is said and by whom: a message's number or date makes no other prompt.
    Conversations that do not share a user's turn are a prompt by themselves.
    """
    parts = [conversations[0].messages[: shared_messages(conversations)]]
    if not any(message["role"] == "user" for message in parts[0]):
        parts = [conversation.messages for conversation in conversations]
    said = [list(map(_said, part)) for part in parts]
    return json.dumps([said, conversations[0].tools], sort_keys=True, default=str)


def conversation_key(conversation: Conversation) -> str:
    """A text that is equal for conversations that say the same; see `prompt_key`."""
    said = list(map(_said, conversation.messages))
    return json.dumps([said, conversation.tools], sort_keys=True, default=str)


def _said(message: Message) -> tuple[Any, ...]:
    return tuple(map(message.get, ("role", "content", *SAYS)))


def _asks(value: Sequence[Any]) -> bool:
    """Whether messages end with somebody else's turn than the assistant's."""
    return bool(value) and parse_messages(value)[-1]["role"] != "assistant"


def _unwrapped(value: Any, system: Any, tools: Any) -> tuple[Any, Any, Any]:
    """Messages, system turn and tools of a mapping that holds messages; anything else as it is.

    A text that is JSON of messages is these: a CSV file has no other way to write them.
    """
    if isinstance(value, str) and value.startswith("["):
        value = _from_json(value)
    if not isinstance(value, Mapping):
        return value, system, tools
    names = [name for name in _MESSAGES if value.get(name) is not None]
    if not names:
        return value, system, tools
    unknown = [k for k, v in value.items() if v is not None and k not in (names[0], *_BESIDE)]
    if unknown:
        raise ValueError(f"has beside its messages {str(unknown[0])!r}, which is not read")
    beside = []
    for name, outer in zip(_BESIDE, (system, tools)):
        inner = value.get(name)
        if inner and outer and inner != outer:
            raise ValueError(f"has {name!r} of its own, which is not the one beside it")
        beside.append(inner or outer)
    return value[names[0]], *beside


def _from_json(text: str) -> Any:
    """The messages that a text is JSON of; the text if it is anything else.

    Raises:
      ValueError: a message has a key twice.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    messages = isinstance(found, list) and all(
        isinstance(item, dict)
        and ({"role", "content"} <= set(item) or {"from", "value"} <= set(item))
        for item in found
    )
    return json.loads(text, object_pairs_hook=unique_keys) if found and messages else text


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    """Messages that begin with the system's turn, which may stand beside them."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"has beside it a 'system' that is {type(system).__name__}, not a text")
    turn = {"role": "system", "content": system}
    if not messages or messages[0]["role"] != "system":
        return [turn, *messages]
    if _said(messages[0]) != _said(turn):
        raise ValueError("begins with a turn of 'system' that is not the one beside it")
    return messages


def _checked(messages: list[Message], tools: Any) -> Conversation:
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("does not end with a turn of 'assistant'")
    try:
        _check_prompt(messages[:-1])
    except ValueError as error:
        raise ValueError(f"has a prompt that {error}") from error
    return Conversation(messages, _parse_tools(tools))


def _check_prompt(messages: Sequence[Message]) -> None:
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("has no user turn")
    last = messages[-1]
    if last["role"] == "assistant":
        raise ValueError("ends with a turn of 'assistant', expected the user's or a tool's")
    if last["role"] == "user" and not (last.get("content") or "").strip():
        raise ValueError("ends with an empty user turn")


def _parse_tools(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=unique_keys) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"has beside it 'tools' that are no JSON ({error})") from error
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"has beside it 'tools' that are {type(value).__name__}, not a list")
    return list(value or [])
