import pytest

from rmjax.data.messages import message_text, parse_messages

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_what_a_template_can_read_is_kept():
    messages = [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "assistant", "content": "3.", "reasoning_content": "it said 3"},
    ]
    assert parse_messages(messages) == messages


def test_null_is_a_field_that_is_not_there():
    nulls = dict.fromkeys(("name", "tool_calls", "reasoning_content"))
    assert parse_messages([{"role": "user", "content": "hi"} | nulls]) == [
        {"role": "user", "content": "hi"}
    ]


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "a "}, "b", {"type": "text", "text": "c", "image": None}]
    assert parse_messages([{"role": "user", "content": parts}])[0]["content"] == "a bc"


def test_sharegpt():
    found = parse_messages(
        [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "h"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "o"},
            {"from": "gpt", "value": "g", "reasoning_content": "r", "weight": None},
        ]
    )
    assert found == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "o"},
        {"role": "assistant", "content": "g", "reasoning_content": "r"},
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "is int, expected a text or a list"),
        (None, "is NoneType"),
        (["hi"], "has a message 1 that is hi, expected 'role' and 'content'"),
        ([{"content": "x"}], "expected 'role' and 'content'"),
        ([{"role": "user"}], "has a message 1 of 'user' without content"),
        ([{"role": "user", "content": None}], "without content"),
        ([{"role": "user", "content": 3}], "whose content is int"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            ],
            "has a message 2 whose content has a part of the type 'image_url'",
        ),
        ([{"from": "robot", "value": "x"}], "has a message 1 from 'robot'; known: human"),
        ([{"from": ["x"], "value": "x"}], "from \"\\['x'\\]\""),
        ([{"from": "gpt", "value": "x", "content": "y"}], "written twice"),
        ([{"from": "function_call", "value": "f(1)"}], "that is no JSON"),
    ],
    ids=repr,
)
def test_what_is_wrong_with_a_message_is_said(value, said):
    with pytest.raises(ValueError, match=said):
        parse_messages(value)


def test_a_call_is_shown_to_people():
    assert message_text({"role": "assistant", "content": None, "tool_calls": [CALL]}) == (
        'tool_calls: [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]'
    )
    assert message_text({"role": "assistant", "content": ""}) == ""
