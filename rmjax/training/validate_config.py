"""Checks a config: every field by itself, the relations between them, and what a run may change."""

import dataclasses
import keyword
import math
import re
import types
import typing
from typing import Any, get_args, get_origin, get_type_hints

from rmjax.config import (
    EVERYTHING,
    MOMENTS,
    SCHEDULES,
    TIES,
    AlignConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    RewardConfig,
    as_flat_dict,
)
from rmjax.data.fields import LARGEST
from rmjax.data.tokenize import OVER_LONG, TURNS
from rmjax.errors import UserError, differing
from rmjax.generation.completions import SamplingSettings
from rmjax.models.attention.dispatch import ATTENTION
from rmjax.models.decoder import REMAT
from rmjax.models.decoder_config import TARGETS
from rmjax.models.hf_config import check_expressible
from rmjax.models.rewards.spec import check_names
from rmjax.training.objectives.objective import is_policy, objective_of
from rmjax.training.objectives.rollouts import has_critic, parse_ratings

# Fields that name one of a few things. (Config overrides cannot be typed as `Literal`.)
_SMALLEST = 1.1754943508222875e-38  # that float32 has with all its digits
_CHOICES = {
    "data.over_long": OVER_LONG,
    "data.turns": TURNS,
    "preference.ties": TIES,
    "optimizer.schedule": SCHEDULES,
    "optimizer.moments": MOMENTS,
    "dtype": ("auto", "float32", "bfloat16"),
    "remat": REMAT,
    "attention": ATTENTION,
}

