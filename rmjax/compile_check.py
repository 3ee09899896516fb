"""Compiles a config's training step for chips that are not there, and says what it will cost.

    python -m rmjax.compile_check --config=configs/llama70b_regression.py --topology=v5p:4x4x4

Needs `pip install 'rmjax[aot]'`: the TPU compiler, which runs on any Linux machine; for GPUs
(`--topology=h100:8`) `'rmjax[cuda12]'`, and no GPU. The exit status is 0 if the program fits the
chips' memory, else 1. Bytes and FLOPs are the compiler's; times are a prediction from a roofline,
see `roofline.predict`.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from rmjax import hlo
from rmjax.commandline import run_with_config
from rmjax.config import Config, validate
from rmjax.data.batches import slots_for
from rmjax.errors import UserError
from rmjax.estimate import estimate
from rmjax.flops import model_flops
from rmjax.hardware import CHIPS, Chip, gpu_target
from rmjax.llama import LlamaConfig
from rmjax.model import REMAT, ModelOptions, RewardModel
from rmjax.objectives import OBJECTIVES
from rmjax.optimizer import make_optimizer, make_schedule, partition
from rmjax.pretrained import open_pretrained
from rmjax.roofline import Prediction, predict
from rmjax.rows import BATCH_AXES, Batch, Rows
from rmjax.sharding import (
    MeshConfig,
    Sharding,
    abstract_mesh,
    check_divisible,
    make_mesh,
    mesh_shape,
)
from rmjax.step import TrainState, abstract_state, make_train_step

# Without these the compiler asks a cloud that is not there, and talks about it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# TPU: looking up embeddings on the SparseCores cannot be written as text by every version of JAX.
# GPU: kernels are chosen by trying them, which needs one; the compiler's own choice is taken.
_COMPILER_OPTIONS = {
    "tpu": {"xla_tpu_offload_gather_to_sparsecore": "false"},
    "cuda": {"xla_gpu_autotune_level": "0"},
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step comes to; bytes and FLOPs are of one chip unless said otherwise.

    Attributes:
      topology: name of the topology.
      mesh: sizes of the axes.
      remat: policy.
      rows: rows computed at once, over all chips.
      microbatches: of a step.
      tokens: real tokens of a step.
      parameters: bytes, float32.
      optimizer: bytes of its state.
      gradients: bytes; part of the temporaries.
      temporaries: bytes of everything else that lives during a step.
      peak: bytes of all of it, as the compiler lays it out.
      memory: bytes the chip has.
      model_flops: of the step, over all chips; see `flops.model_flops`.
      prediction: FLOPs the compiler counted, traffic and time; None if it does not fit.
      compile_seconds: what it took.
    """

    topology: str
    mesh: dict[str, int]
    remat: str
    rows: int
    microbatches: int
    tokens: int
    parameters: int
    optimizer: int
    gradients: int
    temporaries: int
    peak: int
    memory: float
    model_flops: float
    prediction: Prediction | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.prediction is not None and self.peak <= self.memory

    @property
    def seconds(self) -> float:
        """The predicted time of a step; infinite if it does not fit."""
        return math.inf if self.prediction is None else self.prediction.step

    def mfu(self, chip: Chip) -> float:
        """Predicted share of the chips' peak that real tokens' model FLOPs make up."""
        assert self.prediction is not None
        chips = math.prod(self.mesh.values())
        return self.model_flops / (self.prediction.step * chips * chip.flops)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step has to compute.

    Attributes:
      samples: responses a step.
      tokens: mean tokens of a response.
    """

    samples: int
    tokens: int

    def rows(self, length: int) -> int:
        """Rows they fill, packed without a gap; a response is never cut."""
        return -(-self.samples // max(1, length // self.tokens))


def topology_devices(name: str, slices: int = 1) -> tuple[list[Any], Chip]:
    """The devices of a topology such as `v5p:4x4x4` or `h100:8`, which need not exist.

    Raises:
      UserError: no such topology, or no compiler for it.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        raise UserError(
            f"--topology={name}: expected CHIP:SIZES, such as v5p:4x4x4 or h100:8 (GPUs of a host) "
            f"or h100:2x8 (hosts x GPUs); chips: {', '.join(CHIPS)}"
        )
    try:
        if chip.torus:
            options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=name,
                topology=f"1x{shape}" if "x" in shape else f"1x1x{shape}",
                target_config=gpu_target(chip),
            )
    except Exception as error:  # whatever the plugin raises
        needed = "rmjax[aot]" if chip.torus else "rmjax[cuda12]"
        raise UserError(
            f"--topology={name}: the compiler has no such topology, or there is no compiler (pip "
            f"install '{needed}'): {str(error).splitlines()[0][:300]}"
        ) from error
    return list(found.devices), chip


