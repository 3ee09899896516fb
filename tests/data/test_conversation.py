import json

import pytest

from rmjax.data.conversation import (
    Conversation,
    PromptError,
    parse_conversation,
    parse_prompt,
    parse_response,
    prompt_key,
    shared_messages,
)

CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
SYSTEM = {"role": "system", "content": "be kind"}


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


def test_the_mark_in_front_of_the_response_is_no_turn():
    assert parse_prompt("\n\nHuman: hi\n\nAssistant:") == turns("hi")
    assert parse_prompt("hi\n<extra_id_1>Assistant\n") == turns("hi")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (3, "is int"),
        (None, "is NoneType"),
        ("", "no user turn"),
        (" \n", "no user turn"),
        ([], "no user turn"),
        ("hi\n<extra_id_1>Assistant\nhello", "ends with a turn of 'assistant'"),
        ("hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n \n", "empty user turn"),
        ([SYSTEM], "no user turn"),
        (turns("x", "y"), "ends with a turn of 'assistant'"),
        (turns(" "), "empty user turn"),
    ],
    ids=repr,
)
def test_what_is_wrong_with_a_prompt_is_said(prompt, said):
    with pytest.raises(ValueError, match=said):
        parse_prompt(prompt)
    with pytest.raises(PromptError, match=said):
        parse_response(prompt, "x")


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("hi", "answer"),
        (turns("hi"), "answer"),
        ({"messages": turns("hi")}, "answer"),
        ("hi", [{"role": "assistant", "content": "answer"}]),
        ("hi", {"role": "assistant", "content": "answer"}),
        ("hi", {"from": "gpt", "value": "answer"}),
        ([{"from": "human", "value": "hi"}], "answer"),
        ("hi", turns("hi", "answer")),
        ("\n\nHuman: hi\n\nAssistant:", " answer"),
        ("\n\nHuman: hi\n\nAssistant: ", "answer"),
        ("\n\nHuman: hi", "answer"),
        ("\n\nHuman: hi\n\nAssistant:", turns("hi", "answer")),
    ],
    ids=repr,
)
def test_every_writing_of_a_prompt_and_a_response_says_the_same(prompt, response):
    assert parse_response(prompt, response) == Conversation(turns("hi", "answer"))


@pytest.mark.parametrize(
    "whole",
    [
        turns("hi", "answer"),
        tuple(turns("hi", "answer")),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "answer"}],
        {"messages": turns("hi", "answer"), "tools": None},
        "\n\nHuman: hi\n\nAssistant: answer",
        "Human: hi\n\nAssistant: answer",
        "hi\n<extra_id_1>Assistant\nanswer",
    ],
    ids=repr,
)
def test_every_writing_of_a_whole_conversation_says_the_same(whole):
    assert parse_conversation(whole) == Conversation(turns("hi", "answer"))


def test_a_response_behind_an_open_dialogue_is_text():
    text = "b\n\nHuman: more\n\nAssistant: c"
    found = parse_response("\n\nHuman: hi\n\nAssistant:", " " + text)
    assert found == parse_response(turns("hi"), text) == Conversation(turns("hi", text))
    assert found.has_marks


def test_a_repeated_prompt_is_what_both_writings_say():
    """Marks in a text are no turns where messages say what it is; no field is lost."""
    for text in ("Human: a\n\nAssistant: b", "x\n\nAssistant:", "<extra_id_1>User\n"):
        assert parse_response(text, turns(text, "c")) == Conversation(turns(text, "c"))
    named = [turns("hi")[0] | {"name": "Bob"}]
    assert parse_response(named, turns("hi", "a")).messages == [*named, *turns("hi", "a")[1:]]
    other = [turns("hi")[0] | {"name": "Ann"}, turns("hi", "a")[1]]
    with pytest.raises(ValueError, match="a message 1 whose 'name' is not the prompt's"):
        parse_response(named, other)


def test_what_stands_beside_messages_is_read():
    beside = {"messages": turns("hi"), "system": "be kind", "tools": [{"name": "f"}]}
    expected = Conversation([SYSTEM, *turns("hi", "x")], [{"name": "f"}])
    assert parse_response(beside, "x") == expected
    assert parse_conversation(beside | {"messages": turns("hi", "x")}) == expected
    with pytest.raises(ValueError, match="has 'tools' of its own, which is not the one beside it"):
        parse_response(beside, "x", tools=[{"name": "g"}])
    with pytest.raises(ValueError, match="has 'system' of its own"):
        parse_response(beside, "x", system="be strict")


def test_messages_may_be_json_in_a_text():
    """As a CSV file has them."""
    assert parse_conversation(json.dumps(turns("hi", "x"))) == Conversation(turns("hi", "x"))
    assert parse_response(json.dumps(turns("hi")), "[1]") == Conversation(turns("hi", "[1]"))
    assert parse_response("[1, 2]", "x") == Conversation(turns("[1, 2]", "x"))


