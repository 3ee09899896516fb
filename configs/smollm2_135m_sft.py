"""SmolLM2-135M-Instruct learns to say what a file of conversations says; a laptop is enough.

    python -m rmjax.train --config=configs/smollm2_135m_sft.py --config.data.train=FILE

FILE has rows with `messages`, or with `prompt` and `response`; ratings are not needed. The last
turn of each is learned: the loss is the mean of -log P over its tokens. A tenth of the prompts is
held out.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/smollm2_135m_sft",
        data=DataConfig(
            train="conversations.jsonl",
            hold_out=0.1,
            attributes=(),
            max_length=2048,
        ),
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        model=smollm2_135m(),
        objective="sft",
        batch_size=64,
        epochs=1,
        remat="dots",
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_steps=10),
        eval_every=100,
        checkpoint_every=100,
    )
