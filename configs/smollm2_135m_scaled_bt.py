"""SmolLM2-135M learns HelpSteer2-Preference by scaled Bradley-Terry: stage two of two, on a laptop.

    python -m rmjax.train --config=configs/smollm2_135m_scaled_bt.py

The twin of `llama70b_scaled_bt`: from `smollm2_135m_helpfulness`, half of its learning rate, its
head kept. `--config.objective=bradley_terry` needs no strengths, and so takes any pairs.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/smollm2_135m_scaled_bt",
        data=DataConfig(
            train="nvidia/HelpSteer2/preference",
            validation="nvidia/HelpSteer2/preference",
            attributes=("helpfulness",),
            max_length=2048,
        ),
        init="runs/smollm2_135m_helpfulness",
        model=smollm2_135m(),
        objective="scaled_bradley_terry",
        batch_size=128,
        epochs=1,
        remat="dots",
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=10),
        eval_every=20,
        checkpoint_every=20,
    )
