"""Conversations to tokens, with an account of what the chat template does not show of them."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rmjax.data.assistant_tokens import AssistantTokens, assistant_tokens, most_shared
from rmjax.data.conversation import Conversation
from rmjax.data.messages import SAYS, Message
from rmjax.data.tokenizer import Tokenizer, encode_texts, render, unicode_text
from rmjax.errors import UserError

_Tokens = TypeVar("_Tokens")
_Shape = tuple[str, tuple[str, ...], bool, bool, bool, bool]
Kinds = dict[_Shape | None, frozenset[str]]
_MOST_KINDS = 4096  # of messages that are remembered: a server's clients may name any fields


class ChatEncoder:
    """Makes tokens of conversations; training, evaluation and scoring use one each.

    Whether a template shows a field is tried, once for each kind of message: its role, which fields
    it has and where it stands. A template may name a field and yet pass over it.

    Attributes:
      tokenizer: the model's.
      suffix_turn: what a user asks after the response of every conversation; see `RewardSpec`.
      unread: of how many conversations the template does not show something, by what it is.
      kinds: what it does not show of each kind of message that was tried; None stands for tools.
    """

    def __init__(self, tokenizer: Tokenizer, suffix_turn: str = ""):
        """Nothing has been seen."""
        self.tokenizer, self.suffix_turn = tokenizer, suffix_turn
        self.unread: Counter[str] = Counter()
        self.kinds: Kinds = {}

    def encode(self, conversation: Conversation, where: str, asking: bool = False) -> np.ndarray:
        """Token ids [length] int32; the reward is read at the last one.

        Args:
          conversation: any; an empty response too.
          where: what messages call it.
          asking: whether it is a prompt, and the tokens go on to where its response begins.

        Raises:
          UserError: the template refuses it, or passes over what somebody says.
        """
        return self.encode_texts([self.text(conversation, where, asking)], [where])[0]

    def text(self, conversation: Conversation, where: str, asking: bool = False) -> str:
        """What `encode` makes tokens of.

        Raises:
          UserError: see `encode`.
        """
        if self.suffix_turn and not asking:
            conversation, asking = self._with_suffix(conversation), True
        return self._read(conversation, where, functools.partial(unicode_text, asking=asking))

    def encode_texts(self, texts: Sequence[str], wheres: Sequence[str]) -> list[np.ndarray]:
        """The tokens of texts, all at once, on all cores; no other thread may encode meanwhile.

        Args:
          texts: see `text`.
          wheres: what messages call each.

        Raises:
          UserError: see `encode`.
        """
        tokens, found = encode_texts(self.tokenizer, texts), []
        for where in wheres:
            try:
                found.append(next(tokens))
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        return found

    def encode_spoken(
        self, conversation: Conversation, where: str, every_turn: bool = False
    ) -> AssistantTokens:
        """The same tokens, and which of them a policy learns: the assistant's last turn, or all.

        Raises:
          UserError: see `encode`; or a policy cannot be asked for these tokens.
        """

        def read(tokenizer: Tokenizer, conversation: Conversation) -> AssistantTokens:
            found = assistant_tokens(tokenizer, conversation, every_turn=every_turn)
            most_shared(found.spoken)  # which says what nothing predicts
            return found

        return self._read(conversation, where, read)

    def _with_suffix(self, conversation: Conversation) -> Conversation:
        """The conversation that is encoded: the question about the response is part of it."""
        if not self.suffix_turn:
            return conversation
        question: Message = {"role": "user", "content": self.suffix_turn}
        return Conversation([*conversation.messages, question], conversation.tools)

    def _read(
        self,
        conversation: Conversation,
        where: str,
        read: Callable[[Tokenizer, Conversation], _Tokens],
    ) -> _Tokens:
        try:
            tokens = read(self.tokenizer, conversation)
            hidden = self._hidden_fields(conversation)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        unread = {
            f"{field!r} of {message['role']!r}"
            for message, fields in zip(conversation.messages, hidden)
            for field in fields
        }
        if conversation.tools and self._hides_tools(conversation):
            unread.add("'tools'")
        self.unread.update(unread)
        return tokens

    def shows_response(self, conversation: Conversation, every_turn: bool = False) -> bool:
        """Whether the tokens have anything of the response, or of each turn of the assistant's."""
        messages = conversation.messages
        hidden = self._hidden_fields(self._with_suffix(conversation))
        turns = [len(messages) - 1]
        if every_turn:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return all(
            {field for field in ("content", *SAYS) if messages[i].get(field)} - hidden[i]
            for i in turns
        )

    def learn(self, conversation: Conversation) -> None:
        """Tries what is new in a conversation, so that others need not, and find something else.

        An error is left to whoever encodes it.
        """
        with contextlib.suppress(UserError):
            self._hidden_fields(self._with_suffix(conversation))
            if conversation.tools:
                self._hides_tools(conversation)

    def notes(self) -> list[str]:
        """What the template does not show, in words, from how many conversations have it."""
        return [
            f"the chat template does not show {what}, which {count:,} conversations have"
            for what, count in sorted(self.unread.items())
        ]

    def _hidden_fields(self, conversation: Conversation) -> list[frozenset[str]]:
        """For each message the fields that the template does not show."""
        messages = conversation.messages
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        found = []
        for number, message in enumerate(messages):
            shape = (
                message["role"],
                tuple(sorted(field for field in message if message[field])),
                number == 0,
                number == len(messages) - 1,
                number > last_user,
                bool(conversation.tools),
            )
            if shape not in self.kinds:
                if len(self.kinds) >= _MOST_KINDS:
                    self.kinds.clear()
                self.kinds[shape] = self._try(conversation, number)
            found.append(self.kinds[shape])
        return found

    def _try(self, conversation: Conversation, number: int) -> frozenset[str]:
        message = conversation.messages[number]
        fields = [field for field in message if message[field] and field != "role"]
        hidden = frozenset(
            f for f in fields if self._same(conversation, number, _without(message, f))
        )
        if "content" in hidden and not (message["role"] == "system" or message.get("tool_calls")):
            raise UserError(
                f"the chat template leaves out the content of message {number + 1}, of the role "
                f"{message['role']!r}; give it a role that the template shows, or another template"
            )
        return hidden

    def _same(self, conversation: Conversation, number: int, other: Message) -> bool:
        """Whether the conversation reads the same with another message in this place."""
        messages = conversation.messages
        changed = [*messages[:number], other, *messages[number + 1 :]]
        return self._reads_same(conversation, Conversation(changed, conversation.tools))

    def _hides_tools(self, conversation: Conversation) -> bool:
        if None not in self.kinds:
            same = self._reads_same(conversation, Conversation(conversation.messages))
            self.kinds[None] = frozenset({"tools"} if same else ())
        return bool(self.kinds[None])

    def _reads_same(self, one: Conversation, other: Conversation) -> bool:
        try:
            return render(self.tokenizer, one) == render(self.tokenizer, other)
        except UserError:  # the template minds the difference
            return False


def _without(message: Message, field: str) -> Message:
    """A message that lacks a field, or says more where that is its content."""
    if field == "content":
        return message | {"content": f"{message['content']} more"}
    return {k: v for k, v in message.items() if k != field}
