"""A server as an engine: `rmjax.open_server(url, tokenizer=PATH)`.

A prompt is written here, by the tokenizer's own template, and each sample is a request of its own
to `/v1/completions`, which vLLM, SGLang, llama.cpp and others have. What they differ in is in
`server_kinds.py`.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int32
from rich.progress import track

from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.hub import local_path
from rmjax.data.tokenizer import Tokenizer, load_tokenizer, writes_bos
from rmjax.errors import UserError, listed, shortened
from rmjax.generation.completions import Completion, Prompt, SamplingSettings, check_keys
from rmjax.generation.http_json import JsonServer
from rmjax.generation.in_threads import in_threads
from rmjax.generation.prompts import prompt_tokens
from rmjax.generation.server_kinds import KINDS, OTHER, Kind
from rmjax.generation.server_reply import (
    field_of,
    named_log_probabilities,
    numbers_of,
    one_choice,
    visible,
)
from rmjax.generation.stopping import decode, find_stop, make_completion

_KEY = "OPENAI_API_KEY"
_ROUNDED = 1e-3  # what a log-probability of 0 may come to
_BAR_FROM = 256  # samples from which on there is a progress bar


class _Asked(NamedTuple):
    """One sample that is asked for."""

    prompt: int
    sample: int
    tokens: Int32[np.ndarray, "L"]
    body: dict[str, Any]


class ServerEngine:
    """A model on a server, which is an `Engine`; make one with `open_server`.

    Attributes:
      model_name: the server's name for it.
      kind: of the server.
      tokenizer: the model's, which writes the prompts.
      end_tokens: that end a sample.
      context: tokens of a prompt and its answer together; None if the server does not say.
      state: who answers: the URL, the model's name and the tokenizer.
    """

    def __init__(
        self,
        server: JsonServer,
        model_name: str,
        kind: Kind,
        context: int | None,
        tokenizer: Tokenizer,
        end_tokens: Sequence[int],
        concurrency: int,
    ):
        self.model_name, self.kind, self.context = model_name, kind, context
        self.tokenizer, self.end_tokens = tokenizer, tuple(end_tokens)
        self.state = f"{model_name} at {server.url}, tokenizer {_digest(tokenizer, end_tokens)}"
        self._server, self._concurrency = server, concurrency
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._adds_bos = writes_bos(tokenizer)

    def sample(
        self, prompts: Sequence[Prompt], *, keys: Sequence[int] | None = None, **settings: Any
    ) -> list[list[Completion]]:
        """The samples of each prompt; `settings` are the fields of `SamplingSettings`.

        Raises:
          UserError: a setting is out of its range, a prompt is none or too long, or the server does
            not answer what it is asked.
        """
        return self(prompts, SamplingSettings.of(settings), keys)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine`."""
        if isinstance(prompts, str):
            raise UserError("prompts: expected several, found one text; give a list")
        if settings.top_k and self.kind.all_top_k is None:
            raise UserError(f"top_k = {settings.top_k}: {self.kind.name} has no such setting")
        asked = [
            one
            for number, (prompt, key) in enumerate(zip(prompts, check_keys(keys, len(prompts))))
            for one in self._asked(prompt, number, key, settings)
        ]
        found: list[list[Completion | None]] = [[None] * settings.n for _ in prompts]
        for one, reply in track(
            in_threads(self._answer, asked, self._concurrency),
            description="sampling",
            total=len(asked),
            disable=len(asked) < _BAR_FROM,
            transient=True,
        ):
            found[one.prompt][one.sample] = self._completion(one, reply, settings)
        return found  # pyright: ignore[reportReturnType]

    def load_weights(self, directory: Path) -> None:
        """Makes the server sample with the weights of a Hugging Face directory, which it must see.

        Raises:
          UserError: it cannot, or says that it did not.
        """
        assert self.kind.load_weights
        self.kind.load_weights(self._server, directory)

    def _asked(
        self, prompt: Prompt, number: int, key: int, settings: SamplingSettings
    ) -> Iterator[_Asked]:
        """The requests of one prompt."""
        tokens = prompt_tokens(self.tokenizer, prompt, number, self._vocabulary)
        room = settings.max_tokens if self.context is None else self.context - len(tokens)
        if room < 1:
            raise UserError(
                f"prompt {number}: {len(tokens)} tokens, and the model's context on the server has "
                f"{self.context}, prompt and answer together; shorten it"
            )
        body: dict[str, Any] = {
            "model": self.model_name,
            "prompt": tokens.tolist() if self.kind.ids else self._text(tokens, number),
            "max_tokens": min(settings.max_tokens, room),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "n": 1,
            **self.kind.fields,
        }
        if self.kind.all_top_k is not None:
            body["top_k"] = settings.top_k or self.kind.all_top_k
        if self.kind.logprobs is not None:
            body["logprobs"] = self.kind.logprobs
        if self.kind.own_ids:
            body["stop_token_ids"] = list(self.end_tokens)
            if settings.stop:
                body["stop"] = list(settings.stop)
        for sample in range(settings.n):
            seed = request_seed(settings.seed, key, sample)
            yield _Asked(number, sample, tokens, body | {"seed": seed})

    def _text(self, tokens: Int32[np.ndarray, "L"], number: int) -> str:
        """A prompt for a server that takes only text, which puts a BOS before it, if it has one."""
        ids = tokens.tolist()
        if self._adds_bos and ids[0] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        text = decode(self.tokenizer, ids)
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            raise UserError(
                f"prompt {number}: {self.kind.name} takes only text, and these tokens are not "
                "those of a text; give messages, or use vLLM, SGLang or llama.cpp"
            )
        return text

    def _answer(self, one: _Asked) -> dict[str, Any]:
        return self._server.post("/v1/completions", one.body, f"prompt {one.prompt}")

    def _completion(
        self, one: _Asked, reply: dict[str, Any], settings: SamplingSettings
    ) -> Completion:
        """The sample in a reply, of which nothing is taken on trust.

        Raises:
          UserError: it is not what was asked for.
        """
        where = f"prompt {one.prompt}: the reply of {self._server.url}"
        choice = one_choice(reply, where)
        read = field_of(field_of(reply, "usage", dict, where), "prompt_tokens", int, where)
        if read != len(one.tokens):
            raise UserError(
                f"{where}: it read the prompt as {read} tokens, and here it has {len(one.tokens)}: "
                "the tokenizer is not the server's, or the server puts one more BOS before a prompt"
            )
        text, why = field_of(choice, "text", str, where), choice.get("finish_reason")
        if why not in ("stop", "length"):
            raise UserError(f"{where}: 'finish_reason' is {why!r}, expected 'stop' or 'length'")
        if self.kind.own_ids:
            tokens = self._own_tokens(choice, text, where)
        else:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if why == "stop":  # no text was given that could have stopped it
                tokens = [*tokens, self._end_token()]
        if not tokens:
            raise UserError(f"{where}: there is no token in it")
        said = tokens[:-1] if tokens[-1] in self.end_tokens else tokens
        stopped = find_stop(self.tokenizer, said, 0, settings.stop)
        if self.kind.own_ids:
            self._check_end(tokens, one.body["max_tokens"], where)
        logs = self._log_probabilities(choice, tokens, settings.temperature, where)
        done = make_completion(self.tokenizer, tokens, logs, self.end_tokens, stopped)
        if why == "stop" and done.reason == "length":
            last = f"{tokens[-1]} ({self.tokenizer.convert_ids_to_tokens(tokens[-1])!r})"
            raise UserError(
                f"{where}: it ended with token {last}, which is no end token here (those are "
                f"{listed(map(str, self.end_tokens))}), and with no stop text; as tokenizer, name "
                "the directory that has the server's generation_config.json"
            )
        return done

    def _own_tokens(self, choice: dict[str, Any], text: str, where: str) -> list[int]:
        """The tokens that the server sampled; its text must be theirs by our tokenizer too."""
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(
                f"{where}: 'token_ids' is {shortened(repr(tokens))}, expected the numbers of the "
                f"tokens: this version of {self.kind.name} may be too old to give them; update it"
            )
        if not all(0 <= token < self._vocabulary for token in tokens):
            raise UserError(
                f"{where}: a token beyond the tokenizer's {self._vocabulary}: the tokenizer is not "
                "the server's"
            )
        ours = decode(self.tokenizer, tokens)
        if not visible(ours).startswith(visible(text)):
            raise UserError(
                f"{where}: the server reads its tokens as {shortened(text)!r}, the tokenizer as "
                f"{shortened(ours)!r}: the tokenizer is not the server's"
            )
        return tokens

    def _end_token(self) -> int:
        """The end token of a sample whose server does not say which it was."""
        own = self.tokenizer.eos_token_id
        return own if own in self.end_tokens else self.end_tokens[0]

    def _check_end(self, tokens: list[int], most: int, where: str) -> None:
        """Raises a `UserError` unless a sample ends at its end token, and where it was told to."""
        if len(tokens) > most:
            raise UserError(f"{where}: {len(tokens)} tokens, and {most} were asked for at most")
        early = [token for token in tokens[:-1] if token in self.end_tokens]
        if early:
            raise UserError(
                f"{where}: it goes on after token {early[0]}, which ends a sample here (end tokens "
                f"are {listed(map(str, self.end_tokens))}); the server must not ignore end tokens"
            )

    def _log_probabilities(
        self, choice: dict[str, Any], tokens: list[int], temperature: float, where: str
    ) -> list[float]:
        """Those of the tokens; NaN for all where the server's are not theirs, one for one."""
        values = named_log_probabilities(choice.get("logprobs"), self.tokenizer, tokens)
        if self.kind.own_ids and values is None:
            values = numbers_of(choice.get("logprobs"), "token_logprobs", len(tokens))
        if values is None or (self.kind.tempered and temperature not in (0.0, 1.0)):
            return [math.nan] * len(tokens)
        if max(values) > _ROUNDED:
            raise UserError(f"{where}: a log-probability of {max(values)}, which is more than 0")
        return values


