"""The contents of a report, in blocks that every renderer knows.

All texts are plain: each renderer escapes what would be markup in its format. Numbers are texts
too, written by `rmjax.reports.numbers`, so that all formats show the same digits.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # heavy to import
    from matplotlib.figure import Figure as Drawing

Kind = Literal["prompt", "chosen", "rejected", "other"]


@dataclasses.dataclass(frozen=True)
class Heading:
    """The heading of a section (level 2) or of a part of one (3)."""

    text: str
    level: Literal[2, 3] = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Warning:
    """What a reader must know before trusting the numbers that follow."""

    text: str


@dataclasses.dataclass(frozen=True)
class Headline:
    """The few most important numbers.

    Attributes:
      items: label, number, and a detail in small print, which may be empty.
    """

    items: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      columns: their names.
      rows: each with a cell for every column.
      caption: above the table: what it shows.
      note: below the table: how to read it.
      align: a letter for each column, `l` or `r`; empty for the first left and all others right.
      strong: numbers of the rows in bold, such as an average; from 0.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    note: str = ""
    align: str = ""
    strong: tuple[int, ...] = ()

    def __post_init__(self):
        wrong = {len(row) for row in self.rows} - {len(self.columns)}
        if wrong or len(self.alignment) != len(self.columns) or set(self.alignment) - {"l", "r"}:
            raise ValueError(f"table {self.caption!r}: rows, columns and alignment do not fit")

    @property
    def alignment(self) -> str:
        """A letter for each column, `l` or `r`."""
        return self.align or "l" + "r" * (len(self.columns) - 1)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing. Consecutive figures stand side by side if there is room.

    Attributes:
      drawing: from `rmjax.reports.plots`.
      name: of its file, in lower case with hyphens; different for each figure of a report.
      alt: a description with the important numbers, for readers who cannot see it.
      caption: below the drawing.
    """

    drawing: "Drawing"
    name: str
    alt: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A text of an example.

    Attributes:
      label: what the text is.
      text: of any length, with its own line breaks.
      kind: decides its colour.
      numbers: names and values that belong to the text, such as its reward.
    """

    label: str
    text: str
    kind: Kind = "other"
    numbers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """An example from the data, such as a pair that the model orders wrongly.

    Attributes:
      title: its name.
      texts: such as prompt, chosen and rejected response.
      numbers: names and values that belong to the whole example.
    """

    title: str
    texts: tuple[Text, ...]
    numbers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Collapsible:
    """Blocks behind a title that the reader can open."""

    title: str
    blocks: tuple["Block", ...]


Block = Heading | Paragraph | Warning | Headline | Facts | Table | Figure | Example | Collapsible


@dataclasses.dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
      title: the report's name.
      subtitle: a sentence below the title.
      facts: names and values: what the report is about and how it was made.
      blocks: everything else.
      refresh: seconds after which a browser loads the page again; 0 for never.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    refresh: int = 0

    def __post_init__(self):
        names = [figure.name for figure in figures(self.blocks)]
        if len(set(names)) != len(names):
            raise ValueError(f"report {self.title!r}: two figures have the same name")


def figures(blocks: tuple[Block, ...]) -> list[Figure]:
    """All figures in order, with those inside `Collapsible` blocks."""
    inner: list[Figure] = []
    for block in blocks:
        if isinstance(block, Figure):
            inner.append(block)
        elif isinstance(block, Collapsible):
            inner += figures(block.blocks)
    return inner
