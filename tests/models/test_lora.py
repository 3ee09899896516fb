import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

import rmjax
import rmjax.models.layers
from helpers.hf_models import TALK, save_hf, tensors_of
from helpers.models import make_model as make_plain_model
from helpers.models import one_device, tiny_llama
from helpers.reference import hf_state, torch_model
from helpers.runs import assert_same_bits, parts, restore, run, tiny_config
from helpers.targets import only_ratings, regression
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.manager import best_checkpoint
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.convert import hf_to_orbax, orbax_to_hf, orbax_to_peft
from rmjax.data.batch import BATCH_AXES, Batch, Ratings
from rmjax.data.conversation import Conversation
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.data.tokenizer import byte_tokenizer, encode
from rmjax.errors import UserError
from rmjax.inference.score_step import make_score
from rmjax.models.decoder import REMAT
from rmjax.models.decoder_config import ADAPTED, TARGETS, LoraConfig
from rmjax.models.flops import model_flops
from rmjax.models.heads import RewardHead
from rmjax.models.init import random_params
from rmjax.models.layers import ModelOptions
from rmjax.models.lora import drop
from rmjax.models.model import Model
from rmjax.models.parameters import ADAPTERS, flatten, nest
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh, put
from rmjax.training.experiment import make_model
from rmjax.training.optimizer import decay_mask, partition
from rmjax.training.step import abstract_state, init_state, make_train_step
from rmjax.training.validate_config import validate

LLAMA = tiny_llama()
# Where Hugging Face has each product.
PLACES = {t: f"self_attn.{t}_proj" for t in "qkvo"} | {
    t: f"mlp.{t}_proj" for t in ("gate", "up", "down")
}


def adapted(lora: LoraConfig, sharding: Sharding | None = None, decoder=LLAMA, **options):
    return Model(decoder, ModelOptions(sharding or one_device(), **options), RewardHead(5), lora)


def some_params(model, seed=1) -> dict[str, np.ndarray]:
    """Parameters by path on the host; B is not zero, as it would be at first."""
    rng = np.random.default_rng(seed)
    return {
        path: (np.asarray(leaf) + rng.normal(0, 0.05, leaf.shape)).astype(np.float32)
        for path, leaf in sorted(flatten(jax.device_get(random_params(model, seed))).items())
    }


def some_rows(rng, count=2):
    """Rows with a shared beginning, a packed neighbour, one alone; and their samples in order."""
    tokens = [rng.integers(1, 262, n).astype(np.int32) for n in (9, 14, 21, 30)]
    tokens[1][:6] = tokens[0][:6]
    groups = [[Segment(tokens[:2], 6), Segment([tokens[2]])], [Segment([tokens[3]])]]
    return make_rows(groups, count, RowShape(count, 64, 4)), tokens


def pick(scores):
    return np.concatenate([np.asarray(scores)[0, :3], np.asarray(scores)[1, :1]])


# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [TARGETS, ("q", "v"), ("down",), ("o", "up")], ids=lambda t: "_".join(t)
)
def test_scores_and_gradients_equal_dense_products(targets, rng):
    """W + (alpha / rank) A B written out in torch, whose autograd gives A's and B's gradients."""
    lora = LoraConfig(rank=3, alpha=6.0, targets=targets)
    model = adapted(lora)
    params = some_params(model)
    rows, tokens = some_rows(rng)
    labels = rng.uniform(0, 4, (4, 5)).astype(np.float32)

    reference = torch_model(LLAMA, nest(params), 5)
    state, leaves = dict(reference.state_dict()), {}
    for target in targets:
        for layer in range(LLAMA.num_hidden_layers):
            a, b = (
                torch.tensor(params[f"layers/{target}_lora_{x}"][layer].reshape(shape))
                for x, shape in (("a", (-1, 3)), ("b", (3, -1)))
            )
            leaves[target, layer] = a.requires_grad_(), b.requires_grad_()
            key = f"model.layers.{layer}.{PLACES[target]}.weight"
            state[key] = state[key] + 2.0 * (a @ b).T
    state["score.weight"] = head = state["score.weight"].clone().requires_grad_()
    theirs = torch.stack(
        [
            torch.func.functional_call(
                reference, state, (torch.from_numpy(t[None]).long(),)
            ).logits[0]
            for t in tokens
        ]
    )
    ours = pick(make_score(model)(nest(params), rows))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-5)
    plain = pick(make_score(make_plain_model(LLAMA))(nest(without_adapters(params)), rows))
    assert np.abs(ours - plain).max() > 0.1  # the adapters are seen

    ((theirs - torch.from_numpy(labels)) ** 2).sum().backward()
    targets_of = np.zeros((2, 4, 5), np.float32)
    targets_of[0, :3], targets_of[1, 0] = labels[:3], labels[3]
    present = np.zeros_like(targets_of)
    present[0, :3], present[1, 0] = 1, 1
    free, frozen = partition(nest(params), ADAPTED)

    def loss(free):
        scores = model(nest(flatten(free) | flatten(frozen)), rows)
        targets = only_ratings(Ratings._make([targets_of, present]))
        return regression.loss(scores, targets, jnp.ones(1))  # the sum

    with jax.numpy_dtype_promotion("strict"):
        found = flatten(jax.jit(jax.grad(loss))(free))
    assert set(found) == {"head"} | {f"layers/{t}_lora_{x}" for t in targets for x in "ab"}
    close(found["head"], head.grad.numpy().T)
    for (target, layer), (a, b) in leaves.items():
        for name, leaf in (("a", a), ("b", b)):
            array = np.asarray(found[f"layers/{target}_lora_{name}"][layer])
            close(array.reshape(leaf.shape), leaf.grad.numpy())


def close(ours, theirs, tolerance=1e-4) -> None:
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def without_adapters(params):
    return {path: leaf for path, leaf in params.items() if "_lora_" not in path}


@pytest.mark.slow
def test_at_first_nothing_is_added(rng):
    """B is zero, A normal with a variance of one over what it sums over."""
    model = adapted(LoraConfig(rank=64))
    params = flatten(random_params(model, seed=0))
    rows, _ = some_rows(rng)
    plain = make_score(make_plain_model(LLAMA))(nest(without_adapters(params)), rows)
    found = pick(make_score(model)(nest(params), rows))
    np.testing.assert_allclose(found, pick(plain), atol=1e-6)
    for path, (a, b) in ADAPTERS.items():
        assert not np.asarray(params[b.path]).any()
        summed = {"layers/o": 32, "layers/down": 64}.get(path, 32)
        assert np.std(params[a.path]) == pytest.approx(summed**-0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "mesh", [dict(fsdp=2), dict(tensor=2), dict(fsdp=2, context=2, tensor=2)], ids=str
)
def test_every_mesh_gives_one_devices_step(mesh, dropout, rng):
    """Two micro-batches of it; also what is dropped is the same."""
    lora = LoraConfig(rank=2, dropout=dropout)
    count = int(np.prod(list(mesh.values())))
    config = MeshConfig(**({"fsdp": 1} | mesh))
    sharded = one_step(lora, Sharding(make_mesh(config, jax.devices()[:count])))
    loss, gradient = one_device_step(lora)
    assert sharded[0] == pytest.approx(loss, rel=1e-5)
    for path, leaf in gradient.items():
        close(sharded[1][path], leaf, 1e-5)


def one_step(lora: LoraConfig, sharding: Sharding, **options):
    """Loss and gradient of a step of two micro-batches."""
    model = adapted(lora, sharding, **options)
    optimizer = optax.trace(decay=0.0)  # its state is the gradient
    abstract = abstract_state(model, optimizer, ADAPTED)
    params = nest(some_params(adapted(lora)))
    placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, abstract.params)
    state = init_state(placed, optimizer, ADAPTED, abstract)
    step = make_train_step(
        model, regression, optimizer, lambda step: jnp.float32(1.0), ADAPTED, abstract, seed=7
    )
    rng = np.random.default_rng(5)
    rows = [some_rows(rng)[0] for _ in range(2)]
    labels = rng.uniform(0, 4, (2, 2, 4, 5)).astype(np.float32)
    present = np.zeros_like(labels)
    present[:, 0, :3], present[:, 1, :1] = 1, 1
    batch = Batch._make(
        [
            jax.tree.map(lambda *x: np.stack(x), *rows),
            only_ratings(Ratings._make([labels, present])),
            np.zeros((2, 2, 4), np.int32),
            np.int32(2),
        ]
    )
    state, metrics = step(state, put(batch, BATCH_AXES, sharding))
    return float(metrics.loss), flatten(jax.device_get(optax.tree.get(state.opt_state, "trace")))


