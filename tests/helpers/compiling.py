"""Programs compiled as users have them; the suite's settings leave most optimizations out."""

import contextlib
import os
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Programs that are compiled inside are optimized, those of started processes too.

    Programs that are in memory are compiled again, inside and afterwards.
    """
    before = jax.config.read(_FLAG)
    variable = os.environ.get(_FLAG.upper())
    jax.config.update(_FLAG, False)
    os.environ[_FLAG.upper()] = "0"
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update(_FLAG, before)
        if variable is None:
            del os.environ[_FLAG.upper()]
        else:
            os.environ[_FLAG.upper()] = variable
        jax.clear_caches()
