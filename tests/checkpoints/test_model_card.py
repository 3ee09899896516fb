"""Model cards: what a source says of its origin arrives at the export, with what was done to it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from helpers.hf_models import NAMES, save_hf
from helpers.models import tiny_llama
from rmjax.checkpoints.loading_examples import examples
from rmjax.checkpoints.model_card import write_model_card
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.checkpoints.provenance import CARD, provenance, read_front_matter, unknown_origin
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.errors import UserError
from rmjax.models.rewards.ordinal import OrdinalScale
from rmjax.models.rewards.spec import RewardSpec

# As NVIDIA's Llama-3.3-Nemotron-70B-Reward-Principle has it.
FRONT = {
    "license": "other",
    "license_name": "nvidia-open-model-license",
    "license_link": "https://www.nvidia.com/en-us/agreements/",
    "language": ["en"],
    "datasets": ["nvidia/HelpSteer3"],
    "base_model": "meta-llama/Llama-3.3-70B-Instruct",
}


def write_front(directory: Path, **fields: object) -> None:
    (directory / CARD).write_text(f"---\n{yaml.safe_dump(fields)}---\n# A model\n\nWith a text.\n")


def parts(directory: Path) -> tuple[dict, str]:
    """The YAML of a card, and what follows it."""
    _, front, body = (directory / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "hf"
    save_hf(directory, tiny_llama(max_position_embeddings=256))
    write_front(directory, **FRONT, inference=False, tags=["nvidia"])
    return directory


@pytest.fixture(scope="module")
def orbax(source) -> Path:
    hf_to_orbax(str(source), str(source.parent / "orbax"))
    return source.parent / "orbax"


def test_origin_and_licence_are_kept_on_the_way(source, orbax, tmp_path):
    notes = orbax_to_hf(str(orbax), str(tmp_path / "back"))
    assert not any(CARD in note for note in notes)
    for directory, library in ((orbax, "rmjax"), (tmp_path / "back", "transformers")):
        front, _ = parts(directory)
        assert {name: front[name] for name in FRONT} == FRONT
        assert front["library_name"] == library
    front, body = parts(tmp_path / "back")
    assert front["pipeline_tag"] == "text-classification"
    assert front["tags"] == ["reward-model", "rmjax"]
    assert "made from meta-llama/Llama-3.3-70B-Instruct" in body
    assert body.index("`zeal`") < body.index("`care`") < body.index("`length`")
    assert "would read the last one, `length`" in body and "GRPOTrainer" not in body
    # A policy's too.
    save_hf(tmp_path / "causal", causal=True)
    write_front(tmp_path / "causal", license="llama3.1")
    hf_to_orbax(str(tmp_path / "causal"), str(tmp_path / "lm"), language_model=True)
    orbax_to_hf(str(tmp_path / "lm"), str(tmp_path / "policy"))
    front, body = parts(tmp_path / "policy")
    assert (front["license"], front["pipeline_tag"]) == ("llama3.1", "text-generation")
    assert "AutoModelForCausalLM" in body


def test_what_is_on_the_hub_is_what_it_was_made_from(source):
    opened = dataclasses.replace(open_pretrained(str(source)), name="nvidia/A-Reward-Model")
    assert provenance(opened) == FRONT | {"base_model": "nvidia/A-Reward-Model"}
    trained = provenance(opened, trained=True)
    assert "datasets" not in trained and trained["license"] == "other"


def test_nothing_known_is_said(source, tmp_path):
    opened = open_pretrained(str(source))
    assert unknown_origin(opened, {"license": "mit"}) == []
    based = dataclasses.replace(opened, base="a/model")
    (note,) = unknown_origin(based, {})
    assert note.startswith("README.md does not say license and base_model, since nothing here")
    save_hf(tmp_path / "hf")
    hf_to_orbax(str(tmp_path / "hf"), str(tmp_path / "orbax"))
    notes = orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert any("does not say license and base_model" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "front"),
    [
        ("", {}),
        ("# A title\n\n---\nno: front matter\n", {}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n# A title", {"license": "mit"}),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- license\n---\n", None),
    ],
    ids=["empty", "none", "license", "crlf", "broken", "list"],
)
def test_cards_of_others_are_read(text, front, tmp_path):
    (tmp_path / CARD).write_bytes(text.encode())
    if front is None:
        with pytest.raises(UserError, match=r"README\.md: the lines between '---' at its top are"):
            read_front_matter(tmp_path)
    else:
        assert read_front_matter(tmp_path) == front


# ---- of a run ---------------------------------------------------------------------------------

CONFIG = {
    "objective": "regression",
    "batch_size": 32,
    "epochs": 2.0,
    "steps": 0,
    "optimizer.learning_rate": 1e-5,
    "lora.rank": 0,
    "seed": 0,
}
DATA = {
    "train": {
        "source": "nvidia/HelpSteer2",
        "samples": {"read": 1200, "kept": 1100, "dropped: too long": 100},
        "tokens": {"total": 123456},
    },
    "validation": {
        "source": "/home/somebody/secret/held_out.jsonl:validation",
        "samples": {"read": 10, "kept": 10},
        "tokens": {"total": 1000},
    },
}
REPORT = {
    "summary": {"best_step": 20},
    "evaluations": [
        {"step": 10, "validation_loss": 2.0, "attributes": {"zeal": {"mse": 0.75}}},
        {
            "step": 20,
            "validation_loss": 1.25,
            "attributes": {"zeal": {"count": 7, "mse": 0.5, "pearson": 0.625, "spearman": None}},
            "pairs": {"pairs": 3000, "accuracy": 0.875, "low": 0.75, "high": 0.9375},
        },
    ],
}


@pytest.fixture(scope="module")
def run(orbax, tmp_path_factory) -> Pretrained:
    """An Orbax model with the records of a run."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "report").mkdir()
    record = {"config": CONFIG, "versions": {"jax": "0.10.2"}, "devices": "8 x cpu"}
    for name, value in (("config", record), ("data", DATA), ("report/report", REPORT)):
        (directory / f"{name}.json").write_text(json.dumps(value))
    return dataclasses.replace(open_pretrained(str(orbax)), run=directory)


