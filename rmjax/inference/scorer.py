"""The Python API: `rm = rmjax.load(path)`, `rm.score(messages)`, `rm.compare(prompt, a, b)`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from rich.progress import track

from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.data.conversation import parse_prompt
from rmjax.data.tokenized import in_memory
from rmjax.data.tokenizer import Message, Tokenizer, encode, truncate_left
from rmjax.errors import UserError
from rmjax.inference.batching import scoring_batches
from rmjax.inference.score_step import make_score, score_batch
from rmjax.inference.scores import Comparison, Score, Work
from rmjax.models.attention.dispatch import ATTENTION, choose
from rmjax.models.heads import RewardHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.models.parameters import Params
from rmjax.models.quantization import check_quantize, quantize_params
from rmjax.models.rewards.aggregation import Rule, model_rule
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

_OVER_LONG = ("error", "truncate_left")
_DTYPES = ("auto", "float32", "bfloat16")
_BAR_FROM = 8  # batches from which on there is a progress bar


class Scorer:
    """A loaded reward model; make one with `rmjax.load`.

    Attributes:
      state: changes when a file of the model does.
      work: what has been computed so far.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        spec: RewardSpec,
        rule: Rule,
        over_long: str,
        share_prompts: bool = True,
        state: str = "",
    ):
        self.model, self.params, self.tokenizer, self.spec = model, params, tokenizer, spec
        self.rule, self.over_long, self.share_prompts = rule, over_long, share_prompts
        self.max_length = spec.max_length or model.config.max_position_embeddings
        self.state, self.work = state, Work()
        self._score = make_score(model)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.spec.attributes

    def score(self, messages: Sequence[Message]) -> Score:
        """Scores a conversation that ends with the assistant's response.

        Raises:
          UserError: it does not, or is too long.
        """
        return self.score_many([messages])[0]

    def compare(self, prompt: str | Sequence[Message], a: str, b: str) -> Comparison:
        """Scores two responses to one prompt.

        Args:
          prompt: a string (HelpSteer2's turn markers are understood) or messages.
          a: one response.
          b: the other.
        """
        try:
            messages = parse_prompt(list(prompt) if isinstance(prompt, tuple) else prompt)
        except ValueError as error:
            raise UserError(f"the prompt {error}") from error
        first, second = self.score_many(
            [[*messages, {"role": "assistant", "content": text}] for text in (a, b)]
        )
        scores = np.asarray([list(score.attributes.values()) for score in (first, second)])
        values = self.rule.values(scores)
        temperature = self.spec.temperature
        if temperature and temperature.rule != self.rule.name:
            temperature = None
        return Comparison(first, second, float(values[0] - values[1]), temperature)

    def score_many(self, conversations: Sequence[Sequence[Message]]) -> list[Score]:
        """Scores conversations, in their order.

        The prefix that responses to one prompt share is computed once for as many of them as fit
        in a row.

        Raises:
          UserError: one of them is not a conversation, or too long; it says which.
        """
        if not conversations:
            return []
        tokens, cuts = zip(*(self._encode(c, number) for number, c in enumerate(conversations)))
        prompts = [json.dumps([(m["role"], m["content"]) for m in c[:-1]]) for c in conversations]
        # Equal conversations are computed once, so that their scores are equal to the last bit.
        number_of: dict[bytes, int] = {}
        same = [number_of.setdefault(t.tobytes(), len(number_of)) for t in tokens]
        first = np.unique(same, return_index=True)[1]
        scores = self._compute([tokens[i] for i in first], [prompts[i] for i in first])[same]
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(bad):
            raise UserError(
                f"conversation {bad[0]}: its scores are {scores[bad[0]].tolist()}; the weights are "
                f"damaged, or {self.model.options.dtype} is too small for them"
            )
        scores = self.spec.read(scores)
        values = self.rule.values(scores[:, None, :])[:, 0]  # of each by itself
        return [
            Score(
                dict(zip(self.attributes, map(float, row))),
                float(value),
                self.rule.name,
                len(t),
                cut,
            )
            for row, value, t, cut in zip(scores, values, tokens, cuts)
        ]

    def _compute(
        self, tokens: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> Float32[np.ndarray, "N A"]:
        """Scores of token sequences."""
        self.work.conversations += len(tokens)
        self.work.tokens += sum(map(len, tokens))
        data, order = in_memory(tokens, prompts)
        scores = np.empty((len(tokens), len(self.attributes)), np.float32)
        planned = scoring_batches(data, self.model, self.share_prompts)
        steps = [(batches, step) for batches in planned for step in range(len(batches))]
        for batches, step in track(
            steps, description="scoring", disable=len(steps) < _BAR_FROM, transient=True
        ):
            batch = batches[step]
            self.work.computed += int((batch.rows.segment_ids > 0).sum())
            self.work.padded_tokens += batch.rows.segment_ids.size
            samples, values = score_batch(
                self._score, self.params, batch, self.model.options.sharding
            )
            scores[order[samples]] = values
        return scores

    def _encode(self, messages: Sequence[Message], number: int) -> tuple[np.ndarray, int]:
        """The tokens of a conversation, and how many were cut away in front of them."""
        where = f"conversation {number}"
        if not isinstance(messages, list | tuple) or not all(isinstance(m, dict) for m in messages):
            raise UserError(
                f"{where}: expected a list of messages {{'role': ..., 'content': ...}}, found "
                f"{str(messages)[:100]!r}"
            )
        messages = list(messages)
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError(f"{where}: must end with a message of the role 'assistant'")
        try:
            parse_prompt(messages[:-1])
        except ValueError as error:
            raise UserError(f"{where}: the prompt {error}") from error
        response = messages[-1].get("content")
        if not isinstance(response, str) or not response.strip():
            raise UserError(f"{where}: the response is empty")
        try:
            tokens = encode(self.tokenizer, messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        length = len(tokens)
        if len(tokens) > self.max_length:
            if self.over_long != "truncate_left":
                raise UserError(
                    f"{where}: {len(tokens)} tokens, the model was trained with up to "
                    f"{self.max_length}; shorten it, or load with over_long='truncate_left'"
                )
            tokens = truncate_left(tokens, self.max_length, self.tokenizer.bos_token_id)
        config = self.model.config
        if config.rope.type == "dynamic" and len(tokens) > config.max_position_embeddings:
            raise UserError(
                f"{where}: {len(tokens)} tokens, and RoPE of the type 'dynamic' is computed up to "
                f"max_position_embeddings = {config.max_position_embeddings} here; shorten it"
            )
        return tokens, length - len(tokens)


def load(
    path: str | Path,
    *,
    value: str | Mapping[str, float] | None = None,
    mesh: MeshConfig | None = None,
    dtype: str = "auto",
    over_long: str = "error",
    attention: str = "auto",
    share_prompts: bool = True,
    quantize: str = "",
    chat_template: str = "",
) -> Scorer:
    """Loads a reward model for scoring.

    Args:
      path: a run (its best checkpoint), a converted Orbax model, a Hugging Face directory or hub
        id of a `LlamaForSequenceClassification`.
      value: how attributes become the scalar `value`: an attribute, the name of a published
        vector (`rmjax.PUBLISHED`), or weights by attribute. The model's own rule if not given.
      mesh: how to lay the model over the devices; fully sharded over all of them if not given.
      dtype: of the computation; `auto` is bfloat16 on accelerators, float32 on CPUs.
      over_long: `error`, or `truncate_left` to cut conversations that are too long.
      attention: its implementation: one of `ATTENTION`; `auto` chooses by device.
      share_prompts: whether the prefix that responses to a prompt share is computed once.
      quantize: `int8` or `fp8` keeps the layers' weights and computes the products with them in
        8 bits, where the device can; elsewhere the same scores take longer, and a warning says so.
        Scores differ from the unquantized ones, a small model's by much: see docs/score.md.
      chat_template: which of the tokenizer's named templates to use; empty for its default.

    Raises:
      UserError: there is no such model, it has no reward head, or a file is missing.
    """
    for name, given, choices in (
        ("over_long", over_long, _OVER_LONG),
        ("dtype", dtype, _DTYPES),
        ("attention", attention, ATTENTION),
    ):
        if given not in choices:
            raise UserError(f"{name} = {given!r}: there are {', '.join(choices)}")
    source = open_pretrained(str(path), chat_template)
    spec = source.reward_spec()
    computed: Any = compute_dtype(dtype)
    sharding = Sharding(make_mesh(mesh or MeshConfig(), jax.devices()))
    check_quantize(quantize, sharding)
    kernel = choose(attention, source.llama, sharding, computed)
    options = ModelOptions(sharding, dtype=computed, attention=kernel)
    model = Model(source.llama, options, RewardHead(len(spec.attributes)))
    rule = model_rule(spec, value)
    params = load_params(source, model, seed=0, dtype=computed)
    if quantize:
        params = quantize_params(params, sharding, quantize)
    return Scorer(
        model,
        params,
        source.tokenizer(),
        spec,
        rule,
        over_long,
        share_prompts,
        source.state(),
    )
