"""The Python API: `policy = rmjax.load_policy(path)`, `policy.sample(prompts, n=4)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.generation.completions import (
    Completion,
    Prompt,
    SamplingSettings,
    check_keys,
)
from rmjax.generation.prompts import prompt_tokens
from rmjax.generation.sampler import Sampler
from rmjax.generation.schedule import Request
from rmjax.generation.stopping import find_stop, make_completion
from rmjax.models.attention.dispatch import ATTENTION, choose
from rmjax.models.heads import LanguageModelHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

ROWS = 64  # samples that are made at once
_BAR_FROM = 256  # samples from which on there is a progress bar


class Policy:
    """A loaded language model, which is an `Engine`; make one with `rmjax.load_policy`.

    Attributes:
      params: the model's; other ones of the same shapes may take their place.
      end_tokens: that end a sample.
      state: changes when a file of the model does.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        end_tokens: Sequence[int],
        rows: int = ROWS,
        state: str = "",
        usual: Sequence[int] = (),
    ):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.end_tokens, self.state = tuple(end_tokens), state
        self._sampler = Sampler(model, rows, usual)

    def __repr__(self) -> str:
        return f"Policy({self.model.config.num_hidden_layers} layers, {self.context} tokens)"

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.model.config.max_position_embeddings

    def sample(
        self, prompts: Sequence[Prompt], *, keys: Sequence[int] | None = None, **settings: Any
    ) -> list[list[Completion]]:
        """The samples of each prompt; `settings` are the fields of `SamplingSettings`.

        The same seed gives the same samples, whatever else is asked in the same call, in whatever
        order, on whatever mesh, as far as rounding allows; see `Engine` for `keys`.

        Raises:
          UserError: a setting is out of its range, or a prompt is none or too long.
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
        if not isinstance(prompts, Sequence):
            raise UserError(f"prompts: expected a list, found {type(prompts).__name__}")
        requests = [
            self._request(prompt, number, key, settings)
            for number, (prompt, key) in enumerate(zip(prompts, check_keys(keys, len(prompts))))
        ]
        found: list[list[Completion | None]] = [[None] * settings.n for _ in requests]
        stopped: dict[tuple[int, int], tuple[int, str]] = {}

        def is_over(number: int, sample: int, tokens: Sequence[int], checked: int) -> bool:
            """Whether one of the settings' texts ends the sample."""
            said = tokens[:-1] if tokens[-1] in self.end_tokens else tokens
            stop = find_stop(self.tokenizer, said, checked, settings.stop)
            if stop:
                stopped[number, sample] = stop
            return stop is not None

        total = settings.n * len(requests)
        for done in track(
            self._sampler.samples(self.params, requests, settings, self.end_tokens, is_over),
            description="sampling",
            total=total,
            disable=total < _BAR_FROM or jax.process_index() != 0,
            transient=True,
        ):
            number, sample = done.resident.request.number, done.sample
            found[number][sample] = make_completion(
                self.tokenizer,
                done.tokens,
                done.log_probabilities,
                self.end_tokens,
                stopped.get((number, sample)),
            )
        return found  # pyright: ignore[reportReturnType]

    def _request(
        self, prompt: Prompt, number: int, key: int, settings: SamplingSettings
    ) -> Request:
        tokens = prompt_tokens(self.tokenizer, prompt, number, self.model.config.vocab_size)
        room = self.context - len(tokens)
        if room < 1:
            raise UserError(
                f"prompt {number}: {len(tokens)} tokens, and the model's context has "
                f"{self.context}, prompt and answer together; shorten it"
            )
        waiting = list(reversed(range(settings.n)))
        return Request(number, key, tokens, min(settings.max_tokens, room), waiting)


def load_policy(
    path: str | Path,
    *,
    mesh: MeshConfig | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    rows: int = ROWS,
    chat_template: str = "",
) -> Policy:
    """Loads a language model to sample from.

    Args:
      path: a Hugging Face directory or hub id of a language model, a GGUF file, a run or a
        converted Orbax model of a language model.
      mesh: how to lay the model over the devices; fully sharded over all of them if not given.
      dtype: of the computation; `auto` is bfloat16 on accelerators, float32 on CPUs.
      attention: its implementation for prompts: one of `ATTENTION`; `auto` chooses by device.
      rows: samples that are made at once; more are faster and take more memory.
      chat_template: which of the tokenizer's named templates to use; empty for its default.

    Raises:
      UserError: there is no such model, it has no language-model head, or a file is missing.
    """
    for name, given, choices in (
        ("dtype", dtype, ("auto", "float32", "bfloat16")),
        ("attention", attention, ATTENTION),
    ):
        if given not in choices:
            raise UserError(f"{name} = {given!r}: there are {', '.join(choices)}")
    source = open_pretrained(str(path), chat_template)
    if not isinstance(source.head, LanguageModelHead):
        raise UserError(
            f"{path}: a reward model, which has no language-model head and cannot write; name the "
            "language model that it was made from, or another"
        )
    computed: Any = compute_dtype(dtype)
    sharding = Sharding(make_mesh(mesh or MeshConfig(), jax.devices()))
    kernel = choose(attention, source.decoder, sharding, computed)
    options = ModelOptions(sharding, dtype=computed, attention=kernel)
    model = Model(source.decoder, options, source.head)
    params = load_params(source, model, seed=0, dtype=computed)
    tokenizer = source.tokenizer()
    ends = end_tokens(source.files, tokenizer)
    return Policy(model, params, tokenizer, ends, rows, source.state())
