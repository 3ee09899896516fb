"""How programs are compiled: the compiler's options, and its results kept between runs."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from rmjax.runtime.cache import cache_root

# The scratch memory of a v5p that one operation may use, in KiB; the compiler's default is less.
# By its own estimate more pays on v5p and costs on v5e (docs/appendix.md); v6e is untried.
_SCRATCH_KIB = 65536
_SCRATCH_CHIPS = ("TPU v5", "TPU v5p")  # JAX has both names for a v5p


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """The compiler's options for programs on the devices of `mesh`; none except on v5p.

    One device stands for all. An abstract mesh has none, and nothing is compiled for it.
    """
    if isinstance(mesh, AbstractMesh):
        return {}
    device: Any = mesh.devices.flat[0]
    if device.device_kind not in _SCRATCH_CHIPS:
        return {}
    return {"xla_tpu_scoped_vmem_limit_kib": str(_SCRATCH_KIB)}


def enable_compilation_cache() -> None:
    """Has JAX keep what it compiles for the next run, unless the user has chosen where.

    That is `compiled/` in the cache of `runtime.cache`. JAX's own variable goes first:
    `JAX_COMPILATION_CACHE_DIR` names another directory, and none if it is empty. Process 0 alone
    writes. A file that is missing, cut short or unreadable costs a compilation, never the run.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
