"""Renders a report as Markdown (GitHub's), with its figures in files beside it."""

from collections.abc import Sequence

from rmjax.reports.document import (
    Block,
    Collapsible,
    Document,
    Example,
    Facts,
    Figure,
    Heading,
    Headline,
    Paragraph,
    Table,
    Warning,
)
from rmjax.reports.text import markdown_block, one_line
from rmjax.reports.text import markdown_text as escape

FIGURES = "figures"


def figure_path(figure: Figure) -> str:
    """The path of a figure's file, relative to the Markdown file."""
    return f"{FIGURES}/{figure.name}.png"


def render(document: Document) -> str:
    """The whole text."""
    parts = [f"# {escape(document.title)}"]
    if document.subtitle:
        parts.append(escape(document.subtitle))
    parts += _facts(document.facts)
    for block in document.blocks:
        parts += _block(block)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> list[str]:
    match block:
        case Heading(text, level):
            return [f"{'#' * level} {escape(text)}"]
        case Paragraph(text):
            return [escape(text)]
        case Warning(text):
            return [f"> **Note:** {escape(text)}"]
        case Headline(items):
            shown = (f"{number} ({detail})" if detail else number for _, number, detail in items)
            return _facts([(name, text) for (name, _, _), text in zip(items, shown)])
        case Facts(items):
            return _facts(items)
        case Table():
            return _table(block)
        case Figure():
            # The text of an image is markup too.
            shown = f"![{escape(block.alt)}]({figure_path(block)})"
            return [shown, f"*{escape(block.caption)}*"] if block.caption else [shown]
        case Example():
            return _example(block)
        case Collapsible(title, inner):
            parts = [f"<details>\n<summary>{escape(title)}</summary>"]
            for part in inner:
                parts += _block(part)
            return [*parts, "</details>"]


def _facts(items: Sequence[tuple[str, str]]) -> list[str]:
    if not items:
        return []
    rows = "".join(f"\n| {escape(name)} | {escape(value)} |" for name, value in items)
    return [f"| | |\n|---|---|{rows}"]


def _table(table: Table) -> list[str]:
    rules = "".join("---|" if letter == "l" else "---:|" for letter in table.alignment)
    lines = [_row(table.columns), f"|{rules}"]
    for number, row in enumerate(table.rows):
        lines.append(_row(row, strong=number in table.strong))
    parts = ["\n".join(lines)]
    if table.caption:
        parts.insert(0, f"**{escape(table.caption)}**")
    if table.note:
        parts.append(f"*{escape(table.note)}*")
    return parts


def _row(cells: Sequence[str], strong: bool = False) -> str:
    shown = [escape(cell) for cell in cells]
    if strong:
        shown = [f"**{cell}**" if cell else cell for cell in shown]
    return "| " + " | ".join(shown) + " |"


def _example(example: Example) -> list[str]:
    parts = [f"**{escape(example.title)}**{_numbers(example.numbers)}"]
    for text in example.texts:
        parts.append(f"{escape(text.label)}{_numbers(text.numbers)}:")
        parts.append(markdown_block(text.text))
    return parts


def _numbers(numbers: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{one_line(name)} {one_line(value)}" for name, value in numbers)
    return f" ({escape(shown)})" if shown else ""
