import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.data.conversation import parse_prompt, parse_response

TEXT = st.text(max_size=30).filter(lambda text: "extra_id" not in text)
SAID = TEXT.filter(lambda text: text.strip())


def marked(messages):
    """A conversation in HelpSteer2's writing, made here by hand."""
    parts = [messages[0]["content"]]
    for message in messages[1:]:
        parts.append(f"\n<extra_id_1>{message['role'].capitalize()}\n{message['content']}")
    return "".join(parts)


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


def test_a_plain_prompt_is_one_user_turn():
    assert parse_prompt("What is tea?\n\nBe brief.") == turns("What is tea?\n\nBe brief.")


def test_helpsteer2_markers_separate_turns():
    prompt = "hi\n<extra_id_1>Assistant\nhello\n\nthere\n<extra_id_1>User\nwhy?\n"
    assert parse_prompt(prompt) == turns("hi", "hello\n\nthere", "why?\n")


def test_a_marked_prompt_may_start_with_the_system():
    prompt = "<extra_id_1>System\nbe kind\n<extra_id_1>User\nhi"
    assert parse_prompt(prompt) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]


@settings(max_examples=100, deadline=None)
@given(first=SAID, middle=st.lists(st.tuples(TEXT, TEXT), max_size=4), last=st.tuples(TEXT, SAID))
def test_turns_survive_helpsteer2s_writing_to_the_character(first, middle, last):
    messages = turns(first, *(text for pair in (*middle, last) for text in pair))
    assert parse_prompt(marked(messages)) == messages
    assert parse_prompt(messages) == messages


def test_messages_lose_what_is_not_role_or_content():
    message = {"role": "user", "content": "hi", "name": None}
    assert parse_prompt([message]) == turns("hi")


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
        ("hi\n<extra_id_1>Bot\nhello\n<extra_id_1>User\nx", "'Bot'"),
        ([{"role": "user"}], "expected 'role' and 'content'"),
        (["hi"], "expected 'role' and 'content'"),
        ([{"role": "tool", "content": "x"}, *turns("x")], "'tool'"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content is list"),
        ([{"role": "user", "content": None}], "content is NoneType"),
        ([{"role": "system", "content": "x"}], "no user turn"),
        (turns("x", "y"), "ends with a turn of 'assistant'"),
        (turns(" "), "empty user turn"),
    ],
    ids=repr,
)
def test_what_is_wrong_with_a_prompt_is_said(prompt, said):
    with pytest.raises(ValueError, match=said):
        parse_prompt(prompt)


# ---- preference pairs ----------------------------------------------------------------------------

DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nthere\n\nHuman: why?\n\nAssistant: because"


def test_hh_rlhfs_text_is_a_conversation():
    assert parse_response(None, DIALOGUE) == (turns("hi", "hello\n\nthere", "why?"), "because")


@settings(max_examples=100, deadline=None)
@given(said=st.lists(st.text("ab :\n", max_size=9), min_size=2, max_size=7), last=SAID)
def test_turns_survive_hh_rlhfs_writing(said, last):
    said = [text.strip() or "x" for text in said[: len(said) // 2 * 2]]
    said[-2] = said[-2].strip()
    names = ["Human", "Assistant"] * len(said)
    text = "".join(f"\n\n{name}: {content}" for name, content in zip(names, said))
    assert parse_response(None, text) == (turns(*said[:-1]), said[-1])


def test_a_speakers_second_mark_is_part_of_the_turn():
    text = "\n\nHuman: hi\n\nAssistant: they ask:\n\nAssistant: who?"
    assert parse_response(None, text) == (turns("hi"), "they ask:\n\nAssistant: who?")


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("hi", "answer"),
        (turns("hi"), "answer"),
        ("hi", [{"role": "assistant", "content": "answer"}]),
        ("hi", turns("hi", "answer")),
        (None, turns("hi", "answer")),
    ],
    ids=["texts", "messages and text", "the answer's message", "all of it", "no prompt"],
)
def test_every_writing_of_a_pair_says_the_same(prompt, response):
    assert parse_response(prompt, response) == (turns("hi"), "answer")


@pytest.mark.parametrize(
    ("prompt", "response", "said"),
    [
        (None, "just text", "does not begin with"),
        (None, "\n\nHuman: hi", "does not end with a turn of 'assistant'"),
        (None, turns("hi"), "does not end with a turn of 'assistant'"),
        (None, [{"role": "assistant", "content": "x"}], "has a prompt that has no user turn"),
        ("hi", turns("other", "x"), "not those of field 'prompt'"),
        ("", "x", "has a prompt that has no user turn"),
        ("hi", 3, "is int"),
        ("hi", [{"role": "robot", "content": "x"}], "'robot'"),
    ],
)
def test_a_pair_that_is_none_says_why(prompt, response, said):
    with pytest.raises(ValueError, match=said):
        parse_response(prompt, response)
