"""The ladder of HelpSteer2-Preference's paper, on a laptop: what does each rung add?

    python benchmarks/ladder.py GGUF hh_harmless_base_test.jsonl.gz topical_chat_ratings.jsonl OUT

From SmolLM2-135M-Instruct: a regression on people's ratings of dialogue replies; Bradley-Terry on
hh-rlhf's pairs from it, its head kept; ExPO beyond that, its alpha chosen on pairs of their own;
and, on pairs made of the ratings, which say how much better a reply is, the three forms
of Bradley-Terry. Then every model, the untrained one and the longer response are judged on pairs
and dialogues that none of them saw, some on RM-Bench's chat domain, if --rm-bench names its file.

Pairs are split by the dialogue's first turn, so that no conversation is on two sides. Each step is
one of rmjax's own commands, printed as it is run; what is done already is not done again. Needs
`rmjax[gguf]`.
"""

import argparse
import gzip
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenized import hold_out

_SELECT, _TEST = 0.65, 0.75  # of the hash: training below, then choosing alpha, then the test
_HELD = 0.3  # of the dialogues
_ALPHAS = "1.2,1.52,2.0,3.0"
_FORMS = ("bradley_terry", "margin_bradley_terry", "scaled_bradley_terry")
_MODELS = {
    "untrained, a fresh head": "untrained",
    "regression on ratings": "regression",
    "then Bradley-Terry on hh": "bt",
    "then ExPO": "expo",
    "regression, then Bradley-Terry on pairs of ratings": "ratings_bradley_terry",
    "regression, then margin Bradley-Terry on them": "ratings_margin_bradley_terry",
    "regression, then scaled Bradley-Terry on them": "ratings_scaled_bradley_terry",
    "the longer response": "baseline:length",
}
_ON_RM_BENCH = ("untrained", "regression", "bt", "expo", "baseline:length")


def split_pairs(source: Path, out: Path) -> None:
    """Writes train.jsonl, select.jsonl and test.jsonl, by a hash of the first turn."""
    parts: dict[str, list[str]] = {"train": [], "select": [], "test": []}
    for line in gzip.decompress(source.read_bytes()).splitlines():
        row = json.loads(line)
        first = row["chosen"].split("\n\nAssistant:")[0]
        place = int(hashlib.sha256(first.encode()).hexdigest()[:8], 16) / 2**32
        name = "train" if place < _SELECT else "select" if place < _TEST else "test"
        parts[name].append(json.dumps(row) + "\n")
    for name, lines in parts.items():
        (out / f"{name}.jsonl").write_text("".join(lines))


def write_held_out(ratings: Path, model: str, out: Path) -> None:
    """Writes held_out.jsonl: the dialogues that the runs on ratings did not train on."""
    data = load_tokenized(
        str(ratings),
        "train",
        open_pretrained(model).tokenizer(),
        attributes=("overall",),
        label_range=(1.0, 5.0),
        max_length=1024,
        over_long="drop",
    )
    _, (held,) = hold_out([data], _HELD)
    rows = set(held.rows.tolist())
    lines = ratings.read_bytes().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, start=1) if number in rows]
    (out / "held_out.jsonl").write_bytes(b"".join(kept))


def run(*command: str) -> None:
    """One of rmjax's commands, printed and run."""
    print("$ python -m", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def train(config: str, out: Path, name: str, **fields: object) -> None:
    """A run of `configs/CONFIG.py` in OUT/NAME; `__` in a field's name is a dot."""
    given = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    file = Path(__file__).parent.parent / "configs" / f"{config}.py"
    run("rmjax.train", f"--config={file}", f"--config.workdir={out / name}", *given)


def climb(gguf: str, ratings: Path, out: Path) -> None:
    """Trains everything."""
    attributes = {"data__attributes": "('overall',)", "data__max_length": 1024}
    rated: dict[str, Any] = attributes | {
        "data__train": ratings,
        "data__validation": "",
        "data__hold_out": _HELD,
        "data__label_range": "(1,5)",
        "optimizer__warmup_steps": 4,
    }
    pairs: dict[str, Any] = attributes | {
        "objective": "bradley_terry",
        "data__train": out / "train.jsonl",
        "data__validation": out / "select.jsonl",
        "data__row_length": 2048,
        "batch_size": 32,
        "eval_every": 0,
        "checkpoint_every": 25,
        "optimizer__learning_rate": 5e-5,
        "optimizer__warmup_steps": 5,
    }
    train(
        "smollm2_135m_helpfulness",
        out,
        "regression",
        init=gguf,
        **rated,
        batch_size=24,
        epochs=3,
        eval_every=10,
        optimizer__learning_rate=1e-4,
    )
    train("smollm2_135m_scaled_bt", out, "bt", init=out / "regression", **pairs)
    for form in _FORMS:
        train(
            "smollm2_135m_scaled_bt",
            out,
            f"ratings_{form}",
            init=out / "regression",
            objective=form,
            **rated,
            data__compare="overall",
            data__row_length=2048,
            batch_size=64,
            eval_every=4,
            optimizer__learning_rate=3e-5,
        )
    if not (out / "expo").exists():
        models = (str(out / name) for name in ("regression", "bt", "expo"))
        chosen_on = f"--pairs={out / 'select.jsonl'}"
        run("rmjax.extrapolate", *models, f"--search={_ALPHAS}", chosen_on)
    if not (out / "untrained").exists():
        target = str(out / "untrained")
        run("rmjax.convert", "hf-to-orbax", gguf, target, "--attributes=overall")


def judge(out: Path, rm_bench: str) -> list[dict[str, Any]]:
    """The report of every model on what none of them saw."""
    found = []
    for name in _MODELS.values():
        data = [f"pairs={out / 'test.jsonl'}", f"ratings={out / 'held_out.jsonl'}"]
        data += [f"rm-bench={rm_bench}"] if rm_bench and name in _ON_RM_BENCH else []
        model = name if ":" in name else str(out / name)
        report = out / "evaluations" / name.replace(":", "-")
        run("rmjax.evaluate", model, *data, f"--out={report}")
        found.append(json.loads((report / "report.json").read_text()))
    return found


def minutes(run_directory: Path) -> str:
    """What a run's steps took, without evaluations and starting."""
    file = run_directory / "metrics.jsonl"
    if not file.exists():
        return "-"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = sum(r["tokens"] / r["tokens_per_second"] for r in rows if r.get("tokens_per_second"))
    return f"{seconds / 60:.0f} min"


def table(out: Path, reports: Sequence[dict[str, Any]]) -> Table:
    """A row a model, a column a benchmark."""
    view = Table(title="Share of pairs ordered as people did, with 95 % intervals")
    view.add_column("model")
    for benchmark in reports[0]["benchmarks"]:
        view.add_column(f"{benchmark['title']} ({benchmark['items']})", justify="right")
    view.add_column("training", justify="right")
    for (title, name), report in zip(_MODELS.items(), reports):
        cells = [
            "{score:.1%} ({low:.1%} to {high:.1%})".format(**benchmark["overall"])
            for benchmark in report["benchmarks"]
        ]
        missing = [""] * (len(reports[0]["benchmarks"]) - len(cells))
        view.add_row(title, *cells, *missing, minutes(out / name))
    return view


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("ratings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rm-bench", default="", metavar="FILE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    split_pairs(args.pairs, args.out)
    write_held_out(args.ratings, args.gguf, args.out)
    climb(args.gguf, args.ratings, args.out)
    reports = judge(args.out, args.rm_bench)
    Console(width=160).print(table(args.out, reports))


if __name__ == "__main__":
    _main()
