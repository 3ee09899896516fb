"""JSON of which nothing is passed over: an object in which no key is there twice."""

import json
from collections import Counter
from typing import Any

from rmjax.errors import UserError, shortened


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Reads an object; of two equal keys, json alone would take the last and say nothing.

    Args:
      text: of the object.
      where: what has it, for messages.

    Raises:
      UserError: broken JSON, no object, or a key that is there twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{where} has the key {shortened(twice)!r} twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found
