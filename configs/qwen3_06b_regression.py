"""Qwen3-0.6B learns HelpSteer2's five attributes by regression.

    python -m rmjax.train --config=configs/qwen3_06b_regression.py

Hardware: parameters, AdamW's moments and gradients are 9.5 GB in float32; one GPU, or a patient
laptop.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import qwen3_06b


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/qwen3_06b_regression",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=2048,
        ),
        init="Qwen/Qwen3-0.6B",
        model=qwen3_06b(),
        batch_size=64,
        epochs=2,
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=20),
        eval_every=100,
        checkpoint_every=100,
    )
