"""The experiment as plain typed dataclasses, in the order of the flow.

A config file defines `get_config(arg=None) -> Config`. Any field can be overridden on the command
line: `--config.optimizer.learning_rate=1e-6`.
"""

import dataclasses
import re
import types
import typing
from typing import Any, get_args, get_origin, get_type_hints

from rmjax.data.tokenize import OVER_LONG
from rmjax.errors import UserError, differing
from rmjax.models.attention.dispatch import ATTENTION
from rmjax.models.config import TARGETS, LlamaConfig, LoraConfig
from rmjax.models.decoder import REMAT
from rmjax.models.hf_config import llama_config_from_hf, llama_config_to_hf
from rmjax.models.parameters import ADAPTED
from rmjax.models.rewards.spec import HELPSTEER2
from rmjax.runtime.sharding import MeshConfig
from rmjax.training.objectives.objective import make_objective
from rmjax.training.objectives.pairs import TIES, PreferenceConfig
from rmjax.training.optimizer import MOMENTS, SCHEDULES, OptimizerConfig

EVERYTHING = (".*",)


@dataclasses.dataclass
class DataConfig:
    """Where ratings or preference pairs come from and what becomes a sample.

    Attributes:
      train: a hub id, a directory, a file, or `generated:COUNT`; see `data/sources.py`.
      validation: likewise; empty if `hold_out` is set, or for no validation.
      pairs: where pairs come from, for an objective that learns from ratings, in `train`, and from
        pairs. With pairs alone they are in `train`.
      validation_pairs: likewise, beside `validation`.
      compare: a rating whose differences make pairs of the responses to a prompt; empty if the
        sources of pairs hold pairs.
      hold_out: share of the training prompts held out for validation.
      attributes: rating columns. The first is the headline: a model's scalar reward unless told
        otherwise, and what preference pairs train.
      label_range: the lowest and highest rating; anything else is an error.
      max_length: most tokens of a sample.
      over_long: what happens to a longer one: `drop`, `truncate_left` or `error`.
      row_length: token places of a row, at least `max_length`; 0 takes `max_length`.
      packing: several prompts a row, or one.
      share_prompts: whether the tokens that all responses to a prompt begin with are computed once,
        in one row, instead of once a response. The numbers are the same.
    """

    train: str
    validation: str = ""
    pairs: str = ""
    validation_pairs: str = ""
    compare: str = ""
    hold_out: float = 0.0
    attributes: tuple[str, ...] = HELPSTEER2
    label_range: tuple[float, float] = (0.0, 4.0)
    max_length: int = 4096
    over_long: str = "drop"
    row_length: int = 0
    packing: bool = True
    share_prompts: bool = True


@dataclasses.dataclass
class EveryConfig:
    """How often, in steps; the last step counts too. 0: only then."""

    every: int = 0


