"""Serves a reward model over HTTP, in the forms that trainers and data tools ask for.

    python -m rmjax.serve MODEL --port=8000

MODEL is whatever `rmjax.load` takes. docs/serving.md has the endpoints, with a request and a reply
of each. Requests that come together are computed together. `/health` says 200 when every program is
compiled, and 503 before. SIGTERM ends the server when what it has begun is answered, a second one
at once. With the environment variable RMJAX_API_KEY, requests need that key as a bearer token.
"""

import argparse

from rmjax.errors import UserError, answer_interrupts, exit_with_message
from rmjax.inference.load_options import add_load_options, load_options
from rmjax.runtime.options import CommandParser


def _parser() -> CommandParser:
    parser = CommandParser("serve", __doc__)
    add = parser.add_argument
    add("model", help="the reward model")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all of this host's")
    add("--port", type=int, default=8000, help="0 for any that is free")
    add("--served-model-name", default="", metavar="NAME", help="what requests call it; else MODEL")
    add("--value", help="scalar rule: an attribute, a published vector, {JSON}, or weights.json")
    add("--max-length", type=int, default=0, help="in tokens; by default the model's own")
    add("--over-long", default="error", help="error, or truncate_left; see docs/serving.md")
    add_load_options(parser)
    add("--batch-tokens", type=int, default=0, help="computed at once; 0: what suits the devices")
    add("--batch-wait", type=float, default=5.0, metavar="MS", help="for others, in milliseconds")
    add("--queue-tokens", type=int, default=1 << 20, help="that may wait; then requests do")
    add("--queue-wait", type=float, default=30.0, metavar="S", help="for room, before a 503")
    add("--timeout", type=float, default=600.0, metavar="S", help="of a request in all")
    add("--max-body", type=int, default=16 << 20, metavar="BYTES", help="of a request")
    add("--max-conversations", type=int, default=1024, help="of a request")
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

import contextlib
import errno
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

import rmjax
from rmjax.evaluation.fit_weights import parse_value
from rmjax.inference.load import load
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.serving.service import Limits, Service

try:
    import uvicorn

    from rmjax.serving.server import make_server
except ImportError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'rmjax[serve]'") from error

_KEY = "RMJAX_API_KEY"


def serve(
    model: str,
    *,
    host: str,
    port: int,
    name: str,
    key: str,
    max_length: int,
    limits: Limits,
    **options: Any,
) -> None:
    """Serves until a signal ends it; see the top of this file.

    Args:
      model: the reward model.
      host: address to listen on.
      port: 0 for any.
      name: what requests may call the model.
      key: that requests need; empty for none.
      max_length: most tokens of a conversation; 0 for the model's own.
      limits: what it takes on.
      options: of `rmjax.load`.

    Raises:
      UserError: the model cannot be loaded or compiled, or the port is taken.
    """
    listener = _listen(host, port)  # before a large model is loaded
    scorer = load(model, **options)
    scorer.limit(max_length)
    service = Service(scorer, name or model, limits)
    server = make_server(service, rmjax.__version__, key)
    watch = threading.Thread(target=_watch, args=(service, server, listener), daemon=True)
    watch.start()
    # uvicorn ends in good order, and raises the signal again; which may come before it begins, too.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])
    if service.batcher.compiling:  # which cannot be interrupted, nor waited for; nothing is lost
        sys.stdout.flush()
        os._exit(0)
    if service.batcher.failure is not None:
        raise UserError(f"{model}: cannot be computed ({service.batcher.failure})")


def _listen(host: str, port: int) -> socket.socket:
    if not host:  # which the system reads as all addresses
        raise UserError("--host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 all addresses")
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port={port}: ports are 1 to 65535; 0 is any that is free")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        taken = ": another program listens there" if error.errno == errno.EADDRINUSE else ""
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}){taken}; "
            "--host and --port name another address"
        ) from error


def _watch(service: Service, server: uvicorn.Server, listener: socket.socket) -> None:
    """Says when the server is ready; ends it if it cannot be."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    began = time.monotonic()
    print(f"listening on http://{host}:{port}, compiling", flush=True)
    while not service.batcher.ready:
        if service.batcher.failure is not None or server.should_exit:
            server.should_exit = True
            return
        time.sleep(0.01)
    served = service.served
    print(
        f"ready after {time.monotonic() - began:.1f} s: {served.name}, value by "
        f"{served.scorer.rule.name}, up to {served.scorer.max_length:,} tokens",
        flush=True,
    )
    service.batcher.wait()
    server.should_exit = True


def _key() -> str:
    """The key that requests need; empty for none.

    Raises:
      UserError: it is there and says nothing, as a secret does that was not found.
    """
    given = os.environ.get(_KEY)
    if given is None:
        return ""
    if not given.strip():
        raise UserError(f"{_KEY} is empty: give it a key, or unset it to serve without one")
    return given.strip()  # a file's last line break is no part of it, and no header can have it


def _check(args: argparse.Namespace) -> None:
    """Raises a `UserError` about the first option that is out of range."""
    above = ("queue_tokens", "timeout", "max_body", "max_conversations")
    for name in (*above, "batch_tokens", "batch_wait", "queue_wait"):
        given = getattr(args, name)
        fine = given > 0 or (given == 0 and name not in above)
        if not fine or not math.isfinite(given):
            more = "more than 0" if name in above else "0 or more"
            raise UserError(f"--{name.replace('_', '-')}={given:g}: expected {more}")


def _main() -> None:
    args = _parser().parse_args()
    _check(args)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    enable_compilation_cache()
    with contextlib.suppress(ValueError, OSError):  # each client is an open file
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limits = Limits(
        batch_tokens=args.batch_tokens,
        window=args.batch_wait / 1000,
        queue_tokens=args.queue_tokens,
        queue_seconds=args.queue_wait,
        seconds=args.timeout,
        body_bytes=args.max_body,
        held_bytes=max(Limits().held_bytes, args.max_body),
        conversations=args.max_conversations,
    )
    serve(
        args.model,
        host=args.host,
        port=args.port,
        name=args.served_model_name,
        key=_key(),
        max_length=args.max_length,
        limits=limits,
        value=parse_value(args.value)[0],
        over_long=args.over_long,
        **load_options(args),
    )


if __name__ == "__main__":
    exit_with_message(_main)
