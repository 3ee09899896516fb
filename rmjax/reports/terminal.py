"""Prints the tables and numbers of a report. Figures and examples are only in the files."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as View
from rich.text import Text as Styled

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
from rmjax.reports.text import one_line

_LONG_NAME = 28


def print_document(document: Document, console: Console) -> None:
    """Prints a report without its paragraphs, figures, examples and collapsible blocks."""
    console.print(_text(document.title, "bold"))
    if document.subtitle:
        console.print(_text(document.subtitle, "dim"))
    _facts(document.facts, console)
    pending: list[Heading] = []  # not printed if nothing follows that is
    for block in document.blocks:
        if isinstance(block, Heading):
            pending = [h for h in pending if h.level < block.level] + [block]
        elif not isinstance(block, Figure | Example | Collapsible | Paragraph):
            for heading in pending:
                console.print()
                console.print(_text(heading.text, "bold" if heading.level == 2 else ""))
            pending = []
            _block(block, console)


def _block(block: Block, console: Console) -> None:
    match block:
        case Warning(text):
            console.print(_text(f"note: {text}", "yellow"))
        case Headline(items):
            _facts([(name, " ".join((number, detail))) for name, number, detail in items], console)
        case Facts(items):
            _facts(items, console)
        case Table():
            _table(block, console)


def _facts(items: Sequence[tuple[str, str]], console: Console) -> None:
    if not items:
        return
    view = View(box=None, show_header=False, padding=(0, 2, 0, 0))
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for name, value in items:
        view.add_row(_text(name, "dim"), _text(value))
    console.print(view)


def _table(table: Table, console: Console) -> None:
    view = View(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, (letter, name) in enumerate(zip(table.alignment, table.columns)):
        justify = "left" if letter == "l" else "right"
        longest = max((len(row[number]) for row in table.rows), default=0)
        whole = number == 0 and longest <= _LONG_NAME  # longer ones would leave the others no room
        view.add_column(_text(name), justify=justify, no_wrap=whole, overflow="fold")
    for number, row in enumerate(table.rows):
        view.add_row(*map(_text, row), style="bold" if number in table.strong else "")
    if table.caption:
        console.print()
        console.print(_text(table.caption))
    console.print(view)
    if table.note:
        console.print(_text(table.note, "dim"))


def _text(text: str, style: str = "") -> Styled:
    return Styled(one_line(text), style=style)  # no markup, no control characters
