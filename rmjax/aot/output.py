"""Reports as tables and as JSON."""

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rmjax.aot.alignment import AlignmentReport
from rmjax.aot.hardware import Chip
from rmjax.aot.program import Report, Workload
from rmjax.aot.roofline import Prediction
from rmjax.aot.sampling import SamplingLoad, SamplingReport
from rmjax.generation.programs import CHUNK


def line(report: Report, chip: Chip) -> str:
    """A report in one line."""
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    head = f"{mesh}, {report.rows} rows, remat {report.remat}: peak {report.peak / 2**30:.1f} GiB"
    if report.prediction is None:
        return f"{head}, {'not readable' if report.fits else 'does not fit'}"
    return f"{head}, {report.seconds:.2f} s predicted, MFU {report.mfu(chip):.1%}"


def show(report: Report, chip: Chip, load: Workload, length: int, console: Console) -> None:
    """Prints a report."""
    chips = math.prod(report.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    console.print(f"topology    {report.topology}: {chips} chips; mesh {mesh}")
    shared = f", {load.prompt:,} of them shared by {load.responses}" if load.prompt else ""
    predicted = f", {load.predicted:,} of them predicted" if load.predicted else ""
    console.print(
        f"step        {load.samples} responses of {load.tokens:,} tokens{shared}{predicted}, "
        f"{load.rows(length)} rows of {length:,}; {report.microbatches} x {report.rows} rows "
        f"computed, remat {report.remat}"
    )
    taken = f", {report.steps_taken:.0%} of its steps taken" if report.steps_taken else ""
    console.print(f"attention   {report.attention}{taken}")
    console.print(f"compiled    in {report.compile_seconds:.0f} s\n")
    table = _table("bytes a chip", "", "GiB")
    for name in ("parameters", "optimizer", "gradients", "temporaries", "peak"):
        table.add_row(name, f"{getattr(report, name) / 2**30:.2f}")
    table.add_row("the chip has", f"{report.memory / 2**30:.2f}")
    console.print(table)
    if not report.fits:
        console.print(f"DOES NOT FIT: {report.peak / 2**30:.1f} GiB are needed on every chip")
    found = report.prediction
    _show_unread(report.unread, console)
    if found is not None:
        _show_prediction(report, found, chip, console)
    if report.fits:
        console.print(f"FITS: {report.peak / 2**30:.1f} of {report.memory / 2**30:.1f} GiB")


def show_sampling(report: SamplingReport, load: SamplingLoad, console: Console) -> None:
    """Prints what sampling comes to."""
    chips = math.prod(report.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    shape = report.shape
    console.print(f"topology    {report.topology}: {chips} chips; mesh {mesh}")
    console.print(
        f"sampling    {report.rows:,} rows at once, {load.n} samples of a prompt, prompts of "
        f"{load.prompt:,} tokens, samples of {load.tokens:,}"
    )
    console.print(
        f"cache       {shape.groups} groups of {shape.members} rows, {shape.places:,} places for "
        f"prompts, {shape.slots:,} slots a row; attention of prompts {report.attention}"
    )
    console.print(f"compiled    in {report.compile_seconds:.0f} s\n")
    table = _table("bytes a chip", "", "GiB")
    for name in ("weights", "cache", "temporaries", "peak"):
        table.add_row(name, f"{getattr(report, name) / 2**30:.2f}")
    table.add_row("the chip has", f"{report.memory / 2**30:.2f}")
    console.print(table)
    _show_unread(report.unread, console)
    chunk, prompts = report.chunk, report.prompts
    if chunk is not None:
        table = _table("predicted by a roofline, not measured", "one token of every row", "ms")
        rows = {
            "weights and cache read once": report.bound * CHUNK,
            "main memory": chunk.memory,
            "FLOPs of the program": chunk.compute,
            "all operations, estimated": chunk.operations,
            **{f"network {name}": seconds for name, seconds in chunk.networks.items()},
            "predicted": chunk.step,
        }
        for name, seconds in rows.items():
            table.add_row(name, f"{1e3 * seconds / CHUNK:.2f}")
        console.print(table)
        console.print(
            f"{report.decoded:,.0f} tokens/s, {report.decoded / chips:,.0f} a chip; "
            f"{report.of_bound:.0%} of the time is what reading weights and cache takes"
        )
    if chunk is not None and prompts is not None:
        console.print(
            f"prompts {report.calls} x {prompts.step:.2f} s, {report.prompts_at_once:,} at once; "
            f"with them {report.sampled:,.0f} tokens/s"
        )
    found = f"{report.peak / 2**30:.1f} of {report.memory / 2**30:.1f} GiB"
    console.print(f"FITS: {found}" if report.fits else f"DOES NOT FIT: {found}")


def show_alignment(report: AlignmentReport, console: Console) -> None:
    """Prints what a step of a policy that learns from its own samples comes to."""
    chips, load = math.prod(report.mesh.values()), report.load
    trained, sampled = (
        ", ".join(f"{axis} {size}" for axis, size in mesh.items())
        for mesh in (report.mesh, report.sampling.mesh)
    )
    console.print(f"topology    {report.topology}: {chips} chips; mesh {trained}")
    console.print(f"sampling    mesh {sampled}")
    console.print(
        f"step        {report.samples} samples of {load.tokens:,} tokens, {load.n} of each prompt "
        f"of {load.prompt:,}; {report.sampling.rows:,} made at once"
    )
    console.print(f"reward      {report.reward}", markup=False)
    seconds = report.update.compile_seconds + report.sampling.compile_seconds
    console.print(f"compiled    sampling and the update in {seconds:.0f} s\n")
    table = _table("bytes a chip", "", "GiB", "there")
    for part in report.parts:
        table.add_row(part.name, f"{part.bytes / 2**30:.2f}", part.when)
    table.add_row("the chip has", f"{report.memory / 2**30:.2f}", "")
    console.print(table)
    title = "programs, in GiB a chip; seconds are predicted by a roofline, not measured"
    table = _table(title, "", "own", "with the rest", "calls", "s a step")
    for phase in report.phases:
        took = "-" if phase.seconds is None else f"{phase.seconds:.2f}"
        sizes = (f"{phase.own / 2**30:.2f}", f"{phase.peak / 2**30:.2f}")
        table.add_row(phase.name, *sizes, f"{phase.calls:,}", took)
    console.print(table)
    _show_unread(report.unread, console)
    if report.seconds is not None:
        tokens = report.samples * load.tokens / report.seconds
        console.print(f"step {report.seconds:.1f} s; {tokens:,.0f} sampled tokens/s")
    peak = max(report.phases, key=lambda phase: phase.peak)
    found = f"{peak.peak / 2**30:.1f} of {report.memory / 2**30:.1f} GiB, most in: {peak.name}"
    console.print(f"FITS: {found}" if report.fits else f"DOES NOT FIT: {found}")


def _show_unread(unread: str, console: Console) -> None:
    if unread:
        console.print(
            "the compiler's program cannot be read, so there is no prediction; Python 3.12 and its "
            f"newer JAX can, as a rule ({unread})",
            markup=False,
        )


def _show_prediction(report: Report, found: Prediction, chip: Chip, console: Console) -> None:
    chips = math.prod(report.mesh.values())
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


def show_ranking(reports: list[Report], chip: Chip, fitting: int, console: Console) -> None:
    """Prints what a search found."""
    console.print(f"{fitting} candidates should fit; {len(reports)} of them were compiled\n")
    table = _table("from the best prediction to the worst", "mesh", "rows", "remat", "GiB", "s")
    table.add_column("MFU", justify="right")
    for report in reports:
        mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
        speed = ("-", "-")
        if report.prediction is not None:
            speed = (f"{report.seconds:.2f}", f"{report.mfu(chip):.1%}")
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
    fields = dataclasses.asdict(report)
    prediction: Any = fields["prediction"]
    if report.prediction is not None:
        prediction |= {
            "floor": report.prediction.floor,
            "serial": report.prediction.serial,
            "tokens_per_second": report.tokens / report.prediction.step,
            "mfu": report.mfu(chip),
        }
    return fields


def sampling_as_json(report: SamplingReport) -> dict[str, Any]:
    """A report in JSON's types, with what follows from it."""
    fields = dataclasses.asdict(report) | {"rows": report.rows}
    if report.chunk is not None:
        fields |= {
            "seconds_per_token": report.seconds,
            "of_bound": report.of_bound,
            "decoded_per_second": report.decoded,
            "sampled_per_second": report.sampled,
        }
    return fields


def alignment_as_json(report: AlignmentReport, chip: Chip) -> dict[str, Any]:
    """A report in JSON's types, with what follows from it."""
    return dataclasses.asdict(report) | {
        "always": report.always,
        "fits": report.fits,
        "seconds": report.seconds,
        "sampling": sampling_as_json(report.sampling),
        "update": as_json(report.update, chip),
    }
