"""Is this reward model any good? The field's benchmarks, scored exactly, and a report.

    python -m rmjax.evaluate MODEL                               # all that the hub holds
    python -m rmjax.evaluate MODEL reward-bench rm-bench=FILE    # some, from the hub or local files
    python -m rmjax.evaluate MODEL pairs=FILE ratings=FILE best-of-n=FILE      # your own
    python -m rmjax.evaluate MODEL pairs=FILE --against=OTHER    # two models, paired

MODEL is a run (its best checkpoint), an Orbax model, a Hugging Face directory or hub id of a
LlamaForSequenceClassification, a .jsonl file of scores (such as the samples.jsonl of another
evaluation), or baseline:length, which likes the longer response. SOURCE is a file (.jsonl,
.jsonl.gz, .json, .parquet), a directory of the hub's layout, or a hub id.

OUT gets report.html, report.md, report.json, and samples.jsonl with every score. Scores are kept in
OUT/scores as they are computed: a killed evaluation goes on where it was, and no text is scored
twice, in this evaluation or the next.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from rmjax import reports
from rmjax.errors import UserError, exit_with_message
from rmjax.evaluation.benchmarks import BENCHMARKS, FROM_HUB
from rmjax.evaluation.fit_weights import FittedWeights, fit_weights, read_weights, write_weights
from rmjax.evaluation.items import Data
from rmjax.evaluation.results import result, weights_of
from rmjax.evaluation.score_cache import (
    LENGTH,
    Scored,
    Store,
    length_scores,
    read_scores,
    score_data,
)
from rmjax.evaluation.tallies import Judged, comparison
from rmjax.inference.scorer import load
from rmjax.models.rewards.aggregation import PUBLISHED, Rule, ScalarRule, scalar_rule
from rmjax.reports import terminal
from rmjax.reports.evaluations.page import document, summary
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.sharding import MeshConfig
from rmjax.training.workdir import package_versions

FORMAT = "rmjax.report.evaluation/1"
OVER_LONG = ("truncate_left", "drop")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is scored; see `_main` for the options."""

    max_length: int
    over_long: str
    dtype: str
    quantize: str
    mesh: MeshConfig


def open_data(names: Sequence[str], gold: str = "") -> list[Data]:
    """Reads `NAME` or `NAME=SOURCE`; names that come twice are told apart by their file.

    Raises:
      UserError: an unknown name, or bad data.
    """
    found: list[Data] = []
    for text in names:
        name, _, source = text.partition("=")
        if name not in BENCHMARKS:
            raise UserError(
                f"{text!r}: there are {', '.join(BENCHMARKS)}, each with =SOURCE or not"
            )
        benchmark = BENCHMARKS[name]
        if not source and not benchmark.source:
            raise UserError(f"{text!r}: which? {name}=FILE, a directory or a hub id")
        label = name if benchmark.source else f"{name} {Path(source).name.split('.')[0]}"
        if label in {data.label for data in found}:
            label = f"{name} {source}"
        if label in {data.label for data in found}:
            raise UserError(f"{text!r} is there twice")
        found.append(Data(benchmark, source, label, gold))
    return found


