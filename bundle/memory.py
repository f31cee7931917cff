"""The C library's memory allocator, told to keep what it will need again."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

__all__ = ["keep_freed_memory", "release_freed_memory"]

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h of glibc
LARGEST_KEPT = (1 << 26, 1 << 25)  # bytes, the first that is accepted: feature maps and their spectra, but no volumes
NEVER = (1 << 31) - 1  # as many free bytes at the end of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Let the allocator keep freed feature maps for the next layer, once and for the whole process; returns whether it could be told.

    By default glibc hands each large block back to the system when it is freed, and the system clears every page of the next one, which
    takes a good part of the time of a CPU inference. Other C libraries are left as they are.
    """
    mallopt = _function("mallopt")
    # older versions of glibc refuse a threshold above half of their largest heap
    return bool(mallopt and any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST_KEPT) and mallopt(TRIM_THRESHOLD, NEVER))


def release_freed_memory() -> None:
    """Hand back to the system what :func:`keep_freed_memory` kept: the network is done, something else may need it."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def _function(name: str) -> Any:
    """Of the C library, where it is glibc."""
    try:
        return getattr(ctypes.CDLL(None), name) if sys.platform.startswith("linux") else None
    except (AttributeError, OSError):  # musl
        return None
