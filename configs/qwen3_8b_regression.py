"""Qwen3-8B learns HelpSteer2's five attributes by regression.

    python -m rmjax.train --config=configs/qwen3_8b_regression.py

Hardware: parameters, AdamW's moments and gradients are 131 GB in float32, sharded over all devices:
for example 8 H100, or 16 v5e. Compiled for them, see docs/scaling.md; not run by us. The recipe is
that of `llama8b_regression`.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import qwen3_8b


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/qwen3_8b_regression",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=4096,
        ),
        init="Qwen/Qwen3-8B",
        model=qwen3_8b(),
        batch_size=128,
        steps=317,
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=10),
        eval_every=50,
        checkpoint_every=50,
    )
