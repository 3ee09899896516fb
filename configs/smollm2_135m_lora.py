"""SmolLM2-135M-Instruct learns ratings by LoRA: adapters of rank 16, weights frozen.

On HelpSteer2, model and data from the hub:

    python -m rmjax.train --config=configs/smollm2_135m_lora.py

On the dialogue replies of configs/smollm2_135m_regression.py, with local files:

    python -m rmjax.train --config=configs/smollm2_135m_lora.py:dialogues \
        --config.init=SmolLM2-135M-Instruct.Q4_1.gguf \
        --config.data.train=topical_chat_ratings.jsonl

Then the whole model, or the adapters and the head for PEFT:

    python -m rmjax.convert orbax-to-hf runs/smollm2_135m_lora smollm2-rm
    python -m rmjax.convert orbax-to-peft runs/smollm2_135m_lora smollm2-rm-adapter

The rates are not tuned. docs/lora.md says what is computed.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.errors import UserError
from rmjax.models.lora import LoraConfig
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    config = Config(
        workdir="runs/smollm2_135m_lora",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=2048,
        ),
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        model=smollm2_135m(),
        lora=LoraConfig(rank=16, alpha=32.0),
        batch_size=64,
        epochs=2,
        remat="full",
        optimizer=OptimizerConfig(
            learning_rate=5e-4, schedule="cosine", warmup_steps=20, weight_decay=0.0
        ),
        eval_every=100,
        checkpoint_every=100,
    )
    if arg == "dialogues":
        config.workdir += "_dialogues"
        config.data = DataConfig(
            train="topical_chat_ratings.jsonl",
            hold_out=0.2,
            attributes=(
                "naturalness",
                "coherence",
                "engagingness",
                "groundedness",
                "understandability",
            ),
            label_range=(0.0, 3.0),
            max_length=1056,
        )
        config.batch_size, config.epochs = 24, 3
        config.optimizer.warmup_steps = 5
        config.rows_per_device = 2  # 24 replies fill two rows: with more room few places are empty
        config.eval_every = config.checkpoint_every = 12
    elif arg:
        raise UserError(f"smollm2_135m_lora.py:{arg}: there is only :dialogues")
    return config