@functools.cache
def one_device_step(lora: LoraConfig):
    return one_step(lora, one_device())


@pytest.mark.slow
@pytest.mark.parametrize("remat", [r for r in REMAT if r != "none"])
def test_what_is_computed_again_drops_the_same(remat):
    lora = LoraConfig(rank=2, dropout=0.3)
    loss, gradient = one_device_step(lora)
    again, found = one_step(lora, one_device(), remat=remat)
    assert again == pytest.approx(loss, rel=1e-6)
    for path, leaf in gradient.items():
        close(found[path], leaf, 1e-5)


# ---- dropout -------------------------------------------------------------------------------------


def test_what_is_dropped_by_hand():
    x = np.random.default_rng(0).normal(1, 1, (200, 300)).astype(np.float32)
    found = np.asarray(drop(jnp.asarray(x), 0.25, jax.random.key(3)))
    kept = found != 0
    assert abs(kept.mean() - 0.75) < 0.01
    np.testing.assert_allclose(found[kept], x[kept] / 0.75, rtol=1e-6)
    np.testing.assert_array_equal(found, drop(jnp.asarray(x), 0.25, jax.random.key(3)))
    assert (found != np.asarray(drop(jnp.asarray(x), 0.25, jax.random.key(4)))).mean() > 0.3


@pytest.mark.slow
def test_it_drops_the_adapters_input_and_in_training_only(rng, monkeypatch):
    lora = LoraConfig(rank=2, dropout=0.3)
    model, plain = adapted(lora), adapted(dataclasses.replace(lora, dropout=0.0))
    params, (rows, _) = nest(some_params(model)), some_rows(rng)
    scores = pick(make_score(model)(params, rows))
    np.testing.assert_array_equal(scores, pick(make_score(plain)(params, rows)))

    def dropped(key):
        return pick(model(params, rows, jax.random.key(key)))

    assert np.abs(dropped(0) - scores).max() > 1e-2
    assert np.abs(dropped(0) - dropped(1)).max() > 1e-2
    np.testing.assert_array_equal(dropped(0), dropped(0))
    # All of it dropped, the adapters give nothing, and nothing else is touched.
    monkeypatch.setattr(rmjax.models.layers, "drop", lambda x, *_: jnp.zeros_like(x))
    base = nest(without_adapters(flatten(params)))
    expected = pick(make_score(make_plain_model(LLAMA))(base, rows))
    np.testing.assert_allclose(dropped(0), expected, atol=1e-6)


# ---- runs ----------------------------------------------------------------------------------------

RUN = dict(lora__rank=4, lora__alpha=32.0, lora__dropout=0.1, optimizer__learning_rate=0.02)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A causal Llama in Hugging Face's format, with its tokenizer."""
    decoder = tiny_llama(max_position_embeddings=512)
    return save_hf(tmp_path_factory.mktemp("lora") / "base", decoder, causal=True)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run with LoRA that began from `base`."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_config(workdir, init=str(base), model=None, tokenizer="", **RUN)
    run(config)
    return config


def state_of(config, step):
    """The model of a run that had `init`, and its state after a step, adapters apart."""
    stated = dataclasses.replace(config, model=open_pretrained(config.workdir).decoder)
    return make_model(stated, None, one_device()), restore(stated, step)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_stays_to_the_bit_and_only_the_rest_has_state(dtype, tmp_path):
    targets = ("q", "o", "down")
    config = tiny_config(tmp_path / "run", dtype=dtype, **RUN, lora__targets=targets)
    run(config)
    state, _ = restore(config)
    model, *_ = parts(config)
    before, after = (flatten(jax.device_get(p)) for p in (random_params(model, 0), state.params))
    free = {"head"} | {f"layers/{t}_lora_{x}" for t in targets for x in "ab"}
    assert {p for p in before if not np.array_equal(before[p], after[p])} == free
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        kept = path in free or "norm" in path
        assert leaf.dtype == ("float32" if kept else dtype), path
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [after[path].shape for path in free])


