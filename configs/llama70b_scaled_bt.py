"""Llama-3.1-70B learns HelpSteer2-Preference by scaled Bradley-Terry: stage two of two.

    python -m rmjax.train --config=configs/llama70b_scaled_bt.py

Recipe (arXiv 2410.01257): from stage one, `llama70b_helpfulness`, with its head kept; constant 1e-6
after 10 warm-up steps, 64 pairs a step, one epoch (105 steps of the paper's 6,766 pairs), ties left
out. Published for it: RewardBench 93.7 overall, 98.0 chat, 85.7 chat-hard, 94.3 safety, 96.7
reasoning; `python -m rmjax.extrapolate` takes it from there to 94.1. The other two forms are
`--config.objective=bradley_terry` (92.7) and `margin_bradley_terry` (93.0), each with a workdir of
its own. Compiled for 64 chips, see docs/scaling.md; not run by us.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_70b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama70b_scaled_bt",
        data=DataConfig(
            train="nvidia/HelpSteer2/preference",
            validation="nvidia/HelpSteer2/preference",
            attributes=("helpfulness",),
            max_length=4096,
        ),
        init="runs/llama70b_helpfulness",
        model=llama31_70b(),
        objective="scaled_bradley_terry",
        batch_size=128,
        epochs=1,
        remat="dots",
        mesh=MeshConfig(fsdp=-1, context=2, tensor=2),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, warmup_steps=10, b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0
        ),
        eval_every=20,
        checkpoint_every=20,
    )
