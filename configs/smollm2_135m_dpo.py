"""SmolLM2-135M-Instruct learns from preference pairs by DPO; a laptop is enough.

    python -m rmjax.train --config=configs/smollm2_135m_dpo.py --config.data.train=FILE

FILE has pairs, as for smollm2_135m_bradley_terry. The reference is the model itself before the
first step; what it says of each response is computed once. `--config.init=runs/smollm2_135m_sft`
begins with what smollm2_135m_sft has learned. A tenth of the prompts is held out.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig, PreferenceConfig
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/smollm2_135m_dpo",
        data=DataConfig(
            train="harmless-base/train.jsonl.gz",
            hold_out=0.1,
            attributes=(),
            max_length=1024,
        ),
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        model=smollm2_135m(),
        objective="dpo",
        preference=PreferenceConfig(beta=0.1),
        batch_size=128,
        epochs=1,
        remat="dots",
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup_steps=10),
        eval_every=100,
        checkpoint_every=100,
    )
