"""Cycles that the TPU compiler schedules for a step of the attention kernel, without a TPU.

    python benchmarks/schedule.py --topology=v5p:2x2x1

Compiles attention and its gradients for one chip, has the compiler write down the schedule of
every kernel, and counts the bundles in it, one a cycle. A step is straight-line code, so nearly all
of them are its own. A chip's `attention` in `rmjax/aot/hardware.py` comes from here; on chips with
two cores the forward pass gives each core half of the heads, so there its number is halved. Takes a
few minutes, and about 2 GB of disk for a while.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from rmjax.aot.program import topology_devices
from rmjax.models.attention import tpu_splash
from rmjax.models.attention.dispatch import attention
from rmjax.models.attention.mask import Layout
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
jax.config.update("jax_platforms", "cpu")
topology, rows = sys.argv[1], int(sys.argv[2])
sharding = Sharding(make_mesh(MeshConfig(), topology_devices(topology)[0][:1]))
def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.activation(axes))
layout = Layout(*[array((rows, 4096), jnp.int32, "row", "length")] * 3)
q, k = (
    array((rows, 4096, heads, 128), jnp.bfloat16, "row", "length", "heads", "head_dim")
    for heads in (16, 2)
)
def gradients(q, k, v, layout):
    plan = tpu_splash.make_plan(layout, sharding, block=1024)
    return jax.grad(lambda *x: attention(*x, plan).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)
jax.jit(gradients).trace(q, k, k, layout).lower(lowering_platforms=("tpu",)).compile()
"""


def bundles(topology: str, rows: int) -> dict[str, int]:
    """Cycles by phase; with one row, one kernel gives all gradients."""
    with tempfile.TemporaryDirectory() as directory:
        dump = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        environment = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        subprocess.run(
            [sys.executable, "-c", PROGRAM, topology, str(rows)],
            check=True,
            env=os.environ | environment | {"LIBTPU_INIT_ARGS": dump},
        )
        found = {}
        for path in Path(directory).glob("*schedule-analysis_final_bundles.txt"):
            phase = re.search(r"splash_mha_(\w+?)_segmented", path.name)
            count = re.search(r"total scheduled bundles:\s*(\d+)", path.read_text())
            if phase and count:
                found[phase.group(1)] = int(count.group(1))
    return found


def main() -> None:
    """Prints the cycles of the four kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5p:2x2x1")
    topology = parser.parse_args().topology
    apart, together = bundles(topology, 2), bundles(topology, 1)
    print(f"{topology}: cycles of a step of 512 queries, 512 keys, head_dim 128")
    print(f"forward {apart['fwd']}, by queries {apart['dq']}, by keys and values {apart['dkv']}")
    print(f"one row: forward {together['fwd']}, all gradients at once {together['dkv']}")


if __name__ == "__main__":
    main()
