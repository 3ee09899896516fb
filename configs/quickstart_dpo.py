"""The quickstart's policy learns from pairs of its own responses, by DPO.

    POLICY=runs/quickstart_sft REWARD=runs/quickstart PROMPTS=generated:400 \
        HELD_OUT=generated:100:validation CONFIG=configs/quickstart_dpo.py \
        OUT=runs/quickstart_rounds recipes/iterative_dpo.sh

The pairs are the best and the worst of several samples of a prompt, by the quickstart's reward
model. The reference is the policy that a round begins with.
"""

from rmjax.config import Config, DataConfig, OptimizerConfig, PreferenceConfig
from rmjax.models.decoder_config import LlamaConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="runs/quickstart_dpo",
        data=DataConfig(train="pairs.jsonl", attributes=(), max_length=256, row_length=512),
        init="runs/quickstart_sft",
        model=LlamaConfig(
            vocab_size=262,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
        ),
        objective="dpo",
        preference=PreferenceConfig(beta=0.1),
        batch_size=32,
        epochs=2,
        rows_per_device=8,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup_steps=5),
    )
