"""Names of results, what was done before, and files that are never half-written."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .arguments import paths
from .errors import InputError
from .headers import companions, file_format, strip_extension

__all__ = ["fingerprint", "is_done", "namesakes", "result_path", "results_root", "sha256", "write_json", "write_whole"]

RESULT_MARK = "super-resolved by brain_mri_super_resolution"  # in the header of every result: never an input again


def results_root(dataset_dir: Any, volumes: Sequence[str]) -> str:
    """The part of the volumes' paths that their results do not repeat: ``dataset_dir``, or the folder of the one volume that it is; of
    several paths what they share, of a pattern what stands before the first wildcard.

    Args:
        dataset_dir: what :func:`bundle.subjects.find_volumes` searched.
        volumes: what it found.
    """
    given, taken = paths(dataset_dir), set(map(os.path.abspath, volumes))
    single = os.path.abspath(given[0])
    if len(given) > 1:
        return os.path.commonpath([os.path.dirname(p) if p in taken or not os.path.isdir(p) else p for p in map(os.path.abspath, given)])
    if not os.path.lexists(single) and glob.has_magic(single):  # what stands before the first wildcard
        parts = Path(single).parts
        return str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1])))
    return os.path.dirname(single) if single in taken else single


def result_path(volume: str, output_dir: str | Path, root: str, ending: str) -> Path:
    """Where a result goes: ``output_dir``, the volume's path below ``root`` without its extension, ``ending``.

    Example:
        >>> str(result_path("/in/site/sub-01.nii.gz", "out", "/in", "_sr.nii.gz"))
        'out/site/sub-01_sr.nii.gz'
    """
    path = Path(os.path.abspath(volume))
    name = path.name
    # a DICOM folder, and a series in one, may be named after a UID, full of dots
    if file_format(path) and not path.is_dir():
        name = strip_extension(name)
    elif path.is_file():
        name = name.removesuffix(path.suffix)
    return Path(output_dir) / path.relative_to(os.path.abspath(root)).parent / (name + ending)


def namesakes(volumes: Sequence[str], root: str) -> dict[str, str]:
    """Volumes whose results would have one name (``t1.nii.gz`` beside a DICOM folder ``t1``), each with another of them."""
    of_name: dict[Path, list[str]] = {}
    for volume in volumes:
        of_name.setdefault(result_path(volume, "", root, ""), []).append(volume)
    return {v: same[i - 1] for same in of_name.values() if len(same) > 1 for i, v in enumerate(same)}


def fingerprint(volume: str) -> dict[str, int]:
    """Files, bytes and time of the last change (ns) of a volume: a file and its companions, a DICOM folder or a series in one."""
    path = Path(volume)
    folder = path if path.is_dir() else path.parent
    whole_folder = path.is_dir() or not path.exists()
    stats = [f.stat() for f in (folder.iterdir() if whole_folder else (path, *companions(path))) if f.is_file()]
    return {"files": len(stats), "bytes": sum(s.st_size for s in stats), "modified": max((s.st_mtime_ns for s in stats), default=0)}


def is_done(volume: str, output_dir: str | Path, root: str, made_with: dict, endings: Sequence[str] = ("_sr.nii.gz",)) -> bool:
    """Whether the result of a volume stands complete, from the same input and made with the same settings.

    Args:
        volume, output_dir, root: as of :func:`result_path`.
        made_with: the settings, as they are kept in the report beside the result.
        endings: of the files that it consists of, beside that report.
    """
    report = result_path(volume, output_dir, root, "_sr.json")  # written last
    if not all(result_path(volume, output_dir, root, ending).is_file() for ending in ("_sr.json", *endings)):
        return False
    try:
        done = json.loads(report.read_text(encoding="utf-8"))
        return done["made_with"] == made_with and done["input"] == fingerprint(volume)
    except (OSError, ValueError, KeyError, TypeError):  # not a report of ours: make a new one
        return False


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file for people, as :func:`write_whole` does."""
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and move the result to ``path``: whoever looks finds a complete file or none.

    The content is on the disk before the name is, so that not even a power cut leaves half a file under it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")  # keeps the extension, which decides about the format
    try:
        write(part)
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
    for left in path.parent.glob(f".part-*-{glob.escape(path.name)}"):  # by a process that was killed
        left.unlink(missing_ok=True)


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
