"""SmolLM2-135M-Instruct learns helpfulness alone by regression: stage one of two, on a laptop.

    python -m rmjax.train --config=configs/smollm2_135m_helpfulness.py

The twin of `llama70b_helpfulness`. `--config.data.train=FILE` and `--config.data.attributes` take
other ratings.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/smollm2_135m_helpfulness",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            attributes=("helpfulness",),
            max_length=2048,
        ),
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        model=smollm2_135m(),
        batch_size=128,
        epochs=1,
        remat="dots",
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_steps=10),
        eval_every=50,
        checkpoint_every=50,
    )
