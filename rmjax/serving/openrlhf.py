"""OpenRLHF's `--reward.remote_url`: texts in the policy's template, one a request.

Of OpenRLHF 0.11 (`openrlhf/utils/agent.py`): it sends `query`, `prompts` and `labels`, takes
`rewards`, `scores` and `extra_logs` of the reply, asks again five times after an error, and then
has no reward for the sample. So what can be scored is: what is too long loses its first tokens, an
empty response is scored as it is, and both are counted in `extra_logs`, which OpenRLHF logs.
With several servers one may be sent empty lists.
"""

from typing import Any

from rmjax.serving.questions import Asked, Body, Endpoint, Result, Served, text_item
from rmjax.serving.schemas import ALL_SAID, NUMBER, optional, record

_NUMBERS = {"type": "array", "items": NUMBER}


def _parse(body: Body, served: Served) -> Asked:
    items = [text_item(text, f"query[{i}]", served) for i, text in enumerate(body["query"])]

    def write(results: list[Result], notes: list[str]) -> Any:
        values = [result.value for result in results]
        logs = {name: [r.score.attributes[name] for r in results] for name in served.attributes}
        logs["tokens"] = [float(r.score.tokens) for r in results]
        logs["cut_tokens"] = [float(r.score.cut) for r in results]
        logs["empty"] = [float(r.empty) for r in results]
        return {"rewards": values, "scores": values, "extra_logs": logs}

    most = served.scorer.max_length
    return Asked(items, [1] * len(items), write, cut_to=most, loses_nothing=True)


GET_REWARD = Endpoint(
    ("/get_reward",),
    "Rewards of texts that a chat template wrote, for OpenRLHF.",
    record(
        {"query": ALL_SAID},
        {"prompts": optional({"type": "array"}), "labels": optional({"type": "array"})},
    ),
    record(
        {
            "rewards": _NUMBERS,
            "scores": _NUMBERS,
            "extra_logs": {"type": "object", "additionalProperties": _NUMBERS},
        }
    ),
    _parse,
    {
        "query": [
            "<|im_start|>user\nName a prime.<|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n"
        ],
        "prompts": ["<|im_start|>user\nName a prime.<|im_end|>\n<|im_start|>assistant\n"],
        "labels": [""],
    },
)
