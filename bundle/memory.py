"""The C library's memory allocator, told to keep what it will need again."""

from __future__ import annotations

import ctypes
import functools
import sys

__all__ = ["keep_freed_memory"]

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h of glibc
LARGEST_KEPT = 1 << 28  # bytes: feature maps of a slice of 512 x 512 and their spectra, but no volume of 256 such slices
NEVER = (1 << 31) - 1  # as many free bytes at the end of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Let the allocator keep freed feature maps for the next layer, once and for the whole process; returns whether it could be told.

    By default glibc hands each large block back to the system when it is freed, and the system clears every page of the next one: a
    quarter of the time of a CPU inference (``scripts/benchmark.py`` measures with it). Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(TRIM_THRESHOLD, NEVER))
