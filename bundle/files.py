"""Names of results, and files that are never half-written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import InputError

__all__ = ["common_folder", "result_path", "write_whole"]


def common_folder(volumes: Sequence[str]) -> str:
    """Deepest folder that holds all volumes (files or DICOM folders).

    Raises:
        InputError: when the results of two volumes below it would have the same name (``t1.nii.gz`` beside a folder ``t1``).
    """
    root = os.path.commonpath([os.path.dirname(os.path.abspath(v)) for v in volumes])
    seen: dict[Path, str] = {}
    for volume in volumes:
        other = seen.setdefault(result_path(volume, "", root, ""), volume)
        if other != volume:
            raise InputError(f"{other} and {volume}: their results would have the same name")
    return root


def result_path(volume: str, output_dir: str, root: str, ending: str) -> Path:
    """Where a result goes: ``output_dir``, the volume's path below ``root`` without its extension, ``ending``.

    Example:
        >>> str(result_path("/in/site/sub-01.nii.gz", "out", "/in", "_sr.nii.gz"))
        'out/site/sub-01_sr.nii.gz'
    """
    path = Path(os.path.abspath(volume))
    name = path.name
    for extension in ("" if path.is_dir() else path.suffix, ".nii", ".img"):
        name = name.removesuffix(extension)  # a DICOM folder may be named after a UID, full of dots
    return Path(output_dir) / path.relative_to(os.path.abspath(root)).parent / (name + ending)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and move the result to ``path``: whoever looks finds a complete file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")  # keeps the extension, which decides about the format
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
