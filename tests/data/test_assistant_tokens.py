"""Which tokens are the assistant's, against transformers' own marks and by hand."""

import numpy as np
import pytest

from helpers.hf_models import TALK
from rmjax.data.assistant_tokens import assistant_tokens
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer, encode
from rmjax.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def said(tokenizer, messages, **options) -> str:
    tokens, spoken = assistant_tokens(tokenizer, Conversation(messages), **options)
    np.testing.assert_array_equal(tokens, encode(tokenizer, Conversation(messages)))
    return tokenizer.decode(tokens[spoken])


@pytest.mark.parametrize("talk", TALK, ids=["a turn", "a dialogue", "an end token in the text"])
@pytest.mark.parametrize("template", [None, CHATML, PLAIN], ids=["own", "marks", "no marks"])
def test_the_words_and_the_end_token_and_nothing_else(template, talk):
    """Neither the header in front of them nor the line break behind them."""
    tokenizer = with_template(template) if template else byte_tokenizer()
    last, *earlier = [m["content"] + "<|end|>" for m in reversed(talk) if m["role"] == "assistant"]
    assert said(tokenizer, talk) == last
    assert said(tokenizer, talk, every_turn=True) == "".join(reversed([last, *earlier]))


def test_position_and_marks_agree_with_transformers():
    marked, plain = with_template(CHATML), with_template(PLAIN)
    for talk in TALK:
        theirs = marked.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for tokenizer in (marked, plain):
            tokens, spoken = assistant_tokens(tokenizer, Conversation(talk), every_turn=True)
            assert tokens.tolist() == theirs["input_ids"]
            assert spoken.astype(int).tolist() == theirs["assistant_masks"]


def test_to_say_nothing_is_to_end_at_once():
    empty = [TALK[0][0], {"role": "assistant", "content": ""}]
    for template in (CHATML, PLAIN):
        assert said(with_template(template), empty) == "<|end|>"


def test_a_bos_that_only_the_tokenizer_adds_is_nobodys():
    """A template without one, as of a tokenizer that puts it in front of every text."""
    for template in (CHATML, PLAIN):
        tokenizer = with_template(template)
        tokenizer.backend_tokenizer.post_processor = bos_in_front(tokenizer.bos_token_id)
        tokens, spoken = assistant_tokens(tokenizer, Conversation(TALK[0]))
        assert tokens[0] == tokenizer.bos_token_id and not spoken[0]
        assert tokenizer.decode(tokens[spoken]) == "Hello there.<|end|>"


def bos_in_front(bos: int):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])


def test_a_template_that_rewrites_what_was_said_is_an_error():
    """As one that begins the answer with reasoning, and leaves that out once it is given."""
    thinking = PLAIN.replace("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>\n<think>' }}")
    with pytest.raises(UserError, match="message 2: the chat template writes what is said"):
        assistant_tokens(with_template(thinking), Conversation(TALK[0]))
    words = "m['content'] + '<|end|>' }}{% else"
    fewer = words.replace("['content']", "['content'][:9 if loop.last else 3]")
    forgetting = PLAIN.replace(words, fewer)
    tokenizer = with_template(forgetting)
    assert said(tokenizer, TALK[1]) == "A physici<|end|>"
    with pytest.raises(UserError, match=r"message 3: the chat template writes .* the last turn"):
        assistant_tokens(tokenizer, Conversation(TALK[1]), every_turn=True)


def test_a_token_across_the_prompts_end_is_an_error():
    """The prompt ends with a line break, which a tokenizer may join with one that follows."""
    from tokenizers import models

    tokenizer = with_template(PLAIN)
    vocab = tokenizer.get_vocab() | {"ĊĊ": 262}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")])
    talk = [TALK[0][0], {"role": "assistant", "content": "\nHello"}]
    with pytest.raises(UserError, match=r"message 2: the assistant's turn, '\\nHello'"):
        assistant_tokens(tokenizer, Conversation(talk))
    assert said(tokenizer, [TALK[0][0], {"role": "assistant", "content": "Hello"}])


def test_a_turn_without_an_end_is_an_error():
    endless = PLAIN.replace("m['content'] + '<|end|>'", "m['content']")
    with pytest.raises(UserError, match=r"no special token.*'<\|end\|>'"):
        assistant_tokens(with_template(endless), Conversation(TALK[0]))


@pytest.mark.parametrize("talk", [[], TALK[0][:1]], ids=["nothing", "a prompt"])
def test_a_conversation_that_does_not_end_with_the_assistant_is_an_error(talk):
    with pytest.raises(UserError, match="does not end with a turn of the assistant"):
        assistant_tokens(byte_tokenizer(), Conversation(talk))


def test_marks_of_nothing_are_an_error():
    nothing = CHATML.replace("m['role'] == 'assistant'", "m['role'] == 'bot'")
    with pytest.raises(UserError, match="marks nothing of this conversation"):
        assistant_tokens(with_template(nothing), Conversation(TALK[0]))
