"""The commands that are killed and whose disks are full: what they are given, what must come of it.

Each is tiny: layers of width 32, a few seconds. `result` is what must be the same to the bit.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from campaign import forks, good
from safetensors.numpy import save_file

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape
from rmjax.checkpoints.model_files import write_model_files
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.models.heads import LanguageModelHead, model_parameters, model_sizes

# Fields of records that a clock writes, and what a report says of the work of now.
_CLOCK = ("tokens_per_second", "evaluation_seconds", "seconds", "time", "examples_per_second")
_CLOCK += ("seconds_sampling", "seconds_scoring", "seconds_updating")
_CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN = [
    "train",
    f"--config={_CONFIGS / 'quickstart.py'}",
    "--config.data.train=generated:64",
    "--config.data.validation=generated:16",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.head_dim=8",
    "--config.batch_size=8",
    "--config.epochs=0",
    "--config.steps=24",
    "--config.rows_per_device=2",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=2",
    "--config.eval_every=4",
    "--config.checkpoint_every=2",
    "--config.workdir=out",
]
SERVED = "a served load"  # no command that ends: see `served.py`
NAMES = (
    *("training", "alignment", "probing", "conversion to Orbax", "conversion to Hugging Face"),
    "extrapolation",
    *("evaluation", "scoring a file", "sampling", "choosing", "a report"),
)
# Configs of models that lie in the campaign's own directory.
_PROBE = """
from rmjax.config import Config, DataConfig, OptimizerConfig

def get_config(arg=None):
    return Config(
        workdir="unused",
        init={model!r},
        data=DataConfig(
            train="generated:64", validation="generated:16", max_length=128,
            attributes=("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
        ),
        batch_size=8,
        epochs=1,
        rows_per_device=2,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
"""
_ALIGN = """
from rmjax.config import (
    AlignConfig, DataConfig, OptimizerConfig, PolicyGradientConfig, RewardConfig, RolloutConfig
)

def get_config(arg=None):
    return AlignConfig(
        workdir="out",
        init={policy!r},
        data=DataConfig(
            train={prompts!r}, validation={held!r}, attributes=(), max_length=48, row_length=64
        ),
        rollout=RolloutConfig(n=4, max_tokens=12, rows=8),
        rewards={{"teacher": RewardConfig(model={model!r})}},
        objective="reinforce",
        policy_gradient=PolicyGradientConfig(kl=0.1),
        batch_size=8,
        steps=8,
        rows_per_device=4,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=1),
        eval_every=2,
        checkpoint_every=1,
    )
"""


@dataclasses.dataclass(frozen=True)
class Victim:
    """A command that is killed.

    Attributes:
      arguments: of the command, which is given again after a kill.
      result: of its directory, what must be the same to the bit.
    """

    arguments: list[str]
    result: Callable[[Path], dict[str, str]]


def made(scratch: Path, only: Collection[str] = ()) -> dict[str, Victim]:
    """The commands, by what they do, and beneath `scratch` what they need.

    Args:
      scratch: a directory.
      only: which; all if empty.
    """
    only = only or NAMES
    model = good.write_huggingface(scratch / "model")
    policy = _write_policy(scratch / "policy")
    orbax, run, scored = scratch / "orbax", scratch / "run", scratch / "scored.jsonl"
    if "conversion to Hugging Face" in only:
        _done(["convert", "hf-to-orbax", str(model), str(orbax)], scratch)
    rows = good.write_rows(scratch / "pairs.jsonl", good.pair_rows(300))
    prompts = good.write_rows(scratch / "prompts.jsonl", _prompts(96))
    held = good.write_rows(scratch / "held.jsonl", _prompts(4))
    if "choosing" in only:
        _done(["score", str(model), str(rows), str(scored)], scratch)
    probe, align = scratch / "probe.py", scratch / "align.py"
    probe.write_text(_PROBE.format(model=str(model)))
    fields = {"policy": policy, "prompts": prompts, "held": held, "model": model}
    align.write_text(_ALIGN.format(**{name: str(path) for name, path in fields.items()}))
    if "a report" in only:
        _done([*TRAIN[:-1], f"--config.workdir={run}"], scratch)
    convert = ["convert", "orbax-to-hf", str(orbax), "out"]
    strong = good.write_huggingface(scratch / "strong", seed=1)
    extrapolate = ["extrapolate", str(model), str(strong), "out", "--alpha=1.5"]
    sample = ["sample", str(policy), str(prompts), "out.jsonl", "--n=16", "--max-tokens=12"]
    found = {
        "training": Victim(TRAIN, of_run),
        "alignment": Victim(["align", f"--config={align}"], of_run),
        "probing": Victim(["probe", f"--config={probe}", "out"], of_files),
        "conversion to Orbax": Victim(["convert", "hf-to-orbax", str(model), "out"], of_files),
        "conversion to Hugging Face": Victim(convert, of_files),
        "extrapolation": Victim(extrapolate, of_files),
        "evaluation": Victim(["evaluate", str(model), f"pairs={rows}", "--out=out"], of_evaluation),
        "scoring a file": Victim(["score", str(model), str(rows), "out.jsonl"], of_files),
        "sampling": Victim(sample, of_files),
        "choosing": Victim(["choose", str(scored), "out.jsonl", "--way=pairs"], of_files),
        "a report": Victim(["report", str(run), "--out=out"], of_report),
    }
    return {name: found[name] for name in NAMES if name in only}


def undisturbed(
    scratch: Path, victims: dict[str, Victim]
) -> dict[str, tuple[dict[str, str], float]]:
    """What comes of each command that nothing happens to, and in how many seconds."""
    whole = {}
    for name, victim in victims.items():
        for _ in range(2):  # the first compiles
            directory = fresh(scratch, name)
            ended = forks.run(victim.arguments, directory)
            if ended.code != 0:
                raise SystemExit(f"{name} fails undisturbed: {ended.text}")
        whole[name] = forks.call(victim.result, directory), ended.seconds
    return whole


def is_there(ended: forks.Ended) -> bool:
    """Whether a command does nothing, since an earlier one had ended when it was stopped."""
    said = ("is there already", "already exists and is not empty")
    return ended.code == 1 and any(words in ended.text for words in said)


def _done(arguments: list[str], scratch: Path) -> None:
    ended = forks.run(arguments, scratch)
    if ended.code != 0:
        raise SystemExit(f"{arguments[0]} fails undisturbed: {ended.text}")


def _prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say the number {n}."} for n in range(count)]


def _write_policy(directory: Path) -> Path:
    """A language model of the sizes of `good.DECODER`."""
    decoder = good.DECODER
    head = LanguageModelHead(decoder.tie_word_embeddings)
    write_model_files(directory, decoder, byte_tokenizer(), None)
    rng, sizes = np.random.default_rng(1), model_sizes(decoder, head)
    tensors = {
        key: (rng.standard_normal(hf_shape(row, sizes)) * 0.1).astype(np.float32)
        for row in model_parameters(decoder, head)
        for key in hf_keys(row, decoder)
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def fresh(scratch: Path, name: str) -> Path:
    """An empty directory of this name."""
    directory = scratch / "victims" / name.replace(" ", "-").replace("/", "-")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def of_files(directory: Path) -> dict[str, str]:
    """Every file's digest, but what the harness keeps there, caches, and what has a time in it."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in ("output.txt", "_CHECKPOINT_METADATA")
        and path.relative_to(directory).parts[0] != "cache"
    }


