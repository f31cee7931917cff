"""Memory: large volumes are kept in temporary files, and freed memory that will be needed again is kept."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

__all__ = ["empty_volume", "in_files", "keep_freed_memory", "release_freed_memory"]

IN_MEMORY = 1 << 28  # bytes; larger volumes lie in a temporary file
PERIOD = 0.01  # seconds after which the pages of such volumes are given back

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h of glibc
LARGEST_KEPT = (1 << 26, 1 << 25)  # bytes; the first accepted one applies: feature maps and their spectra are kept, volumes are not
NEVER = (1 << 31) - 1  # free bytes at the end of the heap before it shrinks

mapped: WeakSet[mmap.mmap] = WeakSet()
"""The temporary files of the volumes that exist."""


def empty_volume(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised volume, for work slice by slice along the first axis.

    A volume of more than 256 MiB is kept in a temporary file, and memory holds only what was used a moment ago. On systems other than
    Linux, and if the disk is full, it is kept in memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if not in_files(size):
        return torch.empty(*shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=_folder()) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and the end of the process later
            pages = mmap.mmap(file.fileno(), size)
    except OSError:
        return torch.empty(*shape, dtype=dtype)
    mapped.add(pages)
    if len(mapped) == 1:
        threading.Thread(target=_give_pages_back, daemon=True).start()
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def in_files(size: int, count: int = 1) -> bool:
    """Whether :func:`empty_volume` keeps ``count`` volumes of this size, in bytes, in files."""
    if size <= IN_MEMORY or not sys.platform.startswith("linux"):
        return False
    try:
        return shutil.disk_usage(_folder()).free > count * size
    except OSError:
        return False


def _folder() -> str:
    """Folder for large temporary files: ``TMPDIR``, otherwise ``/var/tmp``, because many systems keep ``/tmp`` in memory."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())


def _give_pages_back() -> None:
    """Give the pages of the mapped files back to the system as long as there are such files. The system itself reclaims them only when
    memory runs out. The content stays in the files: reading it again costs a page fault, and sometimes a read from the disk."""
    while mapped:
        for pages in list(mapped):
            pages.madvise(mmap.MADV_DONTNEED)
            del pages  # it would keep the file
        time.sleep(PERIOD)


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
