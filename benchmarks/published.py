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

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.models.decoder_config import LlamaConfig, Rope
from rmjax.models.presets import llama31_8b, llama31_70b, llama31_405b
from rmjax.runtime.sharding import MeshConfig

ROOT = Path(__file__).parent.parent


def _decoder(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    """A decoder with Llama 2's vocabulary."""
    return LlamaConfig(
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


@dataclasses.dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
      model: of `MODELS`.
      topology: of the chips.
      rows: sequences on each row shard, MaxText's per_device_batch_size times `tensor`.
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


def maxtext_flops(llama: LlamaConfig, length: int) -> float:
    """FLOPs of a token, as MaxText counted until July 2025: attention as if it were not causal."""
    heads = llama.num_attention_heads * llama.head_dim
    keys = llama.num_key_value_heads * llama.head_dim
    layer = llama.hidden_size * (3 * llama.intermediate_size + 2 * heads + 2 * keys)
    products = 2 * (llama.num_hidden_layers * layer + llama.hidden_size * llama.vocab_size)
    return 3 * (products + llama.num_hidden_layers * 4 * length * heads)


RUNS = {
    "v5p 70B": Run("Llama-2-70B", "v5p:4x4x4", 4, 4096, "attention", V5P, rate=692),
    "v5p 32B": Run("32B", "v5p:4x4x4", 24, 2048, "dots", V5P, tflops=328, tensor=4),
    "v5p 64B": Run("64B", "v5p:4x4x4", 12, 2048, "dots", V5P, tflops=323, tensor=4),
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
