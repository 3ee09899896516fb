"""The language model's head; the reward head is in `test_decoder.py`, real weights elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.hf_models import edit_tensors, save_hf, tensors_of
from helpers.models import one_device, tiny_llama
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.errors import UserError
from rmjax.generation.policy import load_policy
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import LM_HEAD, flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

PROMPT, ANSWERS = [5, 17, 40, 3, 99], ([12, 7, 8], [44, 2, 9, 31, 6])


def logits(source: Pretrained, sharding: Sharding, rows) -> np.ndarray:
    model = Model(source.decoder, ModelOptions(sharding), source.head)
    params = load_params(source, model, seed=0, dtype=jnp.float32)
    return np.asarray(jax.jit(model)(params, rows))


def by_transformers(path, tokens: list[int], **options) -> np.ndarray:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, **options
    ).eval()
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "eight"])
def test_logits_in_rows_that_share_a_prompt_equal_transformers(tied, mesh, tmp_path):
    """Two answers beside each other after one prompt: each has the logits it has alone."""
    source = save_hf(tmp_path / "hf", tiny_llama(tie_word_embeddings=tied), causal=True)
    samples = [np.asarray(PROMPT + answer, np.int32) for answer in ANSWERS]
    rows = make_rows([[Segment(samples, len(PROMPT))]], 4, RowShape(4, 16, 2))
    sharding = Sharding(make_mesh(MeshConfig(**mesh))) if mesh else one_device()
    found = logits(open_pretrained(str(source)), sharding, rows)[0]
    start = len(PROMPT)
    for answer in ANSWERS:
        expected = by_transformers(source, PROMPT + answer)
        ours = np.concatenate([found[: len(PROMPT)], found[start : start + len(answer)]])
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        start += len(answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_language_model_comes_back_bit_for_bit(tied, dtype, tmp_path):
    decoder = tiny_llama(tie_word_embeddings=tied)
    source = save_hf(tmp_path / "hf", decoder, dtype=dtype, causal=True)
    hf_to_orbax(str(source), str(tmp_path / "orbax"), language_model=True)
    orbax_to_hf(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert tensors_of(tmp_path / "back") == tensors_of(source)

    opened = open_pretrained(str(tmp_path / "orbax"))
    model = Model(opened.decoder, ModelOptions(one_device()), opened.head)
    params = flatten(load_params(opened, model, seed=0, dtype=jnp.float32))
    assert (LM_HEAD.path in params) is not tied and "head" not in params
    expected = by_transformers(source, PROMPT)
    np.testing.assert_allclose(by_transformers(tmp_path / "back", PROMPT), expected, atol=0)


def test_a_language_model_that_is_none_is_an_error(tmp_path):
    reward = save_hf(tmp_path / "reward")
    with pytest.raises(UserError, match="a reward model, which has no language-model head"):
        hf_to_orbax(str(reward), str(tmp_path / "a"), language_model=True)
    causal = save_hf(tmp_path / "causal", tiny_llama(), causal=True)
    edit_tensors(causal, **{LM_HEAD.hf_key: None})
    with pytest.raises(UserError, match=r"1 tensor\(s\) missing: lm_head.weight; .*'tie_word_emb"):
        hf_to_orbax(str(causal), str(tmp_path / "b"), language_model=True)
    with pytest.raises(UserError, match=r"1 tensor\(s\) missing: lm_head.weight"):
        load_policy(str(causal))


def test_a_tied_model_with_another_matrix_as_its_head_is_an_error(tmp_path):
    """transformers 4 takes the embedding, and transformers 5 the other matrix."""
    source = save_hf(tmp_path / "hf", tiny_llama(tie_word_embeddings=True), causal=True)
    matrix = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(source, **{LM_HEAD.hf_key: matrix.clone()})
    hf_to_orbax(str(source), str(tmp_path / "a"), language_model=True)
    edit_tensors(source, **{LM_HEAD.hf_key: matrix + (torch.arange(len(matrix)) == 261)[:, None]})
    ways = (
        lambda: hf_to_orbax(str(source), str(tmp_path / "b"), language_model=True),
        lambda: hf_to_orbax(str(source), str(tmp_path / "b"), head={"0": 1}),
        lambda: load_policy(str(source)),
    )
    for way in ways:
        with pytest.raises(UserError, match="'tie_word_embeddings' is true, but 'lm_head"):
            way()
    hf_to_orbax(str(source), str(tmp_path / "b"), attributes=("a",))  # which needs neither