@pytest.mark.slow
def test_two_and_two_steps_are_four(tmp_path):
    """With dropout, to the bit: what is dropped goes by the step, in the same rows."""
    same = RUN | dict(data__row_length=512)  # chosen for two steps they could be others
    for steps in (2, 4):
        run(tiny_config(tmp_path / "two", steps=steps, **same))
    run(tiny_config(tmp_path / "four", steps=4, **same))
    ours, _ = restore(tiny_config(tmp_path / "two", steps=4, **same))
    theirs, _ = restore(tiny_config(tmp_path / "four", steps=4, **same))
    assert int(ours.step) == 4
    assert_same_bits(ours, theirs)


@pytest.mark.slow
def test_a_run_says_what_it_trains(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", steps=1, eval_every=0, **RUN)
    run(config)
    shown = capsys.readouterr().out
    assert "adapters of rank 4 for q, k, v, o, gate, up, down; the rest float32" in shown
    with pytest.raises(UserError, match="random weights"):
        orbax_to_peft(config.workdir, str(tmp_path / "peft"))


def unmerged(config) -> np.ndarray:
    """Scores of TALK by the run's best checkpoint, its adapters apart."""
    model, state = state_of(config, int(best_checkpoint(Path(config.workdir))[0].name))
    tokens = [encode(byte_tokenizer(), Conversation(messages)) for messages in TALK]
    rows = make_rows([[Segment([t])] for t in tokens], len(tokens), RowShape(len(tokens), 128, 1))
    found = np.asarray(make_score(model)(state.params, rows))[:, 0]
    base = nest(without_adapters(flatten(state.params)))
    plain = np.asarray(make_score(make_plain_model(model.config))(base, rows))[:, 0]
    assert np.abs(found - plain).max() > 1e-2  # the adapters have learned
    return found


def loaded(path) -> np.ndarray:
    scorer = rmjax.load(path)
    return np.asarray([list(s.attributes.values()) for s in scorer.score_many(TALK)])


@pytest.mark.slow
def test_merged_scores_are_the_unmerged_ones(trained, tmp_path):
    """Loaded from the run onto eight devices, and exported; both have no adapters left."""
    expected = unmerged(trained)
    np.testing.assert_allclose(loaded(trained.workdir), expected, atol=1e-5)
    notes = orbax_to_hf(trained.workdir, str(tmp_path / "hf"))
    assert any("merged" in note for note in notes)
    np.testing.assert_allclose(loaded(tmp_path / "hf"), expected, atol=1e-5)
    assert not any("lora" in key for key in tensors_of(tmp_path / "hf"))

    # What is loaded and what is exported is W + (alpha / rank) A B, by hand.
    _, state = state_of(trained, int(best_checkpoint(Path(trained.workdir))[0].name))
    params = flatten(jax.device_get(state.params))
    for target in TARGETS:
        a, b = (params.pop(f"layers/{target}_lora_{x}").astype(np.float64) for x in "ab")
        weight = params[f"layers/{target}"]
        added = np.einsum("lir,lro->lio", a.reshape(len(a), -1, 4), b.reshape(len(b), 4, -1))
        params[f"layers/{target}"] = (weight + 32 / 4 * added.reshape(weight.shape)).astype(
            np.float32
        )
    source = open_pretrained(trained.workdir)
    merged = flatten(
        load_params(source, make_plain_model(source.decoder), seed=0, dtype=jnp.float32)
    )
    by_hand, written = hf_state(source.decoder, nest(params), 5), tensors_of(tmp_path / "hf")
    ours = hf_state(source.decoder, nest(merged), 5)
    assert by_hand.keys() == written.keys()
    for key, tensor in by_hand.items():
        np.testing.assert_allclose(ours[key], tensor, atol=1e-6, err_msg=key)
        kind, shape, data = written[key]
        np.testing.assert_allclose(
            np.frombuffer(data, kind).reshape(shape), tensor, atol=1e-6, err_msg=key
        )


@pytest.mark.slow
def test_a_run_can_begin_from_a_run_with_lora(trained):
    """Whose adapters are then part of the weights, beside fresh ones."""
    source = open_pretrained(trained.workdir)
    config = dataclasses.replace(trained, lora=LoraConfig(rank=2, targets=("k",)))
    model = make_model(config, source, one_device())
    params = flatten(load_params(source, model, seed=0, dtype=jnp.float32))
    plain = make_plain_model(source.decoder)
    merged = flatten(load_params(source, plain, seed=0, dtype=jnp.float32))
    assert params.keys() - merged.keys() == {"layers/k_lora_a", "layers/k_lora_b"}
    for path, leaf in merged.items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)
    fresh = flatten(random_params(model, 0))
    np.testing.assert_array_equal(params["layers/k_lora_a"], fresh["layers/k_lora_a"])


