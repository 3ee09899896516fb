"""How an export is loaded elsewhere, as its model card shows it."""

from collections.abc import Iterator

from rmjax.models.rewards.spec import RewardSpec

_TALK = """[
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Rayleigh scattering."},
]"""
_RMJAX = """
import rmjax

rm = rmjax.load("NAME")
rm.score(TALK)
"""
_TRANSFORMERS = """
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForSequenceClassification.from_pretrained("NAME").eval()
talk = TALK
text = tokenizer.apply_chat_template(talk, tokenize=False)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits[0])
"""
_TRL = """
from trl import GRPOTrainer

trainer = GRPOTrainer(model=..., reward_funcs="NAME", train_dataset=...)
"""
_RMJAX_POLICY = """
import rmjax

policy = rmjax.load_policy("NAME")
"""
_TRANSFORMERS_POLICY = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForCausalLM.from_pretrained("NAME")
"""
_PEFT = """
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

config = AutoConfig.from_pretrained("NAME")
base = AutoModelForSequenceClassification.from_pretrained("BASE", config=config)
model = PeftModel.from_pretrained(base, "NAME")
"""
_PEFT_POLICY = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "NAME")
"""
_REWARD = (
    ("rmjax", "python", _RMJAX),
    ("transformers", "python", _TRANSFORMERS),
    (
        "vLLM, whose `/classify` and `/pooling` give the numbers as they are",
        "bash",
        "vllm serve NAME --runner pooling",
    ),
)
_POLICY = (
    ("rmjax", "python", _RMJAX_POLICY),
    ("transformers", "python", _TRANSFORMERS_POLICY),
    ("vLLM", "bash", "vllm serve NAME"),
)


def examples(spec: RewardSpec | None, name: str, base: str = "") -> Iterator[str]:
    """Paragraphs of Markdown, each with a piece of code.

    Args:
      spec: of a reward model; None for a language model.
      name: what the export is loaded by.
      base: the model that it is adapters of; empty for a whole model.
    """
    if base:
        peft = _PEFT if spec else _PEFT_POLICY
        yield _example("PEFT", "python", peft, name, base)
        return
    for title, language, code in _REWARD if spec else _POLICY:
        yield _example(title, language, code, name)
    if spec is None:
        return
    if len(spec.attributes) == 1:
        yield _example("TRL", "python", _TRL, name)
    else:
        yield (
            "TRL, OpenRLHF, verl and RewardBench take a model of one label; verl "
            f"would read the last one, `{spec.attributes[-1]}`. `rmjax convert orbax-to-hf "
            "--value=RULE` makes such a model."
        )


def _example(title: str, language: str, code: str, name: str, base: str = "") -> str:
    code = code.strip().replace("TALK", _TALK).replace("NAME", name).replace("BASE", base)
    return f"{title}:\n\n```{language}\n{code}\n```"
