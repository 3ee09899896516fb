"""SmolLM2-135M-Instruct, a real and small Llama, learns real ratings; a laptop is enough.

On HelpSteer2, model and data from the hub:

    python -m rmjax.train --config=configs/smollm2_135m_regression.py

On ratings of dialogue replies (USR's annotations of Topical-Chat as UniEval distributes them: five
attributes, six replies to each of 60 dialogues), with local files:

    python -m rmjax.train --config=configs/smollm2_135m_regression.py:dialogues \
        --config.init=SmolLM2-135M-Instruct.Q4_1.gguf \
        --config.data.train=topical_chat_ratings.jsonl

docs/benchmarks.md has the table, the time and the machine of the second. A fifth of the dialogues
is held out, by dialogue.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.errors import UserError
from rmjax.models.presets import smollm2_135m


def get_config(arg: str | None = None) -> Config:
    config = Config(
        workdir="runs/smollm2_135m_regression",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=2048,
        ),
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        model=smollm2_135m(),
        batch_size=64,
        epochs=2,
        remat="dots",
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="cosine", warmup_steps=20),
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
        config.optimizer = OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=5)
        config.rows_per_device = 2  # 24 replies fill two rows: with more room few places are empty
        config.eval_every = config.checkpoint_every = 12
    elif arg:
        raise UserError(f"smollm2_135m_regression.py:{arg}: there is only :dialogues")
    return config
