"""The model card of an export: what it is, what it was made from and how, and how it is loaded."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmjax.checkpoints.loading_examples import examples
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.checkpoints.provenance import provenance, write_card
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.files import read_json

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Of a run's config, what another run would have to be told.
_RECIPE = (
    "objective",
    "batch_size",
    "epochs",
    "steps",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "data.max_length",
    "dtype",
)
_METRICS = (
    ("count", "ratings"),
    ("mse", "MSE"),
    ("mse_constant", "MSE of the mean"),
    ("pearson", "Pearson"),
    ("spearman", "Spearman"),
    ("pair_accuracy", "pair accuracy"),
)


def write_model_card(
    directory: Path,
    source: Pretrained,
    spec: RewardSpec | None,
    name: str,
    dtype: str,
    *,
    adapters: bool = False,
) -> None:
    """Writes the card of an export in Hugging Face's format.

    Args:
      directory: of the export.
      source: what is exported; of a run the card says how it was trained.
      spec: of the export; None for a language model.
      name: what the export is loaded by: a hub id, or a directory.
      dtype: of its weights.
      adapters: whether it holds these alone, of the model `source.base`.

    Raises:
      UserError: a file of the source is damaged.
    """
    front = provenance(source)
    record, data, report = (_read(source.run, file) for file in _RUN_FILES)
    trained_on = _described(data)
    names = " and ".join(trained_on).split(" and ")
    if ids := [id for id in names if _HUB_ID.fullmatch(id)]:
        front["datasets"] = sorted({*_as_list(front.get("datasets")), *ids})
    front |= {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-classification" if spec else "text-generation",
        "tags": [*(["reward-model"] if spec else []), "rmjax"],
    }
    sections = [
        f"# {name.rpartition('/')[2]}",
        *_what_it_is(spec, front, dtype, adapters),
        *_training(record, data, trained_on),
        *_metrics(report),
        "## Use",
        *examples(spec, name, source.base if adapters else ""),
    ]
    write_card(directory, front, "\n\n".join(sections) + "\n")


_RUN_FILES = ("config.json", "data.json", "report/report.json")


def _read(run: Path | None, file: str) -> dict[str, Any]:
    return read_json(run / file) if run and (run / file).is_file() else {}


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _described(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts of a run's data by the name that others may see: a hub id, or a file's name."""
    parts = {part: data[part] for part in ("train", "validation") if data.get(part)}
    return {_shown(described["source"]): described for described in parts.values()}


def _shown(source: str) -> str:
    """A name of data without the directories of the machine that it lay on."""
    if " and " in source:  # ratings and pairs
        return " and ".join(map(_shown, source.split(" and ")))
    name, _, _ = source.partition(":")
    is_id = _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else source.rpartition("/")[2]


def _what_it_is(
    spec: RewardSpec | None, front: Mapping[str, Any], dtype: str, adapters: bool
) -> Iterator[str]:
    base = ", ".join(_as_list(front.get("base_model")))
    what = "Adapters that make" if adapters else "This is"
    of = f" of {base}" if base and adapters else f", made from {base}" if base else ""
    if spec is None:
        yield f"{what} a language model{of}. Weights: {dtype}."
        return
    yield (
        f"{what} a reward model{of}. It scores a conversation that ends with a response. Weights: "
        f"{dtype}."
    )
    if len(spec.attributes) > 1:
        labels = "".join(f"\n{i}. `{name}`" for i, name in enumerate(spec.attributes, start=1))
        yield f"It has {len(spec.attributes)} labels, in this order:\n{labels}"
        if spec.scalar:
            yield f"The value, where one number is wanted, is {_weighted(spec.scalar)}."
        elif spec.general_preference is None:
            yield "The labels are classes; which of them is good is for the user to say."
    else:
        yield f"It has one label, `{''.join(spec.attributes)}`: higher is better."
    if spec.folded and list(spec.folded.values()) != [1.0]:
        yield f"The label is {_weighted(spec.folded)}, of a model with these attributes."
    if spec.general_preference:
        yield (
            "The labels are a vector of general preferences (arXiv 2410.02197), which compares two "
            "responses and gives no number for one."
        )
    if spec.ordinal:
        yield (
            f"Of {', '.join(spec.ordinal.attributes)} the label is a place among thresholds, which "
            "are in `rmjax.json`; only rmjax reads it as a rating."
        )
    if spec.offset:
        constants = ", ".join(f"{value:g} ({name})" for name, value in spec.offset.items())
        yield f"To a label rmjax adds a constant, which other programs leave out: {constants}."
    if spec.suffix_turn:
        yield (
            "The reward is read where the answer to this question would begin, which is a user's "
            "turn after the response, with a generation prompt behind it. rmjax asks it by itself; "
            f"other programs have to be given it:\n\n````\n{spec.suffix_turn}\n````"
        )
    if spec.max_length:
        yield f"It was trained on conversations of up to {spec.max_length:,} tokens."


def _weighted(weights: Mapping[str, float]) -> str:
    return " ".join(f"{weight:+g} * `{name}`" for name, weight in weights.items())


def _training(
    record: Mapping[str, Any],
    data: Mapping[str, Any],
    described: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    if not record:
        return
    yield "## Training"
    lines = []
    for name, part in described.items():
        counts = ", ".join(f"{count:,} {what}" for what, count in part["samples"].items())
        lines.append(f"- {name}: {counts}; {part['tokens']['total']:,} tokens")
    if lines:
        yield "Data, by what became of its rows:"
        yield "\n".join(lines)
    config: Mapping[str, Any] = record["config"]
    rows = [(key, config[key]) for key in _RECIPE if config.get(key)]
    rows.append(("seed", config["seed"]))
    if config.get("lora.rank"):
        rows += [(key, config[key]) for key in ("lora.rank", "lora.alpha", "lora.targets")]
    versions = record.get("versions", {})
    rows += [(name, versions[name]) for name in ("rmjax", "jax") if name in versions]
    if record.get("devices"):
        rows.append(("devices", record["devices"]))
    yield _table(("setting", "value"), rows)


def _metrics(report: Mapping[str, Any]) -> Iterator[str]:
    """The held-out metrics of the best checkpoint, which is the one that is exported."""
    best = (report.get("summary") or {}).get("best_step")
    found = next((e for e in report.get("evaluations") or () if e["step"] == best), None)
    if best is None or found is None:
        return
    yield "## Held-out data"
    yield f"Step {best:,}; validation loss {_number(found['validation_loss'])}."
    if attributes := found.get("attributes"):
        rows = [
            (f"`{name}`", *(_number(row.get(key)) for key, _ in _METRICS))
            for name, row in attributes.items()
        ]
        yield _table(("attribute", *(title for _, title in _METRICS)), rows)
    if pairs := found.get("pairs"):
        interval = f"{_number(pairs.get('low'))} to {_number(pairs.get('high'))}"
        yield (
            f"Accuracy on {_number(pairs.get('pairs'))} preference pairs: "
            f"{_number(pairs.get('accuracy'))} (95 %: {interval})."
        )
    if policy := found.get("policy"):
        yield (
            f"Mean log-probability of a token of {_number(policy.get('responses'))} responses: "
            f"{_number(policy.get('token_log_probability'))}."
        )


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
