"""Reports in a browser: nothing overflows, nothing is fetched, nothing is said in its log."""

import io
import json
import zlib

import numpy as np
import pytest

from helpers.browser import CHROMIUM, Browser
from helpers.reports import (
    HOSTILE,
    PAIRS,
    RATED,
    everything,
    prompt_rows,
    write_alignment,
    write_lines,
)
from rmjax.config import HELPSTEER2
from rmjax.evaluate import report_evaluation
from rmjax.evaluation.benchmark_data import read_benchmarks
from rmjax.evaluation.benchmarks import BENCHMARKS
from rmjax.evaluation.model_scores import ScoringSettings
from rmjax.report import report_data, report_run
from rmjax.reports.writer import write_report
from rmjax.runtime.sharding import MeshConfig

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

WIDTHS = (390, 1280)

# What stands out of where it belongs: elements beyond the window that no ancestor scrolls, and
# words of a figure outside of its frame. Half a pixel is rounding.
OVERFLOW = """(() => {
  const found = [], wide = document.documentElement.clientWidth;
  const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) ||
    scrolls(e.parentElement));
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg") && e.tagName != "svg") continue;
    const box = e.getBoundingClientRect();
    if ((box.right > wide + .5 || box.left < -.5) && !scrolls(e.parentElement))
      found.push(e.tagName + ": " + e.textContent.slice(0, 60));
  }
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - .5 || box.right > frame.right + .5 ||
          box.top < frame.top - .5 || box.bottom > frame.bottom + .5)
        found.push("svg: " + text.textContent + " in " + svg.getAttribute("aria-label"));
    }
  }
  return found;
})()"""

# Words of one axis that stand on each other, of figures that are not made of hostile names.
COLLISIONS = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")]
      .filter(t => !/rotate\\(-?[1-9]/.test(t.getAttribute("transform") || ""))
      .map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
      if (x.width && x.left < y.right - 1 && y.left < x.right - 1 && x.top < y.bottom - 3 &&
          y.top < x.bottom - 3) found.push(a + " / " + b);
    }));
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind of report, and one of everything with hostile names."""
    directory = tmp_path_factory.mktemp("pages")
    data = directory / "data"
    data.mkdir()
    write_lines(data / "train.jsonl", RATED)
    write_lines(data / "preference.jsonl", PAIRS)
    run = directory / "run"
    run.mkdir()
    write_run(run)
    return {
        "data": report_data(str(data), out=str(directory / "of-data"))[1][0],
        "run": report_run(str(run))[1][0],
        "alignment": report_run(str(write_judged_alignment(directory / "alignment")))[1][0],
        "evaluation": write_evaluation(directory / "evaluation"),
        "plain": write_report(everything("a name"), directory / "plain", {})[0],
        "hostile": write_report(everything(), directory / "hostile", {})[0],
        "long": write_report(everything("Unbreakable" * 20), directory / "long", {})[0],
    }


def write_judged_alignment(directory):
    """The records of an alignment that never was, whose held-out answers a second judge scored."""
    steps = [{"reward": 1 + n / 30, "kl": 4.0 * n, "grad_norm": 1 / n} for n in range(1, 31)]
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    held_out = {}
    for step in range(0, 31, 5):
        scores = [step / 10 + number % 4 for number in range(12)]
        attributes = [{name: score + i for i, name in enumerate(names)} for score in scores]
        held_out[step] = prompt_rows(scores, [HOSTILE] * 12, attributes=attributes)
    write_alignment(directory, steps, held_out)
    for step, rows in held_out.items():
        write_lines(directory / f"rollouts/held-out-{step:06d}.scores-a-second-judge.jsonl", rows)
    return directory


def write_evaluation(directory):
    """The page of two models' scores, made up, on a few items of each benchmark."""
    directory.mkdir()
    text = {"prompt": "Why? <b>not</b>", "chosen": "since " * 9, "rejected": "no"}
    subsets = [u.name for s in BENCHMARKS["reward-bench"].sections for u in s.subsets]
    bench = [text | {"subset": name, "id": i} for i, name in enumerate(subsets * 4)]
    styles = [text | {"chosen": ["a"] * 3, "rejected": ["b"] * 3, "id": i} for i in range(9)]
    rated = [
        {"prompt": f"{i // 4}?", "response": f"{'x' * i}", "helpfulness": i % 5, "verbosity": i % 3}
        for i in range(40)
    ]
    write_lines(directory / "filtered.jsonl", bench)
    write_lines(directory / "chat_filtered.jsonl", styles)
    write_lines(directory / "rated.jsonl", rated)
    names = {"reward-bench": "filtered", "rm-bench": "chat_filtered", "ratings": "rated"}
    data = read_benchmarks([f"{name}={directory / file}.jsonl" for name, file in names.items()])
    rng, files = np.random.default_rng(0), []
    for model in ("one", "two"):
        rows = [
            {
                "benchmark": part.label,
                "subset": item.subset,
                "id": item.id,
                "scores": [
                    dict(zip(HELPSTEER2, rng.normal(good, 1, 5).tolist())) for good in item.gold
                ],
            }
            for part in data
            for item in part.items
        ]
        files.append(directory / f"{model}.jsonl")
        write_lines(files[-1], rows)
    settings = ScoringSettings(0, "truncate_left", "auto", "", MeshConfig())
    report_evaluation(str(files[0]), data, directory, settings=settings, against=str(files[1]))
    return directory / "report.html"


