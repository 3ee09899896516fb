"""`config.json` of every family: as published, as transformers reads it, and what is refused."""

import dataclasses
import json
from typing import Any

import pytest
import transformers

from helpers.families import FAMILY_MODELS
from helpers.models import tiny_llama
from rmjax.errors import UserError
from rmjax.models import presets
from rmjax.models.decoder_config import FULL, SLIDING, Rope
from rmjax.models.families import FAMILIES
from rmjax.models.heads import language_model_head, model_parameters, model_sizes
from rmjax.models.hf_config import check_expressible, config_from_hf, config_to_hf

# Fields that change the numbers, as their makers published them, in transformers 4's spelling.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": dict(
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=128,
        hidden_act="silu",
        hidden_size=1024,
        initializer_range=0.02,
        intermediate_size=3072,
        max_position_embeddings=40960,
        max_window_layers=28,
        model_type="qwen3",
        num_attention_heads=16,
        num_hidden_layers=28,
        num_key_value_heads=8,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "Qwen2.5-7B-Instruct": dict(
        architectures=["Qwen2ForCausalLM"],
        attention_dropout=0.0,
        hidden_act="silu",
        hidden_size=3584,
        initializer_range=0.02,
        intermediate_size=18944,
        max_position_embeddings=32768,
        max_window_layers=28,
        model_type="qwen2",
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=131072,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=152064,
    ),
    "Mistral-7B-v0.1": dict(
        architectures=["MistralForCausalLM"],
        hidden_act="silu",
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=14336,
        max_position_embeddings=32768,
        model_type="mistral",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "gemma-2-9b-it": dict(
        architectures=["Gemma2ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=3584,
        initializer_range=0.02,
        intermediate_size=14336,
        max_position_embeddings=8192,
        model_type="gemma2",
        num_attention_heads=16,
        num_hidden_layers=42,
        num_key_value_heads=8,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
        sliding_window=4096,
        sliding_window_size=4096,
        vocab_size=256000,
    ),
    "gemma-3-1b-it": dict(
        architectures=["Gemma3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=1152,
        initializer_range=0.02,
        intermediate_size=6912,
        max_position_embeddings=32768,
        model_type="gemma3_text",
        num_attention_heads=4,
        num_hidden_layers=26,
        num_key_value_heads=1,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
        vocab_size=262144,
    ),
}


def theirs_of(raw: dict[str, Any]) -> Any:
    fields = {k: v for k, v in raw.items() if k != "model_type"}
    return transformers.CONFIG_MAPPING[raw["model_type"]](**fields)


def same_as_transformers(ours, theirs: Any) -> None:
    """What transformers fills in for what a file leaves out is what is filled in here."""
    for field in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field), field
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == width
    assert ours.hidden_act == getattr(theirs, FAMILIES[ours.family].activation)
    for field in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        assert getattr(ours, field) == getattr(theirs, field, None), field
    window = theirs.sliding_window
    types = getattr(theirs, "layer_types", None) or [SLIDING if window else FULL] * 99
    assert ours.windows == tuple(
        window if name == SLIDING else None for name in types[: ours.num_hidden_layers]
    )
    ropes: Any = theirs.rope_parameters
    both = [ropes[FULL], ropes[SLIDING]] if FULL in ropes else [ropes]
    for rope, found in zip((ours.rope, ours.rope_local), both):
        assert (rope.theta, rope.type) == (found["rope_theta"], found["rope_type"])
    assert (ours.rope_local is None) == (len(both) == 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_as_transformers_reads_them(name):
    ours = config_from_hf(PUBLISHED[name], "config.json")
    same_as_transformers(ours, theirs_of(PUBLISHED[name]))
    check_expressible(ours, name)


# Gemma's eps and numbers of key heads are asked for here whatever transformers' default is.
LEFT_OUT = ("head_dim", "sliding_window", "max_window_layers", "query_pre_attn_scalar")
LEFT_OUT += ("attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "rope_theta")
LEFT_OUT += ("sliding_window_pattern", "rope_local_base_freq", "tie_word_embeddings", "hidden_act")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_file_leaves_out_is_what_transformers_takes(name):
    raw = {k: v for k, v in PUBLISHED[name].items() if k not in LEFT_OUT}
    same_as_transformers(config_from_hf(raw, "config.json"), theirs_of(raw))


def test_presets_are_what_was_published():
    assert config_from_hf(PUBLISHED["Qwen3-0.6B"], "") == presets.qwen3_06b()
    assert config_from_hf(PUBLISHED["gemma-3-1b-it"], "") == presets.gemma3_1b()


@pytest.mark.parametrize(
    ("name", "numbers"),
    [  # of parameters: the totals of the published safetensors files
        ("qwen3_06b", 596_049_920),
        ("qwen3_17b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_14b", 14_768_307_200),
        ("qwen3_32b", 32_762_123_264),
        ("gemma3_1b", 999_885_952),
        ("gemma3_4b", 3_880_263_168),
        ("gemma3_12b", 11_766_034_176),
        ("gemma3_27b", 27_009_346_304),
    ],
)
def test_presets_have_as_many_numbers(name, numbers):
    config = getattr(presets, name)()
    head = language_model_head(config)
    sizes, found = model_sizes(config, head), 0
    for row in model_parameters(config, head):
        size = 1
        for axis in row.all_axes:
            size *= sizes[axis]
        found += size
    assert found == numbers
    check_expressible(config, name)


@pytest.mark.parametrize("spelling", ["both", "4", "5"])
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_round_trip(name, spelling):
    raw = json.loads(json.dumps(config_to_hf(FAMILY_MODELS[name])))
    old = ("rope_scaling", "rope_theta", "rope_local_base_freq")
    for field in {"both": (), "4": ("rope_parameters",), "5": old}[spelling]:
        raw.pop(field, None)
    assert config_from_hf(raw, "config.json") == FAMILY_MODELS[name]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_what_transformers_writes_is_read(name, tmp_path):
    raw = config_to_hf(FAMILY_MODELS[name])
    theirs_of(raw).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert config_from_hf(written, "config.json") == FAMILY_MODELS[name]


def test_layers_that_are_all_alike_have_no_types():
    qwen = PUBLISHED["Qwen3-0.6B"] | dict(use_sliding_window=True, sliding_window=64)
    assert config_from_hf(qwen | {"max_window_layers": 0}, "").layer_types == ()
    assert config_from_hf(qwen, "").sliding_window is None  # no layer is above the 28th
    gemma = PUBLISHED["gemma-3-1b-it"] | {"layer_types": [FULL] * 26}
    config = config_from_hf(gemma, "")
    assert (config.sliding_window, config.layer_types) == (None, ())
    check_expressible(config, "")
    some = config_from_hf(qwen | {"max_window_layers": 26}, "")
    assert some.windows == (None,) * 26 + (64, 64) and len(some.kinds) == 2


REFUSED = [
    ("Qwen3-0.6B", "model_type", dict(model_type="qwen3_moe")),
    ("gemma-3-1b-it", "model_type", dict(model_type="gemma3")),
    ("Qwen3-0.6B", "architectures", dict(architectures=["Qwen2ForCausalLM"])),
    ("Qwen3-0.6B", "hidden_act", dict(hidden_act="relu")),
    ("Qwen3-0.6B", "num_key_value_heads", dict(num_key_value_heads=0)),
    ("Qwen3-0.6B", "rope_scaling.rope_type", dict(rope_scaling={"rope_type": "yarn", "factor": 4})),
    ("Qwen3-0.6B", "sliding_window", dict(use_sliding_window=True, sliding_window=0)),
    (
        "Qwen3-0.6B",
        "max_window_layers",
        dict(use_sliding_window=True, sliding_window=8) | {"max_window_layers": "x"},
    ),
    ("Qwen3-0.6B", "layer_types", dict(layer_types=[SLIDING] * 28)),
    ("Qwen3-0.6B", "layer_types", dict(layer_types=[FULL] * 27)),
    ("Qwen3-0.6B", "layer_types", dict(layer_types=["linear_attention"] * 28)),
    ("Qwen3-0.6B", "mlp_bias", dict(mlp_bias=True)),
    ("Qwen2.5-7B-Instruct", "attention_bias", dict(attention_bias=True)),
    ("Qwen2.5-7B-Instruct", "dual_chunk_attention_config", dict(dual_chunk_attention_config={})),
    ("Mistral-7B-v0.1", "sliding_window", dict(sliding_window=-1)),
    ("Mistral-7B-v0.1", "sliding_window", dict(sliding_window=4096.0)),
    ("Mistral-7B-v0.1", "attention_bias", dict(attention_bias=True)),
    ("Mistral-7B-v0.1", "layer_types", dict(layer_types=[SLIDING])),
    ("Mistral-7B-v0.1", "layer_types", dict(layer_types=[FULL] * 32)),
    ("Mistral-7B-v0.1", "is_causal", dict(is_causal=False)),
    ("gemma-2-9b-it", "attn_logit_softcapping", dict(attn_logit_softcapping=0)),
    ("gemma-2-9b-it", "query_pre_attn_scalar", dict(query_pre_attn_scalar="256")),
    ("gemma-2-9b-it", "hidden_activation", dict(hidden_activation="gelu")),
    ("gemma-3-1b-it", "attn_logit_softcapping", dict(attn_logit_softcapping=50.0)),
    ("gemma-3-1b-it", "use_bidirectional_attention", dict(use_bidirectional_attention=True)),
    ("gemma-3-1b-it", "sliding_window_pattern", dict(sliding_window_pattern=0)),
    ("gemma-3-1b-it", "rope_parameters.local", dict(rope_parameters={"local": {}})),
    ("gemma-3-1b-it", "rope_local_base_freq", dict(rope_local_base_freq="many")),
    (
        "gemma-3-1b-it",
        "rope_parameters.sliding_attention.rope_type",
        dict(rope_parameters={SLIDING: {"rope_type": "linear", "factor": 2.0}}),
    ),
    (
        "gemma-3-1b-it",
        "rope_theta",
        dict(rope_parameters={FULL: {"rope_type": "default", "rope_theta": 5.0}}),
    ),
]


@pytest.mark.parametrize(("name", "field", "changes"), REFUSED)
def test_what_would_change_the_numbers_is_refused_by_name(name, field, changes):
    with pytest.raises(UserError, match=f"models/config.json: .*'{field}'"):
        config_from_hf(PUBLISHED[name] | changes, "models/config.json")


def test_key_heads_are_asked_for():
    raw = {k: v for k, v in PUBLISHED["Qwen3-0.6B"].items() if k != "num_key_value_heads"}
    with pytest.raises(UserError, match="'num_key_value_heads' is missing"):
        config_from_hf(raw, "config.json")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(family="qwen4"), "family"),
        (dict(sliding_window=8), "sliding_window"),
        (dict(family="qwen2", attention_bias=True), "attention_bias"),
        (dict(family="qwen3", mlp_bias=True), "mlp_bias"),
        (dict(family="qwen3", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (dict(family="qwen3", sliding_window=8, layer_types=(FULL,)), "layer_types"),
        (dict(family="gemma2"), "query_pre_attn_scalar"),
        (dict(family="llama", rope_local=Rope()), "rope_local|rope_parameters"),
    ],
    ids=str,
)
def test_a_config_that_no_file_can_say_is_an_error(changes, field):
    with pytest.raises(UserError, match=f"'({field})"):
        check_expressible(dataclasses.replace(tiny_llama(), **changes), "config.model")
