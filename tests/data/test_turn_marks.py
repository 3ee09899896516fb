import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.data.turn_marks import has_marks, is_open_dialogue, split_turns

TEXT = st.text(max_size=30).filter(lambda text: not has_marks(text))
SAID = TEXT.filter(lambda text: text.strip())


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


def marked(messages):
    """A conversation in HelpSteer2's writing, made here by hand."""
    parts = [messages[0]["content"]]
    for message in messages[1:]:
        parts.append(f"\n<extra_id_1>{message['role'].capitalize()}\n{message['content']}")
    return "".join(parts)


def test_a_text_without_marks_is_the_users_turn():
    assert split_turns("What is tea?\n\nBe brief.") == turns("What is tea?\n\nBe brief.")
    assert split_turns(" \n") == []


def test_helpsteer2_marks_separate_turns():
    text = "hi\n<extra_id_1>Assistant\nhello\n\nthere\n<extra_id_1>User\nwhy?\n"
    assert split_turns(text) == turns("hi", "hello\n\nthere", "why?\n")


@pytest.mark.parametrize("number", "01")
def test_a_marked_text_may_start_with_the_system(number):
    assert split_turns(f"<extra_id_{number}>System\nbe kind\n<extra_id_1>User\nhi") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]


@settings(max_examples=100, deadline=None)
@given(first=SAID, others=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_turns_survive_helpsteer2s_writing_to_the_character(first, others):
    messages = turns(first, *(text for pair in others for text in pair))
    assert split_turns(marked(messages)) == messages


DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nthere\n\nHuman: why?\n\nAssistant: because"


def test_hh_rlhfs_text_is_a_conversation():
    assert split_turns(DIALOGUE) == turns("hi", "hello\n\nthere", "why?", "because")
    assert split_turns(DIALOGUE.lstrip()) == split_turns(DIALOGUE)
    windows = split_turns("\r\n\r\nHuman: q\r\n\r\nAssistant:")
    assert windows == turns("q", "")


@settings(max_examples=100, deadline=None)
@given(said=st.lists(st.text("ab :\n", max_size=9), min_size=2, max_size=7), last=SAID)
def test_turns_survive_hh_rlhfs_writing(said, last):
    said = [*(text.strip() or "x" for text in said[: len(said) // 2 * 2 - 1]), last]
    names = ["Human", "Assistant"] * len(said)
    text = "".join(f"\n\n{name}: {content}" for name, content in zip(names, said))
    assert split_turns(text) == turns(*said)


def test_a_speakers_second_mark_is_part_of_the_turn():
    text = "\n\nHuman: hi\n\nAssistant: they ask:\n\nAssistant: who?"
    assert split_turns(text) == turns("hi", "they ask:\n\nAssistant: who?")


@pytest.mark.parametrize(
    "text",
    [
        "Human: After All, a review",
        "Human: a\n\nHuman: b",
        "What does\n\nHuman: x\n\nAssistant: y\n\nmean?",
        "What is <extra_id_1> in T5?",
        "hi\n<extra_id_1>User",
    ],
)
def test_what_only_contains_marks_is_the_users_turn(text):
    assert split_turns(text) == turns(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hi\n<extra_id_1>Bot\nhello", "has a turn of 'Bot'"),
        ("Be kind.\n\nHuman: hi\n\nAssistant:", "does not begin with"),
    ],
)
def test_marks_that_make_no_turns_are_an_error(text, said):
    with pytest.raises(ValueError, match=said):
        split_turns(text)


def test_a_dialogue_is_open_where_the_assistant_has_not_spoken():
    assert is_open_dialogue("\n\nHuman: hi\n\nAssistant:")
    assert is_open_dialogue("Human: hi\n\nAssistant: ")
    assert not is_open_dialogue(DIALOGUE)
    assert not is_open_dialogue("hi\n\nAssistant:")
