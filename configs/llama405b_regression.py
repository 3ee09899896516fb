"""Llama-3.1-405B-Instruct learns HelpSteer2's five attributes by regression.

    python -m rmjax.compile_check --config=configs/llama405b_regression.py --topology=v5p:4x4x8
    python -m rmjax.train --config=configs/llama405b_regression.py

The recipe is that of the 70B config with a smaller learning rate. For planning only, since there
are no weights of it, `configs/llama405b_regression.py:340b` is the shape of Nemotron-4-340B (arXiv
2406.11704: 96 layers of 18,432 with 96 heads), with as many parameters in the gated MLP of a Llama
as it has in its own.

Hardware: float32 weights, moments and gradients are 6.5 TB, so 128 chips of 95 GB (v5p). Compiled
for them, see docs/scaling.md; not run by us.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.presets import llama31_405b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> Config:
    if arg not in (None, "", "340b"):
        raise ValueError(f"this config is plain or :340b, not :{arg}")
    config = Config(
        workdir="runs/llama405b_regression",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-405B-Instruct",
        model=llama31_405b(),
        batch_size=128,
        steps=317,
        mesh=MeshConfig(fsdp=-1, tensor=8),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            schedule="constant",
            warmup_steps=10,
            b1=0.9,
            b2=0.98,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        eval_every=20,
        checkpoint_every=20,
    )
    if arg == "340b":
        config.workdir, config.init, config.tokenizer = "runs/340b_shape", "", "bytes"
        config.model = DecoderConfig(
            vocab_size=256000,
            hidden_size=18432,
            intermediate_size=49152,
            num_hidden_layers=96,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=192,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        )
    return config
