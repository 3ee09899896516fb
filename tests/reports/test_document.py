"""What reports show, in each of their forms, and that data cannot do anything to them."""

import html.parser
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from helpers.reports import everything
from rmjax.reports import drawing, numbers, plots, terminal
from rmjax.reports import html as html_form
from rmjax.reports import markdown as markdown_form
from rmjax.reports.document import (
    Document,
    Figure,
    Table,
)
from rmjax.reports.text import markdown_block, markdown_text, printable
from rmjax.reports.writer import plain, write_report

_VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Structure(html.parser.HTMLParser):
    """Tags that are opened and closed in order, ids, and what is fetched."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[k] for k in ("href", "src", "xlink:href") if k in values]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(values.values()))
        assert not [name for name in values if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing():
    page = html_form.render(everything())
    found = Structure(page)
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "img", "base", "form"}
    assert len(set(found.ids)) == len(found.ids)
    assert found.links and all(link[1:] in found.ids for link in found.links)
    assert all(link.startswith("#") for link in found.links)
    # What looks like an address is text.
    assert re.findall(r"https?://[^\s)]*", re.sub(r"<[^>]*>", "", page))
    assert not re.findall(r"<[^>]*https?://(?!evil\.example)[^>]*>", page)
    assert "@import" not in page and "url(http" not in page


def test_hostile_text_is_shown_and_does_nothing():
    page = html_form.render(everything())
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page and "\x00" not in page and "\ud800" not in page
    assert "\u202e" not in page
    page.encode("utf-8")


def test_every_class_of_the_page_has_a_style():
    page = html_form.render(everything("a name"))
    names = {name for value in re.findall('class="([^"]*)"', page) for name in value.split()}
    style = page[page.index("<style>") : page.index("</style>")]
    plain_kinds = {"prompt", "other"}  # of an example's texts
    assert {name for name in names if f".{name}" not in style} <= plain_kinds


def test_every_figure_is_an_svg_whose_text_is_text():
    page = html_form.render(everything("plain words"))
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(found) == 12
    for svg in found:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label") == "plain words"
        assert [element.text for element in root.iter("text")]
        colours = set(re.findall("#[0-9a-f]{6}", svg))
        assert not colours, "a colour that does not follow the page's"


def test_markdown_shows_hostile_text_as_it_is():
    text = markdown_form.render(everything())
    fenced = re.sub(r"(?ms)^(`{4,})text\n.*?^\1$", "", text)
    assert "<script" not in fenced and "&lt;script&gt;" in fenced
    tags = set(re.findall(r"<[^>]*>", fenced))
    assert tags == {"<details>", "<summary>", "</summary>", "</details>"}
    assert "http://" not in fenced and "@someone" not in fenced
    # Links are those to the figures alone.
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", fenced)
    assert len(links) == 12 and all(re.fullmatch(r"figures/[a-z]+\.png", link) for link in links)
    for line in fenced.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a | b", r"a \| b"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("two\nlines", "two lines"),
        ("a_b*c`d", r"a\_b\*c\`d"),
        ("\\|", r"\\\|"),
        ("1. one", r"1\. one"),
        ("- 1.5 www.a.b", r"\- 1.5 www&#46;a.b"),
    ],
)
def test_a_cell_in_markdown(text, expected):
    assert markdown_text(text) == expected


def test_a_fence_is_longer_than_those_inside():
    assert markdown_block("a\n```\nb").splitlines() == ["````text", "a", "```", "b", "````"]


def test_printable():
    assert printable("a\r\nb\x07\ud83d") == "a\nb\ufffd\ufffd"
    assert printable("日本 🙂\t") == "日本 🙂\t"


def test_the_terminal_shows_tables_without_markup_or_control():
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True, color_system=None)
    terminal.print_document(everything("[bold red]x[/] \x1b[31m"), console)
    shown = stream.getvalue()
    assert "[bold red]x[/]" in shown and "\x1b[31m" not in shown


def test_the_same_report_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(everything(), tmp_path / name, {"format": "test/1", "x": 1})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*"))
    assert {"report.html", "report.md", "report.json"} <= set(map(str, files))
    for file in files:
        if (tmp_path / "a" / file).is_file():
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    links = re.findall(r"\]\((figures/[^)]*)\)", (tmp_path / "a" / "report.md").read_text())
    assert len(links) == 12 and all((tmp_path / "a" / link).is_file() for link in links)


def test_json_holds_numbers_and_null(tmp_path):
    data = {
        "format": "test/1",
        "array": np.array([[1.5, np.nan], [np.inf, -2]]),
        "scalar": np.float32(0.5),
        "whole": np.int64(3),
        "pair": (1, None, True),
    }
    write_report(everything("x"), tmp_path, data)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "format": "test/1",
        "array": [[1.5, None], [None, -2]],
        "scalar": 0.5,
        "whole": 3,
        "pair": [1, None, True],
    }
    assert plain({1: "a"}) == {"1": "a"}


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    from rmjax.errors import UserError

    with pytest.raises(UserError, match="--out"):
        write_report(everything("x"), tmp_path / "file" / "report", {})


def test_numbers():
    assert numbers.decimal(-1.23456) == "−1.235"
    assert numbers.decimal(-0.0001) == "0.000"
    assert numbers.decimal(float("nan")) == "–"
    assert numbers.signed(1.5, 1) == "+1.5"
    assert numbers.percent(0.1234) == "12.3 %"
    assert numbers.percent(-0.00001) == "0.0 %"
    assert numbers.count(1234567) == "1,234,567"
    assert numbers.short(2e-6) == "2e-06"
    assert numbers.short(103.0) == "103"
    assert numbers.interval(0.1, 0.25, 2) == "0.10 to 0.25"
    assert numbers.interval(float("nan"), 0.25) == "–"


def test_a_table_whose_cells_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Table(("a", "b"), (("1",),))
    with pytest.raises(ValueError, match="same name"):
        figure = Figure(plots.histograms({"a": [1.0]}, "x"), "name", "", "")
        Document("", "", (), (figure, figure))


EMPTY = {
    "histograms": lambda: plots.histograms({"a": [np.nan]}, "x"),
    "distributions": lambda: plots.distributions({}, "x"),
    "margins": lambda: plots.margin_histogram([]),
    "columns": lambda: plots.columns([], {}, "x"),
    "boxes": lambda: plots.boxes({"a": []}, "x"),
    "reliability": lambda: plots.reliability([], []),
    "matrix": lambda: plots.correlation_matrix([], np.empty((0, 0))),
    "length": lambda: plots.accuracy_by_length([], []),
    "bars": lambda: plots.bars([], [], "x"),
    "curves": lambda: plots.curves([plots.Curve("", [1], [np.nan])], "x", "y"),
    "best": lambda: plots.best_of_n([], "y"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_plot_of_nothing_says_so(name):
    assert "no data" in drawing.inline_svg(EMPTY[name](), "f", "alt")


ONE = {
    "histograms": lambda: plots.histograms({"a": [2.5]}, "x"),
    "distributions": lambda: plots.distributions({"a": [2.5]}, "x"),
    "margins": lambda: plots.margin_histogram([0.0]),
    "columns": lambda: plots.columns(["a"], {"b": [np.nan]}, "x"),
    "boxes": lambda: plots.boxes({"a": [1.0]}, "x"),
    "reliability": lambda: plots.reliability([0.5], [1]),
    "matrix": lambda: plots.correlation_matrix(["a"], np.array([[np.nan]])),
    "length": lambda: plots.accuracy_by_length([3.0], [0.5]),
    "bars": lambda: plots.bars(["a"], [-0.2], "x"),
    "curves": lambda: plots.curves([plots.Curve("", [1], [0.0])], "x", "y"),
    "log": lambda: plots.curves([plots.Curve("", [1], [5.0])], "x", "y", logarithmic=True),
    "best": lambda: plots.best_of_n([plots.Curve("", [3], [1.0])], "y"),
}


@pytest.mark.parametrize("name", ONE)
def test_a_plot_of_one_number_can_be_drawn(name):
    assert "<path" in drawing.inline_svg(ONE[name](), "f", "alt")
    assert drawing.png(ONE[name]()).startswith(b"\x89PNG")


def test_plots_leave_matplotlib_as_it_is():
    import matplotlib

    before = dict(matplotlib.rcParams)
    everything("x")
    assert dict(matplotlib.rcParams) == before


def test_moving_mean_by_hand():
    values = np.array([1.0, 2, 4, np.nan, 8, 16])
    found = plots.moving_mean(values, 1)
    np.testing.assert_allclose(found, [1, 7 / 3, 3, 6, 12, 12])


def test_bins_of_accuracy_by_length_are_quantiles():
    figure = plots.accuracy_by_length(np.arange(8.0), [0, 0, 0, 1, 1, 1, 1, 1], bins=2)
    line = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    np.testing.assert_allclose(np.asarray(line.get_xdata()), [1.5, 5.5])
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [0.25, 1.0])


def test_points_of_the_reliability_diagram_by_hand():
    said, true = [0.55, 0.55, 0.95, 0.95, 0.95, 0.95], [1, 0, 1, 1, 1, 0]
    figure = plots.reliability(said, true, bins=5)
    line = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    np.testing.assert_allclose(np.asarray(line.get_xdata()), [0.55, 0.95])
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [0.5, 0.75])
    heights = [bar.get_height() for bar in figure.axes[1].patches if isinstance(bar, Rectangle)]
    assert heights == [2, 0, 0, 0, 4]
