"""Numbers at their edges: what is not finite stops or is counted, and nothing else is said for it.

A case is a command on tiny models or files. It stops with one line that names the thing, or it says
what it left out, or its numbers are those of float64.
"""

import shutil
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from campaign import numbers_files, numbers_models, numbers_runs, numbers_served
from campaign.ledger import Row
from campaign.numbers_case import Case, tried

# Those that take long come last, since one of each is tried in turn.
KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "choosing": numbers_files.choice_cases,
    "conversions": numbers_models.conversion_cases,
    "files of scores": numbers_files.score_cases,
    "weights": numbers_models.weight_cases,
    "values and rmjax.json": numbers_models.rule_cases,
    "metrics and reports": numbers_files.report_cases,
    "labels and margins": numbers_runs.label_cases,
    "bfloat16 and 8 bits": numbers_models.precision_cases,
    "sampling": numbers_models.sampling_cases,
    "probing": numbers_runs.probe_cases,
    "losses, gradients, updates": numbers_runs.training_cases,
    "rewards of samples": numbers_runs.alignment_cases,
}


def run(seed: int, minutes: float, scratch: Path, show: Callable[[str], None]) -> list[Row]:
    """Tries a case of each kind in turn, until all are done or the minutes are over."""
    end = time.monotonic() + 60 * minutes
    waiting = {kind: _faults(cases(), scratch / "case", show) for kind, cases in KINDS.items()}
    waiting["served scores"] = numbers_served.replies(scratch)
    rows = {kind: Row("numbers", kind) for kind in waiting}
    while waiting:
        for kind, faults in [*waiting.items()]:
            if time.monotonic() > end:
                break
            name, fault = next(faults, ("", ""))
            if not name:
                del waiting[kind]
                continue
            rows[kind].count(f"{name}: {fault}" if fault else "")
            show(f"{'LOST' if fault else 'ok':<4} {name}: {fault}")
        if time.monotonic() > end:
            break
    for kind, faults in waiting.items():
        show(f"{kind}: no time left for more than {rows[kind].tried}")
        faults.close()
    return [row for row in rows.values() if row.tried]


def _faults(
    cases: Iterator[Case], directory: Path, show: Callable[[str], None]
) -> Generator[tuple[str, str], None, None]:
    """Of each case its name, and what went wrong, if anything did."""
    for case in cases:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        fault, ended = tried(case, directory)
        show(f"     {ended.code}, {ended.seconds:.1f} s: {ended.text.strip()[-160:]!r}")
        yield case.name, fault