def card_of(directory: Path, source: Pretrained, spec: RewardSpec | None) -> tuple[dict, str]:
    write_model_card(directory, source, spec, "me/a-model", "bfloat16")
    return parts(directory)


def test_a_run_says_how_it_was_trained_and_how_good_it_is(run, tmp_path):
    front, body = card_of(tmp_path, run, run.spec)
    assert front["datasets"] == ["nvidia/HelpSteer2", "nvidia/HelpSteer3"]
    for line in (
        "# a-model",
        "- nvidia/HelpSteer2: 1,200 read, 1,100 kept, 100 dropped: too long; 123,456 tokens",
        "- held_out.jsonl:validation: 10 read, 10 kept; 1,000 tokens",
        "| optimizer.learning_rate | 1e-05 |",
        "| seed | 0 |",
        "| jax | 0.10.2 |",
        "Step 20; validation loss 1.25.",
        "| `zeal` | 7 | 0.5 | - | 0.625 | - | - |",
        "Accuracy on 3,000 preference pairs: 0.875 (95 %: 0.75 to 0.9375).",
        'rm = rmjax.load("me/a-model")',
        "vllm serve me/a-model --runner pooling",
    ):
        assert line in body.splitlines(), line
    assert "somebody" not in body and "lora" not in body and "0.75 |" not in body


def test_a_run_without_a_report_is_a_card_without_metrics(run, tmp_path):
    bare = tmp_path / "run"
    bare.mkdir()
    body = card_of(tmp_path, dataclasses.replace(run, run=bare), run.spec)[1]
    assert "Held-out" not in body and "## Training" not in body
    (bare / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json: not readable as JSON"):
        card_of(tmp_path, dataclasses.replace(run, run=bare), run.spec)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attributes": ("wit",), "scalar": {"wit": 1.0}}, "It has one label, `wit`: higher"),
        (
            {"attributes": ("v",), "folded": {"zeal": 1.0, "wit": -0.5}},
            "The label is +1 * `zeal` -0.5 * `wit`, of a model",
        ),
        ({"scalar": {}}, "The labels are classes"),
        ({"offset": {"wit": 2.5}}, "other programs leave out: 2.5 (wit)."),
        ({"suffix_turn": "Is it\n`good`?"}, "````\nIs it\n`good`?\n````"),
        ({"max_length": 4096}, "conversations of up to 4,096 tokens"),
        ({"ordinal": OrdinalScale(0, 4, ("wit",))}, "Of wit the label is a place among thresholds"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_other_programs_do_not_know_is_said(changes, said, run, tmp_path):
    spec = dataclasses.replace(RewardSpec(NAMES, {"zeal": 1.0}), **changes)
    body = card_of(tmp_path, run, spec)[1]
    assert said in body
    assert ("GRPOTrainer" in body) == (len(spec.attributes) == 1)


def test_the_example_for_transformers_runs(orbax, tmp_path, capsys):
    orbax_to_hf(str(orbax), str(tmp_path / "hf"))
    spec = open_pretrained(str(tmp_path / "hf")).spec
    (code,) = [
        text.split("```python\n")[1].split("```")[0]
        for text in examples(spec, str(tmp_path / "hf"))
        if text.startswith("transformers")
    ]
    exec(code, {})
    printed = capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    talk = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Rayleigh scattering."},
    ]
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = model.eval()(**ids).logits[0]
    assert printed.strip() == str(expected)
