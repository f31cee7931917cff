"""From paths to volumes, and from volumes to subjects and splits."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from .dicom import find_series, is_dicom
from .errors import InputError
from .files import RESULT_MARK

__all__ = ["find_volumes", "split_subjects"]

VOLUME_PATTERNS = ("*.nii", "*.nii.gz", "*.mha", "*.mhd", "*.nrrd", "*.nhdr", "*.img", "*.img.gz")


def find_volumes(path: str | Path, pattern: str | Sequence[str] | None = None) -> list[str]:
    """Volumes at or below a path, sorted by name.

    Args:
        path: a file, a folder searched with all its subfolders, or a folder of DICOM slices.
        pattern: file name patterns (``"*_t1ce.nii.gz"``); ``None`` takes every known format, and DICOM folders: each counts as one
            volume, or, where it holds several series, as ``folder/identifier`` for each of them.

    Results of an earlier super-resolution are not taken, wherever they lie.

    Raises:
        InputError: when the path does not exist or holds no volume.
    """
    path = Path(str(path))  # the command line makes a number of a folder 2024
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        return [str(path)]
    if not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"{path}: no permission to read this folder")
    patterns = VOLUME_PATTERNS if pattern is None else [pattern] if isinstance(pattern, str) else pattern
    # a broken link is listed, and fails by its name later: data sets are often full of them
    visible = [f for f in path.rglob("*") if (f.is_file() or (f.is_symlink() and not f.exists())) and not f.name.startswith(".")]
    files = {str(f) for f in visible if any(f.match(p) for p in patterns) and not _is_result(f)}
    if pattern is None:
        for folder in {f.parent for f in visible if is_dicom(f)}:
            series = find_series(folder)
            files |= {str(folder / identifier) for identifier in series} if len(series) > 1 else {str(folder)}
    if not files:
        raise InputError(f"{path}: holds no volume ({', '.join(patterns)}{', DICOM' if pattern is None else ''})")
    return sorted(files)


def _is_result(file: Path) -> bool:
    """Whether a file was written by :class:`bundle.transforms.SaveVolumed`."""
    if not file.name.endswith("_sr.nii.gz"):
        return False
    try:
        with gzip.open(file) as stream:
            return RESULT_MARK.encode() in stream.read(348)
    except (OSError, EOFError, zlib.error):
        return False


def split_subjects(volumes: Sequence[str], split: Sequence[float], part: str) -> list[dict[str, str]]:
    """The subjects (one volume each) of one part of the data, in the order given.

    Args:
        volumes: file names.
        split: training, validation and test subjects: numbers of subjects, or fractions that add up to 1.
        part: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        ``[{"image": volume}, ...]``

    Raises:
        InputError: when there are fewer volumes than the split needs, or a part would be empty.
    """
    parts = ("train", "validation", "test")
    if part not in parts or len(split) != 3 or min(split) < 0:
        raise ValueError(f"one of {parts} and three numbers expected, got {part!r} and {split}")
    if all(float(n).is_integer() for n in split):
        counts = [int(n) for n in split]
    elif not math.isclose(sum(split), 1):
        raise ValueError(f"split must be numbers of subjects, or fractions that add up to 1, got {list(split)}")
    else:
        validation, test = (max(1, round(len(volumes) * fraction)) for fraction in split[1:])
        counts = [len(volumes) - validation - test, validation, test]
    if min(counts) < 1 or sum(counts) > len(volumes):
        raise InputError(f"split {list(split)} needs {max(sum(counts), 3)} volumes or more, found {len(volumes)}")
    start = sum(counts[: parts.index(part)])
    return [{"image": str(v)} for v in volumes[start : start + counts[parts.index(part)]]]