def test_a_key_that_is_twice_in_a_json_text_is_named():
    """Programs differ in which of them counts."""
    said = '{"role": "user", "content": "a", "content": "b"}'
    call = '{"name": "f", "name": "g"}'
    for make in (
        lambda: parse_conversation(f'[{said}, {{"role": "assistant", "content": "c"}}]'),
        lambda: parse_response("a", "b", tools=f"[{call}]"),
        lambda: parse_response("a", [{"from": "function_call", "value": call}]),
    ):
        with pytest.raises(ValueError, match=r"the key '(content|name)' is there twice"):
            make()
    assert parse_response("a", '{"b": 1, "b": 2}').messages[-1]["content"] == '{"b": 1, "b": 2}'


def test_a_response_may_be_several_turns():
    rest = [
        {"role": "assistant", "content": "Let me see.", "tool_calls": CALL},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3."},
    ]
    found = parse_response("hi", rest, tools=[{"name": "f"}])
    assert found == Conversation([*turns("hi"), *rest], [{"name": "f"}])
    assert found == parse_conversation(
        {"messages": [*turns("hi"), *rest], "tools": '[{"name":"f"}]'}
    )


def test_a_call_is_a_response():
    call = {"role": "assistant", "content": None, "tool_calls": CALL}
    assert not parse_response("hi", call).is_empty
    assert parse_response("hi", " \n").is_empty


def test_the_systems_turn_may_stand_beside():
    expected = Conversation([SYSTEM, *turns("hi", "x")])
    assert parse_response("hi", "x", system="be kind") == expected
    assert parse_response([SYSTEM, *turns("hi")], "x", system="be kind") == expected
    assert parse_response("hi", turns("hi", "x"), system="be kind") == expected
    assert parse_conversation(turns("hi", "x"), system="be kind") == expected
    assert parse_conversation(turns("hi", "x"), system="") == Conversation(turns("hi", "x"))
    with pytest.raises(ValueError, match="a turn of 'system' that is not the one beside it"):
        parse_conversation(expected.messages, system="be strict")
    with pytest.raises(ValueError, match="'system' that is int"):
        parse_conversation(turns("hi", "x"), system=3)


@pytest.mark.parametrize(
    ("prompt", "response", "said"),
    [
        ("hi", turns("other", "x"), "not those of the prompt"),
        ("hi", turns("hi"), "does not end with a turn of 'assistant'"),
        ("hi", 3, "is int"),
        ("hi", [], "is an empty list"),
    ],
)
def test_a_response_that_is_none_says_why(prompt, response, said):
    with pytest.raises(ValueError, match=said):
        parse_response(prompt, response)


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ("just text", "does not begin with"),
        ("\n\nHuman: hi\n\nAssistant: a\n\nHuman: b", "does not end with a turn of 'assistant'"),
        (turns("hi"), "does not end with a turn of 'assistant'"),
        ([], "does not end with a turn of 'assistant'"),
        ([{"role": "assistant", "content": "x"}], "has a prompt that has no user turn"),
        ([*turns("x", "y"), {"role": "assistant", "content": "z"}], "ends with a turn of 'assis"),
        ({"messages": turns("hi", "x"), "tools": "f"}, "'tools' that are no JSON"),
        ({"messages": turns("hi", "x"), "tools": 3}, "'tools' that are int"),
        ({"turns": turns("hi", "x")}, "is dict"),
        ({"messages": turns("hi", "x"), "sys": "y"}, "has beside its messages 'sys'"),
    ],
    ids=repr,
)
def test_a_conversation_that_is_none_says_why(whole, said):
    with pytest.raises(ValueError, match=said):
        parse_conversation(whole)


def conversation(*contents):
    return Conversation(turns(*contents))


def test_conversations_share_what_they_begin_with():
    assert (
        shared_messages([conversation("a", "b", "c", "d"), conversation("a", "b", "c", "e")]) == 3
    )
    assert (
        shared_messages([conversation("a", "b", "c", "d"), conversation("a", "x", "c", "d")]) == 1
    )
    assert shared_messages([conversation("a", "b")] * 2) == 1
    assert shared_messages([conversation("a", "b"), conversation("a", "b", "c", "d")]) == 1


def test_a_prompt_is_known_by_what_is_said_in_it():
    one = prompt_key([conversation("a", "b"), conversation("a", "c")])
    assert one == prompt_key([conversation("a", "x")])
    numbered = [message | {"id": i} for i, message in enumerate(turns("a", "x"))]
    assert one == prompt_key([Conversation(numbered)])
    assert one != prompt_key([Conversation(turns("a", "x"), [{"name": "f"}])])
    assert one != prompt_key([conversation("b", "x")])
    # Without a user's turn in common, other pairs are other prompts.
    pairs = [[conversation("a", "b"), conversation(other, "b")] for other in "xy"]
    assert prompt_key(pairs[0]) != prompt_key(pairs[1])
