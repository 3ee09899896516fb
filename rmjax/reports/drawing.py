"""Renders matplotlib figures as PNG and SVG; the same figure always gives the same bytes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rmjax.reports.text import printable
from rmjax.reports.theme import INK, LINE, MUTED, PAPER, SERIES, VARIABLES

PIXEL = 1 / 72  # inches; a point of a figure is a pixel of a page
_DENSITY = 2  # a PNG has so many pixels for each pixel of a page
_HEX = re.compile("#[0-9a-f]{6}")
_SIZE = re.compile(r"[\d.]+px")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_SPACE = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=list(SERIES)),
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same measures everywhere
    "font.size": 12,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "rmjax",
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in the data is a dollar sign
    "xtick.color": MUTED,
    "xtick.labelsize": 11.5,
    "xtick.major.size": 3,
    "xtick.major.width": 0.8,
    "ytick.color": MUTED,
    "ytick.labelsize": 11.5,
    "ytick.major.size": 0,
}


@contextmanager
def style() -> Iterator[None]:
    """Sets the style of all plots while one is drawn or saved, without the user's settings."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        # The font lacks the letters of some scripts; it only measures them, browsers draw them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def png(figure: Figure) -> bytes:
    """A PNG on white, with two pixels for each of the figure's points."""
    stream = io.BytesIO()
    with style():
        FigureCanvasAgg(figure)
        figure.savefig(stream, format="png", dpi=72 * _DENSITY, metadata={"Software": None})
    return stream.getvalue()


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """SVG for use inside a page: text as text, colours of the theme, ids with a prefix.

    Args:
      figure: from `rmjax.reports.plots`.
      name: the prefix of its ids.
      alt: its description.
    """
    stream = io.StringIO()
    with style():
        FigureCanvasAgg(figure)
        metadata = {key: None for key in ("Creator", "Date", "Format", "Type")}
        figure.savefig(stream, format="svg", metadata=metadata, transparent=True)
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", stream.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SPACE}metadata", f"{_SPACE}style"):
                parent.remove(child)
    used = {element.get(_LINK, "")[1:] for element in root.iter()}
    used |= {
        m for e in root.iter() for value in e.attrib.values() for m in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SPACE)
        _adapt(element, name, used)
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", printable(alt))
    # Not enlarged beyond what looks right.
    width = figure.get_figwidth() / PIXEL
    root.set("style", f"max-width:{1.3 * width:.0f}px")
    root.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Prefixes ids and references, and takes colours and font from the page."""
    if element.tag != "text":  # line breaks between elements
        element.text = (element.text or "").strip() or None
    element.tail = None
    if element.attrib.get("id", "") not in used:
        element.attrib.pop("id", None)
    link = element.attrib.pop(_LINK, "")
    if link:
        element.set("href", f"#{name}-{link[1:]}")
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == "style":
            element.set(key, _style_here(value))
        elif "url(#" in value:
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))


def _style_here(value: str) -> str:
    kept = []
    for declaration in value.split(";"):
        key, _, what = declaration.strip().partition(": ")
        if key == "font":  # matplotlib before 3.11 writes size and family as one
            key, what = "font-size", next(iter(_SIZE.findall(what)), "12px")
        if key and key != "font-family":
            kept.append(f"{key}:{_HEX.sub(lambda m: VARIABLES.get(m[0], m[0]), what)}")
    return ";".join(kept)