def open_server(
    url: str,
    *,
    tokenizer: str | Path,
    model_name: str = "",
    chat_template: str = "",
    api_key: str | None = None,
    timeout: float = 600.0,
    retries: int = 6,
    concurrency: int = 64,
) -> ServerEngine:
    """Opens a model on a server that has OpenAI's `/v1/completions`.

    Args:
      url: of the server, such as `http://localhost:8000`.
      tokenizer: the model's: a directory, a GGUF file, or a hub id.
      model_name: the server's name for the model; may be left out if it has one.
      chat_template: which of the tokenizer's named templates to use; empty for its default.
      api_key: is taken from the environment variable OPENAI_API_KEY if not given.
      timeout: seconds in which a sample must be there.
      retries: how often a request that fails is made again.
      concurrency: requests that are under way at once.

    Raises:
      UserError: there is no such server, model or tokenizer, or the key is refused.
    """
    if concurrency < 1 or retries < 0 or timeout <= 0:
        raise UserError("concurrency must be 1 or more, retries 0 or more, timeout more than 0")
    if not tokenizer:
        raise UserError(
            f"{url}: which tokenizer? Name the directory or hub id of the server's model "
            "(--tokenizer, or tokenizer): prompts are written here"
        )
    key = os.environ.get(_KEY, "") if api_key is None else api_key
    server = JsonServer(url, key, timeout, retries, concurrency)
    card = _pick(cards := _cards(server), model_name, server.url)
    files = local_path(str(tokenizer))
    loaded = load_tokenizer(files, chat_template=chat_template)
    return _engine(server, card, cards, loaded, end_tokens(files, loaded), concurrency)


