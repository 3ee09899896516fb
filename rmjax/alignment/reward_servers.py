"""A reward server: each sample is a request of its own, and of its reply nothing is taken on trust.

What is sent are texts or messages, not tokens: the server's model has a tokenizer of its own. A
server that is busy, breaks off or replies with something else is asked again a few times.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from rmjax.data.conversation import Conversation
from rmjax.data.fields import LARGEST, is_number
from rmjax.data.tokenizer import Tokenizer, render
from rmjax.errors import UserError, shortened
from rmjax.generation.http_json import BadReply, JsonServer
from rmjax.generation.in_threads import in_threads

_RETRIES = 5  # where there is no reply
_REPLIES = 3  # that are looked at before one that is of no use ends the run
_PAUSE = 1.0  # seconds before such a server is asked again
_CONCURRENCY = 32
_KEY = "OPENAI_API_KEY"


class _Asked(NamedTuple):
    """A sample: which one, and its prompt and response as a conversation."""

    prompt: int
    sample: int
    whole: Conversation


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of server is sent and replies.

    Attributes:
      name: of programs that speak so.
      body: of a request, from the conversation and the policy's tokenizer.
      numbers: those of a reply, whatever they turn out to be. `LookupError` and `TypeError` mean
        that it has none.
      tools: whether it can be told of a prompt's tools.
    """

    name: str
    body: Callable[[Conversation, Tokenizer], dict[str, Any]]
    numbers: Callable[[dict[str, Any]], Any]
    tools: bool


def _text_body(whole: Conversation, tokenizer: Tokenizer) -> dict[str, Any]:
    asked = Conversation(whole.prompt, whole.tools)
    return {
        "query": [render(tokenizer, whole)],
        "prompts": [render(tokenizer, asked, asking=True)],
        "labels": [""],
    }


def _chat_body(whole: Conversation, tokenizer: Tokenizer) -> dict[str, Any]:
    # Else vLLM takes the softmax of a model's numbers, or what its config says.
    return {"messages": whole.messages, "use_activation": False}


def _only(found: list[Any]) -> Any:
    if len(found) != 1:
        raise LookupError
    return found[0]


def _pooled(reply: dict[str, Any]) -> Any:
    """The numbers of the model, or of the last token, if it has some for each."""
    found = _only(reply["data"])["data"]
    return found[-1] if isinstance(found[-1], list) else found


# By the last part of the URL's path.
KINDS = {
    "get_reward": Kind("OpenRLHF's", _text_body, lambda r: [_only(r["rewards"])], tools=True),
    "classify": Kind("vLLM's", _chat_body, lambda r: _only(r["data"])["probs"], tools=False),
    "pooling": Kind("vLLM's", _chat_body, _pooled, tools=False),
}


class ServerReward:
    """The values of a server."""

    def __init__(self, url: str, value: str, timeout: float, tokenizer: Tokenizer, where: str):
        """Nothing is asked yet.

        Args:
          url: with the path that is asked, whose last part is one of `KINDS`.
          value: which of several numbers is the reward, from 0; empty if there must be one.
          timeout: seconds in which a step's samples must be rewarded.
          tokenizer: the policy's, by whose template texts are written.
          where: the field of the config, for messages.

        Raises:
          UserError: the URL is none, or its path is not known.
        """
        base, _, self._path = url.rstrip("/").rpartition("/")
        if self._path not in KINDS:
            there = ", ".join(f"/{path} ({kind.name})" for path, kind in KINDS.items())
            raise UserError(
                f"{where} = {url!r}: expected a URL that ends with what the server speaks: {there}"
            )
        self._kind, self._tokenizer, self._timeout = KINDS[self._path], tokenizer, timeout
        self._place = int(value) if value else None
        key = os.environ.get(_KEY, "")
        self._server = JsonServer(base, key, timeout, _RETRIES, _CONCURRENCY)
        self._url = f"{self._server.url}/{self._path}"

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], None]:
        """See `Reward`. An empty response has none, and is not asked for.

        Raises:
          UserError: the server does not answer in time, or not what it is asked.
        """
        rewards = np.full((len(prompts), len(responses[0])), np.nan)
        asked = []
        for number, (prompt, texts) in enumerate(zip(prompts, responses)):
            if prompt.tools and not self._kind.tools:
                raise UserError(f"{self._url} cannot be told of a prompt's tools; use /get_reward")
            for sample, text in enumerate(texts):
                answer = {"role": "assistant", "content": text}
                whole = Conversation([*prompt.messages, answer], prompt.tools)
                if not whole.is_empty:
                    asked.append(_Asked(number, sample, whole))
        done = 0
        try:
            for one, reward in in_threads(self._reward, asked, _CONCURRENCY, self._timeout):
                rewards[one.prompt, one.sample] = reward
                done += 1
        except TimeoutError as error:
            raise UserError(
                f"{self._url}: {done} of {len(asked)} rewards were there after {self._timeout:g} s"
            ) from error
        return rewards, None

    def _reward(self, one: _Asked) -> float:
        """One reward, asked for again while replies are of no use."""
        what = f"the reward of prompt {one.prompt}, response {one.sample + 1}"
        body = self._kind.body(one.whole, self._tokenizer)
        for left in reversed(range(_REPLIES)):
            try:
                return self._read(self._server.post(f"/{self._path}", body, what), what)
            except BadReply:
                if not left:
                    raise
                time.sleep(_PAUSE)
        raise AssertionError

    def _read(self, reply: dict[str, Any], what: str) -> float:
        try:
            found = self._kind.numbers(reply)
        except (LookupError, TypeError):
            found = None
        if not isinstance(found, list) or not all(
            is_number(x) and abs(x) <= LARGEST for x in found
        ):
            raise BadReply(
                f"{what}: {self._url} replies {shortened(repr(reply), 200)}, expected a number "
                f"where {self._kind.name} /{self._path} has it, and up to {LARGEST:.3g}"
            )
        if self._place is None and len(found) == 1:
            return float(found[0])
        if self._place is None or self._place >= len(found):
            raise UserError(
                f"{what}: {self._url} gives {len(found)} numbers; say which is the reward with "
                "config.rewards.NAME.value, from 0"
            )
        return float(found[self._place])
