import json
from typing import Any

import pytest
import transformers

from helpers.models import ROPES, tiny_llama
from rmjax.errors import UserError
from rmjax.models.decoder_config import DecoderConfig, Rope
from rmjax.models.hf_config import config_from_hf, config_to_hf

# As Meta published it, in the spelling of transformers 4.
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_1_ROPE = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def read(**changes) -> DecoderConfig:
    return config_from_hf(LLAMA_3_1 | changes, "config.json")


def without(*fields):
    return {k: v for k, v in LLAMA_3_1.items() if k not in fields}


def test_transformers_4_spelling():
    assert read() == DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=LLAMA_3_1_ROPE,
    )


def test_transformers_5_spelling_says_the_same():
    raw = without("rope_scaling", "rope_theta", "torch_dtype")
    raw["rope_parameters"] = LLAMA_3_1["rope_scaling"] | {"rope_theta": 500000.0}
    raw |= {"dtype": "bfloat16", "head_dim": 128}
    assert config_from_hf(raw, "config.json") == read()


@pytest.mark.parametrize("kind", ROPES)
def test_what_transformers_writes_is_read(kind, tmp_path):
    rope = ROPES[kind]
    decoder = tiny_llama(rope=rope, max_position_embeddings=64)
    ours = config_to_hf(decoder)
    config = transformers.LlamaConfig(
        **{k: v for k, v in ours.items() if k not in ("rope_scaling", "rope_theta")}
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert config_from_hf(written, "config.json") == decoder


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("spelling", ["both", "4", "5"])
def test_round_trip(kind, spelling):
    decoder = tiny_llama(
        rope=ROPES[kind],
        head_dim=16,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-6,
    )
    raw = json.loads(json.dumps(config_to_hf(decoder)))
    for field in {"both": (), "4": ("rope_parameters",), "5": ("rope_scaling", "rope_theta")}[
        spelling
    ]:
        del raw[field]
    assert config_from_hf(raw, "config.json") == decoder


@pytest.mark.parametrize("kind", ROPES)
def test_transformers_reads_ours_to_the_same_rope(kind):
    rope = ROPES[kind]
    config = transformers.LlamaConfig.from_dict(config_to_hf(tiny_llama(rope=rope)))
    found: Any = config.rope_parameters
    assert found["rope_theta"] == rope.theta
    assert found["rope_type"] == rope.type
    if rope.type != "default":
        assert found["factor"] == rope.factor


def test_old_configs_leave_things_out():
    """Llama 1 and 2: as many key heads as heads, no head_dim, no base, `type` for `rope_type`."""
    raw = without("num_key_value_heads", "rope_theta", "rope_scaling", "initializer_range")
    decoder = config_from_hf(raw | {"rope_scaling": None}, "config.json")
    assert (decoder.num_key_value_heads, decoder.head_dim) == (32, 128)
    assert decoder.rope == Rope(theta=10000.0)
    assert decoder.initializer_range == 0.02
    assert config_from_hf(raw | {"head_dim": None, "num_key_value_heads": None}, "") == decoder
    linear = config_from_hf(raw | {"rope_scaling": {"type": "linear", "factor": 2}}, "")
    assert linear.rope == Rope(type="linear", factor=2.0)


REFUSED = {
    "model_type": dict(model_type="mixtral"),
    "hidden_act": dict(hidden_act="gelu"),
    "sliding_window": dict(sliding_window=4096),
    "use_sliding_window": dict(use_sliding_window=True),
    "attention_dropout": dict(attention_dropout=0.1),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
    "quantization_config": dict(quantization_config={"quant_method": "gptq"}),
    "architectures": dict(architectures=["MistralForCausalLM"]),
    "layer_types": dict(layer_types=["full_attention", "sliding_attention"]),
    "rope_scaling.rope_type": dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
    "rope_parameters.rope_type": dict(
        rope_scaling=None, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}
    ),
    "rope_scaling": dict(rope_scaling="linear"),
    "rope_scaling.factor": dict(rope_scaling={"rope_type": "linear"}),
    "rope_scaling.low_freq_factor": dict(
        rope_scaling=LLAMA_3_1["rope_scaling"] | {"low_freq_factor": None}
    ),
    "rope_scaling.high_freq_factor": dict(
        rope_scaling=LLAMA_3_1["rope_scaling"] | {"high_freq_factor": 1.0}
    ),
    "rope_scaling.original_max_position_embeddings": dict(
        rope_scaling=LLAMA_3_1["rope_scaling"] | {"original_max_position_embeddings": "8192"}
    ),
    "rope_scaling.partial_rotary_factor": dict(
        rope_scaling=LLAMA_3_1["rope_scaling"] | {"partial_rotary_factor": 0.5}
    ),
    "rope_parameters.full_attention": dict(
        rope_scaling=None, rope_parameters={"full_attention": {"rope_type": "default"}}
    ),
    "rope_theta": dict(rope_theta="many"),
    "num_attention_heads": dict(num_attention_heads=0),
    "num_key_value_heads": dict(num_key_value_heads=5),
    "hidden_size": dict(hidden_size=4100),
    "head_dim": dict(head_dim=127),
    "vocab_size": dict(vocab_size=128256.0),
    "num_hidden_layers": dict(num_hidden_layers=True),
    "rms_norm_eps": dict(rms_norm_eps="1e-5"),
    "initializer_range": dict(initializer_range="small"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_change_the_numbers_is_refused_by_name(field):
    with pytest.raises(UserError, match=f"models/config.json: .*'{field}'"):
        config_from_hf(LLAMA_3_1 | REFUSED[field], "models/config.json")


@pytest.mark.parametrize("value", ["8", -8, 0, 8.0, True])
def test_key_heads_are_a_positive_integer(value):
    with pytest.raises(UserError, match="'num_key_value_heads'"):
        read(num_key_value_heads=value)


def test_two_bases_that_differ_are_refused():
    with pytest.raises(UserError, match="'rope_theta'"):
        read(rope_scaling=LLAMA_3_1["rope_scaling"] | {"rope_theta": 10000.0})


def test_rope_scaling_wins_as_in_transformers():
    raw = LLAMA_3_1 | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    theirs: Any = transformers.LlamaConfig.from_dict(raw).rope_parameters
    assert theirs["rope_type"] == "llama3"
    assert config_from_hf(raw, "config.json").rope == LLAMA_3_1_ROPE


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_a_missing_field_is_named(field):
    with pytest.raises(UserError, match=f"config.json: field '{field}' is missing"):
        config_from_hf(without(field), "config.json")


@pytest.mark.parametrize(
    "field",
    [
        dict(sliding_window=None),
        dict(use_sliding_window=False),
        dict(attention_dropout=0),
        dict(partial_rotary_factor=1.0),
        dict(quantization_config=None),
        dict(layer_types=["full_attention"] * 32),
        dict(architectures=["LlamaForSequenceClassification"]),
        dict(architectures=None),
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(field):
    assert read(**field) == read()
