"""Tries a model's chat template before it is used: it is a program of whoever made the model.

transformers runs templates in jinja's sandbox, which keeps them from Python's objects and from
files. It does not keep them from looping for years or from asking for all the memory. So a template
is run once when a tokenizer is loaded, before there are weights in memory, with a limit to either.
"""

import contextlib
import ctypes
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmjax.errors import UserError

_SECONDS = 5.0  # published templates take milliseconds
_BYTES = 1 << 30
_TALKS = [
    [{"role": role, "content": "x"} for role in roles]
    for roles in (
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("user", "assistant", "user", "assistant"),
    )
]


def check_template(tokenizer: Any, where: str) -> None:
    """Runs a tokenizer's template on small conversations.

    What it refuses or fails at is not looked at here: that is told of a conversation that is meant.

    Args:
      tokenizer: with a chat template.
      where: what messages call it.

    Raises:
      UserError: it computes a power, takes too long, or asks for too much memory.
    """
    what = f"{where}: the chat template"
    _refuse_powers(tokenizer.chat_template, what)
    try:
        with _limited(what):
            for talk in _TALKS:
                for asking in (False, True):
                    _run(tokenizer, talk, asking)
    except MemoryError as error:
        raise UserError(f"{what} asks for more than {_BYTES >> 30} GiB of memory") from error


def _run(tokenizer: Any, talk: list[dict[str, str]], asking: bool) -> None:
    try:
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=asking)
    except MemoryError:
        raise
    except Exception:  # a refusal, or an error of the template's
        return


def _refuse_powers(template: str, what: str) -> None:
    """`9 ** 9 ** 9` is computed when the template is compiled, and nothing interrupts it."""
    import jinja2
    from jinja2 import nodes

    with contextlib.suppress(jinja2.TemplateError, RecursionError):
        # Without the tags of extensions, whose contents stay.
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        if tree.find(nodes.Pow):
            raise UserError(f"{what} computes a power (**), which none has to")


class _TooLong(BaseException):
    """Nothing that catches errors catches it."""


@contextlib.contextmanager
def _limited(what: str) -> Iterator[None]:
    """Limits the time of this thread, and the memory that the process gets beyond what it has."""
    deciding, thread = threading.Lock(), threading.get_ident()
    expired = done = False

    def interrupt() -> None:
        nonlocal expired
        with deciding:
            if not done:
                expired = True
                kind = ctypes.py_object(_TooLong)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)

    timer = threading.Timer(_SECONDS, interrupt)
    timer.daemon = True
    timer.start()
    try:
        with _limited_memory():
            yield
        with deciding:
            done = True
    except _TooLong as error:
        raise UserError(f"{what} was not done after {_SECONDS:g} s") from error
    finally:
        done = True
        timer.cancel()


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):  # no Linux: without a limit
        yield
        return
    most = pages * resource.getpagesize() + _BYTES
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