def scored_by(
    model: str, data: Sequence[Data], settings: Settings, out: Path, value: Any = None
) -> Scored:
    """A model's scores of all data, whatever kind of model it is.

    Args:
      model: see the top of this file.
      data: what to score.
      settings: of the computation.
      out: directory of the evaluation, where scores are kept.
      value: a scalar rule; the model's own if None.

    Raises:
      UserError: no such model, or a text that it cannot score.
    """
    if model == LENGTH:
        return length_scores(data)
    if Path(model).is_file() and model.endswith(".jsonl"):
        return read_scores(Path(model), data, value)
    scorer = load(
        model,
        value=value,
        mesh=settings.mesh,
        dtype=settings.dtype,
        over_long="truncate_left",
        quantize=settings.quantize,
    )
    scorer.max_length = settings.max_length or scorer.max_length
    dtype, devices = str(scorer.model.options.dtype), jax.devices()
    made_by = [scorer.state, str(scorer.max_length), dtype, settings.quantize]
    store = Store(out / "scores" / f"{'-'.join(filter(None, made_by))}.jsonl", scorer.attributes)
    known, began = len(store.known), time.monotonic()
    items = score_data(scorer, data, store)
    facts = {
        "kind": "a reward model",
        "attributes": list(scorer.attributes),
        "max_length": scorer.max_length,
        "over_long": settings.over_long,
        "dtype": settings.quantize or dtype,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "source": scorer.spec.source,
    }
    work = {
        "conversations": scorer.work.conversations,
        "tokens": scorer.work.tokens,
        "computed": scorer.work.computed,
        "places": scorer.work.padded_tokens,
        "seconds": time.monotonic() - began,
        "known before": known,
        "responses": sum(len(item.responses) for part in data for item in part.items),
    }
    return Scored(model, scorer.attributes, scorer.rule, facts, work, items)


def all_rules(scored: Scored, fitted: FittedWeights | None) -> dict[str, Rule]:
    """Every rule that can be read off the same scores, by name: the one in force first."""
    rules: dict[str, Rule] = {scored.rule.name: scored.rule}
    if not isinstance(scored.rule, ScalarRule):  # numbers that mean nothing one by one
        return rules
    for name in (*scored.attributes, *PUBLISHED):
        weights = PUBLISHED.get(name, {})
        if name in scored.attributes or set(weights) <= set(scored.attributes):
            rules.setdefault(name, scalar_rule(name, scored.attributes))
    if fitted:
        rules["fitted"] = scalar_rule(fitted.weights, scored.attributes)._replace(name="fitted")
    return rules


def evaluate(
    model: str,
    data: Sequence[Data],
    out: Path,
    *,
    settings: Settings,
    value: str | Mapping[str, float] | None = None,
    known: FittedWeights | None = None,
    against: str = "",
    fit: Data | None = None,
) -> dict[str, Any]:
    """Scores, judges and writes the report of one model, and perhaps of a second beside it.

    Args:
      model: see the top of this file.
      data: the benchmarks.
      out: directory to write to.
      settings: of the computation.
      value: a scalar rule; the model's own if None.
      known: where `value` comes from a file: what its weights were fitted on.
      against: another model; empty for none.
      fit: pairs to fit weights of the attributes on; None for none.

    Returns:
      What `report.json` holds.

    Raises:
      UserError: something that the user can mend.
    """
    everything = [*data, fit] if fit else list(data)
    scored = scored_by(model, everything, settings, out, value)
    if fit and not isinstance(scored.rule, ScalarRule):
        raise UserError(f"--fit={fit.source}: the model's value is no weighted sum of attributes")
    fitted = fit_weights(fit, scored.items[-1], scored.attributes) if fit else known
    if fit and fitted:
        write_weights(out / "weights.json", fitted)
    rules = all_rules(scored, fitted if fit else None)
    judged = _judged(scored, data, settings)
    found = [result(part, scored.rule, rules, fitted) for part in judged]
    comparisons = {}
    if against:
        other = scored_by(against, data, settings, out)
        for mine, theirs in zip(judged, _judged(other, data, settings)):
            comparisons[mine.data.label] = comparison(mine, scored.rule, theirs, other.rule)
    report = {
        "format": FORMAT,
        "model": {
            "name": model,
            "attributes": scored.attributes,
            "rule": {"name": scored.rule.name, "weights": weights_of(scored.rule)},
            **scored.facts,
        },
        "versions": package_versions(),
        "work": scored.work,
        "fitted": dataclasses.asdict(fitted) | {"prompts": len(fitted.prompts)} if fitted else None,
        "benchmarks": found,
        "against": {"name": against, "benchmarks": comparisons} if against else None,
    }
    reports.write(document(report, judged, scored.rule), out, report)
    _write_samples(out / "samples.jsonl", judged, scored.rule)
    return report


