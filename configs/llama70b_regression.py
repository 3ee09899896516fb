"""Llama-3.1-70B-Instruct learns HelpSteer2's five attributes by regression: the papers' recipe.

    python -m rmjax.train --config=configs/llama70b_regression.py

Recipe (arXiv 2406.08673 and 2410.01257): AdamW, constant 2e-6 after 10 warm-up steps, weight decay
0.1, betas 0.9 and 0.98, clipping at 1, 128 responses a step, 2 epochs = 317 steps, samples up to
4,096 tokens, the checkpoint with the lowest validation loss. One difference: the loss is
normalised over the whole batch, not per micro-batch, so it does not depend on the hardware.

Published for it: RewardBench 92.4 overall, 95.0 chat, 85.5 chat-hard, 94.0 safety, 95.1 reasoning.

Hardware: float32 weights, moments and gradients are 1.13 TB, so 64 chips of 95 GB (v5p) or 80 GB
(H100). Compiled for them, see docs/scaling.md; not run by us.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_70b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama70b_regression",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-70B-Instruct",
        model=llama31_70b(),
        batch_size=128,
        steps=317,
        # 128 responses of HelpSteer2, two to a prompt, fill 16 rows: all at once, each on 4 chips.
        remat="dots",
        mesh=MeshConfig(fsdp=-1, context=2, tensor=2),
        optimizer=OptimizerConfig(
            learning_rate=2e-6,
            schedule="constant",
            warmup_steps=10,
            b1=0.9,
            b2=0.98,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        eval_every=20,
        checkpoint_every=20,
    )
