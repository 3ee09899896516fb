"""What a run prints before its first step and after its last one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from rmjax.data.batches import Batches
from rmjax.evaluation.metrics import AttributeMetrics, PairMetrics, PolicyMetrics
from rmjax.models.init import abstract_model
from rmjax.models.model import Model
from rmjax.models.parameters import HEAD, adapter_parameters, flatten


def announce(
    console: Console,
    *,
    workdir: Path,
    model: Model,
    origin: str,
    batches: Batches,
    held_out: Batches | None,
) -> None:
    """Prints what is about to run: devices, model, weights, data, rows."""
    devices, options = jax.devices(), model.options
    mesh = ", ".join(f"{axis} {size}" for axis, size in options.sharding.mesh.shape.items())
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(abstract_model(model)).items()}
    stored = "float32"
    if model.lora.rank:
        trained = sum(sizes[row.path] for row in adapter_parameters(model.lora))
        trained += sizes.get(HEAD.path, 0)
        what = "the head and adapters" if HEAD.path in sizes else "adapters"
        stored = (
            f"{trained:,} of them trained: {what} of rank {model.lora.rank} for "
            f"{', '.join(model.lora.targets)}; the rest {options.dtype.name}"
        )
    console.print(f"run         {workdir}")
    console.print(f"devices     {len(devices)} x {devices[0].device_kind}; mesh {mesh}")
    console.print(
        f"model       {sum(sizes.values()) / 1e6:,.1f} M parameters, {stored}; computed in "
        f"{options.dtype.name}, remat {options.remat}, attention {options.attention}"
    )
    console.print(f"weights     {origin}")
    for name, part in (("training", batches), ("validation", held_out)):
        if part is not None:
            data = part.data
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in data.counts.items())
            console.print(
                f"{name:<11} {data.source}: {reasons}; {data.lengths.mean():.0f} tokens a sample"
            )
            for note in data.notes:
                console.print(f"{'':<11} {note}")
    steps = range(len(batches))
    tokens = sum(map(batches.tokens, steps))
    alone = sum(int(batches.data.lengths[batches.samples(step)].sum()) for step in steps)
    shapes = " or ".join(
        f"{shape.length} tokens, up to {shape.slots} samples, {shape.rows} rows at once"
        for shape in batches.shapes
    )
    held = f", {padding_of(held_out):.1%} in validation" if held_out else ""
    console.print(
        f"rows        {shapes}; up to {batches.microbatches} micro-batches a step; padding "
        f"{padding_of(batches):.1%}{held}"
    )
    several = sum(len(batches.samples(step)) - len(batches.computed(step)) for step in steps)
    if several:
        console.print(f"pairs       {several:,} times a response was computed for an earlier pair")
    if batches.share:
        saved = 1 - tokens / alone
        console.print(
            f"prompts     computed once for their responses, which saves {saved:.1%} of the tokens"
        )


def padding_of(batches: Batches) -> float:
    """The share of what all steps compute that holds no token."""
    steps = range(len(batches))
    return 1 - sum(map(batches.tokens, steps)) / sum(map(batches.padded_tokens, steps))


def conclude(
    console: Console,
    workdir: Path,
    evaluations: Mapping[int, Mapping[str, Any]],
    policy: bool,
) -> None:
    """Prints the metrics of the best checkpoint, and what to do next with it."""
    if evaluations:
        best = min(evaluations, key=lambda step: evaluations[step]["validation_loss"])
        metrics = evaluations[best]
        title = (
            f"held-out data, step {best} (best validation loss, {metrics['validation_loss']:.4f})"
        )
        console.print()
        if metrics["attributes"]:
            rows = {name: AttributeMetrics(**row) for name, row in metrics["attributes"].items()}
            console.print(attribute_table(title, rows))
        if metrics.get("pairs"):
            console.print(pair_table(title, PairMetrics(**metrics["pairs"])))
        if metrics.get("policy"):
            console.print(policy_table(title, PolicyMetrics(**metrics["policy"])))
    use = f"""rm = rmjax.load("{workdir}")
  >>> rm.compare("a prompt", "one response", "another response")"""
    if policy:
        use = f"""policy = rmjax.load_policy("{workdir}")
  >>> policy.sample(["a prompt"], n=2)"""
    console.print(
        f"""
Next:
  python -m rmjax.report {workdir}
  python -m rmjax.convert orbax-to-hf {workdir} {workdir}-hf
  tensorboard --logdir {workdir}/tensorboard
  python
  >>> import rmjax
  >>> {use}"""
    )


def attribute_table(title: str, table: Mapping[str, AttributeMetrics]) -> Table:
    """The table of rated attributes."""
    view = _table(title)
    view.add_column("attribute", no_wrap=True)
    for name in ("ratings", "MSE", "MSE of\nmean", "Pearson", "Spear-\nman", "pair\nacc.", "pairs"):
        view.add_column(name, justify="right", no_wrap=True)
    for name, metrics in table.items():
        errors = (metrics.mse, metrics.mse_constant, metrics.pearson, metrics.spearman)
        shown = map(_decimal, (*errors, metrics.pair_accuracy))
        view.add_row(name, str(metrics.count), *shown, str(metrics.pairs))
    return view


def pair_table(title: str, metrics: PairMetrics) -> Table:
    """The table of preference pairs."""
    view = _table(title)
    view.add_column("preference pairs", no_wrap=True)
    view.add_column(metrics.attribute, justify="right", no_wrap=True)
    interval = f"{_decimal(metrics.accuracy)} ({_decimal(metrics.low)} to {_decimal(metrics.high)})"
    view.add_row("pairs", str(metrics.pairs))
    view.add_row("accuracy (95 % interval)", interval)
    for strength, (share, count) in metrics.by_strength.items():
        view.add_row(f"  strength {strength}, {count} pairs", _decimal(share))
    view.add_row("mean margin", _decimal(metrics.mean_margin))
    view.add_row("calibration error", _decimal(metrics.calibration_error))
    view.add_row("temperature", _decimal(metrics.temperature))
    view.add_row("correlation with length", _decimal(metrics.length_correlation))
    return view


def policy_table(title: str, metrics: PolicyMetrics) -> Table:
    """The table of what a policy says of held-out responses; see `PolicyMetrics`."""
    view = _table(title)
    view.add_column("responses", no_wrap=True)
    view.add_column("policy", justify="right", no_wrap=True)
    view.add_row("responses", str(metrics.responses))
    view.add_row("tokens", str(metrics.tokens))
    for label, value in (
        ("log-probability of a token", metrics.token_log_probability),
        ("log(policy / reference) of a token", metrics.log_ratio),
        ("log-probability, chosen", metrics.chosen_log_probability),
        ("log-probability, rejected", metrics.rejected_log_probability),
        ("implicit reward, chosen", metrics.chosen_reward),
        ("implicit reward, rejected", metrics.rejected_reward),
    ):
        if (shown := _decimal(value)) != "-":
            view.add_row(label, shown)
    return view


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _decimal(value: float | None) -> str:
    """The number; a checkpoint has None for NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