def architecture(config: Config) -> LlamaConfig:
    """The config's own statement of the model, else that of its first weights."""
    return config.model or open_pretrained(config.init).llama


def check(config: Config, topology: str, mesh: Mesh, chip: Chip, load: Workload) -> Report:
    """Compiles the training step of `config` for `mesh` and counts what it does.

    Raises:
      UserError: something does not divide over the mesh.
    """
    began = time.monotonic()
    sharding, llama = Sharding(mesh), architecture(config)
    step, state = abstract_program(config, llama, sharding)
    batch, microbatches = abstract_batch(config, sharding, load)
    platform = "tpu" if chip.torus else "cuda"
    lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
    prediction, peak = None, 0
    try:
        compiled = lowered.compile(compiler_options=_COMPILER_OPTIONS[platform])
    except jax.errors.JaxRuntimeError as error:
        peak = _needed(str(error))
    else:
        stats = compiled.memory_analysis()
        peak = (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            + stats.temp_size_in_bytes
            + stats.generated_code_size_in_bytes
        )
        work = hlo.work(compiled.as_text(), mesh.size, unknown_trips=microbatches)
        prediction = predict(work, mesh, chip)
    parts = _bytes(state, config.trainable)
    return Report(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=config.remat,
        rows=batch.rows.tokens.shape[1],
        microbatches=microbatches,
        tokens=load.samples * load.tokens,
        **parts,
        temporaries=max(0, peak - sum(parts.values())),
        peak=peak,
        memory=chip.memory,
        model_flops=model_flops(
            llama, len(config.data.attributes), [load.tokens] * load.samples, training=True
        ),
        prediction=prediction,
        compile_seconds=time.monotonic() - began,
    )


def abstract_program(
    config: Config, llama: LlamaConfig, sharding: Sharding
) -> tuple[Any, TrainState]:
    """The training step of `config`, not yet traced, and the shapes of its state.

    Raises:
      UserError: something does not divide over the mesh.
    """
    dtype = jnp.dtype("float32" if config.dtype == "float32" else "bfloat16")
    options = ModelOptions(sharding, dtype=dtype, remat=config.remat)
    model = RewardModel(llama, options, len(config.data.attributes))
    schedule = make_schedule(config.optimizer, config.steps or 1)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = abstract_state(model, optimizer, config.trainable)
    objective = OBJECTIVES[config.objective]
    step = make_train_step(model, objective, optimizer, schedule, config.trainable, state)
    return step, state


def abstract_batch(config: Config, sharding: Sharding, load: Workload) -> tuple[Batch, int]:
    """Shapes and shardings of a step's batch, and how many of its micro-batches hold anything."""
    length = config.row_length
    rows = config.rows_per_device * sharding.row_shards
    check_divisible(
        "rows of config.data.row_length", (rows, length), sharding.activation(("row", "length"))
    )
    count = -(-load.rows(length) // rows)
    slots = slots_for(length, load.tokens) if config.data.packing else 1
    place, sample = (count, rows, length), (count, rows, slots)
    label = (*sample, len(config.data.attributes))
    shapes = [place, place, place, sample, label, label, sample, ()]
    dtypes = [jnp.int32] * 4 + [jnp.float32] * 2 + [jnp.int32] * 2
    axes: list[Any] = [*BATCH_AXES.rows, *BATCH_AXES[1:]]
    leaves: list[Any] = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.activation(names))
        for shape, dtype, names in zip(shapes, dtypes, axes)
    ]
    return Batch(Rows._make(leaves[:4]), *leaves[4:]), count


