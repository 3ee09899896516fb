"""What kinds of server take and give, beyond what all of them do."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rmjax.generation.http_json import JsonServer
from rmjax.generation.server_weights import load_into_sglang, load_into_vllm


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of server takes and gives beyond OpenAI's own fields.

    Attributes:
      name: of it.
      ids: whether prompts go to it as tokens.
      own_ids: whether it gives the tokens that it sampled; without, they are those of its text.
      all_top_k: its `top_k` for all tokens; None if it has no such field.
      logprobs: its `logprobs` for the sampled token's alone; None if it may have none.
      tempered: whether log-probabilities are those at the request's temperature.
      fields: sent always. Servers have defaults of their own, and vLLM takes the model's, which
        would draw from another distribution than was asked for.
      load_weights: makes it load those of a Hugging Face directory; None if it cannot.
    """

    name: str
    ids: bool = False
    own_ids: bool = False
    all_top_k: int | None = None
    logprobs: int | None = None
    tempered: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load_weights: Callable[[JsonServer, Path], None] | None = None


_WHOLE = {"min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
# By what a server says in /v1/models of who owns its models.
KINDS = {
    "vllm": Kind(
        "vLLM",
        ids=True,
        own_ids=True,
        all_top_k=-1,
        logprobs=0,
        fields=_WHOLE | {"return_token_ids": True, "spaces_between_special_tokens": False},
        load_weights=load_into_vllm,
    ),
    "sglang": Kind(
        "SGLang",
        ids=True,
        own_ids=True,
        all_top_k=-1,
        logprobs=0,
        tempered=True,
        fields=_WHOLE | {"return_token_ids": True},
        load_weights=load_into_sglang,
    ),
    "llamacpp": Kind(
        "llama.cpp",
        ids=True,
        all_top_k=0,
        logprobs=1,
        fields={"min_p": 0.0, "repeat_penalty": 1.0},
    ),
    # It has log-probabilities only if it was started so, and else fails.
    "me": Kind("llama-cpp-python", all_top_k=0, fields={"min_p": 0.0, "repeat_penalty": 1.0}),
}
OTHER = Kind("a server of a kind that is not known here", logprobs=0)