def open_policy_server(url: str, tokenizer: Tokenizer, ends: Sequence[int]) -> ServerEngine:
    """Opens the only model on a server, which is sent the weights of a policy that is trained.

    Args:
      url: of the server.
      tokenizer: the policy's.
      ends: tokens that end a sample.

    Raises:
      UserError: there is no such server, or it cannot be told to load weights.
    """
    key, concurrency = os.environ.get(_KEY, ""), 64
    server = JsonServer(url, key, timeout=600.0, retries=6, connections=concurrency)
    card = _pick(cards := _cards(server), "", server.url)
    engine = _engine(server, card, cards, tokenizer, ends, concurrency)
    if engine.kind.load_weights is None:
        able = " and ".join(kind.name for kind in KINDS.values() if kind.load_weights)
        raise UserError(
            f"{url}: {engine.kind.name} cannot be told to load other weights; {able} can"
        )
    return engine


def _engine(
    server: JsonServer,
    card: dict[str, Any],
    cards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    ends: Sequence[int],
    concurrency: int,
) -> ServerEngine:
    kind = KINDS.get(str(card.get("owned_by")), OTHER)
    return ServerEngine(
        server, card["id"], kind, _context(card, cards), tokenizer, ends, concurrency
    )


def request_seed(seed: int, key: int, sample: int) -> int:
    """The seed of a sample's request, from 0 to 2^31 - 1: two samples do not share their noise."""
    return xxhash.xxh32_intdigest(f"{seed} {key} {sample}".encode()) >> 1


def _cards(server: JsonServer) -> list[dict[str, Any]]:
    """What the server says of its models."""
    cards = server.get("/v1/models", "the models").get("data")
    if not isinstance(cards, list) or not all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
    ):
        raise UserError(f"{server.url}/v1/models: field 'data' is no list of models with an 'id'")
    return cards


def _pick(cards: list[dict[str, Any]], name: str, url: str) -> dict[str, Any]:
    named = [card for card in cards if card["id"] == name] if name else cards
    if len(named) == 1:
        return named[0]
    there = listed(card["id"] for card in cards) or "none"
    if name:
        raise UserError(
            f"{url}: there is no model {name!r} (--model-name, or model_name); there are: {there}"
        )
    raise UserError(
        f"{url}: which model? Say it with --model-name, or model_name; there are: {there}"
    )


def _context(card: dict[str, Any], cards: list[dict[str, Any]]) -> int | None:
    """The length of a model's context; an adapter has that of its model."""
    parent = [other for other in cards if other["id"] == card.get("parent")]
    for one in (card, *parent):
        length = one.get("max_model_len")
        if type(length) is int and length > 0:
            return length
    return None


def _digest(tokenizer: Tokenizer, ends: Sequence[int]) -> str:
    parts = (sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tuple(ends))
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())
