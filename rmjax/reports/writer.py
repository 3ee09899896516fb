"""Writes a report: one document as HTML and Markdown, and its numbers as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.errors import UserError, disk_errors
from rmjax.reports import html, markdown
from rmjax.reports.document import Document, figures
from rmjax.reports.drawing import png
from rmjax.runtime.files import replace_file


def write_report(document: Document, directory: Path, data: Mapping[str, Any]) -> list[Path]:
    """Writes `report.json`, `report.md` with its `figures/`, and `report.html`.

    Each file is replaced as a whole. The same document and data give the same bytes.

    Args:
      document: what is shown.
      directory: is created if it does not exist.
      data: the numbers, with `format` and its version first; NaN and infinities become null.

    Returns:
      The three files, `report.html` first.

    Raises:
      UserError: the files cannot be written.
    """
    texts = {
        "report.html": html.render(document),
        "report.md": markdown.render(document),
        "report.json": json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
        + "\n",
    }
    drawn = figures(document.blocks)
    try:
        with disk_errors(f"the report in {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            if drawn:
                (directory / markdown.FIGURES).mkdir(exist_ok=True)
            for figure in drawn:
                replace_file(directory / markdown.figure_path(figure), png(figure.drawing))
            for name, text in texts.items():
                replace_file(directory / name, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{directory}: the report cannot be written there ({error.strerror}); choose another "
            "directory with --out"
        ) from error
    return [directory / name for name in texts]


def plain(value: Any) -> Any:
    """The value in JSON's types: numpy's become Python's, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if hasattr(value, "tolist"):  # a scalar or an array of numpy
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