def write_run(directory):
    """The records of a run that never was."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    fields = ("count", "mse", "mse_constant", "pearson", "spearman", "pair_accuracy", "pairs")
    config = {"steps": 300, "batch_size": 32, "objective": "regression", "seed": 0, "init": ""}
    record = {"format": "rmjax-run", "config": config, "versions": {"jax": "0"}, "devices": "1 x"}
    (directory / "config.json").write_text(json.dumps(record))
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(1, 301):
            noise = zlib.crc32(str(step).encode()) / 2**32
            line = {
                "step": step,
                "loss": 3 / step + noise,
                "grad_norm": 10 + 90 * noise,
                "learning_rate": 2e-6 * min(1, step / 10),
                "tokens": 4000,
                "tokens_per_second": 20000 + 1000 * noise,
                "padding": 0.1,
            }
            print(json.dumps(line), file=file)
            if step % 100 == 0:
                values = {f"{n}/{f}": 0.5 + step / 1000 for n in names for f in fields}
                values["pairs/accuracy"], values["pairs/low"], values["pairs/high"] = 0.7, 0.6, 0.8
                line = {"step": step, "validation_loss": 1 / step, "evaluation_seconds": 1}
                print(json.dumps(line | values), file=file)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "name", ["data", "run", "alignment", "evaluation", "plain", "hostile", "long"]
)
def test_a_page(name, width, dark, pages, browser, tmp_path):
    browser.complaints.clear()
    browser.open(pages[name], width, dark)
    assert browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('svg text').length") > 50
    # What is collapsed is opened: it must fit as well.
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOW) == []
    assert browser.value("window.alerted === undefined") is True
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back.removeprefix("rgb(").rstrip(")").split(","))) < 200) == dark
    if name in ("data", "run", "alignment", "evaluation"):
        assert browser.value(COLLISIONS) == []
    shot = tmp_path / f"{name}-{width}.png"
    shot.write_bytes(browser.screenshot())
    assert len(set(pixels(shot.read_bytes()))) > 20


def test_the_policy_stops_what_would_be_fetched(pages, browser, tmp_path):
    """And the check above would see it."""
    page = tmp_path / "spoilt.html"
    text = pages["plain"].read_text()
    image = '<img src="https://127.0.0.1:9/x.png"><script>window.alerted = 1</script>'
    page.write_text(text.replace("</main>", image + "</main>"))
    browser.complaints.clear()
    browser.open(page, 1280)
    assert browser.value("window.alerted === undefined") is True
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def pixels(png):
    """The bytes of a PNG's rows, which are of one kind if it is blank."""
    stream, data = io.BytesIO(png), b""
    assert stream.read(8) == b"\x89PNG\r\n\x1a\n"
    while head := stream.read(8):
        content = stream.read(int.from_bytes(head[:4], "big"))
        data += content if head[4:] == b"IDAT" else b""
        stream.read(4)
    return zlib.decompress(data)
