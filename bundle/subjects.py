"""From paths to volumes, and from volumes to subjects and splits."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .arguments import paths
from .dicom import Slice, find_dicom, find_series, is_dicom, passed_over, volumes_in
from .dicom_volume import are_copies, make_one_stack
from .errors import InputError
from .headers import RESULT_MARK, file_format, image_of, misnamed, start_of
from .recognition import looks_like

__all__ = ["by_subject", "find_volumes", "split_subjects"]

logger = logging.getLogger(__name__)

SUBJECT = r"(?:^|[/\\_])(sub-[0-9A-Za-z]+)"  # BIDS
# formats and archives that may hold scans but are not read
OTHER_IMAGES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
    ".mnc",
    ".par",
    ".rec",
    ".bz2",
)


DICOM = (".dcm", ".dicom", ".ima")
OURS = "(_s[rd]|_desc-[0-9A-Za-z]*s[rd]_[0-9A-Za-z]+)"  # how names of results end
NOT_RAW = ("derivatives", "sourcedata")  # of a BIDS data set


class Volumes(list[str]):
    """Paths of volumes; ``passed_over`` holds one line, with the reason, for each file that was skipped."""

    passed_over: Sequence[str] = ()


def find_volumes(path: Any, pattern: str | Sequence[str] | None = None) -> Volumes:
    """Volumes at or below a path, sorted by name.

    Args:
        path: a file, a folder, a pattern (``"scans/*.nii.gz"``), or a list of them. A folder is searched with its subfolders; links to
            folders are followed, hidden folders are not. A folder of DICOM slices counts as one volume, or, if it holds several series, as
            ``folder/identifier`` for each of them; such a path names that volume alone.
        pattern: file name patterns (``"*_t1ce.nii.gz"``). They replace the choice by format and content.

    A file that is given by its own name is always used. In folders, label maps, series, colour images and phase maps are skipped, and so
    are results of earlier runs, second names of one file and copies of a DICOM series. The log lists skipped files with the reason.

    Raises:
        InputError: if a path does not exist, or no volume is found.
    """
    given = paths(path)
    found: dict[str, str] = {}  # real path: path
    passed: list[str] = []
    series: dict[str, dict[str, str]] = {}
    slices: Counter[str] = Counter()
    for one in given:
        for volume in _at(one, pattern, passed):
            identity = _identity(volume, series)
            first = found.setdefault(identity, volume)
            if first == volume:
                continue
            if os.path.isfile(identity):
                kind = "file" if os.path.samefile(first, volume) else "volume"
                passed.append(f"{volume}: the same {kind} as {first}")
            elif identity == os.path.realpath(volume):
                passed.append(f"{volume}: the same series as {first}")
            else:
                slices[first] += 1
    passed += [f"{number} more slices of the series of {volume}" for volume, number in slices.items()]
    for line in passed:
        logger.warning("skipped: %s", line)
    if not found:
        formats = "NIfTI, Analyze, FreeSurfer, MetaImage, NRRD, DICOM" if pattern is None else ", ".join(_patterns(pattern))
        but = f"; {len(passed)} files skipped, the first: {passed[0]}" if passed else ""
        raise InputError(f"{', '.join(given)}: holds no volume ({formats}){but}")
    if passed:
        logger.warning("%d volumes to do, %d files skipped", len(found), len(passed))
    volumes = Volumes(sorted(found.values()))
    volumes.passed_over = passed
    return volumes


def _identity(volume: str, series: dict[str, dict[str, str]]) -> str:
    """Path of a file, of the ``.img`` of a ``.hdr``, or of the DICOM volume to which a file belongs as a slice.

    Args:
        volume: path.
        series: a cache: the slices in each folder seen so far, with their volumes.
    """
    real = os.path.realpath(image_of(volume) or volume)
    if not os.path.isfile(real) or file_format(real) or not is_dicom(real):
        return real
    folder = os.path.dirname(real)
    if folder not in series:
        volumes = find_series(folder)
        names = {identifier: folder if len(volumes) == 1 else os.path.join(folder, identifier) for identifier in volumes}
        series[folder] = {file: names[identifier] for identifier, files in volumes.items() for file in files}
    return series[folder].get(real, real)


def _patterns(pattern: str | Sequence[str]) -> Sequence[str]:
    return [pattern] if isinstance(pattern, str) else pattern


def _at(text: str, pattern: str | Sequence[str] | None, passed: list[str]) -> list[str]:
    path = Path(text)
    if not os.path.lexists(path):
        if path.parent.is_dir() and not glob.has_magic(path.name) and path.name in volumes_in(path.parent)[0]:
            return [str(path)]  # folder/identifier
        matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
        if not matches:
            why = "no file has a name like this" if glob.has_magic(text) else "no such file or folder"
            raise InputError(f"{text}: {why}")
        files = [Path(m) for m in matches if not os.path.isdir(m)]
        inside = [volume for m in matches if os.path.isdir(m) for volume in _below(Path(m), pattern, passed)]
        slices = [f for f in files if not file_format(f) and is_dicom(f)] if pattern is None else []
        return _scans([f for f in files if f not in slices], pattern, passed) + [str(f) for f in slices] + inside
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{path}: no such file or folder")
    return _below(path, pattern, passed) if path.is_dir() else [str(path)]


def _below(top: Path, pattern: str | Sequence[str] | None, passed: list[str]) -> list[str]:
    if not os.access(top, os.R_OK | os.X_OK):
        raise InputError(f"{top}: no permission to read this folder")
    volumes: list[str] = []
    series: dict[str, list[tuple[str, list[Slice]]]] = {}
    for folder, files in _folders(top, passed, () if pattern else NOT_RAW):
        slices = [f for f in files if not file_format(f) and is_dicom(f)] if pattern is None else []
        volumes += _scans([f for f in files if f not in slices], pattern, passed)
        if slices:
            found = find_dicom(folder, results=folder == top)
            volumes += found
            for name, its_slices in volumes_in(folder)[0].items():
                path = next((p for p in (str(folder), str(folder / name)) if p in found), "")
                series.setdefault(name, []).extend([(path, its_slices)] * bool(path))
            others = passed_over(folder)
            passed += [f"{folder}: {others}"] if others else []
    for places in series.values():
        parts: list[tuple[str, list[Slice]]] = []
        # a copy has fewer slices, or the longer name
        for path, its_slices in sorted(places, key=lambda place: (-len(place[1]), len(Path(place[0]).name), place[0])):
            original = next((other for other, slices_there in parts if are_copies(its_slices, slices_there)), None)
            if original is None:
                parts.append((path, its_slices))
            else:
                passed.append(f"{path}: a copy of slices in {original}")
                volumes.remove(path)
        if len(parts) > 1 and make_one_stack([slices for _, slices in parts]):
            passed.append(f"{', '.join(path for path, _ in parts)}: hold parts of one series; put them into one folder")
            volumes = [v for v in volumes if v not in [path for path, _ in parts]]
    return volumes


def _folders(top: Path, passed: list[str], not_raw: Sequence[str]) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and its subfolders with their files: each real folder once, without hidden ones and those of a BIDS data set that are
    named in ``not_raw``."""
    seen: set[Path] = set()
    folders, links = [top], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen or (folder != top and top.resolve().is_relative_to(real)):  # a second link, or a circle
            passed.append(f"{folder}: a link to a folder that is searched already")
            continue
        seen.add(real)
        try:
            entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as e:
            passed.append(f"{folder}: {e.strerror}")
            continue
        bids = any(e.name == "dataset_description.json" for e in entries)
        for entry in entries:
            if bids and entry.name in not_raw:
                passed.append(f"{entry.path}: not searched with the rest of a BIDS data set; give it by itself")
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry.path))
        # list broken links, which are common in data sets, so that loading reports them
        files = [e for e in entries if e.is_file() or (e.is_symlink() and not os.path.exists(e.path))]
        yield folder, [Path(e.path) for e in sorted(files, key=lambda e: (e.is_symlink(), e.name))]


