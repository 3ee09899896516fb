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

from absl import flags

from rmjax.training.command_line import answer_help, run_with_config

FITS = ("ridge", "adamw")
_FIT = flags.DEFINE_enum("fit", None, FITS, "How the head is fitted; see docs/probe.md.")

if __name__ == "__main__":
    answer_help()  # before the imports, which take a second

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float32
from rich.console import Console

from rmjax.checkpoints.conversion.engine import convert_slices
from rmjax.checkpoints.conversion.journal import check_target
from rmjax.checkpoints.conversion.to_orbax import ToOrbax
from rmjax.checkpoints.hf_weights import HeadedWeights
from rmjax.checkpoints.model_files import write_model_files
from rmjax.checkpoints.orbax_weights import named_weights
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.checkpoints.provenance import provenance, write_provenance
from rmjax.config import Config
from rmjax.data.tokenized import TokenizedData
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.models.model import Model
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.memory import keep_freed_memory
from rmjax.runtime.sharding import Sharding, make_mesh
from rmjax.training.datasets import load_planned
from rmjax.training.experiment import config_objective, make_model, pick_tokenizer
from rmjax.training.probing.fit import extract, show_ridge, show_training
from rmjax.training.validate_config import validate
from rmjax.training.workdir import run_spec


def probe(config: Config, dst: str, fit: str = "") -> None:
    """The command.

    Args:
      config: of the run.
      dst: directory to make; must not exist or be empty.
      fit: one of `FITS`; empty for the objective's default.

    Raises:
      UserError: something that the user can fix.
    """
    fit = check_probe(config, dst, fit)
    enable_compilation_cache()
    keep_freed_memory()
    console = Console(highlight=False, soft_wrap=True)

    # ---- mesh, model, tokenizer, data --------------------------------------------------------
    sharding, source = (
        Sharding(make_mesh(config.mesh)),
        open_pretrained(config.init, config.chat_template),
    )
    if source.lora.rank:
        raise UserError(
            f"{config.init}: trained with LoRA; merge its adapters first, with `python -m "
            "rmjax.convert orbax-to-hf`"
        )
    model = make_model(config, source, sharding)
    tokenizer = pick_tokenizer(config, source, model.config.vocab_size)
    # Rows, by which features are kept, go by the data: not by the seed, nor by how long one trains.
    once = dataclasses.replace(config, seed=0, steps=0, epochs=1.0)
    data, validation, _, (shape, *_) = load_planned(once, model, tokenizer)

    # ---- features, once ----------------------------------------------------------------------
    began = time.monotonic()
    train, held = extract(config, source, model, data, validation, shape, console)
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
    for note in write_model(config, source, model, tokenizer, head, train.data, dst):
        console.print(note)
    console.print(
        f"written: {dst}\n\nNext:\n"
        f"  python -m rmjax.convert orbax-to-hf {dst} {dst}-hf\n"
        f'  python\n  >>> import rmjax\n  >>> rm = rmjax.load("{dst}")'
    )


def check_probe(config: Config, dst: str, fit: str) -> str:
    """How to fit; raises a `UserError` unless the config is one that a probe can do."""
    validate(config)
    check_target(dst)
    if not config.init:
        raise UserError("config.init is empty: a probe reads what a trained model computes")
    if config_objective(config).policy:
        raise UserError(
            f"config.objective = {config.objective!r}: a probe fits a reward model's head, and a "
            "policy has none; take rmjax.train"
        )
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


def write_model(
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
    work = ToOrbax(HeadedWeights(named_weights(source), head), source.decoder, model.head)
    plan: dict[str, Any] = {
        "command": "probe",
        "model": dataclasses.asdict(spec),
        "head": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(head).tobytes()),
    }

    made = f"A reward model of rmjax: {spec.source} with a fitted head."
    front = provenance(source, trained=True)

    def write_files(files: Path) -> None:
        write_model_files(files, source.decoder, tokenizer, spec)
        write_provenance(files, front, made)

    return convert_slices(work, [source], dst, plan, write_files)


def _run(config: Config, dst: str) -> None:
    probe(config, dst, _FIT.value or "")


if __name__ == "__main__":
    run_with_config(_run, together=False, arguments=("DST",))
