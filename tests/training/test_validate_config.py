import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from helpers import forked
from helpers.checks import known
from helpers.paths import ROOT
from helpers.runs import QUICKSTART, load_config
from rmjax.config import AlignConfig, as_flat_dict
from rmjax.data.batch import Batch, Pairs, PolicyTargets, Ratings, Responses, Rollouts, Targets
from rmjax.data.tokenized import TokenValues
from rmjax.errors import UserError
from rmjax.models.decoder_config import Rope
from rmjax.models.inputs import Rows
from rmjax.runtime.sharding import MeshConfig, Sharding, abstract_mesh
from rmjax.training.experiment import config_objective, make_model
from rmjax.training.objectives.objective import is_policy
from rmjax.training.rows import longest_row
from rmjax.training.step import make_program
from rmjax.training.validate_config import check_continues, validate

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def documented(path) -> list[tuple]:
    """The config itself, and with each argument its text names (`NAME.py:ARG`)."""
    args = set(re.findall(rf"{path.name}:(\w+)", path.read_text(encoding="utf-8")))
    return [(path, None), *((path, arg) for arg in sorted(args))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "arg"),
    [case for path in CONFIGS for case in documented(path)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_config_traces_on_its_mesh(path, arg):
    config = validate(load_config(path, arg))
    assert config.model is not None, "state the model, so that the config can be checked unrun"
    assert longest_row(config) <= config.model.max_position_embeddings
    weights = sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(
            make_model(config, None, Sharding(abstract_mesh(MeshConfig(), 1))).abstract()
        )
    )
    devices = 128 if weights > 2e11 else 64 if weights > 2e10 else 8
    sharding = Sharding(abstract_mesh(config.mesh, devices))
    model = make_model(config, None, sharding)
    program = make_program(
        model, config_objective(config), config.optimizer, steps=1000, trainable=config.trained
    )

    attributes, rows = len(config.data.attributes), config.rows_per_device * sharding.row_shards

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((2, rows, *sizes), dtype)

    row = shape(longest_row(config), dtype=jnp.int32)
    slots = shape(8, dtype=jnp.int32)
    pair = shape(4, dtype=jnp.int32)
    ratings = Ratings._make([shape(8, attributes)] * 2)
    pairs = Pairs._make([pair, pair, shape(4), shape(4)])
    targets = Targets(ratings, pairs)
    predicting = shape(longest_row(config), dtype=jnp.bool_)
    if isinstance(config, AlignConfig):
        values = TokenValues._make([shape(longest_row(config))] * 4)
        targets = Rollouts._make([predicting, row, values])
    elif is_policy(config.objective):
        targets = PolicyTargets(Responses._make([predicting, *[shape(8)] * 3]), pairs)
    microbatches = jax.ShapeDtypeStruct((), jnp.int32)
    batch = Batch._make([Rows._make([*[row] * 5, slots]), targets, slots, microbatches])
    after, metrics = jax.eval_shape(program.step, program.abstract, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.abstract
    )
    assert all(value.shape == () for value in metrics)

    if isinstance(config, AlignConfig) and config.rollout.mesh:
        sampling = Sharding(abstract_mesh(config.rollout.mesh, devices))
        options = dataclasses.replace(model.options, sharding=sampling)
        assert dataclasses.replace(model, options=options).abstract()

    # Weights, two moments and gradients in float32 leave a third of an 80 GB device.
    assert 16 * weights / devices < 80e9 * 2 / 3


def tiny(**changes):
    config = load_config(QUICKSTART)
    for field, value in changes.items():
        *parents, name = field.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        assert hasattr(owner, name), field
        setattr(owner, name, value)
    return config


