"""Fits the head alone, on features that are computed once: a look at a model, on a laptop.

    python -m rmjax.probe --config=configs/NAME.py DST [--fit=adamw] [--config.field=value]

The config is a run's: its data, weights (`init`), attributes, objective and seed. What the head
reads of each sample is computed by the model once and kept in the cache, so that another fit takes
seconds; a killed extraction goes on where it was. DST becomes an Orbax model: the weights of
`init` and the new head.

`--fit=ridge`, the default of the objective `regression`, solves for the head; its strength is that
which predicts training prompts best that are left out, so held-out data stay unseen.
`--fit=adamw`, the default of every other objective, does the steps that `rmjax.train` would do with
`trainable=("head",)`. See docs/probe.md.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from absl import flags
from jaxtyping import Float32
from rich.console import Console

from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.journal import check_target
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.hf_mapping import from_hf
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.model_files import write_model_files
from rmjax.checkpoints.orbax_weights import named_weights
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.config import Config
from rmjax.data.batches import Batches
from rmjax.data.planning import row_shape
from rmjax.data.tokenized import TokenizedData
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.evaluation.metrics import attribute_metrics, mean_ratings
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_features
from rmjax.models.attention.dispatch import alignment
from rmjax.models.init import random_head
from rmjax.models.inputs import ROWS_AXES
from rmjax.models.model import Model
from rmjax.models.parameters import HEAD
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.memory import keep_freed_memory
from rmjax.runtime.sharding import Sharding, check_divisible, make_mesh, put
from rmjax.training.command_line import run_with_config
from rmjax.training.console import attribute_table, pair_table
from rmjax.training.datasets import load_data
from rmjax.training.experiment import config_objective, make_model, pick_tokenizer, with_first_head
from rmjax.training.probing.adamw import head_scores, train_head
from rmjax.training.probing.features import (
    Features,
    cached_features,
    describe_model,
    fingerprint_weights,
)
from rmjax.training.probing.ridge import Ridge, fit_ridge
from rmjax.training.validate_config import validate
from rmjax.training.validation import ValidationMetrics, validation_metrics
from rmjax.training.workdir import run_spec

FITS = ("ridge", "adamw")
_FIT = flags.DEFINE_enum("fit", None, FITS, "How the head is fitted; see docs/probe.md.")


@dataclasses.dataclass(frozen=True)
class Samples:
    """Tokenised samples and what the head reads of them."""

    data: TokenizedData
    features: Float32[np.ndarray, "N D"]


def probe(config: Config, dst: str, fit: str = "") -> None:
    """The command.

    Args:
      config: of the run.
      dst: directory to make; must not exist or be empty.
      fit: one of `FITS`; empty for the objective's default.

    Raises:
      UserError: something that the user can mend.
    """
    fit = check(config, dst, fit)
    enable_compilation_cache()
    keep_freed_memory()
    console = Console(highlight=False, soft_wrap=True)

    # ---- mesh, model, tokenizer, data --------------------------------------------------------
    sharding, source = Sharding(make_mesh(config.mesh)), open_pretrained(config.init)
    if source.lora.rank:
        raise UserError(
            f"{config.init}: trained with LoRA; merge its adapters first, with `python -m "
            "rmjax.convert orbax-to-hf`"
        )
    model = make_model(config, source, sharding)
    tokenizer = pick_tokenizer(config, source, model.config.vocab_size)
    training, validation = make_batches(config, model, tokenizer)

    # ---- features, once ----------------------------------------------------------------------
    began = time.monotonic()
    train, held = extract(config, source, model, training, validation, console)
    console.print(
        f"features    {len(train.data):,} samples to train on"
        + (f", {len(held.data):,} held out" if held else "")
        + f"; {time.monotonic() - began:.1f} s"
    )

    # ---- fit ---------------------------------------------------------------------------------
    began = time.monotonic()
    if fit == "ridge":
        head = show_ridge(config, train, held, console)
    else:
        head = show_training(config, source, model, train, held, console)
    console.print(f"fit         {fit}; {time.monotonic() - began:.1f} s")

    # ---- model -------------------------------------------------------------------------------
    for note in write(config, source, model, tokenizer, head, train.data, dst):
        console.print(note)
    console.print(
        f"written: {dst}\n\nNext:\n"
        f"  python -m rmjax.convert orbax-to-hf {dst} {dst}-hf\n"
        f'  python\n  >>> import rmjax\n  >>> rm = rmjax.load("{dst}")'
    )


def check(config: Config, dst: str, fit: str) -> str:
    """How to fit; raises a `UserError` unless the config is one that a probe can do."""
    validate(config)
    check_target(dst)
    if not config.init:
        raise UserError("config.init is empty: a probe reads what a trained model computes")
    if config_objective(config).levels:
        raise UserError(
            f"config.objective = {config.objective!r}: a probe fits the head alone, without "
            "thresholds; take 'regression', or rmjax.train with "
            "--config.trainable=\"('head','thresholds')\""
        )
    if config.lora.rank:
        raise UserError(
            f"config.lora.rank = {config.lora.rank}: a probe trains the head alone; set it to 0"
        )
    regression = config.objective == "regression"
    if fit == "ridge" and not regression:
        raise UserError(
            f"--fit=ridge with config.objective = {config.objective!r}: it solves 'regression' "
            "alone; give --fit=adamw"
        )
    return fit or ("ridge" if regression else "adamw")


def make_batches(
    config: Config, model: Model, tokenizer: Tokenizer
) -> tuple[Batches, Batches | None]:
    """Every training and every held-out sample once, in the rows of a run."""
    share, packing = config.data.share_prompts, config.data.packing
    align = alignment(model.options.attention, config.row_length)
    data, validation = load_data(config, tokenizer, share, align)
    sharding = model.options.sharding
    rows = config.rows_per_device * sharding.row_shards
    places = sharding.activation(("row", "length"))
    check_divisible("rows of config.data.row_length", (rows, config.row_length), places)
    shape = row_shape(
        data, rows=rows, length=config.row_length, packing=packing, share=share, align=align
    )
    made = [
        evaluation_batches(part, shape, packing=packing, share=share) if part is not None else None
        for part in (data, validation)
    ]
    assert made[0] is not None
    return made[0], made[1]


def extract(
    config: Config,
    source: Pretrained,
    model: Model,
    training: Batches,
    validation: Batches | None,
    console: Console,
) -> tuple[Samples, Samples | None]:
    """The samples with their features; the weights are read only if one is missing."""
    made_by = describe_model(model, fingerprint_weights(source), source)

    @functools.cache
    def load() -> Features:
        # Not in float32 where products round them anyway: half the memory and the same numbers.
        read = with_first_head(config, source)[0]
        params = load_params(read, model, seed=config.seed, dtype=model.options.dtype)
        compute = make_features(model)
        return lambda rows: compute(params, put(rows, ROWS_AXES, model.options.sharding))

    def samples(batches: Batches) -> Samples:
        width = model.config.hidden_size
        return Samples(batches.data, cached_features(batches, made_by, width, load, console))

    return samples(training), samples(validation) if validation else None


# ---- the two fits -------------------------------------------------------------------------------


def show_ridge(
    config: Config, train: Samples, held: Samples | None, console: Console
) -> np.ndarray:
    """The head by ridge regression; prints how it was found and what it is worth."""
    data = train.data
    ridge = fit_ridge(train.features, data.labels, data.prompt_ids, data.attributes)
    for name, strength, freedom in zip(data.attributes, ridge.strengths, ridge.freedom):
        console.print(
            f"ridge       {name}: strength {strength:.1e} of the largest eigenvalue, "
            f"{freedom:.1f} degrees of freedom"
        )
    if held:
        evaluation = evaluate(config, ridge.head, held, data)
        show(f"held-out data (loss {evaluation.loss:.4f})", evaluation, console)
    else:
        show_left_out(ridge, data, console)
    return ridge.head


def show_left_out(ridge: Ridge, data: TokenizedData, console: Console) -> None:
    """What the heads without a prompt say of it: what there is to see without held-out data."""
    rated = attribute_metrics(
        data.attributes, ridge.left_out, data.labels, data.prompt_ids, mean_ratings(data.labels)
    )
    console.print()
    console.print(attribute_table("training data, each prompt left out in turn", rated))
    console.print(
        "The strengths were chosen by these very errors, which makes them a little small."
    )


def show_training(
    config: Config,
    source: Pretrained,
    model: Model,
    train: Samples,
    held: Samples | None,
    console: Console,
) -> np.ndarray:
    """The head by AdamW; prints how it went and what it is worth."""
    found: dict[int, ValidationMetrics] = {}

    def validation_loss(step: int, head: np.ndarray) -> float:
        assert held is not None
        found[step] = evaluate(config, head, held, train.data)
        console.print(f"step {step}: validation loss {found[step].loss:.4f}")
        return found[step].loss

    head, origin = first_head(config, source, model)
    console.print(f"weights     {origin}")
    trained = train_head(
        config, model, head, train.features, train.data, validation_loss if held else None
    )
    console.print(
        f"steps       {trained.steps}; training loss {trained.losses[0]:.4f} in the first, "
        f"{trained.losses[-1]:.4f} in the last"
    )
    if held:
        title = f"held-out data, step {trained.step} (best validation loss, "
        show(f"{title}{found[trained.step].loss:.4f})", found[trained.step], console)
    return trained.head


def first_head(config: Config, source: Pretrained, model: Model) -> tuple[np.ndarray, str]:
    """The head before the first step, that of `experiment.first_params`, and what to say of it."""
    source, origin = with_first_head(config, source)
    if source.spec is None:
        return np.asarray(random_head(model, config.seed)), origin
    tensor = named_weights(source).read(HEAD.hf_key)
    return from_hf(HEAD, tensor, model.sizes).astype(np.float32), origin


def evaluate(
    config: Config, head: np.ndarray, held: Samples, train: TokenizedData
) -> ValidationMetrics:
    """The objective and the metrics of a head on held-out samples."""
    scores = head_scores(held.features, head)
    return validation_metrics(
        scores, held.data, mean_ratings(train.labels), config_objective(config)
    )


def show(title: str, evaluation: ValidationMetrics, console: Console) -> None:
    """Prints the tables of an evaluation."""
    console.print()
    if evaluation.attributes:
        console.print(attribute_table(title, evaluation.attributes))
    if evaluation.pairs:
        console.print(pair_table(title, evaluation.pairs))


# ---- the model ----------------------------------------------------------------------------------


def write(
    config: Config,
    source: Pretrained,
    model: Model,
    tokenizer: Tokenizer,
    head: Float32[np.ndarray, "D A"],
    data: TokenizedData,
    dst: str,
) -> list[str]:
    """Writes the Orbax model of `init`'s weights and `head`; returns what there is to say.

    Raises:
      UserError: see `engine.convert_slices`.
    """
    spec = run_spec(config, model, data)
    work = ToOrbax(named_weights(source), source.llama, model.head, head)
    plan: dict[str, Any] = {
        "command": "probe",
        "model": dataclasses.asdict(spec),
        "head": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(head).tobytes()),
    }

    def write_files(files: Path) -> None:
        write_model_files(files, source.llama, tokenizer, spec)

    return convert_slices(work, [source], dst, plan, write_files)


def _run(config: Config, dst: str) -> None:
    probe(config, dst, _FIT.value or "")


if __name__ == "__main__":
    run_with_config(_run, together=False, arguments=("DST",))
