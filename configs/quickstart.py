"""A small Llama with random weights learns five attributes of generated text.

    python -m rmjax.train --config=configs/quickstart.py

The data are generated (rmjax/data/generated.py): sentences whose attributes follow from the text by
simple rules. Nothing is downloaded. The code is that of the 70B config.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import quickstart


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/quickstart",
        data=DataConfig(
            train="generated:6000",
            validation="generated:400",
            max_length=256,
        ),
        tokenizer="bytes",
        model=quickstart(),
        batch_size=32,
        epochs=1,
        rows_per_device=10,
        remat="none",
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="cosine", warmup_steps=20, clip_norm=1.0
        ),
        eval_every=100,
        checkpoint_every=100,
    )
