"""Reward heads that a causal model brings along: rows of its `lm_head`, or a value head.

All are a linear function of the last hidden state, so each becomes a reward head.

- Logits of tokens, weighted. NVIDIA's Llama-3.1-Nemotron-70B-Reward-HF and its kin: the reward is
  the logit of token 0 after the conversation, `{"reward": {"0": 1}}`. NVIDIA's
  Llama-3.3-Nemotron-70B-Reward-Principle: the logit of "Yes" less that of "No" where the answer to
  a question about the response would begin, `{"Yes": 1, "No": -1}` with the question as the
  suffix turn.
- A value head, see `value_head.py`.

    D embed, A attribute
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from rmjax.checkpoints.hf_weights import HeadedWeights, Weights, check_tensors
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.checkpoints.value_head import VALUE_HEAD_KEYS, read_value_head
from rmjax.checkpoints.weight_files import VALUE_HEAD
from rmjax.data.tokenizer import Tokenizer, check_text
from rmjax.errors import UserError, listed, shortened
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import language_model_head
from rmjax.models.parameters import DECODER, LM_HEAD
from rmjax.models.rewards.spec import RewardSpec, check_names, is_weight
from rmjax.runtime.json_object import parse_object

FROM_VALUE_HEAD = "value_head"
_FORMS = (
    f"expected {FROM_VALUE_HEAD!r}, tokens with weights as in "
    '{"Yes": 1, "No": -1}, or such tokens by output as in {"reward": {"0": 1}}'
)
HeadChoice = str | Mapping[str, Any]  # see `with_head`


def parse_head(text: str) -> HeadChoice:
    """`--head`: `value_head`, or JSON; see `with_head`.

    Raises:
      UserError: broken JSON, or an output or a token that is there twice.
    """
    if not text.lstrip().startswith("{"):
        return text
    return parse_object(text, f"--head={shortened(text, 200)}")


def with_head(
    source: Pretrained, head: HeadChoice | None = None, suffix_turn: str = ""
) -> tuple[Pretrained, str]:
    """A causal model with the reward head that it brings along.

    Args:
      source: as opened. With neither `head` nor `suffix_turn` it stays what it is.
      head: `value_head`; or tokens with the weights of their logits, of an output that is then
        called `reward`; or a mapping from outputs to such tokens. A token is named by its id in
        decimal digits, or by a text that is one token.
      suffix_turn: what a user asks after the response; the reward is read where the answer would
        begin. Of a model that has one already, another one in its place.

    Returns:
      The model, and where its head is from.

    Raises:
      UserError: the model has another head or lacks this one, or a token is not in its
        vocabulary.
    """
    if suffix_turn:
        check_text(suffix_turn, "suffix_turn (--suffix-turn)")
    if head is None:
        return (_with_suffix(source, suffix_turn) if suffix_turn else source), "head kept"
    if source.spec:
        raise UserError(
            f"{source.name}: a reward model, which keeps its head and the names of its outputs "
            f"({', '.join(source.spec.attributes)}); leave out head (--head)"
        )
    if isinstance(source.weights, Path):
        raise UserError(
            f"{source.name}: head (--head) reads a Hugging Face directory or a GGUF file, and this "
            "is an Orbax model or a run; make a directory of it with `python -m rmjax.convert "
            "orbax-to-hf`"
        )
    if head == FROM_VALUE_HEAD:
        spec, weight, origin = _value_head(source)
    elif isinstance(head, Mapping):
        spec, weight, origin = _token_heads(source, head)
    else:
        raise UserError(f"head {head!r}: {_FORMS}")
    if suffix_turn:
        spec = dataclasses.replace(spec, suffix_turn=suffix_turn)
        origin += f", after the question {suffix_turn!r}"
    weights = HeadedWeights(source.weights, weight)
    return dataclasses.replace(source, spec=spec, weights=weights, variant=origin), origin


def _with_suffix(source: Pretrained, suffix_turn: str) -> Pretrained:
    """A model that asks a question, with another question."""
    if source.spec is None or not source.spec.suffix_turn:
        raise UserError(
            f"{source.name}: suffix_turn (--suffix-turn) is of models that answer a question about "
            "the response, and this one does not; of a causal model say with head (--head) which "
            "tokens are the answer"
        )
    spec = dataclasses.replace(source.spec, suffix_turn=suffix_turn)
    return dataclasses.replace(source, spec=spec, variant=f"after the question {suffix_turn!r}")


_Head = tuple[RewardSpec, Float32[np.ndarray, "D A"], str]


def _value_head(source: Pretrained) -> _Head:
    assert not isinstance(source.weights, Path)
    if not source.value_head:
        raise UserError(
            f"{source.name}: no value head here. Looked for {VALUE_HEAD} and, among the model's "
            f"tensors, {VALUE_HEAD_KEYS[0]!r}; files of the hub that are pickles are not downloaded"
        )
    found = read_value_head(source.value_head, source.weights, source.decoder)
    offset = {"reward": found.bias} if found.bias else None
    spec = RewardSpec(("reward",), {"reward": 1.0}, offset=offset)
    return spec, found.weight, f"value head, bias {found.bias:g}"


def _token_heads(source: Pretrained, head: Mapping[str, Any]) -> _Head:
    """Weighted sums of `lm_head`'s rows, one an output."""
    assert not isinstance(source.weights, Path)
    nested = [isinstance(tokens, Mapping) for tokens in head.values()]
    if not head or (any(nested) and not all(nested)):
        raise UserError(f"head {dict(head)!r}: {_FORMS}")
    outputs = [
        (str(output), [(str(key), weight) for key, weight in tokens.items()])
        for output, tokens in (head if nested[0] else {"reward": head}).items()
    ]
    check_names([output for output, _ in outputs], "head")
    named = any(not _is_id(key) for _, tokens in outputs for key, _ in tokens)
    tokenizer = source.tokenizer() if named else None
    columns, said = [], []
    for output, tokens in outputs:
        where = f"head {shortened(output)!r}"
        weights = [_weight(key, weight, where) for key, weight in tokens]
        ids = {
            _token(key, where, tokenizer, source.decoder): weight
            for (key, _), weight in zip(tokens, weights)
        }
        if len(ids) < len(tokens):
            names = ", ".join(key for key, _ in tokens)
            raise UserError(f"{where}: two of {names} are the same token")
        if not any(weights):
            raise UserError(f"{where}: expected tokens, and a weight that is not 0")
        columns.append(token_head(source.weights, source.decoder, ids))
        if not np.isfinite(columns[-1]).all():
            raise UserError(f"{where}: weights so large that the head is not finite in float32")
        terms = [
            f"{weight:+g} * logit of token {token}{f' ({key})' if key != str(token) else ''}"
            for (key, _), (token, weight) in zip(tokens, ids.items())
        ]
        said.append(f"{output} = {' '.join(terms)}")
    names = tuple(output for output, _ in outputs)
    spec = RewardSpec(names, {names[0]: 1.0})
    return spec, np.stack(columns, axis=1), "; ".join(said)


