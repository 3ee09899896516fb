"""SmolLM2-135M-Instruct learns one reward from preference pairs; a laptop is enough.

    python -m rmjax.train --config=configs/smollm2_135m_bradley_terry.py \
        --config.data.train=harmless-base/train.jsonl.gz

The file is hh-rlhf's, whose authors warn of offensive content; any other file of pairs will do:
rows with `prompt`, `chosen` and `rejected`, or whole conversations in `chosen` and `rejected`, as
messages or as hh-rlhf writes them. A tenth of the prompts is held out. The loss is -log sigmoid of
the chosen response's reward less the rejected one's.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/smollm2_135m_bradley_terry",
        data=DataConfig(
            train="harmless-base/train.jsonl.gz",
            hold_out=0.1,
            attributes=("reward",),
            max_length=1024,
        ),
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        model=smollm2_135m(),
        objective="bradley_terry",
        batch_size=128,
        epochs=1,
        remat="dots",
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_steps=10),
        eval_every=100,
        checkpoint_every=100,
    )
