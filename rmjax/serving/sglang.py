"""SGLang's bodies for a reward model: `text` or `input_ids`, answered by `embedding`.

After SGLang 0.5.23. A single text gets an object, a list a list of them. Clients such as Skywork's
read `embedding[0]`, which is the value; `"attributes": true` asks for every attribute.
"""

import uuid
from typing import Any

from rmjax.serving.questions import Asked, Body, Item, Refusal, Result, Served, numbers, text_item
from rmjax.serving.schemas import TEXT, TEXTS, TOKENS, Schema, one_of, optional

SGLANG_FIELDS: dict[str, Schema] = {
    "text": optional(one_of(TEXT, TEXTS), "SGLang's form: texts that a chat template wrote"),
    "input_ids": optional(
        one_of(TOKENS, {"type": "array", "items": TOKENS}), "SGLang's form: token ids"
    ),
}


def is_sglang(body: Body) -> bool:
    """Whether a body is in this form."""
    return any(body.get(name) is not None for name in SGLANG_FIELDS)


def parse_sglang(body: Body, served: Served) -> Asked:
    """Reads a body that `is_sglang`. The model's name is passed over, as SGLang does.

    Raises:
      Refusal: it is in two forms, or a text is not what a template wrote.
    """
    given = [n for n in ("text", "input_ids", "input", "messages") if body.get(n) is not None]
    if len(given) != 1:
        raise Refusal(f"expected one of {', '.join(map(repr, given))}, found all of them")
    said, every = body[given[0]], bool(body.get("attributes"))
    single = isinstance(said, str) or (bool(said) and isinstance(said[0], int | float))
    items = []
    for number, each in enumerate([said] if single else said):
        where = given[0] if single else f"{given[0]}[{number}]"
        items.append(text_item(each, where, served) if isinstance(each, str) else Item(each, where))

    def write(results: list[Result], notes: list[str]) -> Any:
        found = [
            {
                "embedding": numbers(result, every),
                "meta_info": {
                    "id": uuid.uuid4().hex,
                    "finish_reason": None,
                    "prompt_tokens": result.score.tokens,
                    "cut_tokens": result.score.cut,
                },
            }
            for result in results
        ]
        return found[0] if single else found

    return Asked(items, [1] * len(items), write, needs_value=not every)
