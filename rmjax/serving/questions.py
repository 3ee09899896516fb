"""What a request asks: conversations to score, and how their scores are written as its reply.

An `Endpoint` reads a body into an `Asked`. Between the two lies the service, which is the same for
all of them.
"""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmjax.data.conversation import Conversation, PromptError
from rmjax.data.templated_text import OwnTemplate, parse_pair, parse_templated
from rmjax.inference.scorer import Scorer
from rmjax.inference.scores import Score
from rmjax.serving.schemas import Schema

Body = dict[str, Any]


class Refusal(Exception):
    """A reply that is no score.

    Attributes:
      status: of HTTP.
      message: what is wrong, where, and what to do.
      param: the field of the body; None if it is none.
      retry_after: seconds; None where another try will fare no better.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Served:
    """The model behind the endpoints.

    Attributes:
      name: what requests may call it.
      scorer: the model.
      own: its chat template.
      created: when the server started, in seconds since 1970.
    """

    name: str
    scorer: Scorer
    own: OwnTemplate
    created: int

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the model's numbers, in order."""
        return self.scorer.attributes

    @property
    def compares(self) -> bool:
        """Whether the model has no number for one response, but compares two."""
        return self.scorer.spec.general_preference is not None


@dataclasses.dataclass(frozen=True)
class Item:
    """One conversation.

    Attributes:
      said: the conversation, or token ids of the model's own tokenizer.
      where: the field of the body that it stands in.
    """

    said: Conversation | Sequence[int]
    where: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A conversation's scores.

    Attributes:
      score: of the model.
      value: the reward. Of a model of general preferences it is against the other responses to the
        prompt, and None where there are none.
      empty: whether the response says nothing.
    """

    score: Score
    value: float | None
    empty: bool


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that was read.

    Attributes:
      items: to score.
      groups: how many items in a row answer one prompt; they sum to the items.
      write: the reply, from the results in order and what the template does not show.
      needs_value: whether the reply is of use only if each has a value.
      cut_to: most tokens of each, whose first ones are cut; None for the server's own way.
      loses_nothing: whether an empty response is scored, too, where an error would lose more.
    """

    items: list[Item]
    groups: list[int]
    write: Callable[[list[Result], list[str]], Any]
    needs_value: bool = True
    cut_to: int | None = None
    loses_nothing: bool = False


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One form of request and reply.

    Attributes:
      paths: where it is served.
      summary: what it does, for the OpenAPI document.
      request: schema of the body.
      reply: schema of what comes back.
      parse: reads a body that its schema allows. `Refusal` and `UserError` say what is wrong.
      example: a body.
    """

    paths: tuple[str, ...]
    summary: str
    request: Schema
    reply: Schema
    parse: Callable[[Body, Served], Asked]
    example: Body


def text_item(text: str, where: str, served: Served) -> Item:
    """A text that a chat template wrote.

    Raises:
      Refusal: it is none.
    """
    try:
        return Item(parse_templated(text, served.own), where)
    except ValueError as error:
        raise Refusal(f"field {where!r} {error}", param=where) from error


def response_item(
    prompt: Any, response: Any, where: tuple[str, str], served: Served, **beside: Any
) -> Item:
    """A response to a prompt; `where` are the fields of both. See `parse_pair`.

    Raises:
      Refusal: they are no conversation.
    """
    try:
        return Item(parse_pair(prompt, response, served.own, **beside), where[1])
    except ValueError as error:
        field = where[0] if isinstance(error, PromptError) else where[1]
        raise Refusal(f"field {field!r} {error}", param=field) from error


def check_model(body: Body, served: Served) -> None:
    """Refuses a request for another model, as vLLM does; no name, or an empty one, is this."""
    name = body.get("model")
    if name and name != served.name:
        raise Refusal(f"The model `{name}` does not exist; this is {served.name!r}.", 404, "model")


def new_id(kind: str, body: Body) -> str:
    """An id for a reply: the request's own, or a new one."""
    return f"{kind}-{body.get('request_id') or uuid.uuid4().hex}"


def head(kind: str, body: Body, served: Served) -> dict[str, Any]:
    """What a reply in OpenAI's form begins with."""
    return {"id": new_id(kind, body), "created": int(time.time()), "model": served.name}


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """Tokens, as OpenAI counts them; and how many were cut, if there are any."""
    tokens, cut = (sum(getattr(r.score, name) for r in results) for name in ("tokens", "cut"))
    counts = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return counts | ({"cut_tokens": cut} if cut else {})


def numbers(result: Result, every: bool) -> list[float]:
    """The value alone, or every attribute in the model's order."""
    if every:
        return list(result.score.attributes.values())
    assert result.value is not None
    return [result.value]


def with_values(
    scores: Sequence[Score], empty: Sequence[bool], groups: Sequence[int], served: Served
) -> list[Result]:
    """Scores with their values, each among the responses to its prompt."""
    found: list[Result] = []
    start = 0
    for size in groups:
        members = range(start, start + size)
        values: list[float] = [scores[i].value for i in members]
        if served.compares and size:
            matrix = np.asarray([list(scores[i].attributes.values()) for i in members])
            values = served.scorer.rule.values(matrix).tolist()
        found += [
            Result(scores[i], None if np.isnan(value) else value, empty[i])
            for i, value in zip(members, values)
        ]
        start += size
    return found
