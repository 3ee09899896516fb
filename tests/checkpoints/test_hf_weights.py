import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.damage import Bomb
from helpers.gguf_files import write_gguf
from helpers.hf_models import edit_tensors, save_hf, tensors_of
from helpers.models import make_model, tiny_llama
from rmjax.checkpoints.gguf import GGUFWeights
from rmjax.checkpoints.hf_mapping import from_hf, hf_keys, hf_shape, to_hf
from rmjax.checkpoints.hf_weights import SafetensorsWeights, check_tensors
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import encode, load_tokenizer
from rmjax.errors import UserError
from rmjax.models.heads import RewardHead
from rmjax.models.hf_config import config_from_hf, config_to_hf
from rmjax.models.parameters import PARAMETERS
from rmjax.runtime.files import read_json

# ---- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
def test_the_table_is_transformers_state_dict(biases):
    decoder = tiny_llama(attention_bias=biases, mlp_bias=biases, head_dim=16)
    config = transformers.LlamaConfig.from_dict(config_to_hf(decoder) | {"num_labels": 5})
    with torch.device("meta"):
        state = transformers.LlamaForSequenceClassification(config).state_dict()
    model = make_model(decoder)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        key: hf_shape(row, model.sizes) for row in model.parameters for key in hf_keys(row, decoder)
    }


@given(
    row=st.sampled_from(PARAMETERS),
    sizes=st.fixed_dictionaries({k: st.integers(1, 5) for k in make_model(tiny_llama()).sizes}),
)
def test_our_axes_and_theirs_are_inverse(row, sizes):
    shape = hf_shape(row, sizes)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    ours = from_hf(row, tensor, sizes)
    assert ours.shape == tuple(sizes[axis] for axis in row.axes.split())
    np.testing.assert_array_equal(to_hf(row, ours, sizes), tensor)


def test_heads_are_consecutive_rows_of_a_projection(rng):
    rows = {row.path: row for row in PARAMETERS}
    sizes = make_model(tiny_llama()).sizes
    q, o = rng.standard_normal((32, 32)), rng.standard_normal((32, 32))
    ours_q, ours_o = from_hf(rows["layers/q"], q, sizes), from_hf(rows["layers/o"], o, sizes)
    for head in range(4):
        mine = slice(8 * head, 8 * head + 8)
        np.testing.assert_array_equal(ours_q[:, head], q[mine].T)
        np.testing.assert_array_equal(ours_o[head], o[:, mine].T)


# ---- safetensors ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("sharded"), dtype=torch.bfloat16, max_shard_size=20_000)


def same_tensors(weights: SafetensorsWeights, expected) -> bool:
    return {
        key: (weights.dtype(key).name, weights.shape(key), weights.read(key).tobytes())
        for key in weights.keys()  # noqa: SIM118  (not a mapping)
    } == expected


def test_files_are_read_with_and_without_their_index(sharded, tmp_path):
    expected = tensors_of(sharded)
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    # With an index, a file that it does not name is not looked at.
    save_file({"model.norm.weight": torch.zeros(3)}, copy / "adapter_model.safetensors")
    assert same_tensors(SafetensorsWeights(copy), expected)
    (copy / "adapter_model.safetensors").unlink()
    (copy / "model.safetensors.index.json").unlink()
    assert same_tensors(SafetensorsWeights(copy), expected)


def test_a_lost_shard_is_missed_without_an_index_too(sharded, tmp_path):
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (copy / "model.safetensors.index.json").unlink()
    sorted(copy.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"\d+ tensor\(s\) missing: "):
        check_tensors(SafetensorsWeights(copy), tiny_llama(), RewardHead(5))


def test_long_lists_of_tensors_are_cut(sharded):
    with pytest.raises(UserError) as error:
        check_tensors(SafetensorsWeights(sharded), tiny_llama(num_hidden_layers=30), RewardHead(5))
    assert "243 tensor(s) missing: model.layers.10." in str(error.value)
    assert str(error.value).endswith(", ...") and len(str(error.value)) < 500


def test_pickles_are_never_opened(sharded, tmp_path):
    import pickle

    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.00.pth"):
        (copy / name).write_bytes(pickle.dumps(Bomb()))
    assert same_tensors(SafetensorsWeights(copy), tensors_of(sharded))
    for file in copy.glob("model*"):
        file.unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (copy / "training_args.bin").unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"{name} is a pickle.*safetensors first"):
            SafetensorsWeights(copy)
        (copy / name).unlink()


def test_what_a_reward_model_has_no_use_for_is_listed(tmp_path):
    source = save_hf(tmp_path / "hf", causal=True)
    buffer = "model.layers.2.self_attn.rotary_emb.inv_freq"
    edit_tensors(source, **{buffer: torch.ones(4)})
    weights = SafetensorsWeights(source)
    assert check_tensors(weights, tiny_llama(), RewardHead(1)) == ("lm_head.weight", buffer)
    assert "score.weight" not in weights.keys()  # noqa: SIM118  (not a mapping)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("null", "found NoneType"),
        ('"x"', "found str"),
        (None, "there is no such file"),
        (b"\xff\xfe{}", "not readable as JSON"),
    ],
    ids=repr,
)
def test_broken_json_is_named(text, message, tmp_path):
    file = tmp_path / "config.json"
    if isinstance(text, bytes):
        file.write_bytes(text)
    elif text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        read_json(file)


