"""The quickstart's policy learns from pairs of its own responses, by DPO.

`recipes/iterative_dpo.sh` runs it, as the README shows. The pairs are the best and the worst of
several samples of a prompt, by the quickstart's reward model. The reference is the policy that a
round begins with.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig, PreferenceConfig
from rmjax.models.presets import quickstart


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/quickstart_dpo",
        data=DataConfig(train="pairs.jsonl", attributes=(), max_length=256),
        init="runs/quickstart_sft",
        model=quickstart(),
        objective="dpo",
        preference=PreferenceConfig(beta=0.1),
        batch_size=32,
        epochs=2,
        rows_per_device=8,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup_steps=5),
    )
