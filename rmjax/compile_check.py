"""Compiles a config's training step for chips that are not there, and says what it will cost.

    python -m rmjax.compile_check --config=configs/llama70b_regression.py --topology=v5p:4x4x4

With `--sample=prompt:180,tokens:512,n:10,rows:1280` it compiles sampling from the config's model.
Of a config of `rmjax.align` it compiles all programs of a step; `--sample=prompt:180,tokens:512`
then says how long prompts and samples are.

Needs `pip install 'rmjax[aot]'`: the TPU compiler, which runs on any Linux machine; for GPUs
(`--topology=h100:8`) `'rmjax[cuda13]'`, and no GPU. The exit status is 0 if the program fits the
chips' memory, else 1. Bytes and FLOPs are the compiler's; times are a prediction from a roofline,
see `aot/roofline.py`.
"""

from absl import flags

from rmjax.training.command_line import answer_help, run_with_config

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5p:4x4x4, v5e:16x16, v6e:8x8, h100:8, h100:8x8."
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that topology, on a slow network.")
_TOKENS = flags.DEFINE_integer(
    "tokens", 0, "Mean tokens of a prompt with a response; 0 lets each fill data.max_length."
)
_PROMPT = flags.DEFINE_integer("prompt", 0, "How many of them are the prompt's, computed once.")
_RESPONSES = flags.DEFINE_integer("responses", 2, "Responses to a prompt, with --prompt.")
_SAMPLE = flags.DEFINE_string(
    "sample",
    None,
    "Compiles sampling from the model instead: prompt:180,tokens:500,n:10,rows:512. Of a config of "
    "rmjax.align, how long prompts and samples are: prompt:180,tokens:500.",
)
_MESH = flags.DEFINE_string("mesh", None, "Of sampling, as data:8,tensor:8; chosen if not given.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and micro-batches.")
_MINUTES = flags.DEFINE_float("minutes", 15.0, "Time limit of a search.")

if __name__ == "__main__":
    answer_help()  # before the imports, which take a second

import json
import os
import sys
from typing import Any

import jax
from rich.console import Console

from rmjax.aot.alignment import alignment_load, check_alignment
from rmjax.aot.hardware import Chip
from rmjax.aot.output import (
    alignment_as_json,
    as_json,
    sampling_as_json,
    show,
    show_alignment,
    show_ranking,
    show_sampling,
)
from rmjax.aot.program import Workload, architecture, check_program, topology_devices
from rmjax.aot.sampling import SamplingLoad, check_sampling, parse_sampling, sampling_mesh
from rmjax.aot.search import search_meshes
from rmjax.config import AlignConfig, Config
from rmjax.errors import UserError, end_when_interrupted
from rmjax.runtime.sharding import make_mesh, parse_mesh
from rmjax.training.objectives.objective import is_policy
from rmjax.training.rows import longest_row
from rmjax.training.validate_config import validate

# Without these the compiler asks a cloud that is not there, and talks about it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it compiles only, so several may at once
}


def run(config: Config) -> None:
    """The command; exits with 1 if the program does not fit."""
    validate(config)
    if not _TOPOLOGY.value:
        raise UserError("which hardware? --topology=v5p:4x4x4")
    name = _TOPOLOGY.value + (f" x {_SLICES.value} slices" if _SLICES.value > 1 else "")
    console = Console(highlight=False)
    if isinstance(config, AlignConfig) and not _SEARCH.value:
        load = _alignment(config)
        devices, chip = topology_devices(_TOPOLOGY.value, _SLICES.value)
        sys.exit(0 if _alignment_fits(config, name, devices, chip, load, console) else 1)
    load = _workload(config) if _SAMPLE.value is None else _sampling(_SAMPLE.value)
    devices, chip = topology_devices(_TOPOLOGY.value, _SLICES.value)
    if isinstance(load, SamplingLoad):
        sys.exit(0 if _sampling_fits(config, name, devices, chip, load, console) else 1)
    if _SEARCH.value:
        reports, fitting = search_meshes(config, name, devices, chip, load, _MINUTES.value)
        if not _JSON.value:
            show_ranking(reports, chip, fitting, console)
    else:
        reports = [check_program(config, name, make_mesh(config.mesh, devices), chip, load)]
        if not _JSON.value:
            show(reports[0], chip, load, longest_row(config), console)
    if _JSON.value:
        print(json.dumps([as_json(report, chip) for report in reports], indent=2))
    sys.exit(0 if any(report.fits for report in reports) else 1)