BAD = {
    "steps": (dict(steps=5), "config.steps = 5 and config.epochs = 1"),
    "no_end": (dict(epochs=0), "config.steps = 0 and config.epochs = 0"),
    "negative_end": (dict(steps=-1), "config.steps = -1"),
    "batch_size": (dict(batch_size=0), "config.batch_size = 0"),
    "rows_per_device": (dict(rows_per_device=0), "config.rows_per_device = 0"),
    "max_length": (dict(data__max_length=0), "config.data.max_length = 0"),
    "row_length": (dict(data__row_length=64), "config.data.row_length = 64"),
    "learning_rate": (dict(optimizer__learning_rate=0.0), "config.optimizer.learning_rate = 0.0"),
    "infinite": (
        dict(preference__beta=math.inf),
        "config.preference.beta = inf: expected a finite",
    ),
    "nan": (dict(optimizer__learning_rate=math.nan), "config.optimizer.learning_rate = nan"),
    "clip_norm": (dict(optimizer__clip_norm=-1.0), "config.optimizer.clip_norm = -1.0"),
    "b2": (dict(optimizer__b2=1.0), "config.optimizer.b2 = 1.0"),
    "warmup_steps": (dict(optimizer__warmup_steps=-1), "config.optimizer.warmup_steps = -1"),
    "weight_decay": (dict(optimizer__weight_decay=-0.1), "config.optimizer.weight_decay = -0.1"),
    "final": (dict(optimizer__final_fraction=-0.1), "config.optimizer.final_fraction = -0.1"),
    "gamma": (dict(preference__gamma=-1.0), "config.preference.gamma = -1.0"),
    "scale": (dict(preference__strength_scale=0.0), "config.preference.strength_scale = 0.0"),
    "every": (dict(eval_every=-1), "config.eval_every = -1"),
    "seed": (dict(seed=-1), "config.seed = -1"),
    "schedule": (dict(optimizer__schedule="sqrt"), "config.optimizer.schedule = 'sqrt'"),
    "over_long": (dict(data__over_long="cut"), "config.data.over_long = 'cut'"),
    "objective": (dict(objective="bradley"), "config.objective = 'bradley'"),
    "dtype": (dict(dtype="fp8"), "config.dtype = 'fp8'"),
    "remat": (dict(remat="some"), "config.remat = 'some'"),
    "int": (dict(batch_size=8.0), "config.batch_size = 8.0: expected int"),
    "bool": (dict(batch_size=True), "config.batch_size = True: expected int"),
    "str": (dict(init=None), "config.init = None: expected str"),
    "tuple": (dict(data__attributes=["a"]), "config.data.attributes = ['a']: expected tuple"),
    "pair": (dict(data__label_range=(0.0, 1.0, 2.0)), "config.data.label_range"),
    "part": (dict(preference=MeshConfig()), "config.preference = MeshConfig"),
    "attributes": (dict(data__attributes=()), "config.data.attributes = ()"),
    "twice": (dict(data__attributes=("a", "a")), "config.data.attributes = ('a', 'a')"),
    "label_range": (dict(data__label_range=(4.0, 0.0)), "config.data.label_range = (4.0, 0.0)"),
    "both": (dict(data__hold_out=0.1), "config.data.validation and config.data.hold_out"),
    "hold_out": (dict(data__validation="", data__hold_out=1.0), "config.data.hold_out = 1.0"),
    "model": (dict(model=None), "config.model"),
    "tokenizer": (dict(tokenizer=""), "config.tokenizer"),
    "nothing": (dict(trainable=()), "config.trainable"),
    "pattern": (dict(trainable=("layers/(q",)), "config.trainable: 'layers/(q'"),
    "kv_heads": (dict(model__num_key_value_heads=3), "num_key_value_heads"),
    "layers": (dict(model__num_hidden_layers=0), "num_hidden_layers"),
    "head_dim": (dict(model__head_dim=7), "head_dim"),
    "rope": (dict(model__rope=Rope(type="yarn")), "rope_type"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_field_is_named(case):
    changes, message = BAD[case]
    with pytest.raises(UserError) as error:
        validate(tiny(**changes))
    assert message in str(error.value)


def test_a_float_field_takes_an_int():
    assert validate(tiny(epochs=2, optimizer__clip_norm=1)).epochs == 2


def test_flat_dict_is_the_configs_json():
    config = tiny()
    flat = as_flat_dict(config)
    assert json.loads(json.dumps(flat)) == flat
    assert flat["optimizer.learning_rate"] == config.optimizer.learning_rate
    assert flat["model.rope.theta"] == known(config.model).rope.theta
    assert flat["data.attributes"] == list(config.data.attributes)
    assert as_flat_dict(dataclasses.replace(config, model=None))["model"] is None


def test_a_run_continues_with_its_own_numbers_only():
    before = json.loads(json.dumps(as_flat_dict(tiny())))
    check_continues(before, tiny())
    free = dict(workdir="elsewhere", eval_every=7, checkpoint_every=9, wandb="x", remat="full")
    check_continues(before, tiny(**free, mesh=MeshConfig(fsdp=2, tensor=4)))
    fixed = dict(
        optimizer__learning_rate=1.0,
        seed=3,
        data__train="generated:100",
        batch_size=3,
        rows_per_device=3,
        trainable=("head",),
        dtype="bfloat16",
        model__initializer_range=0.1,
    )
    for field, value in fixed.items():
        with pytest.raises(UserError, match=field.replace("__", r"\.") + ": was .*, now "):
            check_continues(before, tiny(**{field: value}))


def test_a_field_that_is_gone_matters_only_if_it_was_on():
    before = as_flat_dict(tiny())
    check_continues(before | {"preference.gone": 0.0, "gone": ""}, tiny())
    with pytest.raises(UserError, match=r"preference.gone: was 0.1, now None"):
        check_continues(before | {"preference.gone": 0.1}, tiny())


def test_a_field_that_a_run_began_without_counts_as_its_default():
    before = as_flat_dict(tiny())
    for field in (
        "optimizer.moments",
        "preference.center_rewards_coefficient",
        "lora.targets",
        "data.share_prompts",
    ):
        del before[field]
    check_continues(before, tiny())
    with pytest.raises(UserError, match=r"optimizer\.moments: was 'float32', now 'bfloat16'"):
        check_continues(before, tiny(optimizer__moments="bfloat16"))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_ends_fixes_the_number_of_steps(schedule):
    before = as_flat_dict(tiny(optimizer__schedule=schedule))
    with pytest.raises(UserError, match="epochs: was 1, now 2"):
        check_continues(before, tiny(optimizer__schedule=schedule, epochs=2))
    before = as_flat_dict(tiny(optimizer__schedule="constant"))
    check_continues(before, tiny(optimizer__schedule="constant", epochs=2))


# One process imports everything and forks for each command line: an import takes seconds.
_USE = f"--config={QUICKSTART}"
_ALIGN = f"--config={ROOT}/configs/quickstart_align.py"
COMMANDS = {
    "no_config": ([], "--config"),
    "no_file": (["--config=configs/nope.py"], "configs/nope.py"),
    "bad_argument": ([f"--config={ROOT}/configs/smollm2_135m_regression.py:nope"], "nope"),
    "unknown_field": ([_USE, "--config.nope=1"], "nope"),
    "unknown_inner_field": ([_USE, "--config.optimizer.nope=1"], "nope"),
    "wrong_type": ([_USE, "--config.batch_size=many"], "config.batch_size"),
    "fraction": ([_USE, "--config.batch_size=1.5"], "config.batch_size"),
    "wrong_bool": ([_USE, "--config.data.packing=maybe"], "config.data.packing"),
    "wrong_tuple": ([_USE, "--config.data.attributes=5"], "config.data.attributes"),
    "bad_choice": ([_USE, "--config.optimizer.schedule=sqrt"], "config.optimizer.schedule"),
    "other_flag": ([_USE, "--batch_size=3"], "batch_size"),
    "not_a_flag": ([_USE, "batch_size=3"], "batch_size=3"),
    "missing_data": ([_USE, "--config.data.train=nope.jsonl"], "nope.jsonl"),
    "missing_init": ([_USE, "--config.init=./nope"], "nope"),
    "reward": ([_ALIGN, "--config.rewards.teacher.weight=x"], "config.rewards.teacher.weight"),
    "no_reward": ([_ALIGN, "--config.rewards.nobody.weight=1"], "nobody"),
    "mesh": ([_USE, "--config.mesh.tensor=3"], "'tensor': 3"),
    "vocabulary": ([_USE, "--config.model.vocab_size=100"], "vocab_size"),
    "workdir": ([_USE, "--config.workdir=taken"], "taken: not empty"),
    "not_a_directory": ([_USE, "--config.workdir=taken/note.txt/run"], "taken/note.txt/run"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("commands")
    (directory / "taken").mkdir()
    (directory / "taken" / "note.txt").write_text("mine")
    ended = {}
    for number, (name, (command, _)) in enumerate(COMMANDS.items()):
        own = command[:1] and not any("workdir" in part for part in command)
        workdir = [f"--config.workdir=run{number}"] if own else []
        ended[name] = forked.run(["-m", "rmjax.train", *command, *workdir], cwd=directory)
    assert [path.name for path in (directory / "taken").iterdir()] == ["note.txt"]
    return ended


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_is_answered_in_one_message(outcomes, name):
    code, output = outcomes[name].returncode, outcomes[name].stdout + outcomes[name].stderr
    assert code == 1
    assert output.startswith("error: ") and output.count("\n") == 1, output
    assert COMMANDS[name][1] in output
    assert "Traceback" not in output
