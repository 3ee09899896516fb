"""Which mesh, remat policy and micro-batch: ranked by arithmetic, then compiled."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

from rmjax.aot.estimate import estimate
from rmjax.aot.hardware import Chip
from rmjax.aot.output import line
from rmjax.aot.program import (
    Report,
    Workload,
    abstract_program,
    architecture,
    check_program,
    state_bytes,
)
from rmjax.config import Config
from rmjax.errors import UserError
from rmjax.models.decoder import REMAT
from rmjax.runtime.sharding import MeshConfig, Sharding, abstract_mesh, make_mesh, mesh_shape
from rmjax.training.experiment import new_head
from rmjax.training.rows import longest_row


def search_meshes(
    config: Config, topology: str, devices: list[Any], chip: Chip, load: Workload, minutes: float
) -> tuple[list[Report], int]:
    """Compiles what arithmetic ranks best, the config as it is first, until the time is up.

    Two are compiled whatever time it takes, so that there is something to compare.

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
        if len(reports) >= 2 and time.monotonic() + longest > end:
            break
        mesh = make_mesh(candidate.mesh, devices)
        report = check_program(candidate, topology, mesh, chip, load)
        longest = max(longest, report.compile_seconds)
        reports.append(report)
        print(line(report, chip), file=sys.stderr)
    return sorted(reports, key=lambda r: (not r.fits, r.seconds)), len(ranked)


def _estimated(
    config: Config, devices: list[Any], chip: Chip, load: Workload
) -> Iterator[tuple[float, Config]]:
    """Candidates that divide and should fit, with their seconds by arithmetic."""
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if chip.torus else 1
    decoder = architecture(config)
    head = new_head(config, decoder)
    for mesh in _meshes(len(devices), slices):
        sizes = mesh_shape(mesh, len(devices))
        sharding = Sharding(abstract_mesh(mesh, len(devices)))
        try:
            state = state_bytes(abstract_program(config, decoder, sharding)[1], config.trained)
        except UserError:  # does not divide
            continue
        for rows in (1, 2, 4, 8):
            for remat in REMAT[1:]:
                candidate = dataclasses.replace(
                    config, mesh=mesh, rows_per_device=rows, remat=remat
                )
                guess = estimate(
                    decoder,
                    head,
                    mesh=sizes,
                    chip=chip,
                    chips_per_host=_chips_per_host(devices),
                    rows=rows,
                    microbatches=-(-load.rows(longest_row(config)) // (rows * sharding.row_shards)),
                    length=longest_row(config),
                    group=load.group,
                    remat=remat,
                    predicted=load.predicted * load.responses,
                )
                divides = longest_row(config) % sizes["context"] == 0
                if divides and sum(state.values()) + guess.temporaries < chip.memory:
                    yield guess.step, candidate


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
