"""Atomic writes and fingerprints of files."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib

from .dicom import files_of
from .errors import InputError
from .headers import companions, file_format, sidecar

__all__ = ["fingerprint", "save_nifti", "sha256", "write_atomically", "write_json", "write_text"]

DAY = 24 * 60 * 60  # seconds


def fingerprint(volume: str) -> dict[str, Any]:
    """Files, bytes and time of the last change (ns) of a volume: a file and its companions, or all slices of a DICOM series. Also the hash
    of what its BIDS sidecars say, if it has any."""
    path = Path(volume)
    files = [] if file_format(path) and path.is_file() else files_of(path)
    stats = [f.stat() for f in files or (path, *companions(path)) if f.is_file()]
    told = {} if files else sidecar(path)
    hashed = {"sidecar": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()} if told else {}
    modified = max((s.st_mtime_ns for s in stats), default=0)
    return {"files": len(stats), "bytes": sum(s.st_size for s in stats), "modified": modified, **hashed}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        with Path(str(path)).open("rb") as stream:  # the command line reads the name 5 as a number
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def save_nifti(image: nib.Nifti1Image, path: Path) -> None:
    """Write a ``.nii.gz``: by ``isal`` where it is installed, which compresses ten times as fast as zlib does; equal images give equal
    bytes."""
    try:
        from isal.igzip import IGzipFile
    except ImportError:
        image.to_filename(path)
        return
    with path.open("wb") as file, IGzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as stream:
        image.to_stream(stream)


def write_json(path: Path, content: dict) -> None:
    """Write an indented JSON file with :func:`write_text`. A file name that is not UTF-8 is read back as it was.

    Raises:
        ValueError: for NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 with :func:`write_atomically`; the bytes of file names that are not UTF-8 become ``\\udc..``."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and rename the result to ``path``: the file is always complete or absent.

    The content reaches the disk before the name does, so that even a power failure leaves no partial file. Temporary files of killed
    processes are removed: those of this machine at once, others after a day, because another machine may still be writing them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the extension stays at the end because it selects the format
    part = path.with_name(f".part-{platform.node()}-{os.getpid()}-{path.name}")
    try:
        write(part)
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
    for left in path.parent.glob(f".part-*-{glob.escape(path.name)}"):
        if _is_abandoned(left):
            left.unlink(missing_ok=True)


def _is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a temporary file has ended: known for this machine, assumed for others after a day."""
    try:
        age = time.time() - part.stat().st_mtime
    except OSError:  # gone already
        return False
    own = re.match(rf"\.part-{re.escape(platform.node())}-(\d+)-", part.name)
    if own is None or os.name == "nt":  # where os.kill would end the process
        return age > DAY
    try:
        os.kill(int(own[1]), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # a process of another user
        return age > DAY
    return age > DAY


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the file itself is safe
        pass
    finally:
        os.close(descriptor)
