"""A judge of responses: a model that is loaded here, or a server of rmjax.

Both take what trainers have, prompts and completions as texts or messages, one prompt often in a
row. Texts may be what the policy's chat template wrote. What is too long loses its first tokens,
since an error would end a run.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rmjax.data.messages import message_text, parse_messages
from rmjax.data.templated_text import OwnTemplate, parse_pair
from rmjax.errors import UserError
from rmjax.generation.http_json import BadReply, JsonServer
from rmjax.generation.in_threads import in_threads
from rmjax.inference.load import load

_RETRIES = 5  # where there is no reply
_CONCURRENCY = 32
_PATH = "/v1/rewards"

Judged = dict[str, float]  # `value`, and each attribute by its name


class Judge(Protocol):
    """Judges completions of prompts."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Judged | None]:
        """What each completion is worth; None of one that says nothing.

        Args:
          prompts: a text or messages each.
          completions: likewise, of the assistant; as many.
        """
        ...


def open_judge(judge: str, timeout: float = 180.0, **options: Any) -> Judge:
    """A judge.

    Args:
      judge: the URL of `rmjax serve`, or whatever `rmjax.load` takes. A server's key is the
        environment variable OPENAI_API_KEY.
      timeout: seconds in which a server must have answered a call.
      options: of `rmjax.load`; a server has its own.

    Raises:
      UserError: it cannot be opened.
    """
    if not judge.startswith(("http://", "https://")):
        return ModelJudge(judge, **options)
    if options:
        raise UserError(f"{next(iter(options))!r} is said where the server {judge} is started")
    return ServerJudge(judge, timeout)


class ModelJudge:
    """A model in this process."""

    def __init__(self, model: str, **options: Any):
        """Takes what `rmjax.load` does."""
        self._scorer = load(model, **{"over_long": "truncate_left", **options})
        self._scorer.progress = False
        self._own = OwnTemplate(self._scorer.tokenizer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Judged | None]:
        """See `Judge`.

        Raises:
          UserError: a prompt or a completion is none.
        """
        asked = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                asked.append(parse_pair(prompt, completion, self._own))
            except ValueError as error:
                raise UserError(f"completion {number} {error}") from error
        said = [i for i, each in enumerate(asked) if not each.is_empty]
        scores = self._scorer.score_many(
            [{"messages": asked[i].messages, "tools": asked[i].tools} for i in said]
        )
        found: list[Judged | None] = [None] * len(asked)
        for i, score in zip(said, scores):
            found[i] = {**score.attributes, "value": score.value}
        return found


class ServerJudge:
    """A server: a request has all completions of a prompt, and several go at once."""

    def __init__(self, url: str, timeout: float):
        """Nothing is asked yet.

        Raises:
          UserError: the URL is none.
        """
        key = os.environ.get("OPENAI_API_KEY", "")
        self._server = JsonServer(url, key, timeout, _RETRIES, _CONCURRENCY)
        self._timeout = timeout

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Judged | None]:
        """See `Judge`.

        Raises:
          UserError: the server does not answer in time, or refuses; see docs/serving.md.
        """
        groups: dict[str, list[int]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if _says(completion):
                groups.setdefault(json.dumps(prompt), []).append(i)
        found: list[Judged | None] = [None] * len(prompts)

        def ask(members: list[int]) -> list[Judged]:
            responses = [completions[i] for i in members]
            body = {"prompt": prompts[members[0]], "responses": responses, "truncate": True}
            return _read(self._server.post(_PATH, body, "rewards"), len(members))

        try:
            asked = in_threads(ask, list(groups.values()), _CONCURRENCY, self._timeout)
            for members, judged in asked:
                for i, each in zip(members, judged, strict=True):
                    found[i] = each
        except TimeoutError as error:
            raise UserError(
                f"{self._server.url}: not all rewards were there after {self._timeout:g} s"
            ) from error
        return found


def _says(completion: Any) -> bool:
    """Whether there is anything in a completion, which is a text, a message or messages."""
    if isinstance(completion, str):
        return bool(completion.strip())
    try:
        messages = parse_messages([completion] if isinstance(completion, Mapping) else completion)
    except ValueError:
        return True  # the server will say what is wrong with it
    return bool(messages) and bool(message_text(messages[-1]).strip())


def _read(reply: dict[str, Any], count: int) -> list[Judged]:
    try:
        found = [{**item["attributes"], "value": item["value"]} for item in reply["data"]]
        fine = all(math.isfinite(value) for each in found for value in each.values())
    except (LookupError, TypeError):
        found, fine = [], False
    if not fine or len(found) != count:
        raise BadReply(f"{count} rewards were asked for, and {_PATH} replies {str(reply)[:200]}")
    return found