def _weight(token: str, weight: Any, where: str) -> float:
    if not is_weight(weight):
        said = shortened(repr(weight))
        raise UserError(f"{where}: the weight of {shortened(token)!r} is {said}, not a number")
    return float(weight)


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal()


def _token(key: str, where: str, tokenizer: Tokenizer, decoder: DecoderConfig) -> int:
    """The id of a token that is named by its id or its text."""
    token = int(key.lstrip("0")[:20] or 0) if _is_id(key) else None
    if token is None:
        check_text(key, where)
        ids = tokenizer(key, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                f"{where}: {shortened(key)!r} is not one token of the vocabulary but {len(ids)} "
                f"({listed(map(str, ids)) or 'none'}); name a text that is one token, or an id"
            )
        token = ids[0]
    if not token < decoder.vocab_size:
        raise UserError(
            f"{where}: token {token} is not there; the model's tokens are 0 to "
            f"{decoder.vocab_size - 1}"
        )
    return token


def token_head(
    weights: Weights, decoder: DecoderConfig, tokens: Mapping[int, float]
) -> Float32[np.ndarray, "D"]:
    """The weights of the last hidden state that give a weighted sum of tokens' logits.

    Raises:
      UserError: there is no language-model head, or its logits are no sums of hidden states.
    """
    if decoder.final_logit_softcapping is not None:
        raise UserError(
            f"{weights.where}: field 'final_logit_softcapping' is "
            f"{decoder.final_logit_softcapping:g}: the logits of tokens are capped, so that no "
            "reward head gives them"
        )
    check_tensors(weights, decoder, language_model_head(decoder))
    row = DECODER[0] if decoder.tie_word_embeddings else LM_HEAD
    rows = [
        weight * weights.read(row.hf_key, [slice(token, token + 1)])[0].astype(np.float64)
        for token, weight in tokens.items()
    ]
    return np.sum(rows, axis=0).astype(np.float32)