def _scans(files: list[Path], pattern: str | Sequence[str] | None, passed: list[str]) -> list[str]:
    """The volumes among some files. Other image files are added to ``passed`` with the reason why they are skipped."""
    scans = []
    present = set(files)
    others: Counter[str] = Counter()
    for file in files:
        if file.name.startswith("."):
            continue
        broken = file.is_symlink() and not file.exists()
        if pattern is not None:
            if any(file.match(p) for p in _patterns(pattern)) and not _is_result(file):
                scans.append(str(file))
            continue
        if image_of(file) in present:  # the volume is listed by that name
            continue
        if file_format(file) and not _is_result(file):
            why = "" if broken else looks_like(file)
            if why:
                passed.append(f"{file}: {why}")
            else:
                scans.append(str(file))
        elif file_format(file):
            others["results of earlier runs"] += 1
        elif broken:
            passed.append(f"{file}: a link to {file.readlink()}, which does not exist")
        elif file.suffix.lower() in OTHER_IMAGES and not re.search(OURS + r"\.png$", file.name):
            passed.append(f"{file}: {file.suffix} files are not read")
        elif misnamed(file):
            passed.append(f"{file}: {misnamed(file)}")
        elif file.suffix.lower() in DICOM:
            passed.append(f"{file}: is no DICOM, whatever its name says")
        else:
            others[file.suffix or "no extension"] += 1
    if others:
        text = ", ".join(f"{number} x {what}" for what, number in sorted(others.items()))
        logger.info("%s: other files, not read: %s", files[0].parent, text)
    return scans


