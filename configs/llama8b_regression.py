"""Llama-3.1-8B-Instruct learns HelpSteer2's five attributes by regression.

    python -m rmjax.train --config=configs/llama8b_regression.py

Hardware: parameters, AdamW's moments and gradients are 128 GB in float32, sharded over all devices:
for example 8 H100, or 16 v5e. Compiled for them, see docs/scaling.md; not run by us. The recipe is
the 70B one with the larger learning rate that a smaller model takes.
"""

from rmjax.config import Config, DataConfig, EveryConfig
from rmjax.llama import LlamaConfig, Rope
from rmjax.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama8b_regression",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-8B-Instruct",
        model=LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope=Rope(
                theta=500000.0,
                type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        batch_size=128,
        steps=317,
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=10),
        eval=EveryConfig(50),
        checkpoint=EveryConfig(50),
    )
