"""What vLLM's bodies for pooling models have in common.

After vLLM 0.33's protocols (`vllm/entrypoints/pooling/base/protocol.py`). What a body asks for and
cannot be had is refused, such as a prompt cut on the right, where the reward is read. Numbers are
raw whatever `use_activation` says, as in vLLM those of the regression models that rmjax exports.
"""

from typing import Any

from rmjax.serving.questions import Body, Refusal, Served, check_model
from rmjax.serving.schemas import FLAG, TEXT, WHOLE, Schema, one_of, optional, record

_CUT = one_of({"enum": [-1]}, {"type": "integer", "minimum": 1})
COMMON: dict[str, Schema] = {
    "model": optional(TEXT, "must be the served model's name"),
    "user": optional(TEXT),
    "request_id": optional(TEXT),
    "truncate_prompt_tokens": optional(_CUT, "keeps so many of the last tokens; -1: all that fit"),
    "use_activation": optional(FLAG, "passed over: numbers are raw"),
}
USAGE = record({"prompt_tokens": WHOLE, "total_tokens": WHOLE}, {"cut_tokens": WHOLE})


# What a body may ask for and cannot have: the field, the values that it may have, and why.
_END = "the reward is read where the response ends"
_TEMPLATE = "the template is the model's own"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "truncation_side": (("left",), _END),
    "add_generation_prompt": ((False,), _END),
    "continue_final_message": ((False,), _END),
    "chat_template": ((), _TEMPLATE),
    "chat_template_kwargs": (({},), _TEMPLATE),
    "priority": ((0,), "requests are scored as they come"),
    "task": (("classify",), "this is a reward model, whose task is 'classify'"),
    "dimensions": ((), "numbers are the model's"),
    "encoding_format": (("float", "base64"), "there are 'float' and 'base64'"),
}


def check_body(body: Body, served: Served) -> int | None:
    """Refuses another model's name, and what cannot be had.

    Returns:
      The most tokens of a conversation, if the body says it.
    """
    check_model(body, served)
    for name, (allowed, why) in _REFUSED.items():
        if body.get(name) not in (None, *allowed):
            raise Refusal(f"{name!r} cannot be {body[name]!r}: {why}", param=name)
    most = body.get("truncate_prompt_tokens")
    if most is None:
        return None
    longest = served.scorer.max_length
    if most > longest:
        raise Refusal(
            f"'truncate_prompt_tokens' is {most}, and the model reads up to {longest}",
            param="truncate_prompt_tokens",
        )
    return longest if most == -1 else int(most)
