"""Texts in which marks separate the turns, as hh-rlhf and HelpSteer2 write conversations.

hh-rlhf:     \\n\\nHuman: hi\\n\\nAssistant: hello
HelpSteer2:  hi\\n<extra_id_1>Assistant\\nhello\\n<extra_id_1>User\\nwhy?
"""

import re

from rmjax.data.messages import Message

_DIALOGUE = re.compile(r"(?:\A|\n\n|\r\n\r\n)(Human|Assistant):[ ]?")
_TURN = re.compile(r"\n?<extra_id_[01]>(\w+)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}
_MARKS = (
    *(f"{line}{name}:" for line in ("\n\n", "\r\n\r\n") for name in ("Human", "Assistant")),
    "<extra_id_",
)
_OPEN = re.compile(r"(\n\n|\r\n\r\n)Assistant:\s*\Z")


def has_marks(text: str) -> bool:
    """Whether a text contains what these data sets write between turns."""
    return any(mark in text for mark in _MARKS)  # a tenth of what an expression takes


def split_turns(text: str) -> list[Message]:
    """The turns of a text. A text that does not begin as one of turns is one turn, the user's.

    Raises:
      ValueError: what is wrong with it, in words that follow "field 'prompt' ".
    """
    if _TURN.search(text):
        return _split_helpsteer(text)
    marks = list(_DIALOGUE.finditer(text.lstrip()))
    begins = bool(marks) and marks[0].start() == 0
    # "Human: ..." at the very beginning may be what a user says, until the assistant answers.
    if begins and (text[:1] in "\r\n" or len({mark[1] for mark in marks}) > 1):
        return _split_dialogue(text)
    if _OPEN.search(text):
        raise ValueError(
            "ends with '\\n\\nAssistant:' but does not begin with '\\n\\nHuman: '; write its turns "
            "as messages"
        )
    return [{"role": "user", "content": text}] if text.strip() else []


def is_open_dialogue(text: str) -> bool:
    """Whether a text is in hh-rlhf's writing and ends where the response's text begins."""
    if not _OPEN.search(text) or _TURN.search(text):
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
    return messages
