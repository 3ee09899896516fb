"""A loaded reward model: `rm.score(messages)`, `rm.compare(prompt, a, b)`, `rm.score_many(...)`."""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int64
from rich.progress import track

from rmjax.data.batch import Batch
from rmjax.data.batches import Batches
from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import (
    Conversation,
    PromptError,
    parse_conversation,
    parse_response,
)
from rmjax.data.prefix_groups import prefix_groups
from rmjax.data.tokenized import in_memory
from rmjax.data.tokenizer import Tokenizer, encode, truncate_left
from rmjax.errors import UserError
from rmjax.inference.batching import ScoringShapes
from rmjax.inference.encoded import Encoded
from rmjax.inference.score_step import make_score, score_batch, score_batches
from rmjax.inference.scores import Comparison, Score, Work
from rmjax.models.heads import LanguageModelHead
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.models.parts import computed_places
from rmjax.models.rewards.aggregation import Rule
from rmjax.models.rewards.spec import RewardSpec

_BAR_FROM = 8  # batches from which on there is a progress bar


class Scorer:
    """A loaded reward model; make one with `rmjax.load`.

    Or a language model, whose only attribute is the log-probability of the response.

    Attributes:
      state: changes when a file of the model does.
      name: what it was loaded by.
      work: what has been computed so far.
      encoder: makes tokens, and knows what the chat template does not show.
      progress: whether many batches show a bar.
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
        name: str = "",
    ):
        self.model, self.params, self.tokenizer, self.spec = model, params, tokenizer, spec
        self.rule, self.over_long, self.share_prompts = rule, over_long, share_prompts
        self.max_length = spec.max_length or model.config.max_position_embeddings
        self.state, self.name, self.work = state, name, Work()
        self.encoder = ChatEncoder(tokenizer, spec.suffix_turn)
        self.progress = True
        self._warned: set[str] = set()
        self._score_rows = make_score(model)
        self._shapes = ScoringShapes(model, self.max_length)

    def __repr__(self) -> str:
        mesh = self.model.options.sharding.mesh
        assert isinstance(mesh, Mesh)  # loaded weights are somewhere
        kind = next(iter(mesh.devices.flat)).device_kind
        axes = "".join(f", {name}:{size}" for name, size in mesh.shape.items() if size > 1)
        return (
            f"Scorer({self.name and f'{self.name}: '}{', '.join(self.attributes)}; "
            f"value: {self.rule.name}; up to {self.max_length:,} tokens; "
            f"{mesh.size} x {kind}{axes})"
        )

    @property
    def is_language_model(self) -> bool:
        """Whether the score is the log-probability of a response."""
        return isinstance(self.model.head, LanguageModelHead)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.spec.attributes

    def limit(self, max_length: int) -> None:
        """Takes conversations of at most so many tokens from now on; 0 leaves it as it is.

        Raises:
          UserError: the model was not made for so many.
        """
        context = self.model.config.max_position_embeddings
        if not 0 <= max_length <= context:
            raise UserError(
                f"--max-length={max_length}: the model was made for up to {context} tokens "
                "(max_position_embeddings)"
            )
        if max_length:
            self.max_length = max_length
            self._shapes = ScoringShapes(self.model, max_length)

    def compile_shapes(self) -> list[int]:
        """Compiles every program that may be needed, and no other one from then on.

        Returns:
          The lengths of rows, in token positions.
        """
        every = self._shapes.settle(self.is_language_model)
        for batches in every:
            score_batch(self._score_rows, self.params, batches[0], self.model.options.sharding)
        return [batches[0].rows.tokens.shape[-1] for batches in every]

    def score(self, conversation: Any) -> Score:
        """Scores a conversation that ends with the assistant's response.

        Args:
          conversation: messages, or a mapping of `messages`, `system` and `tools`.

        Raises:
          UserError: it is none, or is too long.
        """
        return self.score_many([conversation])[0]

    def compare(self, prompt: Any, a: Any, b: Any) -> Comparison:
        """Scores two responses to one prompt.

        Args:
          prompt: a text (HelpSteer2's and hh-rlhf's marks of turns are understood), messages, or a
            mapping of `messages` and `tools`.
          a: one response: a text, a message, or the messages that follow the prompt.
          b: the other.

        Raises:
          UserError: they are no conversations, or are too long.
        """
        conversations = []
        for name, response in (("a", a), ("b", b)):
            try:
                conversations.append(parse_response(prompt, response))
            except ValueError as error:
                wrong = "the prompt" if isinstance(error, PromptError) else f"response {name}"
                raise UserError(f"{wrong} {error}") from error
        first, second = self._score(conversations, ("response a", "response b"))
        scores = np.asarray([list(score.attributes.values()) for score in (first, second)])
        values = self.rule.values(scores)
        temperature = self.spec.temperature
        if temperature and temperature.rule != self.rule.name:
            temperature = None
        return Comparison(first, second, float(values[0] - values[1]), temperature)

    def score_many(self, conversations: Iterable[Any]) -> list[Score]:
        """Scores conversations, in their order.

        What conversations begin with is computed once for as many of them as fit in a row.

        Args:
          conversations: see `score`.

        Raises:
          UserError: one of them is no conversation, or is too long; it says which.
        """
        if not isinstance(conversations, Iterable) or isinstance(conversations, str | Mapping):
            raise UserError(
                f"score_many takes a list of conversations, found {type(conversations).__name__}"
            )
        conversations = list(conversations)
        parsed, names = [], [f"conversation {number}" for number in range(len(conversations))]
        for name, value in zip(names, conversations):
            try:
                parsed.append(parse_conversation(value))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        return self._score(parsed, names)

    def _score(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Score]:
        encoded = []
        for name, conversation in zip(names, conversations):
            if conversation.is_empty:
                raise UserError(f"{name}: the response is empty")
            encoded.append(self.encode(conversation, name))
            if not self.encoder.shows_response(conversation):
                raise UserError(f"{name}: the chat template shows nothing of the response")
        for what in sorted(set(self.encoder.unread) - self._warned):
            warnings.warn(f"the chat template does not show {what}", stacklevel=3)
        self._warned.update(self.encoder.unread)
        return self.score_encoded(encoded)

    def encode(self, conversation: Conversation, where: str, cut_to: int | None = None) -> Encoded:
        """The tokens of a conversation, cut on the left if they are too many and may be.

        Args:
          conversation: any; an empty response too.
          where: what messages call it.
          cut_to: most tokens, whose first ones are cut; None for the scorer's `over_long`.

        Raises:
          UserError: the template refuses it, or it is too long.
        """
        spoken = None
        if self.is_language_model:
            tokens, spoken = self.encoder.encode_spoken(conversation, where)
        else:
            tokens = self.encoder.encode(conversation, where)
        return self._fitted(tokens, spoken, where, cut_to)

    def encode_tokens(
        self, tokens: Sequence[int], where: str, cut_to: int | None = None
    ) -> Encoded:
        """Tokens of the model's own tokenizer, of a whole conversation, with one BOS before them.

        Args:
          tokens: at least one.
          where: what messages call them.
          cut_to: see `encode`.

        Raises:
          UserError: see `encode`; one of them is none of the model's, or the model is a language
            model, which must be told which of them are the response, or asks something after it.
        """
        if self.encoder.suffix_turn:
            raise UserError(
                f"{where}: the model asks {self.encoder.suffix_turn!r} after the response, and "
                "token ids do not say where that ends; send messages"
            )
        if self.is_language_model:
            raise UserError(
                f"{where}: a language model scores a response, and token ids do not say where it "
                "begins; send messages"
            )
        ids, size = np.asarray(tokens), self.model.config.vocab_size
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= size:
            raise UserError(f"{where}: expected token ids from 0 to {size - 1}")
        if self._begins_with_bos:
            bos = self.tokenizer.bos_token_id
            bare = np.argmax(ids != bos) if (ids != bos).any() else len(ids)
            ids = np.concatenate([[bos], ids[bare:]])
        return self._fitted(ids.astype(np.int32), None, where, cut_to)

    @functools.cached_property
    def _begins_with_bos(self) -> bool:
        """Whether conversations do."""
        said = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        return int(encode(self.tokenizer, Conversation(said))[0]) == self.tokenizer.bos_token_id

    def encode_sampled(self, prompt: Conversation, token_ids: Sequence[int], where: str) -> Encoded:
        """A prompt and the tokens that a language model said, as they are.

        A text that is made tokens again need not give the tokens that were sampled.

        Args:
          prompt: a conversation that lacks its response.
          token_ids: of the response, at least one.
          where: what messages call it.

        Raises:
          UserError: see `encode`; or a token is none of the model's.
        """
        asked, said = self.encoder.encode(prompt, where, asking=True), np.asarray(token_ids)
        size = self.model.config.vocab_size
        whole = np.issubdtype(said.dtype, np.integer) and said.ndim == 1
        if not whole or not len(said) or said.min() < 0 or said.max() >= size:
            raise UserError(
                f"{where}: its token_ids are no list of tokens of this model, whole numbers from 0 "
                f"to {size - 1}; they are read because the model is a language model, which may be "
                "another one than sampled: leave the column out to have the texts read"
            )
        tokens = np.concatenate([asked, said.astype(np.int32)])
        return self._fitted(tokens, np.arange(len(tokens)) >= len(asked), where)

    def _fitted(
        self,
        tokens: np.ndarray,
        spoken: Bool[np.ndarray, "L"] | None,
        where: str,
        cut_to: int | None = None,
    ) -> Encoded:
        length, most = len(tokens), cut_to or self.max_length
        if length > most:
            if self.over_long != "truncate_left" and not cut_to:
                raise UserError(
                    f"{where}: {length} tokens, the model was trained with up to "
                    f"{self.max_length}; shorten it, or load with over_long='truncate_left'"
                )
            tokens = truncate_left(tokens, most, self.tokenizer.bos_token_id)
            if spoken is not None:
                if spoken.sum() + 2 > most:
                    raise UserError(
                        f"{where}: its response has {spoken.sum()} tokens, and {most} "
                        "hold it together with its prompt; shorten it"
                    )
                spoken = spoken[-len(tokens) :]
        config = self.model.config
        if config.rope.type == "dynamic" and len(tokens) > config.max_position_embeddings:
            raise UserError(
                f"{where}: {len(tokens)} tokens, and RoPE of the type 'dynamic' is computed up to "
                f"max_position_embeddings = {config.max_position_embeddings} here; shorten it"
            )
        return Encoded(tokens, length - len(tokens), where, spoken)

    def score_encoded(self, encoded: Sequence[Encoded]) -> list[Score]:
        """Scores what `encode` returned, in its order.

        Raises:
          UserError: a score is not finite; it says whose.
        """
        if not encoded:
            return []
        # Equal conversations are computed once, so that their scores are equal to the last bit.
        number_of: dict[tuple[bytes, bytes], int] = {}
        same = [number_of.setdefault(e.identity, len(number_of)) for e in encoded]
        first = np.unique(same, return_index=True)[1]
        scores = self._compute([encoded[i] for i in first])[same]
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(bad):
            raise UserError(
                f"{encoded[bad[0]].where}: its scores are {scores[bad[0]].tolist()}; the weights "
                f"are damaged, or {self.model.options.dtype} is too small for them"
            )
        scores = self.spec.read(scores)
        values = self.rule.values(scores[:, None, :])[:, 0]  # of each by itself
        return [
            Score(
                dict(zip(self.attributes, map(float, row))),
                float(value),
                self.rule.name,
                len(e.tokens),
                e.cut,
            )
            for row, value, e in zip(scores, values, encoded)
        ]

    def _plan(self, encoded: Sequence[Encoded]) -> tuple[list[Batches], Int64[np.ndarray, "N"]]:
        """Batches that hold each once, and which of `encoded` each of their samples is."""
        tokens, spoken = [e.tokens for e in encoded], [e.spoken for e in encoded]
        groups = prefix_groups(tokens) if self.share_prompts else [[i] for i in range(len(tokens))]
        group_of = {i: number for number, group in enumerate(groups) for i in group}
        numbers = [group_of[i] for i in range(len(tokens))]
        said = [s for s in spoken if s is not None] if self.is_language_model else None
        data, order = in_memory(tokens, numbers, said)
        return self._shapes.batches(data, self.share_prompts), order

    def _compute(self, encoded: Sequence[Encoded]) -> Float32[np.ndarray, "N A"]:
        """Scores of token sequences, all different."""
        tokens = [e.tokens for e in encoded]
        self.work.conversations += len(tokens)
        self.work.tokens += sum(map(len, tokens))
        scores = np.empty((len(tokens), len(self.attributes)), np.float32)
        planned, order = self._plan(encoded)
        steps = sum(map(len, planned))
        for samples, values in track(
            score_batches(
                self._score_rows,
                self.params,
                (self._counted(batches[n]) for batches in planned for n in range(len(batches))),
                self.model.options.sharding,
            ),
            description="scoring",
            total=steps,
            disable=not self.progress or steps < _BAR_FROM or jax.process_index() != 0,
            transient=True,
        ):
            scores[order[samples]] = values
        return scores

    def _counted(self, batch: Batch) -> Batch:
        ids = np.asarray(batch.rows.segment_ids[0])
        self.work.computed += int((ids > 0).sum())
        self.work.padded_tokens += computed_places(ids, self.model.options.parts)
        return batch
