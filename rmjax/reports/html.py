"""Renders a report as one HTML file that needs no network, no scripts and no fonts."""

import itertools
import re
from collections.abc import Iterator, Sequence

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
    Text,
    Warning,
)
from rmjax.reports.drawing import inline_svg
from rmjax.reports.text import html_text as escape
from rmjax.reports.theme import STYLE

# Nothing may be fetched or run, even if a text is not escaped as it should be.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_WIDE = 6  # a table with so many columns takes the whole width
_CONTENTS = 4  # a report with so many sections gets links to them on top


def render(document: Document) -> str:
    """The whole page."""
    anchors = _anchors(document)
    sections = [block for block in document.blocks if isinstance(block, Heading)]
    sections = [block for block in sections if block.level == 2]
    links = "".join(f'<a href="#{anchors[id(s)]}">{escape(s.text)}</a>' for s in sections)
    contents = f'<nav aria-label="Sections">{links}</nav>\n' if len(sections) >= _CONTENTS else ""
    subtitle = f'<p class="subtitle">{escape(document.subtitle)}</p>\n' if document.subtitle else ""
    refresh = f'<meta http-equiv="refresh" content="{document.refresh}">\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
{refresh if document.refresh else ""}<title>{escape(document.title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(document.title)}</h1>
{subtitle}{_facts(document.facts)}{contents}</header>
{_blocks(document.blocks, anchors)}<footer>Made by rmjax.</footer>
</main>
</body>
</html>
"""


def _anchors(document: Document) -> dict[int, str]:
    """An id for each heading, made of its text; keyed by `id(heading)`, as texts may repeat."""
    anchors, taken = {}, set()
    for block in document.blocks:
        if isinstance(block, Heading):
            base = "s-" + (re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-") or "section")
            names = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
            anchors[id(block)] = next(name for name in names if name not in taken)
            taken.add(anchors[id(block)])
    return anchors


def _blocks(blocks: Sequence[Block], anchors: dict[int, str]) -> str:
    parts = []
    for are_figures, run in itertools.groupby(blocks, lambda block: isinstance(block, Figure)):
        shown = "".join(_block(block, anchors) for block in run)
        parts.append(f'<div class="figures">\n{shown}</div>\n' if are_figures else shown)
    return "".join(parts)


def _block(block: Block, anchors: dict[int, str]) -> str:
    match block:
        case Heading(text, level):
            anchor = f' id="{anchors[id(block)]}"' if id(block) in anchors else ""
            return f"<h{level}{anchor}>{escape(text)}</h{level}>\n"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>\n"
        case Warning(text):
            return f'<div class="warning" role="note"><p>{escape(text)}</p></div>\n'
        case Headline(items):
            return _headline(items)
        case Facts(items):
            return _facts(items)
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Example():
            return _example(block)
        case Collapsible(title, inner):
            return (
                f"<details><summary>{escape(title)}</summary>\n"
                f"{_blocks(inner, anchors)}</details>\n"
            )


def _facts(items: Sequence[tuple[str, str]]) -> str:
    if not items:
        return ""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_breakable(value)}</dd></div>\n" for name, value in items
    )
    return f'<dl class="facts card">\n{rows}</dl>\n'


def _breakable(value: str) -> str:
    """With points where a long path may break into the next line."""
    return escape(value).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _headline(items: Sequence[tuple[str, str, str]]) -> str:
    rows = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd class="number">{escape(number)}</dd>'
        + (f'<dd class="detail">{escape(detail)}</dd>' if detail else "")
        + "</div>\n"
        for name, number, detail in items
    )
    return f'<dl class="headline">\n{rows}</dl>\n'


def _table(table: Table) -> str:
    letters = table.alignment
    caption = f'<figcaption class="caption">{escape(table.caption)}</figcaption>\n'
    note = f'<p class="note">{escape(table.note)}</p>\n'
    head = "".join(
        f'<th scope="col" class="{letter}">{escape(name)}</th>'
        for letter, name in zip(letters, table.columns)
    )
    rows = "".join(_rows(table))
    kind = "scroll card wide" if len(table.columns) >= _WIDE else "scroll card"
    return (
        f"<figure>\n{caption if table.caption else ''}"
        f'<div class="{kind}" tabindex="0" role="region" '
        f'aria-label="{escape(table.caption or "table")}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
        f"{note if table.note else ''}</figure>\n"
    )


def _rows(table: Table) -> Iterator[str]:
    for number, row in enumerate(table.rows):
        cells = []
        for column, (letter, cell) in enumerate(zip(table.alignment, row)):
            tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
            cells.append(f'<{tag}{scope} class="{letter}">{escape(cell)}</{tag}>')
        strong = ' class="strong"' if number in table.strong else ""
        yield f"<tr{strong}>{''.join(cells)}</tr>\n"


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    svg = inline_svg(figure.drawing, f"f-{figure.name}", figure.alt)
    return f'<figure class="card">{svg}{caption}</figure>\n'


def _example(example: Example) -> str:
    texts = "".join(map(_text, example.texts))
    return (
        f'<article class="example card"><h4>{escape(example.title)}</h4>\n'
        f"{_numbers(example.numbers)}{texts}</article>\n"
    )


def _text(text: Text) -> str:
    return (
        f'<div class="text {text.kind}"><div class="label"><b>{escape(text.label)}</b>'
        f"{_numbers(text.numbers)}</div>\n"
        f'<div class="said" tabindex="0">{escape(text.text)}</div></div>\n'
    )


def _numbers(numbers: Sequence[tuple[str, str]]) -> str:
    if not numbers:
        return ""
    shown = "".join(
        f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in numbers
    )
    return f'<span class="numbers">{shown}</span>'
