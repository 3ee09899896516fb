"""Llama-3.1-70B-Instruct learns what HelpSteer2 rates as more helpful by DPO.

    python -m rmjax.train --config=configs/llama70b_dpo.py

Recipe (arXiv 2406.08673): the two responses to a prompt are a pair if their helpfulness differs,
which makes 7,221 pairs; beta .001, constant 2e-7, weight decay .1, 128 pairs a step, 7 epochs = 395
steps. The paper began with its own Llama-3-70B: `--config.init=runs/llama70b_sft` does alike.

The reference is the model before the first step; what it says of each response is computed once, so
no second model is in memory. `scaled_dpo` (arXiv 2410.01257) is `--config.objective=scaled_dpo`,
with a workdir of its own. Compiled for 64 chips, see docs/scaling.md; not run by us.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig, PreferenceConfig
from rmjax.models.presets import llama31_70b
from rmjax.runtime.sharding import MeshConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/llama70b_dpo",
        data=DataConfig(
            train="nvidia/HelpSteer2",
            validation="nvidia/HelpSteer2",
            compare="helpfulness",
            attributes=(),
            max_length=4096,
        ),
        init="meta-llama/Llama-3.1-70B-Instruct",
        model=llama31_70b(),
        objective="dpo",
        preference=PreferenceConfig(beta=1e-3),
        batch_size=256,
        epochs=7,
        remat="dots",
        mesh=MeshConfig(fsdp=-1, context=2, tensor=2),
        optimizer=OptimizerConfig(
            learning_rate=2e-7, warmup_steps=10, b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0
        ),
        eval_every=20,
        checkpoint_every=20,
    )
