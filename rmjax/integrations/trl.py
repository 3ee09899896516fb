"""TRL: a reward function for `GRPOTrainer`, `RLOOTrainer` and others.

    from rmjax.integrations.trl import reward_function

    trainer = GRPOTrainer(..., reward_funcs=reward_function("http://localhost:8000"))

TRL 1.16 calls it with `prompts`, `completions`, `completion_ids` and the data's other columns, and
takes a number for each completion, or None where it has none.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rmjax.integrations.judges import open_judge

RewardFunction = Callable[..., list[float | None]]


def reward_function(judge: str, *, name: str = "rmjax", **options: Any) -> RewardFunction:
    """A reward function.

    Args:
      judge: the URL of `rmjax serve`, or a model for `rmjax.load`.
      name: by which TRL reports the reward.
      options: of `open_judge`.

    Raises:
      UserError: the judge cannot be opened.
    """
    opened = open_judge(judge, **options)

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        found = opened(prompts, completions)
        return [None if judged is None else judged["value"] for judged in found]

    reward.__name__ = name
    return reward