def _is_result(file: Path) -> bool:
    """Whether a file was written by :class:`bundle.results.SaveVolumed`; one with another name is not opened."""
    return bool(re.search(OURS + r"\.nii\.gz$", file.name)) and RESULT_MARK.encode() in start_of(file)


def split_subjects(volumes: Sequence[str], split: Sequence[float], part: str, subject_pattern: str | None = None) -> list[dict[str, str]]:
    """Volumes of the training, validation or test subjects, in input order. All volumes of one subject are in one part.

    Args:
        volumes: file names.
        split: training, validation and test subjects: numbers of subjects, or fractions that add up to 1.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        subject_pattern: regular expression that finds the subject in a path: its first group, or the whole match. ``None`` uses BIDS
            names (``sub-01``). A volume whose path does not match is a subject of its own.

    Returns:
        ``[{"image": volume}, ...]``

    Raises:
        InputError: if there are fewer subjects than the split needs, or a part would be empty.
    """
    parts = ("train", "validation", "test")
    if part not in parts:
        raise ValueError(f"part must be one of {parts}, got {part!r}")
    if not isinstance(split, Sequence) or len(split) != 3 or not all(type(n) in (int, float) and n >= 0 for n in split):
        raise InputError(f"split must be three numbers of subjects, or three fractions that add up to 1, got {split!r}")
    subjects = by_subject(volumes, subject_pattern)
    if all(float(n).is_integer() for n in split):
        counts = [int(n) for n in split]
    elif not math.isclose(sum(split), 1):
        raise InputError(f"split must be three numbers of subjects, or three fractions that add up to 1, got {list(split)}")
    else:
        validation, test = (max(1, round(len(subjects) * fraction)) for fraction in split[1:])
        counts = [len(subjects) - validation - test, validation, test]
    if min(counts) < 1 or sum(counts) > len(subjects):
        of = "" if len(subjects) == len(volumes) else f" ({len(volumes)} volumes)"
        raise InputError(f"split {list(split)} needs {max(sum(counts), 3)} subjects or more, found {len(subjects)}{of}")
    start = sum(counts[: parts.index(part)])
    chosen = subjects[start : start + counts[parts.index(part)]]
    return [{"image": volume} for subject in chosen for volume in subject]


def by_subject(volumes: Sequence[str], pattern: str | None = None) -> list[list[str]]:
    """Volumes of each subject, in the order of their first ones, see :func:`split_subjects`. The common start of all paths is ignored."""
    pattern = pattern or SUBJECT
    try:
        expression = re.compile(pattern)
    except re.error as e:
        raise InputError(f"subject_pattern {pattern!r}: not a regular expression ({e})") from e
    names = [str(v) for v in volumes]
    shared = len(os.path.commonpath([os.path.dirname(n) for n in names])) if names else 0
    subjects: dict[str, list[str]] = {}
    for name in names:
        matches = list(expression.finditer(name[shared:]))
        # the last match: the file name overrides folder names
        key = "subject " + matches[-1][matches[-1].re.groups and 1] if matches else name
        subjects.setdefault(key, []).append(name)
    return list(subjects.values())
