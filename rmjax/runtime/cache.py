"""The cache on disk: `$RMJAX_CACHE`, else `~/.cache/rmjax`.

What is in it can be deleted at any time: it is computed again.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rmjax.errors import UserError, disk_errors


def cache_root() -> Path:
    """The cache's directory, which need not exist yet."""
    return Path(os.environ.get("RMJAX_CACHE", "~/.cache/rmjax")).expanduser()


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Turns what can go wrong while the cache is written into a `UserError`."""
    root = cache_root()
    try:
        with disk_errors(f"the cache in {root}"):
            yield
    except OSError as error:
        raise UserError(
            f"the cache in {root} cannot be written ({error}): set RMJAX_CACHE to a directory "
            "that can"
        ) from error
