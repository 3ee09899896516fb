"""Runs a chat template on small conversations, as a process of its own that has limits.

    python -I template_trial.py < REQUEST

It is begun by `template_check.py`, for nothing but its end: status 0, or a signal for too much
time, or one of those below. It imports jinja2 and nothing of rmjax, so that it begins in a tenth of
a second.
"""

import contextlib
import datetime
import json
import resource
import sys
from typing import Any, ClassVar

POWER, MEMORY = 3, 4  # exit status
_TALKS = [
    [{"role": role, "content": "x"} for role in roles]
    for roles in (
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("user", "assistant", "user", "assistant"),
    )
]


def _environment() -> Any:
    """jinja's sandbox as transformers makes it."""
    import jinja2.sandbox
    from jinja2.ext import Extension

    class Generation(Extension):
        """The tag around what the assistant says; what is in it stays."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        given: dict[str, Any] = {"ensure_ascii": False} | options
        return json.dumps(value, **given)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime.datetime.now().strftime
    return environment


def render(template: str, special: dict[str, Any], talk: list[Any], asking: bool) -> str:
    """What transformers makes of a template, without it."""
    return (
        _environment()
        .from_string(template)
        .render(messages=talk, tools=None, documents=None, add_generation_prompt=asking, **special)
    )


def _has_power(template: str) -> bool:
    """`9 ** n` may be harmless in these conversations and not in others."""
    import jinja2
    from jinja2 import nodes

    try:
        return _environment().parse(template).find(nodes.Pow) is not None
    except (jinja2.TemplateError, RecursionError):
        return False  # so it cannot be run either


def main() -> None:
    """The process."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    import jinja2.sandbox  # noqa: F401  what it takes is not the template's

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + request["seconds"]
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 5),
        resource.RLIMIT_AS: (request["bytes"], request["bytes"]),
        resource.RLIMIT_CORE: (0, 0),
    }
    for limit, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # the system allows less already
            resource.setrlimit(limit, most)
    if _has_power(request["template"]):
        sys.exit(POWER)
    for talk in _TALKS:
        for asking in (False, True):
            try:
                render(request["template"], request["special"], talk, asking)
            except MemoryError:
                sys.exit(MEMORY)
            except Exception:  # a refusal, or an error of the template's
                continue


if __name__ == "__main__":
    main()
