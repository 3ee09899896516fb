"""An export of one label is the value, as every consumer reads it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.hf_models import NAMES, TALK, edit_json, save_hf
from helpers.models import make_model, tiny_llama
from helpers.official import load_official_pipeline
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.inference.scorer import Scorer
from rmjax.models.rewards.aggregation import fold_spec, model_rule, scalar_rule
from rmjax.models.rewards.ordinal import OrdinalScale
from rmjax.models.rewards.spec import RewardSpec, Temperature
from rmjax.runtime.files import read_json

RULE = {"zeal": 0.65, "wit": 0.8, "length": -0.4}


def scorer_of(path: Path, value: Any = None) -> Scorer:
    source = open_pretrained(str(path))
    spec = source.reward_spec()
    model = make_model(source.decoder, len(spec.attributes))
    params = load_params(source, model, seed=0, dtype=np.float32)
    return Scorer(model, params, source.tokenizer(), spec, model_rule(spec, value), "error")


@pytest.fixture(scope="module")
def orbax(tmp_path_factory) -> Path:
    """A model of five attributes, in bfloat16, whose tokenizer puts a BOS before any text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[bos]
    )
    directory = tmp_path_factory.mktemp("models")
    decoder = tiny_llama(max_position_embeddings=256)
    save_hf(directory / "hf", decoder, dtype=torch.bfloat16, tokenizer=tokenizer)
    hf_to_orbax(str(directory / "hf"), str(directory / "orbax"), value=RULE)
    return directory / "orbax"


@pytest.fixture(scope="module")
def values(orbax) -> np.ndarray:
    found = np.asarray([score.value for score in scorer_of(orbax).score_many(TALK)])
    assert np.ptp(found) > 1e-2
    return found


@pytest.fixture(scope="module")
def export(orbax, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("export") / "hf"
    notes = orbax_to_hf(str(orbax), str(target), dtype="float32", value=RULE)
    assert notes[0].endswith("head: +0.65*zeal +0.8*wit -0.4*length")
    return target


def by_trl(path: Path, tokenizer: Any) -> list[float]:
    """TRL 1.16, `GRPOTrainer`: how it loads a reward function by path, and what it asks it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALK]
    inputs = tokenizer(
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    )
    with torch.inference_mode():
        return model.eval()(**inputs).logits[:, 0].tolist()


def by_pipeline(path: Path, tokenizer: Any) -> list[float]:
    """transformers' pipeline, which cuts no BOS of a template off; so it is given none."""
    pipe = transformers.pipeline("text-classification", str(path), device="cpu")
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALK]
    texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    return [answer["score"] for answer in pipe(texts, function_to_apply="none")]


def by_rewardbench(path: Path, tokenizer: Any) -> list[float]:
    """RewardBench 0.1.4's own pipeline on its own way to a text, in a batch padded on the left."""
    tokenizer.padding_side = "left"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    pipe = load_official_pipeline()("text-classification", model=model, tokenizer=tokenizer)
    with pytest.MonkeyPatch.context() as patch:  # it says "cuda"
        patch.setattr(transformers.BatchEncoding, "to", lambda inputs, device: inputs)
        texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALK]
        rewards = pipe(texts, batch_size=8, truncation=False, padding=True, max_length=2048)
    return rewards.float().cpu().numpy()[:, 0].tolist()


