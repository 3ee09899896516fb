"""Llama-3.1-8B-Instruct learns what HelpSteer2 rates as more helpful by DPO.

    python -m rmjax.train --config=configs/llama8b_dpo.py

The twin of `llama70b_dpo`, with the larger learning rate that a smaller model takes, in the
proportion of `llama8b_regression`, and that one's hardware.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig, PreferenceConfig
from rmjax.models.presets import llama31_8b


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama8b_dpo",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            compare="helpfulness",
            attributes=(),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-8B-Instruct",
        model=llama31_8b(),
        objective="dpo",
        preference=PreferenceConfig(beta=1e-3),
        batch_size=256,
        epochs=7,
        optimizer=OptimizerConfig(learning_rate=5e-7, warmup_steps=10),
        eval_every=20,
        checkpoint_every=20,
    )
