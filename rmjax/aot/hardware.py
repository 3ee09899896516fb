"""What accelerators can do, by their makers' data sheets: the constants of the roofline.

TPUs: the pages v5e, v5p and v6e of Google's Cloud TPU documentation. Bandwidths of links are one
direction of one port: what the documentation gives for a chip, both directions, over the number of
its ports and 2. GPUs: NVIDIA's data sheets of the H100 SXM and H200 SXM; a port stands for all of
a GPU's NVLinks, which a switch joins, and the slow network is one 400 Gb/s adapter a GPU.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: as in a topology's name.
      flops: bfloat16 matrix products, FLOP/s.
      memory: bytes.
      memory_bandwidth: bytes/s.
      clock: cycles/s in which the compiler states its estimates; 0 if it states none.
      link: bytes/s of one port in one direction.
      torus: sizes of a dimension from which on (in multiples of which) its ends are joined; 0 if
        there is no torus but a switch.
      slow: bytes/s of the network between slices or hosts, for each chip.
      attention: cycles that the compiler schedules for a step of the attention kernel, 512 queries
        by 512 keys of 128 numbers: forward, gradient by queries, by keys and values, by all three
        at once. From `benchmarks/schedule.py`. A v5p has two cores, which only the forward pass
        uses both.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    clock: float
    link: float
    torus: int
    slow: float
    attention: tuple[int, int, int, int] = (0, 0, 0, 0)


# The clocks are the ones at which the matrix units give the stated FLOP/s; a test holds the
# compiler's estimate of one large product to it.
CHIPS = {
    "v5p": Chip(
        "v5p", 459e12, 95 * 2**30, 2765e9, 1.75e9, 100e9, 4, 6.25e9, (1152, 2587, 3285, 3462)
    ),
    "v5e": Chip(
        "v5e", 197e12, 16 * 2**30, 819e9, 1.5e9, 50e9, 16, 3.125e9, (2162, 2377, 2785, 3299)
    ),
    "v6e": Chip(
        "v6e", 918e12, 32 * 2**30, 1640e9, 1.75e9, 100e9, 16, 12.5e9, (1938, 2362, 2243, 2483)
    ),
    "h100": Chip("h100", 989e12, 80e9, 3350e9, 0.0, 450e9, 0, 50e9),
    "h200": Chip("h200", 989e12, 141e9, 4800e9, 0.0, 450e9, 0, 50e9),
}


def gpu_target(chip: Chip) -> str:
    """What XLA's GPU compiler must be told of a GPU that is not there (its `GpuTargetConfigProto`).

    Hopper's limits are those of NVIDIA's CUDA programming guide for compute capability 9.0.
    """
    return f"""
platform_name: "CUDA"
device_description_str: "{chip.name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {chip.memory_bandwidth:.0f}
  device_memory_size: {chip.memory:.0f}
}}
"""