def of_evaluation(directory: Path) -> dict[str, str]:
    """The samples, and the report without what was computed now."""
    report = json.loads((directory / "out" / "report.json").read_text())
    samples = (directory / "out" / "samples.jsonl").read_bytes()
    return {
        "samples.jsonl": hashlib.sha256(samples).hexdigest(),
        "report.json": json.dumps(
            _timeless({k: v for k, v in report.items() if k != "work"}), sort_keys=True
        ),
    }


def of_report(directory: Path) -> dict[str, str]:
    """A report's pages."""
    return {name: value for name, value in of_files(directory).items() if "report" in name}


def of_run(directory: Path) -> dict[str, str]:
    """The last state of a run, array for array, and the numbers that it recorded."""
    import tensorstore as ts

    found, checkpoints = {}, directory / "out" / "checkpoints"
    last = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    found["last step"] = last.name
    for item in sorted(path.name for path in last.iterdir() if (path / "_METADATA").exists()):
        tree = json.loads((last / item / "_METADATA").read_text())["tree_metadata"]
        for leaf in tree.values():
            name = ".".join(str(key["key"]) for key in leaf["key_metadata"])
            base = {"driver": "file", "path": f"{last / item}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            try:
                array = ts.open({"driver": "zarr3", "kvstore": store}, read=True).result()
            except ValueError:  # nothing is stored for a node that has no array
                continue
            found[f"{item}.{name}"] = hashlib.sha256(
                np.asarray(array.read().result()).tobytes()
            ).hexdigest()
    lines = (directory / "out" / "metrics.jsonl").read_text().splitlines()
    for number, line in enumerate(map(json.loads, lines)):
        found[f"metrics {number}, of step {line['step']}"] = json.dumps(_timeless(line))
    for file in sorted((directory / "out" / "rollouts").glob("*.jsonl")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _CLOCK}
    return [_timeless(v) for v in value] if isinstance(value, list) else value