@pytest.mark.slow
def test_peft_gives_the_same_scores(base, trained, tmp_path):
    peft = pytest.importorskip("peft", reason="the other side: pip install --no-deps peft==0.21.2")
    exported = tmp_path / "peft"
    orbax_to_peft(trained.workdir, str(exported))
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        base, config=transformers.AutoConfig.from_pretrained(exported)
    )
    theirs = peft.PeftModel.from_pretrained(model, exported).eval()
    tokens = [encode(byte_tokenizer(), Conversation(messages)) for messages in TALK]
    with torch.no_grad():
        found = [theirs(torch.from_numpy(t[None]).long()).logits[0].numpy() for t in tokens]
    np.testing.assert_allclose(found, unmerged(trained), atol=1e-5)

    # PEFT reads every tensor of the file, and would write the same.
    state = peft.get_peft_model_state_dict(theirs)
    written = tensors_of(exported)
    assert state.keys() == written.keys()
    for key, tensor in state.items():
        assert written[key] == ("float32", tuple(tensor.shape), tensor.numpy().tobytes()), key
    assert f"{Path(base).name}" == theirs.peft_config["default"].base_model_name_or_path
    with pytest.raises(UserError, match="PEFT"):
        open_pretrained(str(exported))


def test_no_adapters_to_export(base, tmp_path):
    hf_to_orbax(str(base), str(tmp_path / "orbax"))
    with pytest.raises(UserError, match="without LoRA"):
        orbax_to_peft(str(tmp_path / "orbax"), str(tmp_path / "peft"))


# ---- config, tables, counts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(lora__rank=-1), "config.lora.rank = -1"),
        (dict(lora__rank=2.0), "config.lora.rank = 2.0"),
        (dict(lora__rank=2, lora__alpha=0.0), "config.lora.alpha = 0.0"),
        (dict(lora__rank=2, lora__alpha=float("nan")), "config.lora.alpha"),
        (dict(lora__rank=2, lora__dropout=1.0), "config.lora.dropout = 1.0"),
        (dict(lora__rank=2, lora__targets=("q", "qkv")), "config.lora.targets = .*expected some"),
        (dict(lora__rank=2, lora__targets=()), "config.lora.targets"),
        (dict(lora__rank=2, lora__targets=("q", "q")), "config.lora.targets"),
        (dict(lora__rank=2, trainable=("head",)), "config.trainable .* config.lora.rank = 2"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(changes, named):
    with pytest.raises(UserError, match=named):
        validate(tiny_config("unused", **changes))


def test_the_tables_know_the_adapters():
    rows = [row for pair in ADAPTERS.values() for row in pair]
    assert len(rows) == 14
    assert all(flatten(decay_mask(nest({row.path: 0 for row in rows}))).values())


def test_flops_by_hand():
    """A product, its gradient by the activations; the adapters' and attention's by both factors."""
    decoder = tiny_llama(num_hidden_layers=1)
    lora = LoraConfig(rank=2, targets=("q", "down"))
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    adapters = 2 * (32 + 32) + 2 * (64 + 32)
    attention, head = 4 * (7 * 8 // 2) * 32, 2 * 32 * 5
    expected = 2 * 7 * (2 * weights + 3 * adapters) + 3 * (attention + head)
    assert model_flops(decoder, 5, [(0, [7])], training=True, lora=lora) == expected
