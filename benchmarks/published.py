"""The predictions of `compile_check` beside what MaxText measured on the chips themselves.

    python benchmarks/published.py [NAME ...]

Each row is a run whose step time MaxText's authors published. Here the same model, batch, sequence
length and chips are compiled in this library's own program, with the XLA flags that MaxText gave,
and the predicted seconds of a step stand beside theirs. docs/scaling.md says what differs.

Needs `rmjax[aot]`, and for v6e JAX 0.12. Prints one line of Markdown a run as soon as it is
compiled; one to four minutes each on two quiet cores.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax

from rmjax.aot.program import Report, Workload, check_program, topology_devices
from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.decoder_config import DecoderConfig, Rope
from rmjax.models.presets import llama31_8b, llama31_70b, llama31_405b
from rmjax.runtime.sharding import MeshConfig, make_mesh

ROOT = Path(__file__).parent.parent
# Without these the compiler asks a cloud that is not there.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HEAD = (
    "| model | chips | mesh | tokens a chip | remat | operations | waiting | predicted "
    "| measured | ratio |\n|" + "---|" * 10
)


def _decoder(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    """A decoder with Llama 2's vocabulary."""
    return DecoderConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope=Rope(theta=10000.0),
    )


# MaxText's `global_parameter_scale`: its base model, with heads and mlp, embed, and layers doubled
# in turn.
MODELS = {
    "Llama-3.1-8B": llama31_8b(),
    "Llama-3.1-70B": llama31_70b(),
    "Llama-3.1-405B": llama31_405b(),
    "Llama-2-70B": _decoder(8192, 28672, 80, 64, 8),
    "16B": _decoder(4096, 28672, 32, 64, 64),
    "32B": _decoder(8192, 28672, 32, 64, 64),
    "64B": _decoder(8192, 28672, 64, 64, 64),
    "128B": _decoder(8192, 57344, 64, 128, 128),
}

