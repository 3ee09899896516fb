"""How the process's memory is allocated."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Lets this process use freed memory again instead of returning it to the kernel.

    Call it before the work begins. By default glibc returns every large buffer when it is freed,
    and the kernel zeroes the pages of the next one: a quarter of a conversion's processor time, a
    few per cent of training on CPUs. Without glibc nothing happens.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((arena_max, 1), (mmap_threshold, 1 << 30), (trim_threshold, 1 << 30)):
            libc.mallopt(option, value)