# ---- GGUF -------------------------------------------------------------------------------------


def test_a_gguf_file_holds_the_same_model(causal_state, tmp_path):
    decoder, state = causal_state
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", decoder, state))
    found = config_from_hf(weights.config, "m.gguf")
    found.initializer_range = decoder.initializer_range  # which GGUF does not store
    assert found == decoder
    assert weights.keys() == set(state)
    for key, tensor in state.items():
        assert weights.shape(key) == tensor.shape
        np.testing.assert_array_equal(weights.read(key), tensor, err_msg=key)
    assert check_tensors(weights, decoder, RewardHead(1)) == ("lm_head.weight",)


def test_gguf_precisions_are_read_as_float32(causal_state, tmp_path):
    decoder, state = causal_state
    halves = {key: tensor.astype(np.float16) for key, tensor in state.items()}
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", decoder, halves))
    for key, tensor in halves.items():
        read = weights.read(key)
        assert read.dtype == weights.dtype(key) == np.float32
        np.testing.assert_array_equal(read, tensor.astype(np.float32))


def test_gguf_linear_rope_is_read(causal_state, tmp_path):
    decoder, state = causal_state
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = GGUFWeights(write_gguf(tmp_path / "m.gguf", decoder, state, **fields)).config
    rope = config_from_hf(config, "m.gguf").rope
    assert (rope.type, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "qwen2"}, "'general.architecture' is 'qwen2'"),
        ({"expert_count": 8}, "experts: not supported"),
        ({"rope.scaling.type": "yarn"}, "'llama.rope.scaling.type' is 'yarn'"),
        ({"block_count": None}, "'llama.block_count' is missing"),
        ({"embedding_length": None}, "'llama.embedding_length' is missing"),
    ],
    ids=str,
)
def test_gguf_files_of_other_models_are_refused(fields, message, causal_state, tmp_path):
    with pytest.raises(UserError, match=message):
        GGUFWeights(write_gguf(tmp_path / "m.gguf", *causal_state, **fields))


@pytest.mark.parametrize("change", ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "missing"])
def test_gguf_tensors_must_be_those_of_the_model(change, causal_state, tmp_path):
    decoder, state = causal_state
    state = dict(state)
    if change == "missing":
        del state["model.layers.1.mlp.up_proj.weight"]
        message = r"1 tensor\(s\) missing: model.layers.1.mlp.up_proj.weight"
    else:
        state[change] = np.ones(4, np.float32)
        message = change if "blk" in change else "frequencies are scaled .*Hugging Face directory"
    with pytest.raises(UserError, match=message):
        check_tensors(
            GGUFWeights(write_gguf(tmp_path / "m.gguf", decoder, state)), decoder, RewardHead(1)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 20, 1 << 10, 1 << 20, -1], ids=str)
def test_truncated_gguf_is_one_message(kept, smollm2, tmp_path):
    file = tmp_path / "part.gguf"
    with open(smollm2, "rb") as whole:
        file.write_bytes(whole.read() if kept < 0 else whole.read(kept))
    if kept < 0:
        with open(file, "r+b") as part:
            part.truncate(file.stat().st_size + kept)
    with pytest.raises(UserError, match=r"part.gguf: not a readable GGUF file"):
        GGUFWeights(file)


@pytest.mark.parametrize(
    "content", [b"hello " * 1000, b"GGUF" + b"\xff" * 4096], ids=["text", "ff"]
)
def test_what_is_no_gguf_is_one_message(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"m.gguf: not a readable GGUF file"):
        GGUFWeights(tmp_path / "m.gguf")


@pytest.mark.slow
def test_real_gguf_config_is_what_transformers_reads(smollm2):
    ours = config_from_hf(GGUFWeights(smollm2).config, str(smollm2))
    theirs = transformers.AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    read = config_from_hf(
        json.loads(theirs.to_json_string(use_diff=False)) | {"architectures": None}, "theirs"
    )
    # transformers has the float32 of 1e-5 and its own default where the file says nothing.
    assert np.float32(read.rms_norm_eps) == np.float32(ours.rms_norm_eps)
    read.rms_norm_eps = ours.rms_norm_eps
    assert read == ours
    assert ours.rms_norm_eps == 1e-5


@pytest.mark.slow
def test_real_gguf_tokens_are_transformers(smollm2):
    ours = load_tokenizer(smollm2, 49152)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    conversations = [
        [
            {"role": "user", "content": "Why is the sky blue?\n\n  And the sea — 海?"},
            {"role": "assistant", "content": "Rayleigh scattering: λ⁻⁴.\tSee <b>§3</b> 👩‍🚀"},
        ],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "def f(x):\n    return x ** 2"},
            {"role": "assistant", "content": "Squares `x`."},
            {"role": "user", "content": "ok"},
            {"role": "assistant", "content": "1,000,000 times <|im_end|> 2"},
        ],
    ]
    for messages in conversations:
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert encode(ours, Conversation(messages)).tolist() == expected


def test_gguf_types_that_cannot_be_read_are_named(causal_state, tmp_path):
    decoder, state = causal_state
    key = "model.layers.1.mlp.up_proj.weight"
    integers = state | {key: np.ones(state[key].shape, np.int8)}
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", decoder, integers))
    with pytest.raises(UserError, match=f"m.gguf: tensor '{key}' is I8, which"):
        weights.read(key)
