"""A report before it has a form: what it says, in blocks that every renderer knows.

All texts are plain: each renderer escapes what would mean something to its form. Numbers come as
text too, written by `rmjax.reports.numbers`, so that all forms show the same digits.
"""

import dataclasses
from typing import Literal

from matplotlib.figure import Figure as Drawing

Kind = Literal["prompt", "chosen", "rejected", "other"]


@dataclasses.dataclass(frozen=True)
class Heading:
    """Begins a section (level 2) or a part of one (3)."""

    text: str
    level: Literal[2, 3] = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Warning:
    """What a reader must know before believing the numbers near it."""

    text: str


@dataclasses.dataclass(frozen=True)
class Headline:
    """The few numbers that the report is about.

    Attributes:
      items: label, number, and what stands below it in small print, which may be empty.
    """

    items: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    items: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      columns: their names.
      rows: cells, as many as there are columns.
      caption: what it shows, above it.
      note: what one must know to read it, below it.
      align: a letter for each column, `l` or `r`; empty for the first left and all others right.
      strong: rows to stand out, such as an average; from 0.
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
        """A letter for each column."""
        return self.align or "l" + "r" * (len(self.columns) - 1)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing. Figures that follow each other stand side by side where there is room.

    Attributes:
      drawing: from `rmjax.reports.plots`.
      name: of its file, in lower case with hyphens; once in a report.
      alt: what it shows, for who cannot see it, with the numbers that matter.
      caption: below it.
    """

    drawing: Drawing
    name: str
    alt: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A text of an example.

    Attributes:
      label: what it is.
      text: of any length, with its own line breaks.
      kind: which colour it has.
      numbers: names and values that belong to it, such as its reward.
    """

    label: str
    text: str
    kind: Kind = "other"
    numbers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """Something from the data in full, such as a pair that was ordered wrongly.

    Attributes:
      title: what it is an example of.
      texts: prompt, chosen, rejected.
      numbers: names and values that belong to the whole.
    """

    title: str
    texts: tuple[Text, ...]
    numbers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Collapsible:
    """Blocks that are shown when asked for."""

    title: str
    blocks: tuple["Block", ...]


Block = Heading | Paragraph | Warning | Headline | Facts | Table | Figure | Example | Collapsible


@dataclasses.dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
      title: its name.
      subtitle: one sentence below the title.
      facts: of what, with what, when: names and values.
      blocks: the rest.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]

    def __post_init__(self):
        names = [figure.name for figure in figures(self.blocks)]
        if len(set(names)) != len(names):
            raise ValueError(f"report {self.title!r}: two figures have the same name")


def figures(blocks: tuple[Block, ...]) -> list[Figure]:
    """All figures, in order, those that are collapsed too."""
    found = []
    for block in blocks:
        if isinstance(block, Figure):
            found.append(block)
        elif isinstance(block, Collapsible):
            found += figures(block.blocks)
    return found
