"""A small Llama with random weights learns to write like the quickstart's generated responses.

    python -m rmjax.train --config=configs/quickstart_sft.py

It becomes the policy that configs/quickstart_dpo.py improves; see docs/alignment.md. The ratings
are not used.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import quickstart


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/quickstart_sft",
        data=DataConfig(
            train="generated:3000",
            validation="generated:400",
            attributes=(),
            max_length=256,
        ),
        tokenizer="bytes",
        model=quickstart(),
        objective="sft",
        batch_size=32,
        epochs=1,
        rows_per_device=10,
        remat="none",
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="cosine", warmup_steps=20, clip_norm=1.0
        ),
        eval_every=100,
        checkpoint_every=100,
    )
