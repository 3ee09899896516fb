"""`rmjax.load`: a model's files to a `Scorer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rmjax.checkpoints.causal_heads import HeadChoice, with_head
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.errors import UserError
from rmjax.inference.scorer import Scorer
from rmjax.models.attention.dispatch import ATTENTION, choose
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.models.quantization import check_quantize, quantize_params
from rmjax.models.rewards.aggregation import model_rule
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LOG_PROBABILITY = "log_probability"  # the rule of a language model
_OVER_LONG = ("error", "truncate_left")
_DTYPES = ("auto", "float32", "bfloat16")


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
    head: HeadChoice | None = None,
    suffix_turn: str = "",
) -> Scorer:
    """Loads a reward model for scoring.

    Args:
      path: a run (its best checkpoint), a converted Orbax model, a Hugging Face directory or hub
        id of a classification model of a known family, or with `head` of a causal model.
      value: how attributes become the scalar `value`: an attribute, the name of a published
        vector (`rmjax.PUBLISHED`), or weights by attribute. The model's own rule if not given. Of a
        language model `log_probability`, that of the response, is the only attribute.
      mesh: how to lay the model over the devices; fully sharded over all of them if not given.
      dtype: of the computation; `auto` is bfloat16 on accelerators, float32 on CPUs.
      over_long: `error`, or `truncate_left` to cut conversations that are too long.
      attention: its implementation: one of `ATTENTION`; `auto` chooses by device.
      share_prompts: whether the prefix that responses to a prompt share is computed once.
      quantize: `int8` or `fp8` keeps the layers' weights and computes the products with them in
        8 bits, where the device can; elsewhere the same scores take longer, and a warning says so.
        Scores differ from the unquantized ones, a small model's by much: see docs/score.md.
      chat_template: which of the tokenizer's named templates to use; empty for its default.
      head: where a causal model's reward is: `value_head`, or the tokens whose logits it is, as in
        `{"Yes": 1, "No": -1}`; see `causal_heads.with_head`.
      suffix_turn: what a user asks after the response, where the reward is read in the answer.

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
    source, _ = with_head(open_pretrained(str(path), chat_template), head, suffix_turn)
    language_model = value == LOG_PROBABILITY and source.spec is None
    spec = RewardSpec((LOG_PROBABILITY,), {}) if language_model else source.reward_spec()
    computed: Any = compute_dtype(dtype)
    sharding = Sharding(make_mesh(mesh or MeshConfig(), jax.devices()))
    check_quantize(quantize, sharding)
    kernel = choose(attention, source.decoder, sharding, computed)
    parts = kernel == "cpu_flash" and sharding.mesh.size == 1
    options = ModelOptions(sharding, dtype=computed, attention=kernel, parts=parts)
    model = Model(source.decoder, options, source.head)
    rule = model_rule(spec, value)
    tokenizer = source.tokenizer()  # whose template is tried before there are weights in memory
    params = load_params(source, model, seed=0, dtype=computed)
    if quantize:
        params = quantize_params(params, sharding, quantize)
    return Scorer(
        model,
        params,
        tokenizer,
        spec,
        rule,
        over_long,
        share_prompts,
        source.state(),
        source.name,
    )
