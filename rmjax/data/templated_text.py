"""Texts that a chat template wrote, turned back into messages.

Trainers send a reward server the text of a conversation as the policy's template writes it. The
reward model may have another template, or the same with another date, a space or an end token
more. Its reward is defined on what its own template writes, so a text becomes messages first.

ChatML, Llama 3's and Gemma's writing are known by their marks (`FORMATS`). Any other template is
known if it is the model's own: `OwnTemplate` finds its marks by having it write a conversation.
"""

import functools
import re
from typing import Any, NamedTuple

from rmjax.data.conversation import Conversation, parse_response
from rmjax.data.messages import Message
from rmjax.data.tokenizer import Tokenizer, render
from rmjax.data.turn_marks import has_marks, split_turns
from rmjax.errors import UserError, shortened


class Format(NamedTuple):
    """How a family of templates writes a turn.

    Attributes:
      name: what people call it.
      opening: the mark before a turn; its group is the role.
      ends: the marks after a turn, of which there is one.
      around: what may stand before the first turn and after the last one.
      roles: what it calls a role, if that is not its name in messages.
    """

    name: str
    opening: re.Pattern[str]
    ends: tuple[str, ...]
    around: tuple[str, ...]
    roles: dict[str, str]


FORMATS = (
    Format(
        "ChatML",
        re.compile(r"<\|im_start\|>(\w+)\n"),
        ("<|im_end|>",),
        ("<|endoftext|>", "<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>"),
        {},
    ),
    Format(
        "Llama 3",
        re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n"),
        ("<|eot_id|>", "<|eom_id|>"),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        {"ipython": "tool"},
    ),
    Format(
        "Gemma",
        re.compile(r"<start_of_turn>(\w+)\n"),
        ("<end_of_turn>",),
        ("<bos>", "<eos>", "<pad>"),
        {"model": "assistant"},
    ),
)
# Llama 3.1 and later begin the system's turn so. The model's own template writes its own date.
_DATES = re.compile(r"\ACutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n?")
# Marks of templates that cannot be turned back, by what people call them.
_OTHERS = {
    "[INST]": "Mistral's or Llama 2's",
    "<|START_OF_TURN_TOKEN|>": "Command R's",
    "<｜User｜>": "DeepSeek's",
    "<|start|>": "gpt-oss's",
    "<|user|>": "Zephyr's, Phi's or GLM's",
    "### Instruction:": "Alpaca's",
}
_SAID = ("QUESTIONA", "ANSWERA", "QUESTIONB", "ANSWERB")  # no template changes these
_SYSTEM = "SYSTEMA"


def parse_templated(text: str, own: "OwnTemplate") -> Conversation:
    """The conversation that a template wrote.

    The last turn is the assistant's. It may be empty, and may lack its end mark, as a response does
    that was cut off.

    Args:
      text: in ChatML, as Llama 3 or Gemma write, by the model's own template, or with hh-rlhf's or
        HelpSteer2's marks of turns.
      own: the model's template.

    Raises:
      ValueError: it is none of them, or broken; in words that follow "field 'query' ".
    """
    for known in FORMATS:
        if known.opening.search(text):
            return _ended(_split(text, known, own.special), f"is {known.name} text and ")
    found = own.split(text)
    if found:
        return _ended(found, "is in the model's own template and ")
    if has_marks(text):
        return _ended(split_turns(text), "has marks of turns and ")
    for mark, whose in _OTHERS.items():
        if mark in text:
            raise ValueError(
                f"is in another chat template than the model's: {whose}, by its {mark!r}; text is "
                "read in ChatML, as Llama 3 or Gemma write it, or in the model's own template. "
                "Send messages, or token ids of the model's own tokenizer"
            )
    raise ValueError(
        f"is in no chat template: {shortened(text, 40)!r}. A reward is defined on a conversation: "
        "send messages, or the text that a chat template makes of them"
    )


def parse_pair(prompt: Any, response: Any, own: "OwnTemplate", **beside: Any) -> Conversation:
    """A response to a prompt; if both are texts, the prompt may be what a template wrote.

    Args:
      prompt: see `parse_response`.
      response: likewise.
      own: the model's template.
      beside: the system's turn and tools; see `parse_response`.

    Raises:
      PromptError: see `parse_response`.
      ValueError: likewise, and see `parse_templated`.
    """
    if isinstance(prompt, str) and isinstance(response, str) and not any(beside.values()):
        known = any(known.opening.search(prompt) for known in FORMATS)
        if known or own.split(prompt + response):
            return parse_templated(prompt + response, own)
    return parse_response(prompt, response, **beside)


