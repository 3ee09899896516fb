"""How programs are compiled: the compiler's options, and its results kept between runs."""

import warnings
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from rmjax.errors import UserError
from rmjax.runtime.cache import cache_directory, programs_fault

# Weights are gathered, and their gradients summed, by the SparseCores, beside what the TensorCore
# computes. By itself the compiler has the TensorCore wait for them, and makes an all-reduce, with
# twice the bytes, of what goes along three dimensions of the torus (docs/scaling.md).
_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    # By itself the compiler takes a scatter, which uses two links, for shorter than it is, and has
    # the end of a layer's backward pass wait for it.
    "xla_tpu_sparse_core_reduce_scatter_latency_multiplier": "4",
}
# A product is not cut into small ones, each beside the permutation of a part of its weight: that
# hides less than gathers that run beside whole products, and reads and writes its sums again.
_WHOLE_PRODUCTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def _scratch(kib: int) -> dict[str, str]:
    """The scratch memory that one operation may use; the compiler's default is less."""
    return {"xla_tpu_scoped_vmem_limit_kib": str(kib)}


_V5P = _scratch(65536) | _WHOLE_PRODUCTS | _SPARSE_CORES
# It has no SparseCores. With twice the scratch memory it is no faster, and compiles far longer.
_V5E = _scratch(32768) | _WHOLE_PRODUCTS
_V6E = _scratch(98304) | _WHOLE_PRODUCTS | _SPARSE_CORES
_OPTIONS = {  # JAX has two names for each
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """The compiler's options for programs on the devices of `mesh`, by the kind of chip.

    One device stands for all. An abstract mesh has none, and nothing is compiled for it.
    """
    if isinstance(mesh, AbstractMesh):
        return {}
    device: Any = mesh.devices.flat[0]
    return _OPTIONS.get(device.device_kind, {})


def enable_compilation_cache() -> None:
    """Has JAX keep what it compiles for the next run, unless the user has chosen where.

    That is `compiled/` in the cache of `runtime.cache`. JAX's own variable goes first:
    `JAX_COMPILATION_CACHE_DIR` names another directory, and none if it is empty. Process 0 alone
    writes. A file that is missing, cut short or unreadable costs a compilation, never the run.

    A program is code, and nothing shows who wrote it. So a directory that others may write to is
    not used, which costs a compilation and a warning.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        directory = cache_directory("compiled")
        fault = programs_fault(directory)
    except UserError as error:
        fault, directory = str(error), None
    if fault or directory is None:
        warnings.warn(f"compiled programs are not kept: {fault}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
