"""What rewards are like on given data, so that a sample's can be told in deviations from the mean.

HelpSteer2's PPO standardizes so, by the rewards of HelpSteer2's responses (arXiv 2406.08673, 4.3).
The numbers are computed once, and kept with the run: a run that is continued has the same.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax.data.conversation import Conversation
from rmjax.data.readers import open_source
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError, write_errors
from rmjax.runtime.files import read_json, replace_file
from rmjax.runtime.processes import from_first

FILE = "rewards.json"
_AT_ONCE = 1024  # responses that are rewarded in one call


@dataclasses.dataclass(frozen=True)
class Standard:
    """The rewards of a source's responses.

    Attributes:
      source: of the responses.
      mean: of their rewards.
      deviation: of these, by n.
      responses: that have one.
      without: that have none.
    """

    source: str
    mean: float
    deviation: float
    responses: int
    without: int

    def __str__(self) -> str:
        without = f", {self.without:,} without" if self.without else ""
        return (
            f"(reward - {self.mean:.4g}) / {self.deviation:.4g}, as of {self.responses:,} "
            f"responses of {self.source}{without}"
        )


def measured(reward: Any, source: str, where: str) -> Standard:
    """The rewards of all responses of a source.

    Args:
      reward: a `rewards.Reward`.
      source: a data source with responses.
      where: the field of the config, for messages.

    Raises:
      UserError: a bad row, with its file; or rewards that do not differ.
    """
    reader, found = RowReader(), []
    waiting: list[Conversation] = []

    def rewarded() -> None:
        prompts = [Conversation(c.prompt, c.tools) for c in waiting]
        found.append(reward(prompts, [[c.response] for c in waiting])[0][:, 0])
        waiting.clear()

    for row in open_source(source, "train"):
        waiting += reader.responses(row)
        if len(waiting) >= _AT_ONCE:
            rewarded()
    if waiting:
        rewarded()
    values = np.concatenate([np.zeros(0), *found])
    known = values[~np.isnan(values)]
    # Of equal ones rounding leaves a deviation, and of those that hardly differ none.
    if not len(known) or known.min() == known.max() or not known.std():
        raise UserError(
            f"{where} = {source!r}: {len(known)} of its {len(values)} responses have a reward, and "
            "these do not differ; give a source whose responses differ"
        )
    return Standard(
        source, float(known.mean()), float(known.std()), len(known), len(values) - len(known)
    )


def kept_standard(workdir: Path, name: str, reward: Any, source: str) -> Standard:
    """The standard of a reward: what the run has of it, or measured now and kept.

    Every process must ask. All measure, because all compute a model, and the first one writes.

    Raises:
      UserError: see `measured`; or the run's file is damaged.
    """
    path = workdir / FILE
    kept = from_first("standards", lambda: read_json(path) if path.exists() else {})
    if name in kept:
        try:
            standard = Standard(**kept[name])
            if not (math.isfinite(standard.mean) and 0 < standard.deviation < math.inf):
                raise ValueError("its numbers are none")
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); restore it") from error
        if standard.source == source:
            return standard
    standard = measured(reward, source, f"config.rewards.{name}.standardize")
    if jax.process_index() != 0:
        return standard
    with write_errors(str(path)):
        kept[name] = dataclasses.asdict(standard)
        replace_file(path, (json.dumps(kept, indent=2, allow_nan=False) + "\n").encode())
    return standard
