"""Settings of the C library's memory allocator: keep freed memory that will be needed again."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

__all__ = ["keep_freed_memory", "release_freed_memory"]

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h of glibc
LARGEST_KEPT = (1 << 26, 1 << 25)  # bytes; the first accepted one applies: feature maps and their spectra are kept, volumes are not
NEVER = (1 << 31) - 1  # free bytes at the end of the heap before it shrinks


@functools.cache
def keep_freed_memory() -> bool:
    """Make the allocator of this process keep freed feature maps for the next layer; returns whether that worked.

    By default glibc returns each large block to the system when it is freed, and the system clears every page of the next one, which takes
    a good part of the time of inference on a CPU. Other C libraries are not changed.
    """
    mallopt = _function("mallopt")
    # older versions of glibc refuse a threshold above half of their largest heap
    return bool(mallopt and any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST_KEPT) and mallopt(TRIM_THRESHOLD, NEVER))


def release_freed_memory() -> None:
    """Return the memory kept by :func:`keep_freed_memory` to the system, for use after the network."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def _function(name: str) -> Any:
    """A function of the C library, if it is glibc."""
    try:
        return getattr(ctypes.CDLL(None), name) if sys.platform.startswith("linux") else None
    except (AttributeError, OSError):  # musl
        return None
