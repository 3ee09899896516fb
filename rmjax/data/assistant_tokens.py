"""Which tokens of a conversation are the assistant's: what a policy says, and is trained to say.

A policy begins where a prompt ends, and ends with a token that ends its turn. So these are the
tokens behind the prompt, the end token among them; what a template writes behind that one, such as
a line break, no policy ever says.
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from rmjax.data.conversation import Conversation
from rmjax.data.messages import message_text
from rmjax.data.tokenizer import Tokenizer, encode, render
from rmjax.errors import UserError

_MARKS = re.compile(r"\{\%-?\s*generation\s*-?\%\}")  # as transformers looks for them


class AssistantTokens(NamedTuple):
    """A conversation in tokens.

    Attributes:
      tokens: of the whole conversation, as `encode` gives them.
      spoken: which of them are the assistant's.
    """

    tokens: Int32[np.ndarray, "L"]
    spoken: Bool[np.ndarray, "L"]


def assistant_tokens(
    tokenizer: Tokenizer, conversation: Conversation, *, every_turn: bool = False
) -> AssistantTokens:
    """The tokens of a conversation, and which of them the assistant says.

    A template that marks them itself, by `{% generation %}`, is believed. With any other, the
    assistant's are those that follow the prompt: the conversation so far, templated so that the
    assistant is to answer. That needs templates that write a beginning as they write the whole,
    and tokenizers that cut both alike.

    Args:
      tokenizer: with a chat template.
      conversation: ends with the assistant's turn.
      every_turn: whether the assistant's earlier turns count, too, or the last one alone.

    Raises:
      UserError: the conversation does not end with the assistant; the tokens of a prompt are not
        those that the conversation begins with, and why; or a turn does not end with a special
        token, so that a policy would never learn to stop.
    """
    messages = conversation.messages
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the conversation does not end with a turn of the assistant")
    tokens = encode(tokenizer, conversation)
    if _MARKS.search(tokenizer.chat_template):
        spoken = _marked(tokenizer, conversation, tokens)
        return AssistantTokens(tokens, spoken if every_turn else _last_run(spoken))
    spoken = np.zeros(len(tokens), bool)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in turns if every_turn else turns[-1:]:
        start, end = _turn(tokenizer, conversation, turn, tokens)
        spoken[start:end] = True
    return AssistantTokens(tokens, spoken)


def most_shared(spoken: Bool[np.ndarray, "L"]) -> int:
    """How much of a sample other samples may share, if the assistant's tokens are predicted.

    A token is predicted by the one before it. The last token of a prompt predicts each response's
    first one, and so every response needs its own: what is shared ends one token before the prompt.

    Raises:
      UserError: there is no such token, or nothing before the first of them.
    """
    if not spoken.any():
        raise UserError("none of the sample's tokens are the assistant's")
    first = int(np.argmax(spoken))
    if first == 0:
        raise UserError(
            "the assistant's tokens begin with the sample's first one, which nothing predicts: a "
            "BOS or a prompt must stand before it"
        )
    return first - 1


def _marked(
    tokenizer: Tokenizer, conversation: Conversation, tokens: Int32[np.ndarray, "L"]
) -> Bool[np.ndarray, "L"]:
    found = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools or None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    spoken = np.asarray(found["assistant_masks"], bool)
    if not spoken.any():
        raise UserError("the chat template marks nothing of this conversation as the assistant's")
    # `encode` may have put a BOS in front, which is nobody's.
    return np.concatenate([np.zeros(len(tokens) - len(spoken), bool), spoken])


def _last_run(spoken: Bool[np.ndarray, "L"]) -> Bool[np.ndarray, "L"]:
    """The last of the runs of true alone."""
    starts = np.flatnonzero(np.diff(spoken.astype(np.int8), prepend=0) == 1)
    return spoken & (np.arange(len(spoken)) >= starts[-1])


def _turn(
    tokenizer: Tokenizer, conversation: Conversation, turn: int, tokens: Int32[np.ndarray, "L"]
) -> tuple[int, int]:
    """Where the assistant's turn begins and ends in the whole conversation's tokens."""
    prompt = _begun(tokenizer, conversation, turn, tokens, asked=True)
    through = tokens
    if turn + 1 < len(conversation.messages):
        through = _begun(tokenizer, conversation, turn + 1, tokens, asked=False)
    for beginning in (prompt, through):
        if not np.array_equal(beginning, tokens[: len(beginning)]):
            raise UserError(f"message {turn + 1}: {_why(tokenizer, conversation, turn)}")
    special = np.isin(through[len(prompt) :], _special_ids(tokenizer))
    if not special.any():
        raise UserError(
            f"message {turn + 1}: the chat template ends the assistant's turn with no special "
            "token, so that a policy would never learn to stop: let it write the tokenizer's "
            f"end token {tokenizer.eos_token!r} there"
        )
    return len(prompt), len(prompt) + int(np.flatnonzero(special)[-1]) + 1


def _begun(
    tokenizer: Tokenizer,
    conversation: Conversation,
    messages: int,
    tokens: Int32[np.ndarray, "L"],
    asked: bool,
) -> Int32[np.ndarray, "P"]:
    """The tokens of the first messages, with a BOS if those of the whole have one."""
    text = _text(tokenizer, conversation, messages, asked)
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and tokens[0] == bos and ids[:1] != [bos]:
        ids = [bos, *ids]
    return np.asarray(ids, np.int32)


def _text(tokenizer: Tokenizer, conversation: Conversation, messages: int, asked: bool) -> str:
    try:
        return render(tokenizer, conversation.begun(messages), asked)
    except UserError as error:
        raise UserError(f"of the first {messages} messages alone: {error}") from error


def _why(tokenizer: Tokenizer, conversation: Conversation, turn: int) -> str:
    """Why a beginning's tokens are not those that the whole conversation begins with."""
    whole = render(tokenizer, conversation)
    prompt = _text(tokenizer, conversation, turn, asked=True)
    through = _text(tokenizer, conversation, turn + 1, asked=False)
    if whole.startswith(prompt) and whole.startswith(through):
        said = message_text(conversation.messages[turn])
        return (
            f"the assistant's turn, {said[:20]!r}..., and the text around it share a token, so "
            "that no policy can begin or end there: take away the white space at its ends"
        )
    return (
        "the chat template writes what is said up to here otherwise if more follows, as templates "
        "do that leave out earlier reasoning or begin the answer themselves: train on the last "
        "turn alone (data.turns 'last'), or use a template that marks the assistant's words by "
        "{% generation %}"
    )


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    added = tokenizer.added_tokens_decoder
    return [*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)]
