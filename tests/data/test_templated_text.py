"""Texts that templates wrote become the messages they were, whichever template it was."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.data.conversation import Conversation
from rmjax.data.templated_text import OwnTemplate, parse_templated
from rmjax.data.tokenizer import BYTES_TEMPLATE, byte_tokenizer, encode, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.1's: a date in the system's turn, which is always there, and trimmed contents.
LLAMA_3 = (
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    "December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# A template that is none of those: an own one, with a system's turn inside the marks of another.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FOREIGN = {"chatml": CHATML, "llama 3": LLAMA_3, "gemma": GEMMA}
OWN = {**FOREIGN, "zephyr": ZEPHYR, "bytes": BYTES_TEMPLATE}


def tokenizer_of(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: tokenizer_of(template) for name, template in OWN.items()}
BYTES = OwnTemplate(TOKENIZERS["bytes"])
TEXT = st.text("ab é\n<|>:[]/", min_size=1, max_size=12).filter(str.strip)
TALK = st.tuples(st.none() | TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)).map(
    lambda talk: [
        *([{"role": "system", "content": talk[0]}] if talk[0] else []),
        *(
            {"role": role, "content": text}
            for turn in talk[1]
            for role, text in zip(("user", "assistant"), turn)
        ),
    ]
)


def trimmed(messages):
    return [message | {"content": message["content"].strip()} for message in messages]


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=60, deadline=None)
@given(messages=TALK, cut_end=st.booleans())
def test_what_a_template_wrote_is_read_back(name, messages, cut_end):
    if name == "gemma":
        messages = [m for m in messages if m["role"] != "system"]
    tokenizer = TOKENIZERS[name]
    text = render(tokenizer, Conversation(messages))
    if cut_end:  # what a policy says ends with its end token, and with nothing if it was cut off
        end = {"zephyr": "</s>\n", "bytes": "<|end|>", "gemma": "<end_of_turn>\n"}
        text = text.removesuffix(end.get(name, "<|im_end|>\n")).removesuffix("<|eot_id|>")
    own = OwnTemplate(tokenizer) if name in ("zephyr", "bytes") else BYTES
    found = parse_templated(text, own).messages
    trims = name in ("llama 3", "gemma")
    assert (trimmed(found) if trims else found) == (trimmed(messages) if trims else messages)


@pytest.mark.parametrize("name", OWN)
def test_own_text_becomes_the_tokens_of_its_messages(name):
    """However many BOS stand before it, and whatever stands after it."""
    tokenizer = TOKENIZERS[name]
    whole = Conversation(
        [
            {"role": "user", "content": "Hi, é?"},
            {"role": "assistant", "content": "Hello <there>."},
        ]
    )
    text, bos = render(tokenizer, whole), tokenizer.bos_token
    expected = encode(tokenizer, whole).tolist()
    own = OwnTemplate(tokenizer)
    for sent in (text, bos + text, bos + bos + text, text + tokenizer.pad_token, text.rstrip()):
        assert encode(tokenizer, parse_templated(sent, own)).tolist() == expected, sent


def test_another_day_is_not_another_conversation():
    text = render(TOKENIZERS["llama 3"], Conversation([*TURNS])).replace(
        "26 Jul 2024", "1 Dec 2026"
    )
    assert parse_templated(text, BYTES).messages == TURNS
    system = {"role": "system", "content": "Be brief."}
    text = render(TOKENIZERS["llama 3"], Conversation([system, *TURNS]))
    assert parse_templated(text, BYTES).messages == [system, *TURNS]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_marks_of_turns_are_read():
    assert parse_templated("\n\nHuman: q\n\nAssistant: a", BYTES).messages == TURNS


def test_an_empty_response_is_there():
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert parse_templated(text, BYTES).is_empty


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is in no chat template: 'hello'"),
        ("[INST] hi [/INST] yes</s>", "another chat template .* Mistral's or Llama 2's"),
        ("<｜User｜>hi<｜Assistant｜>yes", "DeepSeek's"),
        ("<|user|>\nhi</s>\n<|assistant|>\nyes</s>", "Zephyr's"),
        ("<|im_start|>user\nq<|im_end|>\n", "ChatML text and does not end with a turn"),
        ("<|im_start|>assistant\na<|im_end|>\n", "ChatML text and has no user turn"),
        ("so <|im_start|>user\nq<|im_end|>\n", "ChatML text and does not begin with a turn"),
        (
            "<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>",
            "has a turn without '<|im_end|>'".replace("|", r"\|"),
        ),
        (
            "<start_of_turn>user\nq<end_of_turn> more\n<start_of_turn>model\na",
            "Gemma text and has something between its turns: 'more'",
        ),
    ],
)
def test_what_cannot_be_read_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse_templated(text, BYTES)


@pytest.mark.parametrize("before", [True, False])
def test_a_million_marks_around_a_text_take_no_longer_than_reading_them(before):
    """A copy of the text for each of them would take minutes, in which nobody else is served."""
    written, marks = render(TOKENIZERS["chatml"], Conversation([*TURNS])), "<s> " * 1_000_000
    began = time.process_time()
    assert parse_templated(marks + written if before else written + marks, BYTES).messages == TURNS
    assert time.process_time() - began < 10
