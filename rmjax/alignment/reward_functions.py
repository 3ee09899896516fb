"""A function of a Python file as a reward."""

import asyncio
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from rmjax.data.conversation import Conversation
from rmjax.data.fields import LARGEST
from rmjax.errors import UserError, shortened
from rmjax.runtime.python_files import as_user_error, load_python_file
from rmjax.runtime.time_limit import time_limit


class FunctionReward:
    """The values of a function, `def NAME(prompts, responses)`, which may be `async`.

    It is called with lists of messages and as many texts, all of a step at once, and gives a number
    for each, or None. Numbers of numpy, JAX and PyTorch will do, True and False too, and so will
    whatever gives them one by one.
    """

    def __init__(self, address: str, timeout: float, where: str):
        """Loads it.

        Args:
          address: `FILE.py:NAME`.
          timeout: seconds that a call may take.
          where: the field of the config, for messages.

        Raises:
          UserError: there is no such file or function, or the file raises.
        """
        file, _, name = address.rpartition(":")
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(
                f"{where} = {address!r}: expected FILE.py:NAME, and there is no file {file!r}"
            )
        self._address, self._path, self._timeout = address, path, timeout
        self._function: Any = getattr(load_python_file(path, where), name, None)
        if not callable(self._function):
            raise UserError(f"{where}: {file} has no function {name!r}")

    def __call__(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> tuple[Float64[np.ndarray, "P n"], None]:
        """See `Reward`.

        Raises:
          UserError: it raises, takes too long, or returns something else.
        """
        asked = [
            [{**message} for message in prompt.messages]  # its own, which it may change
            for prompt, texts in zip(prompts, responses)
            for _ in texts
        ]
        said = [text for texts in responses for text in texts]
        with time_limit(self._timeout, f"{self._address}, which rewards {len(said)} responses,"):
            found = self._called(asked, said)
        if len(found) != len(said):
            more = "more than that" if len(found) > len(said) else f"{len(found)} rewards"
            raise UserError(f"{self._address}: {more} for {len(said)} responses")
        return np.asarray([self._number(x) for x in found]).reshape(len(prompts), -1), None

    def _called(self, asked: list[Any], said: list[str]) -> list[Any]:
        """What it gives, and one more at most than it should."""
        try:
            found = self._function(asked, said)
            if inspect.iscoroutine(found):
                found = asyncio.run(found)
            if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping | Set):
                raise UserError(
                    f"{self._address} returns {shortened(repr(found))}, expected a number or None "
                    "for each response"
                )
            return list(itertools.islice(found, len(said) + 1))
        except (Exception, SystemExit) as error:
            raise as_user_error(error, self._address, self._path) from error

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        if getattr(value, "ndim", None) == 0:  # numpy's, JAX's or PyTorch's
            value = value.item()
        if not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise UserError(
                f"{self._address}: a reward is {shortened(repr(value))}, expected a number up "
                f"to {LARGEST:.3g}, or None for none"
            )
        return float(value)
