"""Llama-3.1-70B-Instruct learns helpfulness alone by regression: stage one of two.

    python -m rmjax.train --config=configs/llama70b_helpfulness.py

Recipe (arXiv 2410.01257): as `llama70b_regression`, with one attribute. Stage two is
`llama70b_scaled_bt`. Published for it: RewardBench 93.0 overall, 97.2 chat, 84.2 chat-hard, 94.6
safety, 95.8 reasoning. Compiled for 64 chips, see docs/scaling.md; not run by us.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.presets import llama31_70b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama70b_helpfulness",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            attributes=("helpfulness",),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-70B-Instruct",
        model=llama31_70b(),
        batch_size=128,
        steps=317,
        remat="dots",
        mesh=MeshConfig(fsdp=-1, context=2, tensor=2),
        optimizer=OptimizerConfig(
            learning_rate=2e-6, warmup_steps=10, b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0
        ),
        eval_every=20,
        checkpoint_every=20,
    )
