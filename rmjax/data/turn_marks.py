"""Texts in which marks separate the turns, as hh-rlhf and HelpSteer2 write conversations.

hh-rlhf:     \\n\\nHuman: hi\\n\\nAssistant: hello
HelpSteer2:  hi\\n<extra_id_1>Assistant\\nhello\\n<extra_id_1>User\\nwhy?
"""

import re

from rmjax.data.messages import Message

_DIALOGUE = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
_TURN = re.compile(r"\n?<extra_id_1>(\w+)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}
_ANSWER, _TURN_MARK = "\n\nAssistant:", "<extra_id_"
_MARKS = ("\n\nHuman:", _ANSWER, _TURN_MARK)


def has_marks(text: str) -> bool:
    """Whether a text contains what these data sets write between turns."""
    return any(mark in text for mark in _MARKS)


def split_turns(text: str) -> list[Message]:
    """The turns of a text. A text without marks in front is one turn, the user's.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'prompt' ".
    """
    if _TURN_MARK in text:
        return _split_helpsteer(text)
    marks = list(_DIALOGUE.finditer(text.lstrip()))
    begins = bool(marks) and marks[0].start() == 0
    # "Human: ..." alone at the very beginning may be what a user says.
    if begins and (len(marks) > 1 or text.startswith("\n\n")):
        return _split_dialogue(text)
    if text.rstrip().endswith(_ANSWER):
        raise ValueError(
            f"ends with {_ANSWER!r} but does not begin with '\\n\\nHuman: '; write its turns as "
            "messages"
        )
    return [{"role": "user", "content": text}] if text.strip() else []


def is_open_dialogue(text: str) -> bool:
    """Whether a text is in hh-rlhf's writing and ends where the response's text begins."""
    if _TURN_MARK in text or not text.rstrip().endswith(_ANSWER):
        return False
    return _DIALOGUE.match(text.lstrip()) is not None


def _split_dialogue(text: str) -> list[Message]:
    text = text.lstrip()
    marks = list(_DIALOGUE.finditer(text))
    # Turns alternate. A second mark of the same speaker is part of what was said: nothing is lost.
    starts = [m for before, m in zip([None, *marks], marks) if not before or before[1] != m[1]]
    ends = [mark.start() for mark in starts[1:]] + [len(text)]
    return [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end]}
        for mark, end in zip(starts, ends)
    ]


def _split_helpsteer(text: str) -> list[Message]:
    first, *rest = _TURN.split(text)
    messages = [{"role": "user", "content": first}] if first.strip() else []
    for name, content in zip(rest[::2], rest[1::2]):
        if name not in _ROLES:
            raise ValueError(f"has a turn of {name!r}; known: User, Assistant, System")
        messages.append({"role": _ROLES[name], "content": content})
    if any(_TURN_MARK in message["content"] for message in messages):
        raise ValueError(
            f"has a mark {_TURN_MARK!r} that begins no turn; write its turns as messages"
        )
    return messages
