"""Llama-3.1-8B-Instruct learns helpfulness alone by regression: stage one of two.

    python -m rmjax.train --config=configs/llama8b_helpfulness.py

The twin of `llama70b_helpfulness`, with the hardware and the learning rate of `llama8b_regression`.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_8b


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama8b_helpfulness",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            attributes=("helpfulness",),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-8B-Instruct",
        model=llama31_8b(),
        batch_size=128,
        steps=317,
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=10),
        eval_every=50,
        checkpoint_every=50,
    )
