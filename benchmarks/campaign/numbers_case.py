"""A case of numbers at their edges: what is given, what must come of it, and whether it did.

Whatever a command writes is looked at: JSON that is none, pages with a NaN in them, and weights
that are not finite are faults, whether the command ends well or not.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from campaign import forks

# Of a page or a terminal; letters and paths around it make it a word of a text.
_NO_NUMBER = re.compile(r"(?<![\w./'\"=-])-?(nan|inf|infinity)(?![\w./'\"=-])", re.IGNORECASE)
_STYLES = re.compile(r"<(style|script|svg)\b.*?</\1>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Case:
    """One command and its promise.

    Attributes:
      name: what is at its edge, and where.
      make: writes into an empty directory what the command is given.
      arguments: of the command, which runs there.
      stops: a pattern of the one line with which it must stop; empty if it must not. With `found`
        it may do either.
      says: a pattern of what it must say if it ends well.
      found: says what is wrong with what it wrote if it ends well.
    """

    name: str
    make: Callable[[Path], object]
    arguments: list[str]
    stops: str = ""
    says: str = ""
    found: Callable[[Path], str] | None = None


def tried(case: Case, directory: Path) -> tuple[str, forks.Ended]:
    """Runs a case in an empty directory; what is wrong, or nothing, and how it ended."""
    case.make(directory)
    before = _files(directory)
    ended = forks.run(case.arguments, directory, seconds=120)
    written = [path for path, seen in _files(directory).items() if before.get(path) != seen]
    faults = [_end_fault(case, ended, directory)]
    faults += [file_fault(path) for path in written if path.name != "output.txt"]
    if any(path.name == "_METADATA" for path in written):
        found = forks.call(_array_faults, directory)
        faults += [f"{name}: {what}" for name, what in found.items()]
    return "; ".join(filter(None, faults)), ended


def _files(directory: Path) -> dict[Path, tuple[int, int]]:
    found = ((path, path.stat()) for path in directory.rglob("*") if path.is_file())
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found}


def _end_fault(case: Case, ended: forks.Ended, directory: Path) -> str:
    text, last = ended.text, ended.text.strip()[-300:]
    if ended.limit:
        return f"not done after {ended.limit}"
    for word in ("Traceback", "RuntimeWarning"):
        if word in text:
            return f"{word}: {last!r}"
    if ended.code == 0:
        if case.stops and not case.found:
            return f"it went on: {last!r}"
        if case.says and not re.search(case.says, text):
            return f"does not say {case.says!r}: {last!r}"
        if (found := _NO_NUMBER.search(text)) and not case.says:
            return f"prints {text[max(0, found.start() - 60) : found.end() + 20]!r}"
        return case.found(directory) if case.found else ""
    lines = [line for line in text.splitlines() if "error: " in line]
    if ended.code != 1 or len(lines) != 1:
        return f"status {ended.code}, and {len(lines)} lines that say why: {last!r}"
    if not case.stops:
        return f"it stopped: {lines[0][-300:]!r}"
    return "" if re.search(case.stops, lines[0]) else f"stops for another reason: {lines[0]!r}"


def file_fault(path: Path) -> str:
    """What is wrong with the numbers of a file that a command wrote."""
    try:
        if path.suffix == ".json":
            strict(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                strict(line or "null")
        elif path.suffix in (".html", ".md", ".csv"):
            text = _STYLES.sub("", path.read_text())
            if found := _NO_NUMBER.search(text):
                raise ValueError(text[max(0, found.start() - 60) : found.end() + 20])
        elif path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.numpy import load_file

            with contextlib.suppress(SafetensorError):  # of an export that is not whole
                bad = [key for key, x in load_file(path).items() if not np.isfinite(x).all()]
                if bad:
                    raise ValueError(f"{', '.join(bad)} not finite")
    except ValueError as error:
        return f"{path.name} is written with {str(error)!r}"
    return ""


def strict(text: str | bytes) -> Any:
    """JSON as its standard has it, and numbers that a float has; a `ValueError` if it is not."""

    def constant(name: str) -> Any:
        raise ValueError(name)

    def number(digits: str) -> float:
        found = float(digits)
        if not math.isfinite(found):
            raise ValueError(digits)
        return found

    return json.loads(text, parse_constant=constant, parse_float=number)


def _array_faults(directory: Path) -> dict[str, str]:
    """Of all Orbax arrays under a directory, those that are not finite."""
    import tensorstore as ts

    faults = {}
    for metadata in directory.rglob("_METADATA"):
        item = metadata.parent
        for leaf in json.loads(metadata.read_text())["tree_metadata"].values():
            name = ".".join(str(key["key"]) for key in leaf["key_metadata"])
            stores = (
                {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"},
                {"driver": "file", "path": f"{item}/{name}/"},
            )
            for store in stores:
                try:
                    array = ts.open({"driver": "zarr3", "kvstore": store}, read=True).result()
                except ValueError:  # it is stored the other way, or has no array
                    continue
                if not np.isfinite(np.asarray(array.read().result(), np.float64)).all():
                    faults[name] = "is saved with numbers that are not finite"
    return faults
