"""A function of a Python file as a reward."""

import asyncio
import importlib.util
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from rmjax.data.conversation import Conversation
from rmjax.errors import UserError, shortened
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
        self._address, self._timeout = address, timeout
        self._function: Any = getattr(_load(path, where), name, None)
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
            raise _said(error, self._address) from error

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        if getattr(value, "ndim", None) == 0:  # numpy's, JAX's or PyTorch's
            value = value.item()
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise UserError(
                f"{self._address}: a reward is {shortened(repr(value))}, expected a number, or "
                "None for none"
            )
        return float(value)


def _load(path: Path, where: str) -> Any:
    """The module of a file, under a name that no other module has."""
    name = f"rmjax_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: {path} is no Python file; expected FILE.py:NAME")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # as dataclasses need it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _said(error, f"{where}: loading {path}") from error
    return module


def _said(error: BaseException, what: str) -> UserError:
    """What was raised and where, in a line."""
    if isinstance(error, UserError):
        return error
    *_, last = traceback.extract_tb(error.__traceback__)
    return UserError(
        f"{what} raised {type(error).__name__}: {shortened(str(error), 300)} "
        f"({last.filename} line {last.lineno})"
    )
