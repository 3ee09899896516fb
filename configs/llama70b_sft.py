"""Llama-3.1-70B-Instruct learns to say what a file of conversations says.

    python -m rmjax.train --config=configs/llama70b_sft.py --config.data.train=FILE

FILE has rows with `messages`, or with `prompt` and `response`. The last turn of each is learned:
the loss is the mean of -log P over its tokens. A fiftieth of the prompts is held out.

Recipe (arXiv 2406.08673, of its policies): constant 2e-6; 128 responses a step, as for its 2,400
steps of OASST. Its 1,600 steps of Daring Anteater had 384: `--config.batch_size=384
--config.epochs=0 --config.steps=1600`. Compiled for 64 chips, see docs/scaling.md; not run by us.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_70b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama70b_sft",
        data=DataConfig(
            train="conversations.jsonl",
            hold_out=0.02,
            attributes=(),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-70B-Instruct",
        model=llama31_70b(),
        objective="sft",
        batch_size=128,
        epochs=1,
        remat="dots",
        mesh=MeshConfig(fsdp=-1, context=2, tensor=2),
        optimizer=OptimizerConfig(
            learning_rate=2e-6, warmup_steps=10, b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0
        ),
        eval_every=100,
        checkpoint_every=100,
    )
