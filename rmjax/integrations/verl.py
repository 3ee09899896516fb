"""verl: a `compute_score` that asks a server, one response at a time.

    reward.custom_reward_function.path=pkg://rmjax.integrations.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.url=http://localhost:8000
    +reward.custom_reward_function.reward_kwargs.prompt_field=question

verl hands over the response and the row's `extra_info`, but not the prompt. So the prompt must be
in `extra_info`, as a text or messages. Many responses are asked for at once, and the server makes
batches of them.
"""

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from rmjax.errors import UserError
from rmjax.integrations.judges import Judge, open_judge


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str,
    prompt_field: str = "prompt",
    empty: float = 0.0,
    **others: Any,
) -> dict[str, float]:
    """The value as `score`, and each attribute by its name, which verl logs.

    Args:
      data_source: not used.
      solution_str: the response.
      ground_truth: not used.
      extra_info: of the row; holds the prompt.
      url: of `rmjax serve`.
      prompt_field: of `extra_info`.
      empty: the score of a response that says nothing; it has no attributes.
      others: what verl passes besides.

    Raises:
      UserError: there is no such field, or the server does not answer.
    """
    if not extra_info or extra_info.get(prompt_field) is None:
        there = ", ".join(map(str, extra_info or {})) or "nothing"
        raise UserError(
            f"extra_info has no {prompt_field!r}, but {there}: name the field that holds the "
            "prompt with reward_kwargs.prompt_field"
        )
    prompt = extra_info[prompt_field]
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    (judged,) = await asyncio.to_thread(_judge(url), [prompt], [solution_str])
    if judged is None:
        return {"score": empty}
    return {"score": judged.pop("value"), **judged}


@functools.lru_cache(maxsize=8)
def _judge(url: str) -> Judge:
    """One for a process, with its connections."""
    return open_judge(url)
