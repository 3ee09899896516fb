"""Llama-3.1-8B-Instruct learns to say what a file of conversations says.

    python -m rmjax.train --config=configs/llama8b_sft.py --config.data.train=FILE

The twin of `llama70b_sft`, with the hardware and the learning rate of `llama8b_regression`.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_8b


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama8b_sft",
        data=DataConfig(
            train="conversations.jsonl",
            hold_out=0.02,
            attributes=(),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-8B-Instruct",
        model=llama31_8b(),
        objective="sft",
        batch_size=128,
        epochs=1,
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=10),
        eval_every=100,
        checkpoint_every=100,
    )
