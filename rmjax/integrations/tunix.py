"""Tunix: a reward function for `GRPOLearner`.

    from rmjax.integrations.tunix import reward_function

    learner = GRPOLearner(..., reward_fns=reward_function("http://localhost:8000", empty=0.0))

Tunix 0.1.7 calls it with `prompts` and `completions`, which are texts, and the data's other
columns. It has no None, so what a completion is worth that says nothing must be said.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rmjax.integrations.judges import open_judge


def reward_function(judge: str, *, empty: float, **options: Any) -> Callable[..., list[float]]:
    """A reward function.

    Args:
      judge: the URL of `rmjax serve`, or a model for `rmjax.load`.
      empty: the reward of a completion that says nothing.
      options: of `open_judge`.

    Raises:
      UserError: the judge cannot be opened.
    """
    opened = open_judge(judge, **options)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        found = opened(list(prompts), list(completions))
        return [judged["value"] if judged else empty for judged in found]

    return reward
