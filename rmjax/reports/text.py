"""Escapes text from data: it is shown as it is, and never acts as markup."""

import html
import re

# What no format can hold: control characters, halves of surrogate pairs, and what XML forbids.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Marks that reorder the text around them.
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = re.compile(r"([\\`*_\[\]#|~$])")
_MARKDOWN_START = re.compile(r"^(\d*)([-+=.)])")  # of lists and underlines


def printable(text: str) -> str:
    """The text, with U+FFFD for what cannot be shown or would reorder the text around it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _REORDERING.sub("\ufffd", _UNPRINTABLE.sub("\ufffd", text))


def one_line(text: str) -> str:
    """The printable text with single spaces for all white space."""
    return " ".join(printable(text).split())


def html_text(text: str) -> str:
    """Escapes text for HTML, between tags and in quoted attributes."""
    return html.escape(printable(text), quote=True)


def markdown_text(text: str) -> str:
    """Escapes text for a Markdown paragraph, heading or table cell, as one line."""
    line = html.escape(one_line(text), quote=False)
    line = _MARKDOWN_START.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", line))
    # Colons and at signs make links and mentions; not every renderer lets a backslash escape them.
    return line.replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")


def markdown_block(text: str) -> str:
    """A Markdown code block with the text as it is, in a fence longer than any inside."""
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
