"""The quickstart's policy learns from its own samples, by REINFORCE on the quickstart's reward.

    python -m rmjax.train --config=configs/quickstart.py
    python -m rmjax.train --config=configs/quickstart_sft.py
    python -m rmjax.align --config=configs/quickstart_align.py

With the method's own `kl` of .01 and a rate of 1e-3 it learns to write what only the reward model
likes; see docs/online.md.
"""

from rmjax.config import (
    AlignConfig,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
    ShapingConfig,
)
from rmjax.models.presets import quickstart


def get_config(arg: str | None = None) -> AlignConfig:
    return AlignConfig(
        workdir="runs/quickstart_align",
        data=DataConfig(
            train="generated:400",
            validation="generated:120",
            attributes=(),
            max_length=384,
        ),
        init="runs/quickstart_sft",
        model=quickstart(),
        objective="reinforce",
        rollout=RolloutConfig(n=4, max_tokens=200),
        rewards={"teacher": RewardConfig(model="runs/quickstart")},
        shaping=ShapingConfig(unended_penalty=1.0),
        batch_size=64,
        policy_gradient=PolicyGradientConfig(kl=0.5),
        steps=30,
        rows_per_device=4,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="constant", warmup_steps=4),
        eval_every=10,
        checkpoint_every=10,
    )
