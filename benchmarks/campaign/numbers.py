"""Numbers at their edges: what is not finite stops or is counted, and nothing else is said for it.

A case is a command on tiny models or files. It stops with one line that names the thing, or it says
what it left out, or its numbers are those of float64.
"""

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

from campaign import numbers_files, numbers_models, numbers_runs, numbers_served
from campaign.ledger import Row
from campaign.numbers_case import tried

KINDS = {
    "weights": numbers_models.weight_cases,
    "bfloat16 and 8 bits": numbers_models.precision_cases,
    "values and rmjax.json": numbers_models.rule_cases,
    "conversions": numbers_models.conversion_cases,
    "sampling": numbers_models.sampling_cases,
    "labels and margins": numbers_runs.label_cases,
    "losses, gradients, updates": numbers_runs.training_cases,
    "rewards of samples": numbers_runs.alignment_cases,
    "probing": numbers_runs.probe_cases,
    "files of scores": numbers_files.score_cases,
    "choosing": numbers_files.choice_cases,
    "metrics and reports": numbers_files.report_cases,
}


def run(
    seed: int,
    minutes: float,
    scratch: Path,
    show: Callable[[str], None],
    only: Collection[str] = (),
) -> list[Row]:
    """Tries the cases of each kind in turn, so that all have some when the minutes are over."""
    end = time.monotonic() + 60 * minutes
    rows = {kind: Row("numbers", kind) for kind in KINDS}
    waiting = {kind: cases() for kind, cases in KINDS.items() if not only or kind in only}
    if not only or "served scores" in only:
        rows["served scores"] = numbers_served.run(scratch, show)
    while waiting and time.monotonic() < end:
        for kind, cases in [*waiting.items()]:
            case = next(cases, None)
            if case is None:
                del waiting[kind]
                continue
            directory = scratch / "case"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            fault, ended = tried(case, directory)
            rows[kind].count(f"{case.name}: {fault}" if fault else "")
            show(f"{'LOST' if fault else 'ok':<4} {case.name}: {ended.code}, {ended.seconds:.1f} s")
            show(f"     {fault or ended.text.strip()[-160:]!r}")
    for kind in waiting:
        show(f"{kind}: no time left for more than {rows[kind].tried}")
    return [row for row in rows.values() if row.tried]
