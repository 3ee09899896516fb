"""Tries a model's chat template before it is used: it is a program of whoever made the model.

transformers runs templates in jinja's sandbox, which keeps them from Python's objects and from
files. It does not keep them from looping for years or from asking for all the memory. So a template
is run when a tokenizer is loaded, on small conversations, in a process of its own.

Nothing less holds. An allocation of a hundred gigabytes is one call of C, which no thread can
interrupt. A limit to this process' memory would be one for all its threads, and a GPU reserves
addresses by the terabyte, so that what is loaded at the same time would fail. Counting steps needs
an environment that intercepts every operator and filter, and forgets one.
"""

import functools
import json
import signal
import subprocess
import sys
from typing import Any

from rmjax.data import template_trial
from rmjax.errors import UserError

_SECONDS = 5  # of computing; published templates take milliseconds
_WAIT = 120.0  # seconds until the process has ended, on a machine that is busy
_BYTES = 1 << 30
_LONGEST = 1 << 20  # characters; published templates have some thousands


def check_template(tokenizer: Any, where: str) -> None:
    """Runs a tokenizer's template on small conversations.

    What it refuses or fails at is not looked at here: that is told of a conversation that is meant.

    Args:
      tokenizer: with a chat template.
      where: what messages call it.

    Raises:
      UserError: it computes a power, takes too long, asks for too much memory, is too long, or
        ends the process that runs it.
    """
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    fault = _fault(tokenizer.chat_template, json.dumps(special, sort_keys=True), _SECONDS)
    if fault:
        raise UserError(f"{where}: the chat template {fault}")


@functools.lru_cache(maxsize=256)
def _fault(template: str, special: str, seconds: int) -> str:
    """What is wrong with a template, in words; empty for nothing. The same one is run once."""
    if len(template) > _LONGEST:
        return f"has {len(template):,} characters, more than {_LONGEST:,}"
    request = {
        "path": sys.path,
        "template": template,
        "special": json.loads(special),
        "seconds": seconds,
        "bytes": _BYTES,
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-I", template_trial.__file__],
            input=json.dumps(request).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_WAIT,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"was not done after {_WAIT:g} s"
    except (OSError, ValueError) as error:
        return f"cannot be tried: no process of Python can be begun ({error})"
    if ended == -signal.SIGXCPU:
        return f"was not done after {seconds} s"
    if ended == template_trial.POWER:
        return "computes a power (**), which none has to"
    if ended == template_trial.MEMORY:
        return f"asks for more than {_BYTES >> 30} GiB of memory"
    return f"ends the process that tries it (status {ended})" if ended else ""