_POSITIVE = (
    "batch_size",
    "rows_per_device",
    "data.max_length",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "optimizer.eps",
    "lora.alpha",
    "preference.strength_scale",
)
_NOT_NEGATIVE = (
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.final_fraction",
    "eval_every",
    "checkpoint_every",
    "seed",
    "data.row_length",
    "preference.center_rewards_coefficient",
    "preference.gamma",
    "lora.rank",
)
_FRACTIONS = ("optimizer.b1", "optimizer.b2", "data.hold_out", "lora.dropout")
_RANGES = (
    (_POSITIVE, lambda value: value > 0, "more than 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (_FRACTIONS, lambda value: 0 <= value < 1, "0 up to 1"),
)

# What a run may change when it is continued: none of these changes its numbers so far.
_MAY_CHANGE = ("workdir", "eval", "checkpoint", "mesh.", "wandb", "steps", "epochs")
_MAY_CHANGE += ("remat", "attention", "rollout.mesh")
_SERVERS = (".server", ".timeout")  # the ends of fields that may change: a server may move
_LONGEST = 24 * 3600.0


def validate(config: Config) -> Config:
    """Checks every field's type and the relations between fields.

    Raises:
      UserError: naming the field, its value and what is expected.
    """
    _check_types(config, "config")
    flat = as_flat_dict(config)
    for name, choices in _CHOICES.items():
        if flat[name] not in choices:
            raise UserError(f"config.{name} = {flat[name]!r}: there are {', '.join(choices)}")
    for name, value in flat.items():
        numbers = [x for x in (value if isinstance(value, list) else [value]) if type(x) is float]
        if not all(x == 0 or _SMALLEST <= abs(x) <= LARGEST for x in numbers):
            raise UserError(
                f"config.{name} = {value!r}: expected a finite number that float32 has (0, or from "
                f"{_SMALLEST:.2g} to {LARGEST:.2g})"
            )
    data = config.data
    if (config.steps > 0) == (config.epochs > 0) or min(config.steps, config.epochs) < 0:
        raise UserError(
            f"config.steps = {config.steps} and config.epochs = {config.epochs:g}: set one of them "
            "and leave the other 0"
        )
    for names, fits, wanted in _RANGES:
        for name in names:
            if not fits(flat[name]):  # which a NaN never does
                raise UserError(f"config.{name} = {flat[name]!r}: expected {wanted}")
    if not config.trainable:
        raise UserError("config.trainable is empty: nothing would be trained")
    for pattern in config.trainable:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.trainable: {pattern!r} is not a pattern ({error})") from error
    _check_lora(config)
    if data.row_length and data.row_length < data.max_length:
        raise UserError(
            f"config.data.row_length = {data.row_length} is less than data.max_length = "
            f"{data.max_length}: a sample must fit in a row; 0 chooses a length from the data"
        )
    _check_objective(config)
    if isinstance(config, AlignConfig):
        _check_alignment(config)
    if data.attributes or not is_policy(config.objective):
        check_names(data.attributes, f"config.data.attributes = {data.attributes!r}")
    if data.label_range[0] >= data.label_range[1]:
        raise UserError(f"config.data.label_range = {data.label_range!r}: expected (low, high)")
    if data.validation and data.hold_out:
        raise UserError("config.data.validation and config.data.hold_out are both set")
    if not config.init and config.model is None:
        raise UserError("config.init is empty: set it, or config.model for random weights")
    if not config.init and not config.tokenizer:
        raise UserError("config.init is empty: set config.tokenizer as well")
    if config.model is not None:  # the relations that a model's own config.json must keep
        check_expressible(config.model, "config.model")
    return config


def _check_objective(config: Config) -> None:
    """The relations between an objective and its data."""
    data, preference = config.data, config.preference
    objective = objective_of(config)
    if not 0 <= preference.label_smoothing < 0.5:
        raise UserError(
            f"config.preference.label_smoothing = {preference.label_smoothing!r}: expected 0 or "
            "more, less than .5"
        )
    if objective.pairs and config.batch_size % 2:
        raise UserError(
            f"config.batch_size = {config.batch_size} counts responses: with pairs it must be even"
        )
    if (objective.pairs and objective.ratings) != bool(data.pairs):
        raise UserError(
            f"config.data.pairs = {data.pairs!r} with config.objective = {config.objective!r}: it "
            "is for objectives that learn from ratings and pairs, and these need it"
        )
    if bool(data.validation_pairs) != bool(data.validation and data.pairs):
        raise UserError(
            f"config.data.validation_pairs = {data.validation_pairs!r}: it goes with data.pairs "
            "and data.validation, and they with it"
        )
    if objective.policy:
        _check_policy(config)
    if data.turns == "all" and (objective.pairs or not objective.policy):
        raise UserError(
            f"config.data.turns = 'all' with config.objective = {config.objective!r}: only 'sft' "
            "by itself learns every turn of the assistant's; a pair is compared by its last turns, "
            "and a rating is of the last one"
        )
    if data.compare and not objective.pairs:
        raise UserError(
            f"config.data.compare = {data.compare!r} makes pairs, and config.objective = "
            f"{config.objective!r} learns from none"
        )


def _check_policy(config: Config) -> None:
    if config.data.over_long == "truncate_left":
        raise UserError(
            "config.data.over_long = 'truncate_left' with config.objective = "
            f"{config.objective!r}: a policy would learn answers to prompts that it did not see; "
            "choose 'drop' or 'error'"
        )


def _check_alignment(config: AlignConfig) -> None:
    """The relations between what a policy samples, what it is worth, and a step."""
    rollout, gradient = config.rollout, config.policy_gradient
    if not config.rewards:
        raise UserError(
            "config.rewards is empty: give at least one, such as "
            "rewards={'teacher': RewardConfig(model='PATH')}"
        )
    for name, reward in config.rewards.items():
        _check_reward(name, reward)
    if not any(reward.weight for reward in config.rewards.values()):
        raise UserError("config.rewards: every weight is 0, so nothing would be learned")
    for name in ("unended_penalty", "length_penalty"):
        if not math.isfinite(getattr(config.shaping, name)):
            raise UserError(f"config.shaping.{name}: expected a finite number")
    if rollout.push_every < 1 or (rollout.push_every > 1 and not rollout.server):
        raise UserError(
            f"config.rollout.push_every = {rollout.push_every} with rollout.server = "
            f"{rollout.server!r}: expected 1, or more with a server"
        )
    sampled = [f.name for f in dataclasses.fields(SamplingSettings) if f.name != "seed"]
    try:
        SamplingSettings.of({name: getattr(rollout, name) for name in sampled})
    except UserError as error:
        raise UserError(f"config.rollout.{error}") from error
    if rollout.rows < 1:
        raise UserError(f"config.rollout.rows = {rollout.rows}: expected 1 or more")
    if rollout.n < 2 and not has_critic(config):
        raise UserError(
            f"config.rollout.n = {rollout.n}: a sample is compared with the prompt's others, so "
            "there must be 2 or more"
        )
    parts = rollout.n * max(1, gradient.minibatches)
    if gradient.minibatches < 1 or config.batch_size % parts:
        raise UserError(
            f"config.batch_size = {config.batch_size} responses of rollout.n = {rollout.n} each, "
            f"in policy_gradient.minibatches = {gradient.minibatches}: expected a multiple of both"
        )
    if rollout.max_tokens >= config.data.max_length:
        raise UserError(
            f"config.rollout.max_tokens = {rollout.max_tokens} leaves no room for a prompt in "
            f"data.max_length = {config.data.max_length}"
        )
    for name in ("kl", "clip_below", "clip_above"):
        value = getattr(gradient, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"config.policy_gradient.{name} = {value!r}: expected 0 or more")
    if gradient.passes < 1:
        raise UserError(f"config.policy_gradient.passes = {gradient.passes}: expected 1 or more")
    if config.objective == "steerlm2" and not gradient.ratings:
        raise UserError(
            "config.policy_gradient.ratings is empty: the objective 'steerlm2' needs the ratings "
            "that answers shall have, such as helpfulness:4,verbosity:2"
        )
    if gradient.ratings and config.objective != "steerlm2":
        raise UserError(
            f"config.policy_gradient.ratings = {gradient.ratings!r}: only the objective 'steerlm2' "
            f"asks for ratings; leave them empty for {config.objective!r}"
        )
    low, high = config.data.label_range
    for name, rating in parse_ratings(gradient.ratings).items() if gradient.ratings else ():
        if not low <= rating <= high:  # which a NaN never is
            raise UserError(
                f"config.policy_gradient.ratings asks for {name}:{rating:g}: expected one in "
                f"config.data.label_range = {config.data.label_range!r}"
            )
    if has_critic(config):
        _check_critic(config)


def _check_critic(config: AlignConfig) -> None:
    critic, flat = config.critic, as_flat_dict(config)
    if not (critic.init or config.only_model):
        raise UserError(
            "config.critic.init is empty: name a reward model to start the critic from; without, "
            "config.rewards must have one model with a weight, and no second one"
        )
    for name in (f"critic.{name}" for name in _CHOICES if name.startswith("optimizer.")):
        choices = _CHOICES[name.removeprefix("critic.")]
        if flat[name] not in choices:
            raise UserError(f"config.{name} = {flat[name]!r}: there are {', '.join(choices)}")
    for names, fits, wanted in _RANGES:
        for name in (f"critic.{name}" for name in names if name.startswith("optimizer.")):
            if not fits(flat[name]):
                raise UserError(f"config.{name} = {flat[name]!r}: expected {wanted}")
    for name in ("discount", "smoothing"):
        if not 0 <= getattr(critic, name) <= 1:
            raise UserError(f"config.critic.{name} = {getattr(critic, name)!r}: expected 0 to 1")
    if not 0 < critic.clip < math.inf:
        raise UserError(f"config.critic.clip = {critic.clip!r}: expected more than 0")


def _check_reward(name: str, reward: RewardConfig) -> None:
    where = f"config.rewards.{name}"
    # The command line reads `config.rewards.NAME.model` as Python would.
    if not name.isidentifier() or keyword.iskeyword(name) or hasattr(dict, name):
        raise UserError(
            f"config.rewards has {name!r}: expected a name of letters, digits and underscores that "
            "is no word of Python's and no method of a dict's"
        )
    given = [kind for kind in ("model", "function", "server") if getattr(reward, kind)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(f"{where}: of model, function and server give one; found {found}")
    if reward.value and reward.function:
        raise UserError(f"{where}.value = {reward.value!r} is of a model or a server")
    if reward.server and reward.value and not reward.value.isdecimal():
        raise UserError(
            f"{where}.value = {reward.value!r}: of a server, expected which of its numbers, from 0"
        )
    if not math.isfinite(reward.weight):
        raise UserError(f"{where}.weight = {reward.weight!r}: expected a finite number")
    if not 0 < reward.timeout <= _LONGEST:
        raise UserError(f"{where}.timeout = {reward.timeout!r}: expected seconds, up to a day")


def _check_lora(config: Config) -> None:
    targets = config.lora.targets
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets or len(set(targets)) < len(targets):
        raise UserError(
            f"config.lora.targets = {targets!r}: expected some of {', '.join(TARGETS)}, each once"
        )
    if config.lora.rank and config.trainable != EVERYTHING:
        raise UserError(
            f"config.trainable = {config.trainable!r} with config.lora.rank = {config.lora.rank}: "
            "LoRA trains its adapters and a reward model's head; leave trainable as it is, or set "
            "lora.rank to 0"
        )


def _check_types(value: Any, path: str) -> None:
    for field, hint in get_type_hints(type(value)).items():
        item = getattr(value, field)
        if not _fits(item, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise UserError(f"{path}.{field} = {item!r}: expected {wanted.replace('typing.', '')}")
        for name, part in item.items() if isinstance(item, dict) else ():
            _check_types(part, f"{path}.{field}.{name}")
        if dataclasses.is_dataclass(item):
            _check_types(item, f"{path}.{field}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_fits(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_continues(before: dict[str, Any], now: Config) -> None:
    """Raises a `UserError` with the difference unless `now` can continue the run of `before`.

    More or fewer steps are fine where the learning rate does not depend on their number. A run
    that began before there was a field is as if it had its default. A field that is gone since
    then changed nothing if it was off: 0, False or empty.
    """
    after = as_flat_dict(now)
    defaults = as_flat_dict(type(now)("", DataConfig(""), OptimizerConfig(0.0), 0))
    before = {field: defaults[field] for field in after if field in defaults} | before
    before = {field: value for field, value in before.items() if field in after or value}
    fixed = ("steps", "epochs") if now.optimizer.schedule != "constant" else ()
    changed = [
        f"  {field}: was {old!r}, now {new!r}"
        for field, (old, new) in sorted(differing(before, after).items())
        if field in fixed or not (field.startswith(_MAY_CHANGE) or field.endswith(_SERVERS))
    ]
    if changed:
        raise UserError(
            f"{now.workdir}: the run there was started with another config:\n"
            + "\n".join(changed)
            + "\nUse the old values to continue it, or another --config.workdir to start anew."
        )