def _judged(scored: Scored, data: Sequence[Data], settings: Settings) -> list[Judged]:
    return [
        Judged.of(part, scored.attributes, items, settings.over_long)
        for part, items in zip(data, scored.items)
    ]


def _write_samples(path: Path, judged: Sequence[Judged], rule: Rule) -> None:
    """One line an item: what `read_scores` reads, with values and lengths."""
    with open(path, "w", encoding="utf-8") as file:
        for part in judged:
            for item, scores, value in zip(part.items, part.scores, part.values(rule)):
                row = {
                    "benchmark": part.data.label,
                    "subset": item.subset,
                    "id": item.id,
                    "scores": [dict(zip(part.attributes, map(float, s))) for s in scores.scores],
                    "value": value.tolist(),
                    "good": item.good,
                    "tokens": scores.tokens.tolist(),
                    "cut": scores.cut.tolist(),
                }
                file.write(json.dumps(row) + "\n")


# ---- command line -------------------------------------------------------------------------------


def _value(text: str | None) -> tuple[Any, FittedWeights | None]:
    """`--value`: a name, a mapping in JSON, or a file that `--fit` wrote."""
    if text is None:
        return None, None
    if text.endswith(".json"):
        fitted = read_weights(Path(text))
        return fitted.weights, fitted
    if text.startswith("{"):
        try:
            return json.loads(text), None
        except ValueError as error:
            raise UserError(f"--value={text}: broken JSON ({error})") from error
    return text, None


def _mesh(text: str) -> MeshConfig:
    """`--mesh=fsdp:4,tensor:2`."""
    try:
        sizes = {name: int(size) for name, size in (part.split(":") for part in text.split(","))}
        return MeshConfig(**sizes)
    except (ValueError, TypeError) as error:
        axes = ", ".join(field.name for field in dataclasses.fields(MeshConfig))
        raise UserError(f"--mesh={text}: expected AXIS:SIZE,... of {axes}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rmjax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="what to evaluate")
    add("benchmarks", nargs="*", metavar="BENCHMARK[=SOURCE]", help=", ".join(BENCHMARKS))
    add("--out", help="directory of the report; evaluations/MODEL's name by default")
    add("--against", default="", metavar="MODEL", help="a second model, compared with the first")
    add("--value", help="scalar rule: an attribute, a published vector, {JSON}, or weights.json")
    add("--fit", metavar="PAIRS", help="fit weights of the attributes on these pairs")
    add("--gold", default="", metavar="RATING", help="of several ratings the one that decides")
    add("--max-length", type=int, default=0, help="most tokens; the model's own by default")
    add("--over-long", choices=OVER_LONG, default=OVER_LONG[0], help="responses beyond that")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--quantize", default="", help="int8 or fp8; see docs/performance.md")
    add("--mesh", default="fsdp:-1", metavar="AXIS:SIZE,...", help="over this host's devices")
    return parser


def _main() -> None:
    args = _parser().parse_args()
    if args.max_length < 0:
        raise UserError(f"--max-length={args.max_length}: expected 0 or more")
    enable_compilation_cache()
    console = Console(highlight=False, soft_wrap=True)
    data = open_data(args.benchmarks or FROM_HUB, args.gold)
    value, known = _value(args.value)
    fit = Data(BENCHMARKS["pairs"], args.fit, "fit") if args.fit else None
    out = Path(args.out or Path("evaluations") / Path(args.model).name.replace(":", "-"))
    settings = Settings(
        args.max_length, args.over_long, args.dtype, args.quantize, _mesh(args.mesh)
    )
    report = evaluate(
        args.model,
        data,
        out,
        settings=settings,
        value=value,
        known=known,
        against=args.against,
        fit=fit,
    )
    terminal.show(summary(report), console)
    console.print(f"\n{out / 'report.html'}, report.md, report.json; scores: samples.jsonl")


if __name__ == "__main__":
    exit_with_message(_main)