@dataclasses.dataclass
class Config:
    """One run.

    Attributes:
      workdir: where the run lives; running the same command again continues it.
      data: see `DataConfig`.
      init: weights to start from: a Hugging Face directory or hub id, a GGUF file, an Orbax model
        or a run; empty for random weights.
      model: the architecture. Needed without `init`; with it, a statement that is checked.
      tokenizer: a directory, or `bytes`; empty takes the one of `init`.
      objective: a name in `objectives.OBJECTIVES`, or a sum of several with coefficients, such as
        `regression + 0.5 * bradley_terry`.
      preference: how pairs are learned from.
      trainable: patterns that must match a parameter's whole path for it to be trained.
      lora: adapters to train with the head, instead of the weights; see `lora.LoraConfig`.
      batch_size: responses a step.
      steps: how many, or
      epochs: how often to see the training data; one of the two is set, the other 0.
      rows_per_device: rows computed at once on each row shard of the mesh; a step accumulates
        over as many micro-batches as its samples need.
      dtype: of the computation; `auto` is bfloat16 on accelerators and float32 on CPUs.
      remat: what is computed again in the backward pass; see `model.ModelOptions`.
      attention: what computes it: `auto`, or one of `kernels.KERNELS`.
      seed: of the head or all weights, and of the data's order.
      wandb: project to report to; empty for none.
    """

    workdir: str
    data: DataConfig
    optimizer: OptimizerConfig
    batch_size: int
    init: str = ""
    model: LlamaConfig | None = None
    tokenizer: str = ""
    objective: str = "regression"
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    trainable: tuple[str, ...] = EVERYTHING
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    steps: int = 0
    epochs: float = 0.0
    rows_per_device: int = 1
    dtype: str = "auto"
    remat: str = "full"
    attention: str = "auto"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EveryConfig = dataclasses.field(default_factory=EveryConfig)
    checkpoint: EveryConfig = dataclasses.field(default_factory=EveryConfig)
    seed: int = 0
    wandb: str = ""

    @property
    def row_length(self) -> int:
        """Token places of a row."""
        return self.data.row_length or self.data.max_length

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns of what is trained: with LoRA adapters and head, else `trainable`."""
        return ADAPTED if self.lora.rank else self.trainable


# Fields that name one of a few things. (Config overrides cannot be typed as `Literal`.)
_CHOICES = {
    "data.over_long": OVER_LONG,
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
)
_NOT_NEGATIVE = (
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "eval.every",
    "checkpoint.every",
    "seed",
    "preference.center_rewards_coefficient",
    "lora.rank",
)
_FRACTIONS = ("optimizer.b1", "optimizer.b2", "data.hold_out", "lora.dropout")
_RANGES = (
    (_POSITIVE, lambda value: value > 0, "more than 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (_FRACTIONS, lambda value: 0 <= value < 1, "0 up to 1"),
)

# What a run may change when it is continued: none of these changes its numbers so far.
_MAY_CHANGE = ("workdir", "eval.", "checkpoint.", "mesh.", "wandb", "steps", "epochs", "remat")
_MAY_CHANGE += ("attention",)


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
    if config.row_length < data.max_length:
        raise UserError(
            f"config.data.row_length = {data.row_length} is less than data.max_length = "
            f"{data.max_length}: a sample must fit in a row"
        )
    _check_objective(config)
    if len(set(data.attributes)) != len(data.attributes) or not data.attributes:
        raise UserError(f"config.data.attributes = {data.attributes!r}: expected distinct names")
    if data.label_range[0] >= data.label_range[1]:
        raise UserError(f"config.data.label_range = {data.label_range!r}: expected (low, high)")
    if data.validation and data.hold_out:
        raise UserError("config.data.validation and config.data.hold_out are both set")
    if not config.init and config.model is None:
        raise UserError("config.init is empty: set it, or config.model for random weights")
    if not config.init and not config.tokenizer:
        raise UserError("config.init is empty: set config.tokenizer as well")
    if config.model is not None:  # the relations that a model's own config.json must keep
        llama_config_from_hf(llama_config_to_hf(config.model), "config.model")
    return config


def _check_objective(config: Config) -> None:
    """The relations between an objective and its data."""
    data, preference = config.data, config.preference
    objective = make_objective(config.objective, data.attributes, preference, data.label_range)
    if not 0 <= preference.label_smoothing < 0.5:
        raise UserError(
            f"config.preference.label_smoothing = {preference.label_smoothing!r}: expected 0 up "
            "to .5"
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
    if data.compare and not objective.pairs:
        raise UserError(
            f"config.data.compare = {data.compare!r} makes pairs, and config.objective = "
            f"{config.objective!r} learns from none"
        )


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
            "LoRA trains its adapters and the head; leave trainable as it is, or set lora.rank to 0"
        )


def _check_types(value: Any, path: str) -> None:
    for field, hint in get_type_hints(type(value)).items():
        item = getattr(value, field)
        if not _fits(item, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise UserError(f"{path}.{field} = {item!r}: expected {wanted.replace('typing.', '')}")
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
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def as_flat_dict(config: Config) -> dict[str, Any]:
    """`{"optimizer.learning_rate": 1e-6, ...}` in JSON's types, for files and comparisons."""

    def flat(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {
                k: v
                for name, item in value.items()
                for k, v in flat(item, f"{path}.{name}").items()
            }
        return {path[1:]: list(value) if isinstance(value, tuple) else value}

    return flat(dataclasses.asdict(config), "")


def check_continues(before: dict[str, Any], now: Config) -> None:
    """Raises a `UserError` with the difference unless `now` can continue the run of `before`.

    More or fewer steps are fine where the learning rate does not depend on their number. A run
    that began before there was a field is as if it had its default.
    """
    after = as_flat_dict(now)
    defaults = as_flat_dict(Config("", DataConfig(""), OptimizerConfig(0.0), 0))
    before = {field: defaults[field] for field in after if field in defaults} | before
    fixed = ("steps", "epochs") if now.optimizer.schedule != "constant" else ()
    changed = [
        f"  {field}: was {old!r}, now {new!r}"
        for field, (old, new) in sorted(differing(before, after).items())
        if field in fixed or not field.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{now.workdir}: the run there was started with another config:\n"
            + "\n".join(changed)
            + "\nUse the old values to continue it, or another --config.workdir to start anew."
        )