# MaxText's groups of flags (benchmarks/xla_flags_library.py), without those for copies to the host,
# which this program has none of.
GATHERS = (
    " --xla_tpu_enable_async_collective_fusion=true"
    " --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
    " --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
    " --xla_tpu_overlap_compute_collective_tc=true"
    " --xla_enable_async_all_gather=true"
)
REPLICAS = (
    " --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    " --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
SCRATCH = " --xla_tpu_scoped_vmem_limit_kib=98304"
SCATTERS = (
    " --xla_tpu_use_minor_sharding_for_major_trivial_input=true"
    " --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1"
    " --xla_tpu_assign_all_reduce_scatter_layout=true"
)
WHOLE_PRODUCTS = " --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
# What MaxText has in place of `GATHERS` in its newer recipes; today's compiler takes `GATHERS` on
# v5e alone, and refuses a program for other chips.
SPARSECORE = (
    " --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false"
    " --xla_tpu_enable_sparse_core_collective_offload_all_gather=true"
    " --xla_tpu_enable_all_gather_offload_tracing=true"
    " --xla_tpu_use_tc_device_shape_on_sc=true"
    " --xla_sc_disable_megacore_partitioning=true"
    " --xla_sc_enable_instruction_fusion=false"
    " --xla_sc_disjoint_spmem=false"
)
PIPELINED = (
    " --xla_enable_async_collective_permute=true --xla_tpu_enable_ag_backward_pipelining=true"
)
V5P = REPLICAS + PIPELINED
V5E = GATHERS + REPLICAS
V6E = SCRATCH + WHOLE_PRODUCTS + SCATTERS + REPLICAS + PIPELINED + SPARSECORE


# Cycles that the compiler schedules for a step of JAX's splash attention as MaxText runs it: a
# causal mask known beforehand. In `hardware.Chip.attention`'s order, of 512 queries and 512 keys.
# v6e's runs of 8,192 have blocks of 2,048, of which 10 of 16 are taken, and one kernel for all
# gradients, here written as that of keys and values.
_LARGE = 10 * 16 / 136
KERNELS = {
    "v5p": (1066, 1828, 2367, 2367),
    "v5e": (1866, 1745, 2278, 2278),
    "v6e": (round(1327 * _LARGE), 0, round(1485 * _LARGE), round(1485 * _LARGE)),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
      model: of `MODELS`.
      topology: of the chips.
      rows: sequences on each row shard: MaxText's per_device_batch_size times `tensor`, or half of
        that where this program needs more memory; the measured time is then of half the tokens.
      length: of a sequence.
      remat: this library's policy that is nearest to MaxText's.
      seconds: measured, of a step; or
      tflops: measured, TFLOP/s a chip by MaxText's count, or
      rate: tokens/s a chip.
      tensor: size of that axis; all other chips are `fsdp`.
      flags: MaxText's.
    """

    model: str
    topology: str
    rows: int
    length: int
    remat: str
    flags: str
    seconds: float = 0.0
    tflops: float = 0.0
    rate: float = 0.0
    tensor: int = 1

    @property
    def measured(self) -> float:
        """Seconds of a step."""
        tokens = self.rows * self.length / self.tensor
        if self.rate:
            return tokens / self.rate
        return self.seconds or tokens * maxtext_flops(MODELS[self.model], self.length) / (
            self.tflops * 1e12
        )


def maxtext_flops(decoder: DecoderConfig, length: int) -> float:
    """FLOPs of a token, as MaxText counted until July 2025: attention as if it were not causal."""
    heads = decoder.num_attention_heads * decoder.head_dim
    keys = decoder.num_key_value_heads * decoder.head_dim
    layer = decoder.hidden_size * (3 * decoder.intermediate_size + 2 * heads + 2 * keys)
    products = 2 * (decoder.num_hidden_layers * layer + decoder.hidden_size * decoder.vocab_size)
    return 3 * (products + decoder.num_hidden_layers * 4 * length * heads)


RUNS = {
    "v5p 70B": Run("Llama-2-70B", "v5p:4x4x4", 2, 4096, "attention", V5P, rate=692),
    "v5p 32B": Run("32B", "v5p:4x4x4", 12, 2048, "dots", V5P, tflops=328, tensor=4),
    "v5p 64B": Run("64B", "v5p:4x4x4", 6, 2048, "dots", V5P, tflops=323, tensor=4),
    "v5p 405B": Run("Llama-3.1-405B", "v5p:8x8x8", 2, 8192, "full", V5P, seconds=131.474),
    "v5e 16B": Run("16B", "v5e:16x16", 6, 2048, "full", V5E, tflops=120),
    "v5e 32B": Run("32B", "v5e:16x16", 4, 2048, "full", V5E, tflops=132),
    "v5e 64B": Run("64B", "v5e:16x16", 2, 2048, "full", V5E, tflops=118),
    "v5e 128B": Run("128B", "v5e:16x16", 1, 2048, "full", V5E, tflops=110),
    "v6e 8B 8": Run("Llama-3.1-8B", "v6e:2x4", 3, 8192, "full", V6E, 3.443),
    "v6e 8B 16": Run("Llama-3.1-8B", "v6e:4x4", 3, 8192, "full", V6E, 3.393),
    "v6e 8B 64": Run("Llama-3.1-8B", "v6e:8x8", 5, 8192, "full", V6E, 5.652),
    "v6e 8B 256": Run("Llama-3.1-8B", "v6e:16x16", 4, 8192, "full", V6E, 4.546),
    "v6e 70B 256": Run("Llama-2-70B", "v6e:16x16", 2, 4096, "full", V6E, 9.052),
    "v6e 70B 3.1": Run("Llama-3.1-70B", "v6e:16x16", 5, 8192, "full", V6E, 42.656),
}


def config(run: Run, chips: int) -> Config:
    """The run as this library has it: a language model that learns every token of full rows."""
    return Config(
        workdir="unused",
        data=DataConfig(train="unused", attributes=(), max_length=run.length),
        model=MODELS[run.model],
        objective="sft",
        batch_size=run.rows * chips // run.tensor,
        steps=1,
        rows_per_device=run.rows,
        remat=run.remat,
        mesh=MeshConfig(tensor=run.tensor),
        optimizer=OptimizerConfig(learning_rate=1e-5, b1=0.9, b2=0.95),
    )


def compiled(run: Run) -> Report:
    """The run's program, with MaxText's attention kernel in its time."""
    devices, chip = topology_devices(run.topology)
    told = config(run, len(devices))
    chip = dataclasses.replace(chip, attention=KERNELS[chip.name])
    load = Workload(told.batch_size, run.length, predicted=run.length - 1)
    return check_program(told, run.topology, make_mesh(told.mesh, devices), chip, load)


def line(name: str) -> str:
    """Compiles one run and says what came of it."""
    run = RUNS[name]
    report = compiled(run)
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    cells = [run.model, run.topology, mesh, f"{run.rows * run.length // run.tensor:,}", run.remat]
    found = report.prediction
    if found is None:
        why = report.unread or f"does not fit: {report.peak / 2**30:.1f} GiB"
        return "| " + " | ".join([*cells, why, "", f"{run.measured:.2f}", ""]) + " |"
    waits = found.step - found.operations
    cells += [f"{found.operations:.2f}", f"{waits:.2f}", f"{found.step:.2f}"]
    cells += [f"{run.measured:.2f}", f"{found.step / run.measured:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """The command: a process a run, since the compiler reads its flags once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", action="store_true", help="compile here, and print the line alone")
    parser.add_argument("names", nargs="*", help="runs, or chips; all if not given")
    arguments = parser.parse_args()
    if arguments.one:
        jax.config.update("jax_platforms", "cpu")
        print(line(arguments.names[0]))
        return
    print(HEAD, flush=True)
    for name, run in RUNS.items():
        if arguments.names and not {name, name.split()[0]} & set(arguments.names):
            continue
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": run.flags}
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        print(done.stdout.strip() or f"| {name} | {done.stderr.strip().splitlines()[-1][:200]} |")


if __name__ == "__main__":
    main()
