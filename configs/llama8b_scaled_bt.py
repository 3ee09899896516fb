"""Llama-3.1-8B learns HelpSteer2-Preference by scaled Bradley-Terry: stage two of two.

    python -m rmjax.train --config=configs/llama8b_scaled_bt.py

The twin of `llama70b_scaled_bt`: half of stage one's learning rate, its head kept.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_8b


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama8b_scaled_bt",
        data=DataConfig(
            train="nvidia/HelpSteer2/preference",
            validation="nvidia/HelpSteer2/preference",
            attributes=("helpfulness",),
            max_length=4096,
        ),
        init="runs/llama8b_helpfulness",
        model=llama31_8b(),
        objective="scaled_bradley_terry",
        batch_size=128,
        epochs=1,
        optimizer=OptimizerConfig(learning_rate=2.5e-6, warmup_steps=10),
        eval_every=20,
        checkpoint_every=20,
    )