class OwnTemplate:
    """A model's own template: what it writes before, between and after turns.

    Attributes:
      special: tokens that may stand around a text, such as BOS and padding.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Nothing is written yet."""
        self._tokenizer = tokenizer
        names = ("bos_token", "eos_token", "pad_token")
        self.special = tuple(filter(None, (getattr(tokenizer, name, None) for name in names)))

    def split(self, text: str) -> list[Message]:
        """The messages of a text that this template wrote; none if it did not."""
        if self._marks is None:
            return []
        before, after_user, after_answer, end = self._marks
        text = rest = _strip(text, self.special)
        messages: list[Message] = []
        if self._system and text.startswith(self._system[0]):
            said, mark, turns = text.removeprefix(self._system[0]).partition(self._system[1])
            if mark:
                messages, rest = [{"role": "system", "content": said}], before + turns
        if not rest.startswith(before):
            return []
        place = len(before)
        while place < len(rest):
            said, place, marked = _until(after_user, rest, place)
            if not marked:
                return []
            messages.append({"role": "user", "content": said})
            said, place, marked = _until(after_answer, rest, place)
            if not marked:
                said = _without_end(said, end)
            messages.append({"role": "assistant", "content": said})
        return messages if self._writes(messages, text) else []

    def _writes(self, messages: list[Message], text: str) -> bool:
        """Whether the template writes this text of them, but for spaces and what ends it."""
        try:
            written = render(self._tokenizer, Conversation(messages))
        except UserError:
            return False
        one, other = ("".join(_strip(t, self.special).split()) for t in (written, text))
        return one.startswith(other) and one[len(other) :] in "".join(self._end.split())

    @property
    def _end(self) -> str:
        return self._marks[3] if self._marks else ""

    @functools.cached_property
    def _marks(self) -> tuple[str, str, str, str] | None:
        """What stands before the first turn, after the user's, after an answer, and at the end."""
        parts = self._parts(_turns(*_SAID), _SAID)
        if not parts or parts[1] != parts[3] or not (parts[1].strip() and parts[2].strip()):
            return None
        return _strip(parts[0], self.special), parts[1], parts[2], parts[4]

    @functools.cached_property
    def _system(self) -> tuple[str, str] | None:
        """What stands before and after a system turn."""
        messages = [{"role": "system", "content": _SYSTEM}, *_turns(*_SAID[:2])]
        parts = self._parts(messages, (_SYSTEM, *_SAID[:2]))
        if not parts or not parts[1].strip():
            return None
        return _strip(parts[0], self.special), parts[1]

    def _parts(self, messages: list[Message], said: tuple[str, ...]) -> list[str] | None:
        """What the template writes around what is said."""
        try:
            text = render(self._tokenizer, Conversation(messages))
        except UserError:
            return None
        parts = re.split("|".join(said), text)
        return parts if len(parts) == len(said) + 1 else None


def _turns(*said: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def _split(text: str, known: Format, special: tuple[str, ...]) -> list[Message]:
    """The turns of a text in a known format, which must be all of it."""
    around = (*known.around, *special)
    text = _strip(text, around)
    marks = list(known.opening.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError(f"is {known.name} text and does not begin with a turn")
    messages: list[Message] = []
    for number, mark in enumerate(marks, 1):
        last = number == len(marks)
        said = text[mark.end() : len(text) if last else marks[number].start()]
        places = [(said.find(end), end) for end in known.ends if end in said]
        if places:
            place, end = min(places)
            rest = _strip(said[place + len(end) :], around)
            if rest.strip():
                raise ValueError(
                    f"is {known.name} text and has something between its turns: "
                    f"{shortened(rest, 40)!r}"
                )
            said = said[:place]
        elif not last:
            raise ValueError(f"is {known.name} text and has a turn without {known.ends[0]!r}")
        role = known.roles.get(mark[1], mark[1])
        if role == "system" and number == 1 and known.name == "Llama 3":
            said = _DATES.sub("", said)
            if not said.strip():
                continue
        messages.append({"role": role, "content": said})
    return messages


def _ended(messages: list[Message], what: str) -> Conversation:
    """A conversation of messages that end with an answer."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{what}does not end with a turn of 'assistant'")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{what}has no user turn")
    return Conversation(messages)


def _until(mark: str, text: str, start: int) -> tuple[str, int, bool]:
    """The text from a place to a mark, the place behind the mark, and whether there is one."""
    place = text.find(mark, start)
    if place < 0:
        return text[start:], len(text), False
    return text[start:place], place + len(mark), True


def _strip(text: str, marks: tuple[str, ...]) -> str:
    """A text without marks, and spaces outside of them, at its beginning and end.

    The text is not copied for each mark: there may be millions.
    """
    start, end, place = 0, len(text), 0
    while True:
        while place < end and text[place].isspace():
            place += 1
        found = next((mark for mark in marks if text.startswith(mark, place, end)), None)
        if found is None:
            break
        start = place = place + len(found)
    place = end
    while True:
        while place > start and text[place - 1].isspace():
            place -= 1
        found = next((mark for mark in marks if text.endswith(mark, start, place)), None)
        if found is None:
            return text[start:end]
        end = place = place - len(found)


def _without_end(said: str, end: str) -> str:
    """A last answer without what the template writes after it, or the part of it that is there."""
    said = said.removesuffix(end)
    return said.removesuffix(end.strip()) if end.strip() else said
