"""TRL's own trainer, where it is installed: what a model and its server reward is equal."""

import pytest
import torch
import transformers

from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from helpers.serving import make_service, one_device, running
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.integrations.trl import reward_function

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def rewards(judge, directory):
    """Of each step of GRPO of a tiny policy, which samples the same each time."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    policy = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=reward_function(judge),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": f"say {n}"}]} for n in range(4)]
        ),
        args=trl.GRPOConfig(
            str(directory),
            max_steps=2,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=8,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
        ),
    )
    trainer.train()
    return [log["rewards/rmjax/mean"] for log in trainer.state.log_history if "reward" in log]


@pytest.mark.slow
def test_grpo_is_rewarded_by_a_model_as_by_its_server(tmp_path):
    model = save_hf(tmp_path / "hf", tiny_llama(max_position_embeddings=128), names=("good",))
    with running(make_service(one_device(model))) as url:
        by_server = rewards(url, tmp_path / "a")
    assert len(set(by_server)) == 2
    assert rewards(str(model), tmp_path / "b") == pytest.approx(by_server, abs=1e-5)
