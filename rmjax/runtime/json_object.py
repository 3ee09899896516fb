"""JSON of which nothing is passed over: objects in which no key is there twice.

Of two equal keys json alone takes the last and says nothing, and other programs take the first.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rmjax.errors import UserError, shortened


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values, as the `object_pairs_hook` of json.

    Raises:
      ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shortened(twice)!r} is there twice")
    return found


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Reads an object.

    Args:
      text: of the object.
      where: what has it, for messages.

    Raises:
      UserError: broken JSON, no object, or a key that is there twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found
