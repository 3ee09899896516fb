"""A model's scores of benchmarks, whatever it is: a reward model, a file of scores, a baseline."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax.checkpoints.causal_heads import HeadChoice
from rmjax.data.fields import LARGEST
from rmjax.errors import UserError
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.items import Item
from rmjax.evaluation.score_cache import ItemScores, ScoreCache, score_items
from rmjax.models.rewards.aggregation import Rule, scalar_rule
from rmjax.runtime.files import BAD_JSON
from rmjax.runtime.json_object import unique_keys
from rmjax.runtime.sharding import MeshConfig

LENGTH_BASELINE = "baseline:length"


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
    """How a model is scored; see the options of `rmjax.evaluate`.

    `chat_template`, `head` and `suffix_turn` are of the model alone, not of one that it is compared
    with.
    """

    max_length: int
    over_long: str
    dtype: str
    quantize: str
    mesh: MeshConfig
    chat_template: str = ""
    head: HeadChoice | None = None
    suffix_turn: str = ""


@dataclasses.dataclass(frozen=True)
class ModelScores:
    """A model's scores of several benchmarks.

    Attributes:
      name: of the model, as the user gave it.
      attributes: the columns of the scores.
      rule: how they become one value.
      facts: what a report says of the model and the settings, by name.
      work: how many texts and tokens were computed; empty where nothing was.
      items: a list for each benchmark.
    """

    name: str
    attributes: tuple[str, ...]
    rule: Rule
    facts: dict[str, Any]
    work: dict[str, float]
    items: list[list[ItemScores]]


def score_model(
    model: str,
    data: Sequence[BenchmarkData],
    settings: ScoringSettings,
    out: Path,
    value: str | Mapping[str, float] | None = None,
) -> ModelScores:
    """Scores benchmarks with a model.

    Args:
      model: a reward model, a `.jsonl` file of scores, or `LENGTH_BASELINE`.
      data: the benchmarks.
      settings: of the computation.
      out: directory of the evaluation, where scores are kept.
      value: a scalar rule; None for the model's own.

    Raises:
      UserError: there is no such model, or it cannot score a text.
    """
    if model == LENGTH_BASELINE:
        return length_scores(data)
    if Path(model).is_file() and model.endswith(".jsonl"):
        return read_scores(Path(model), data, value)
    from rmjax.inference.load import load

    scorer = load(
        model,
        value=value,
        mesh=settings.mesh,
        dtype=settings.dtype,
        over_long="truncate_left",
        quantize=settings.quantize,
        chat_template=settings.chat_template,
        head=settings.head,
        suffix_turn=settings.suffix_turn,
    )
    scorer.max_length = settings.max_length or scorer.max_length
    dtype, devices = str(scorer.model.options.dtype), jax.devices()
    made_by = [scorer.state, str(scorer.max_length), dtype, settings.quantize]
    path = out / "scores" / f"{'-'.join(filter(None, made_by))}.jsonl"
    cache = ScoreCache(path, scorer.attributes)
    known, began = len(cache.known), time.monotonic()
    items = score_items(scorer, data, cache)
    facts = {
        "kind": "a reward model",
        "attributes": list(scorer.attributes),
        "max_length": scorer.max_length,
        "over_long": settings.over_long,
        "dtype": settings.quantize or dtype,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "source": scorer.spec.source,
        "suffix_turn": scorer.spec.suffix_turn,
        "unread": scorer.encoder.notes(),
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
    return ModelScores(model, scorer.attributes, scorer.rule, facts, work, items)


def length_scores(data: Sequence[BenchmarkData]) -> ModelScores:
    """The baseline that prefers the longer response: its score is the number of characters."""
    items = [
        [_without_tokens([[len(text)] for text in item.responses]) for item in part.items]
        for part in data
    ]
    rule, facts = scalar_rule("characters", ("characters",)), {"kind": "the response's characters"}
    return ModelScores(LENGTH_BASELINE, ("characters",), rule, facts, {}, items)


def _without_tokens(scores: Sequence[Sequence[float]]) -> ItemScores:
    count = len(scores)
    return ItemScores(np.asarray(scores, np.float64), np.zeros(count, int), np.zeros(count, bool))


# ---- a file of scores ---------------------------------------------------------------------------


def read_scores(
    path: Path, data: Sequence[BenchmarkData], value: str | Mapping[str, float] | None = None
) -> ModelScores:
    """Reads scores from a file of JSON lines, such as the `samples.jsonl` of another evaluation.

    A row has `id`, `scores` (one for each response, the good ones first; a number or a mapping from
    attributes to numbers), and `benchmark` and `subset` if ids are not unique.

    Args:
      path: the file.
      data: the benchmarks; the file must have every item.
      value: a scalar rule; None for the first attribute.

    Raises:
      UserError: a bad row, or an item without scores.
    """
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            row = _score_row(line, f"{path} row {number}")
            fields = (str(row.get(field, "")) for field in ("benchmark", "subset", "id"))
            for key in dict.fromkeys(_keys(*fields)):
                rows.setdefault(key, []).append(row)  # several are an error if one is looked up
    if not rows:
        raise UserError(f"{path}: there is no row in it")
    attributes = tuple(next(iter(rows.values()))[0]["scores"][0])
    items = [
        [_item_scores(rows, part.label, item, attributes, path) for item in part.items]
        for part in data
    ]
    rule = scalar_rule(attributes[0] if value is None else value, attributes)
    return ModelScores(str(path), attributes, rule, {"kind": "a file of scores"}, {}, items)


def _keys(benchmark: str, subset: str, id: str) -> tuple[tuple[str, str, str], ...]:
    """What a row is looked up by: as much as it says, or less."""
    return (benchmark, subset, id), ("", subset, id), ("", "", id)


def _score_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=unique_keys)
        scores = [s if isinstance(s, dict) else {"score": s} for s in row["scores"]]
        row["scores"] = [{str(k): float(v) for k, v in score.items()} for score in scores]
        row["id"] = str(row["id"])
        if any(not abs(v) <= LARGEST for score in row["scores"] for v in score.values()):
            raise ValueError("a score is no number of float32")
    except BAD_JSON as error:
        raise UserError(
            f"{where}: expected an object with 'id' and 'scores', a list with a number or a "
            f"mapping for each response ({error!r})"
        ) from error
    if not row["scores"] or any(set(s) != set(row["scores"][0]) for s in row["scores"]):
        raise UserError(f"{where}: field 'scores' is empty, or its responses differ in attributes")
    return row


def _item_scores(
    rows: dict[tuple[str, str, str], list[Any]],
    label: str,
    item: Item,
    attributes: tuple[str, ...],
    path: Path,
) -> ItemScores:
    keys = _keys(label, item.subset, item.id)
    matches = next((rows[key] for key in keys if len(rows.get(key, ())) == 1), None)
    if matches is None:
        many = max(len(rows.get(key, ())) for key in keys)
        raise UserError(
            f"{path}: {many or 'no'} rows for {item.where} (benchmark {label!r}, subset "
            f"{item.subset!r}, id {item.id!r})"
        )
    scores = matches[0]["scores"]
    if len(scores) != len(item.responses) or tuple(scores[0]) != attributes:
        raise UserError(
            f"{path}: id {item.id!r} has {len(scores)} scores of {', '.join(scores[0])}; expected "
            f"{len(item.responses)} of {', '.join(attributes)}"
        )
    found = _without_tokens([[s[name] for name in attributes] for s in scores])
    known = {name: matches[0].get(name) for name in ("tokens", "cut", "keys")}
    if any(not isinstance(v, list) or len(v) != len(scores) for v in known.values()):
        return found  # a file that another program wrote
    return ItemScores(
        found.scores,
        np.asarray(known["tokens"], int),
        np.asarray(known["cut"], bool),
        tuple(map(str, known["keys"] or ())),
    )
