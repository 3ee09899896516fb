"""Llama-3.1-8B-Instruct learns from its own samples what its reward model likes, by REINFORCE.

    python -m rmjax.align --config=configs/llama8b_reinforce.py

The twin of `llama70b_reinforce`, with the larger learning rate that a smaller model takes, in the
proportion of `llama8b_dpo`, and the reward model of `llama8b_scaled_bt`. For 8 GPUs or 16 chips of
v5e (v5e:4x4); compiled for them, see docs/scaling.md; not run by us.
"""

from rmjax.config import (
    AlignConfig,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
)
from rmjax.models.presets import llama31_8b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> AlignConfig:
    return AlignConfig(
        workdir="runs/llama8b_reinforce",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            attributes=(),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-8B-Instruct",
        model=llama31_8b(),
        objective="reinforce",
        rollout=RolloutConfig(
            n=4, max_tokens=2048, rows=64, mesh=MeshConfig(data=-1, fsdp=1, tensor=8)
        ),
        rewards={"teacher": RewardConfig(model="runs/llama8b_scaled_bt")},
        policy_gradient=PolicyGradientConfig(kl=0.01),
        batch_size=64,
        steps=318,
        optimizer=OptimizerConfig(
            learning_rate=1.25e-6, schedule="linear", final_fraction=0.8, warmup_steps=10
        ),
        eval_every=50,
        checkpoint_every=20,
    )