def _sampling_fits(
    config: Config,
    topology: str,
    devices: list[Any],
    chip: Chip,
    load: SamplingLoad,
    console: Console,
) -> bool:
    """Compiles and prints sampling; whether it fits."""
    decoder = architecture(config)
    wanted = parse_mesh(_MESH.value) if _MESH.value else sampling_mesh(decoder, len(devices))
    report = check_sampling(decoder, topology, make_mesh(wanted, devices), chip, load)
    if _JSON.value:
        print(json.dumps(sampling_as_json(report), indent=2))
    else:
        show_sampling(report, load, console)
    return report.fits


def _alignment_fits(
    config: AlignConfig,
    topology: str,
    devices: list[Any],
    chip: Chip,
    load: SamplingLoad,
    console: Console,
) -> bool:
    """Compiles and prints a step of `rmjax.align`; whether it fits."""
    report = check_alignment(config, topology, make_mesh(config.mesh, devices), chip, load)
    if _JSON.value:
        print(json.dumps(alignment_as_json(report, chip), indent=2))
    else:
        show_alignment(report, console)
    return report.fits


def _workload(config: Config) -> Workload:
    """What the flags say of a step. A policy predicts what stands behind the prompt.

    The prompt's last token is every response's own there, since it predicts the first one's.
    """
    policy, most = is_policy(config.objective), config.data.max_length
    tokens, prompt = _TOKENS.value or most, _PROMPT.value
    if not (_TOKENS.value >= 0 and 1 + policy <= tokens <= most):
        raise UserError(f"--tokens={_TOKENS.value}: expected {1 + policy} to {most}")
    if not (0 <= prompt < (_TOKENS.value or 1) and _RESPONSES.value > 0):
        raise UserError(
            f"--prompt={prompt} --responses={_RESPONSES.value}: expected fewer tokens than "
            f"--tokens={_TOKENS.value}, and at least 1 response"
        )
    if _MESH.value is not None:
        raise UserError("--mesh is of --sample; that of a step is --config.mesh.AXIS=SIZE")
    predicted = 0
    if policy:
        predicted = tokens - max(1, prompt)
        prompt = max(0, prompt - 1)
    responses = _RESPONSES.value if _PROMPT.value else 1
    return Workload(config.batch_size, tokens, prompt, responses, predicted)


def _alignment(config: AlignConfig) -> SamplingLoad:
    """What the flags say of a step of `rmjax.align`."""
    if _TOKENS.value or _PROMPT.value or _MESH.value:
        raise UserError(
            "of a config of rmjax.align --sample=prompt:COUNT,tokens:COUNT says how long prompts "
            "and samples are, and config.rollout.mesh on what mesh they are made: leave out "
            "--tokens, --prompt, --mesh"
        )
    if _SAMPLE.value is None:
        return alignment_load(config, None)
    if {"n", "rows"} & {part.partition(":")[0] for part in _SAMPLE.value.split(",")}:
        raise UserError(
            f"--sample={_SAMPLE.value}: of a config of rmjax.align, rollout.n and rollout.rows are "
            "its own; leave them out"
        )
    return alignment_load(config, parse_sampling(_SAMPLE.value))


def _sampling(text: str) -> SamplingLoad:
    """What `--sample` says."""
    if _TOKENS.value or _PROMPT.value or _SEARCH.value:
        raise UserError(
            "--sample says itself what is sampled: leave out --tokens, --prompt, --search"
        )
    return parse_sampling(text)


if __name__ == "__main__":
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # what is there is not what is asked about
    end_when_interrupted()
    run_with_config(run, together=False)