def by_verl(path: Path, tokenizer: Any) -> list[float]:
    """verl asks vLLM's /classify for `probs` without an activation, and takes the last."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for talk in TALK:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            found.append(model(**ids).logits[0].tolist()[-1])
    return found


CONSUMERS = [by_trl, by_pipeline, by_rewardbench, by_verl]


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda function: function.__name__[3:])
def test_every_consumer_reads_the_value(
    consumer: Callable[[Path, Any], list[float]], export, values
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    np.testing.assert_allclose(consumer(export, tokenizer), values, rtol=0, atol=1e-5)


def test_the_label_says_what_it_is(export, orbax, values):
    config, spec = read_json(export / "config.json"), read_json(export / "rmjax.json")
    name = "+0.65*zeal +0.8*wit -0.4*length"
    assert config["id2label"] == {"0": name}
    assert config["problem_type"] == "regression"
    assert (spec["attributes"], spec["scalar"], spec["folded"]) == ([name], {name: 1.0}, RULE)
    found = scorer_of(export).score_many(TALK)
    np.testing.assert_allclose([score.value for score in found], values, rtol=0, atol=1e-5)
    head = load_file(export / "model.safetensors")["score.weight"]
    assert (head.dtype, head.shape) == (torch.float32, (1, 32))
    # Back and forth it stays what it is.
    hf_to_orbax(str(export), str(export.parent / "again"))
    orbax_to_hf(str(export.parent / "again"), str(export.parent / "back"), value=name)
    assert read_json(export.parent / "back" / "rmjax.json")["folded"] == RULE
    assert torch.equal(
        load_file(export.parent / "back" / "model.safetensors")["score.weight"], head
    )


def test_one_attribute_is_its_row(orbax, tmp_path):
    orbax_to_hf(str(orbax), str(tmp_path / "hf"), value="care")
    every = orbax_to_hf(str(orbax), str(tmp_path / "all"))
    assert any("5 labels: " in note and "--value=RULE makes" in note for note in every)
    one, five = (
        load_file(tmp_path / name / "model.safetensors")["score.weight"] for name in ("hf", "all")
    )
    assert torch.equal(one, five[1:2].float())
    assert read_json(tmp_path / "hf" / "config.json")["id2label"] == {"0": "care"}


def test_a_rule_of_what_is_not_there_is_an_error(orbax, tmp_path):
    for value, message in (
        ({"zeal": 1, "helpfulness": 1}, "the model has no attribute 'helpfulness'; it has zeal"),
        ("goodness", "the model has no attribute 'helpfulness'"),
        ("virtue", "scalar rule 'virtue': neither an attribute"),
        ({}, "expected attributes, and a weight that is not 0"),
    ):
        with pytest.raises(UserError, match=message):
            orbax_to_hf(str(orbax), str(tmp_path / "no"), value=value)
    assert not (tmp_path / "no").exists()
    save_hf(tmp_path / "causal", causal=True)
    hf_to_orbax(str(tmp_path / "causal"), str(tmp_path / "lm"), language_model=True)
    with pytest.raises(UserError, match="a language model, which has no value"):
        orbax_to_hf(str(tmp_path / "lm"), str(tmp_path / "no"), value="care")


def test_what_is_no_weighted_sum_is_not_folded(orbax, tmp_path):
    scale = OrdinalScale(0, 2, ("zeal",), ((0.5, 1.5),))
    spec = RewardSpec(NAMES, {"zeal": 1.0}, ordinal=scale)
    with pytest.raises(UserError, match="the value of 'zeal' is an expected rating"):
        fold_spec(spec, scalar_rule(RULE, NAMES))
    assert fold_spec(spec, scalar_rule("wit", NAMES)).ordinal is None
    copy = Path(tmp_path / "general")
    hf_to_orbax(str(save_hf(tmp_path / "hf", names=("a", "b"))), str(copy))
    edit_json(copy / "rmjax.json", general_preference={"beta": 0.1})
    with pytest.raises(UserError, match="a model of general preferences"):
        orbax_to_hf(str(copy), str(tmp_path / "no"), value="a")


def test_constants_and_temperatures_go_with_the_value():
    spec = RewardSpec(
        NAMES,
        {"zeal": 1.0},
        offset={"zeal": 2.0, "length": 5.0},
        temperature=Temperature(1.5, "wit", 10),
    )
    folded = fold_spec(spec, scalar_rule(RULE, NAMES))
    (name,) = folded.attributes
    assert folded.offset == {name: pytest.approx(0.65 * 2 - 0.4 * 5)}
    assert (folded.temperature, folded.folded) == (None, RULE)
    wit = fold_spec(spec, scalar_rule("wit", NAMES))
    assert (wit.offset, wit.temperature) == (None, spec.temperature)
    twice = fold_spec(folded, scalar_rule({name: 2.0}, folded.attributes))
    assert twice.folded == {key: 2 * weight for key, weight in RULE.items()}
    assert json.loads(json.dumps(dataclasses.asdict(twice)))["folded"] == twice.folded
