import numpy as np
import pytest

from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer, encode
from rmjax.errors import UserError

CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# As Mistral 7B v0.3 has it: the system's turn stands before the user's if that is the last one.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }}\n{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# As Llama 3.1 has it: a call has no content beside it. `name` is a word in it.
CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
    "{% elif m.role != 'system' %}{{ m.role + m.content }}{% endif %}{% endfor %}"
)


def encoder(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


def turn(role, content, **fields):
    return {"role": role, "content": content} | fields


def test_tokens_are_those_of_the_template():
    made = encoder(PLAIN)
    talk = Conversation([turn("user", "hi"), turn("assistant", "yo")])
    np.testing.assert_array_equal(made.encode(talk, "x"), encode(made.tokenizer, talk))
    assert not made.unread and made.notes() == []


@pytest.mark.parametrize(
    ("template", "messages", "tools", "unread"),
    [
        (PLAIN, [turn("user", "hi", name="Ann"), turn("assistant", "a")], [], "'name' of 'user'"),
        (
            MISTRAL,
            [turn("system", "s"), turn("user", "hi"), turn("assistant", "a")],
            [],
            "'content' of 'system'",
        ),
        (
            CALLS,
            [turn("user", "hi", name="Ann"), turn("assistant", "a")],
            [],
            "'name' of 'user'",
        ),
        (
            CALLS,
            [turn("user", "hi"), turn("assistant", "I look.", tool_calls=CALL)],
            [],
            "'content' of 'assistant'",
        ),
        (PLAIN, [turn("user", "hi"), turn("assistant", "a")], [{"name": "f"}], "'tools'"),
    ],
)
def test_what_the_template_passes_over_is_counted(template, messages, tools, unread):
    made = encoder(template)
    for _ in range(2):
        made.encode(Conversation(messages, tools), "x")
    assert made.unread == {unread: 2}
    (note,) = made.notes()
    assert note == f"the chat template does not show {unread}, which 2 conversations have"


@pytest.mark.parametrize("role", ["user", "tool", "critic"])
def test_a_message_that_the_template_passes_over_is_an_error(role):
    made = encoder(
        "{% for m in messages %}{% if m.role in ('assistant', 'other') %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    messages = [turn("user", ""), turn(role, "x"), turn("assistant", "y")]
    said = rf"row 7: the chat template leaves out the content of message 2, of the role '{role}'"
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            made.encode(Conversation(messages), "row 7")


def test_earlier_reasoning_is_hidden_and_that_of_the_last_question_is_not():
    """As Qwen3's template has it: what one kind of message hides says nothing of another kind."""
    made = encoder(
        "{% for m in messages %}{{ m.content }}"
        "{% set later = messages[loop.index :] | map(attribute='role') | list %}"
        "{% if m.reasoning_content and 'user' not in later %}{{ m.reasoning_content }}{% endif %}"
        "{% endfor %}"
    )
    thought, user = turn("assistant", "a", reasoning_content="so"), turn("user", "hi")
    made.encode(Conversation([user, thought, user, turn("assistant", "b")]), "x")
    assert made.unread == {"'reasoning_content' of 'assistant'": 1}
    rounds = [
        user,
        turn("assistant", "c"),
        user,
        thought,
        turn("tool", "3"),
        turn("assistant", "d"),
    ]
    made.encode(Conversation(rounds), "x")
    assert made.unread == {"'reasoning_content' of 'assistant'": 1}  # no more than before


def test_a_response_of_which_nothing_is_shown():
    made, user = encoder(PLAIN), turn("user", "hi")
    thought = Conversation([user, turn("assistant", "", reasoning_content="so")])
    made.encode(thought, "x")
    assert not made.shows_response(thought)
    assert made.shows_response(Conversation([user, turn("assistant", "a", reasoning_content="so")]))


def test_a_long_dialogue_is_rendered_few_times(monkeypatch):
    made, asked = encoder(PLAIN), []
    render = type(made.tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(made.tokenizer),
        "apply_chat_template",
        lambda self, *args, **options: asked.append(1) or render(self, *args, **options),
    )
    messages = [turn(("user", "tool", "assistant")[i % 3], f"x{i}") for i in range(300)]
    made.encode(Conversation(messages), "x")
    assert len(asked) < 20
