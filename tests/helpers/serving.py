"""A server on this machine, in a thread of the test's own process."""

import contextlib
import copy
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from helpers.checks import known
from helpers.models import make_model
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.inference.scorer import Scorer
from rmjax.models.rewards.aggregation import model_rule
from rmjax.serving.server import make_server
from rmjax.serving.service import Limits, Service


def one_device(directory: Path, value: str | None = None) -> Scorer:
    """A model of random weights on one device, which is what most servers have."""
    source = open_pretrained(str(directory))
    spec = known(source.spec)
    options = {"attention": "cpu_flash", "parts": True}  # as `rmjax.load` has it there
    model = make_model(source.decoder, len(spec.attributes), **options)
    params = load_params(source, model, seed=0, dtype=np.float32)
    return Scorer(model, params, source.tokenizer(), spec, model_rule(spec, value), "error")


def variant(scorer: Scorer, **changes: object) -> Scorer:
    """The same model with other attributes; what is compiled is shared."""
    found = copy.copy(scorer)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@contextlib.contextmanager
def running(service: Service, key: str = "", wait: bool = True) -> Iterator[str]:
    """The URL of a server that is ready, or that only listens."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = make_server(service, "0", key)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until = time.monotonic() + 120
        while wait and not service.batcher.ready:
            assert service.batcher.failure is None and time.monotonic() < until
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def make_service(scorer: Scorer, **limits) -> Service:
    return Service(scorer, "judge", Limits(**limits))