def _bytes(state: TrainState, trainable: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the state's parts on one device, from shapes and shardings."""

    def local(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    free, _ = partition(state.params, trainable)
    return {
        "parameters": local(state.params),
        "optimizer": local(state.opt_state),
        "gradients": local(free),
    }


def _needed(message: str) -> int:
    """Bytes that a program which does not fit would need, from the compiler's refusal."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if not found:
        raise UserError(f"the compiler refuses the program: {message.splitlines()[0][:400]}")
    return int(float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1))


# ---- search --------------------------------------------------------------------------------------


def search(
    config: Config, topology: str, devices: list[Any], chip: Chip, load: Workload, minutes: float
) -> tuple[list[Report], int]:
    """Compiles what arithmetic ranks best, the config as it is first, until the time is up.

    Returns:
      Reports from the best prediction to the worst, those that do not fit last; and how many
      candidates arithmetic found to fit.
    """
    end = time.monotonic() + minutes * 60
    ranked = sorted(_estimated(config, devices, chip, load), key=lambda pair: pair[0])
    order, seen = [config], set()
    for _, candidate in ranked:
        # To arithmetic a row split over two devices is half a row on one: compile only the best.
        split = candidate.mesh.tensor, candidate.remat, _places(candidate)
        if split not in seen and candidate != config:
            order.append(candidate)
        seen.add(split)
    reports: list[Report] = []
    longest = 0.0
    for candidate in order:
        if reports and time.monotonic() + longest > end:
            break
        mesh = make_mesh(candidate.mesh, devices)
        report = check(candidate, topology, mesh, chip, load)
        longest = max(longest, report.compile_seconds)
        reports.append(report)
        print(_line(report, chip), file=sys.stderr)
    return sorted(reports, key=lambda r: (not r.fits, r.seconds)), len(ranked)


def _estimated(
    config: Config, devices: list[Any], chip: Chip, load: Workload
) -> Iterator[tuple[float, Config]]:
    """Candidates that divide and should fit, with their seconds by arithmetic."""
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if chip.torus else 1
    llama = architecture(config)
    for mesh in _meshes(len(devices), slices):
        sizes = mesh_shape(mesh, len(devices))
        sharding = Sharding(abstract_mesh(mesh, len(devices)))
        try:
            state = _bytes(abstract_program(config, llama, sharding)[1], config.trainable)
        except UserError:  # does not divide
            continue
        for rows in (1, 2, 4, 8):
            for remat in REMAT[1:]:
                candidate = dataclasses.replace(
                    config, mesh=mesh, rows_per_device=rows, remat=remat
                )
                guess = estimate(
                    llama,
                    len(config.data.attributes),
                    mesh=sizes,
                    chip=chip,
                    chips_per_host=_chips_per_host(devices),
                    rows=rows,
                    microbatches=-(-load.rows(config.row_length) // (rows * sharding.row_shards)),
                    length=config.row_length,
                    tokens=load.tokens,
                    remat=remat,
                )
                divides = config.row_length % sizes["context"] == 0
                if divides and sum(state.values()) + guess.temporaries < chip.memory:
                    yield guess.serial, candidate


def _places(config: Config) -> float:
    """Rows computed at once on one device."""
    return config.rows_per_device / config.mesh.context


def _meshes(devices: int, slices: int) -> Iterator[MeshConfig]:
    """All splits of a slice into powers of two for context and tensor, the rest fsdp."""
    each = devices // slices
    for tensor in (2**i for i in range(each.bit_length()) if each % 2**i == 0):
        for context in (2**i for i in range(4) if each // tensor % 2**i == 0):
            yield MeshConfig(
                data=slices, fsdp=each // tensor // context, context=context, tensor=tensor
            )


def _chips_per_host(devices: list[Any]) -> int:
    return len(devices) // len({device.process_index for device in devices})


# ---- output --------------------------------------------------------------------------------------


def _line(report: Report, chip: Chip) -> str:
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    head = f"{mesh}, {report.rows} rows, remat {report.remat}: peak {report.peak / 2**30:.1f} GiB"
    if report.prediction is None:
        return f"{head}, does not fit"
    return f"{head}, {report.seconds:.2f} s predicted, MFU {report.mfu(chip):.1%}"


def show(report: Report, chip: Chip, load: Workload, length: int, console: Console) -> None:
    """Prints a report."""
    chips = math.prod(report.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    console.print(f"topology    {report.topology}: {chips} chips; mesh {mesh}")
    console.print(
        f"step        {load.samples} responses of {load.tokens:,} tokens, {load.rows(length)} rows "
        f"of {length:,}; {report.microbatches} x {report.rows} rows computed, remat {report.remat}"
    )
    console.print(f"compiled    in {report.compile_seconds:.0f} s\n")
    table = _table("bytes a chip", "", "GiB")
    for name in ("parameters", "optimizer", "gradients", "temporaries", "peak"):
        table.add_row(name, f"{getattr(report, name) / 2**30:.2f}")
    table.add_row("the chip has", f"{report.memory / 2**30:.2f}")
    console.print(table)
    if not report.fits:
        console.print(f"DOES NOT FIT: {report.peak / 2**30:.1f} GiB are needed on every chip")
    found = report.prediction
    if found is None:
        return
    table = _table("moved between chips, a step", "collective", "along", "times", "GB a chip", "s")
    table.add_column("beside\ncomputation", justify="right")
    for row in found.traffic:
        if row.bytes >= 1e7:
            table.add_row(
                row.kind,
                row.network,
                f"{row.count:,.0f}",
                f"{row.bytes / 1e9:,.1f}",
                f"{row.seconds:.2f}",
                f"{row.asynchronous:.0%}",
            )
    console.print(table)
    model = report.model_flops / chips
    table = _table("predicted by a roofline, not measured", "", "a chip", "s")
    table.add_row("model FLOPs", f"{model / 1e12:,.0f} T", f"{model / chip.flops:.2f}")
    table.add_row("FLOPs of the program", f"{found.flops / 1e12:,.0f} T", f"{found.compute:.2f}")
    table.add_row("main memory", f"{found.bytes / 1e9:,.0f} GB", f"{found.memory:.2f}")
    table.add_row("all operations, estimated", "", f"{found.operations:.2f}")
    for name, seconds in found.networks.items():
        if seconds >= 0.005:
            table.add_row(f"network {name}", "", f"{seconds:.2f}")
    console.print(table)
    console.print(
        f"step {found.step:.2f} s: at least {found.floor:.2f}, at most {found.serial:.2f} if "
        f"nothing overlaps; {report.tokens / found.step:,.0f} tokens/s, MFU {report.mfu(chip):.1%}"
    )
    if report.fits:
        console.print(f"FITS: {report.peak / 2**30:.1f} of {report.memory / 2**30:.1f} GiB")


def show_ranking(reports: list[Report], chip: Chip, fitting: int, console: Console) -> None:
    """Prints what a search found."""
    console.print(f"{fitting} candidates should fit; {len(reports)} of them were compiled\n")
    table = _table("from the best prediction to the worst", "mesh", "rows", "remat", "GiB", "s")
    table.add_column("MFU", justify="right")
    for report in reports:
        mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
        speed = (f"{report.seconds:.2f}", f"{report.mfu(chip):.1%}") if report.fits else ("-", "-")
        rows = f"{report.microbatches} x {report.rows}"
        table.add_row(mesh, rows, report.remat, f"{report.peak / 2**30:.1f}", *speed)
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def as_json(report: Report, chip: Chip) -> dict[str, Any]:
    """A report in JSON's types, with what follows from it."""
    fields = dataclasses.asdict(report) | {"fits": report.fits}
    prediction: Any = fields["prediction"]
    if report.prediction is not None:
        prediction |= {
            "floor": report.prediction.floor,
            "serial": report.prediction.serial,
            "tokens_per_second": report.tokens / report.prediction.step,
            "mfu": report.mfu(chip),
        }
    return fields


# ---- command -------------------------------------------------------------------------------------

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5p:4x4x4, v5e:16x16, v6e:8x8, h100:8, h100:8x8."
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that topology, on a slow network.")
_TOKENS = flags.DEFINE_integer(
    "tokens", 0, "Mean tokens of a response; 0 lets each fill data.max_length."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and micro-batches.")
_MINUTES = flags.DEFINE_float("minutes", 15.0, "Time limit of a search.")


def run(config: Config) -> None:
    """The command; exits with 1 if the program does not fit."""
    validate(config)
    if not _TOPOLOGY.value:
        raise UserError("which hardware? --topology=v5p:4x4x4")
    if not 0 <= _TOKENS.value <= config.data.max_length:
        raise UserError(f"--tokens={_TOKENS.value}: expected 1 to {config.data.max_length}")
    load = Workload(config.batch_size, _TOKENS.value or config.data.max_length)
    devices, chip = topology_devices(_TOPOLOGY.value, _SLICES.value)
    name = _TOPOLOGY.value + (f" x {_SLICES.value} slices" if _SLICES.value > 1 else "")
    console = Console(highlight=False)
    if _SEARCH.value:
        reports, fitting = search(config, name, devices, chip, load, _MINUTES.value)
        if not _JSON.value:
            show_ranking(reports, chip, fitting, console)
    else:
        reports = [check(config, name, make_mesh(config.mesh, devices), chip, load)]
        if not _JSON.value:
            show(reports[0], chip, load, config.row_length, console)
    if _JSON.value:
        print(json.dumps([as_json(report, chip) for report in reports], indent=2))
    sys.exit(0 if any(report.fits for report in reports) else 1)


if __name__ == "__main__":
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # what is there is not what is asked about
    run_with_config(run)
