"""Llama-3.1-70B-Instruct learns from its own samples what its reward model likes, by REINFORCE.

    python -m rmjax.align --config=configs/llama70b_reinforce.py

Recipe (arXiv 2410.01257 and its launch script): the reward model of `llama70b_scaled_bt`, 4 samples
of up to 2,048 tokens of each of 16 prompts a step, up to 318 steps, KL .01 in the reward, a rate of
5e-7 that falls to 4e-7. How it falls is not said: here linearly. Published for it: Arena Hard 85.0,
from 55.7. Prompts are those of HelpSteer2.

Weights sample on copies of `tensor` = 8, where no token waits for others' weights; see
docs/scaling.md. Compiled for 128 chips (v5p:4x4x8); not run by us.
"""

from rmjax.config import (
    AlignConfig,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
)
from rmjax.models.presets import llama31_70b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> AlignConfig:
    return AlignConfig(
        workdir="runs/llama70b_reinforce",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            attributes=(),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-70B-Instruct",
        model=llama31_70b(),
        objective="reinforce",
        rollout=RolloutConfig(
            n=4, max_tokens=2048, rows=64, mesh=MeshConfig(data=-1, fsdp=1, tensor=8)
        ),
        rewards={"teacher": RewardConfig(model="runs/llama70b_scaled_bt")},
        policy_gradient=PolicyGradientConfig(kl=0.01),
        batch_size=64,
        steps=318,
        remat="dots",
        mesh=MeshConfig(fsdp=-1, tensor=8),
        optimizer=OptimizerConfig(
            learning_rate=5e-7,
            schedule="linear",
            final_fraction=0.8,
            warmup_steps=10,
            b1=0.9,
            b2=0.98,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        eval_every=50,
        checkpoint_every=20,
    )
