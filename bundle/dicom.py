"""DICOM folders: the series in them, and whether the slices of a series make up a volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import itk
import numpy as np
import pydicom

from .errors import InputError

__all__ = ["check_slices", "find_series", "is_dicom", "modality"]

TOLERANCE = 0.05  # of the slice distance: how far a slice may lie from its place on an even grid


class Slice(NamedTuple):
    """What a file, or a frame of one, says of its place. Empty lists stand for what it does not say."""

    name: str
    position: list[float]
    orientation: list[float]  # of a row and a column
    spacing: list[float]  # of the pixels, in mm


def find_series(folder: str | Path) -> dict[str, list[str]]:
    """Series in a folder, without its subfolders: identifier to files, in the order of their positions.

    The identifier is the SeriesInstanceUID with a suffix that tells apart images of different orientation, size or date under one UID;
    the same one selects a series in :class:`monai.data.ITKReader`.
    """
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")  # series date; as MONAI's reader does
    names.SetDirectory(str(folder))
    return {identifier: list(names.GetFileNames(identifier)) for identifier in names.GetSeriesUIDs()}


def is_dicom(file: Path) -> bool:
    """Whether a file is a slice, or several, in DICOM."""
    if file.name.upper() == "DICOMDIR" or file.suffix.lower() not in ("", ".dcm", ".ima"):  # an index is no slice
        return False
    try:
        with file.open("rb") as stream:
            stream.seek(128)
            return stream.read(4) == b"DICM"
    except OSError:  # no permission to read it
        return False


def modality(file: str | Path) -> str:
    """Modality (0008,0060) of a DICOM file; empty where it says none."""
    return str(pydicom.dcmread(file, stop_before_pixels=True).get("Modality", ""))


def check_slices(series: str, files: Sequence[str]) -> None:
    """Refuse a series whose slices do not lie one above the other at equal distances: readers would silently stretch the gap away.

    Args:
        series: name for messages.
        files: of the slices, one plane each; or one file with all as its frames.

    Raises:
        InputError: naming the slices between which one is missing, those at one position, or what else is wrong.
    """
    slices = [slice_ for file in files for slice_ in _slices(file)]
    if len(slices) < 2:
        return
    if len(slices) > len(files) > 1:
        raise InputError(f"{series}: {len(files)} files of several frames each; one is expected")
    for slice_ in slices:
        if len(slice_.position) != 3 or len(slice_.orientation) != 6:
            raise InputError(f"{series}: {slice_.name} does not say where its slice lies")
        if len(slice_.spacing) != len(slices[0].spacing) or not np.allclose(slice_.spacing, slices[0].spacing, rtol=1e-3):
            raise InputError(f"{series}: {slice_.name} has pixels of {slice_.spacing} mm, {slices[0].name} of {slices[0].spacing} mm")
    positions = [slice_.position for slice_ in slices]
    row, column = np.reshape(slices[0].orientation, (2, 3))
    normal = np.cross(row, column)
    along = np.asarray(positions) @ normal
    order = np.argsort(along, kind="stable")
    places, names = along[order], [slices[i].name for i in order]
    distances = np.diff(places)
    distance = float(np.median(distances))
    nearest, widest = int(distances.argmin()), int(distances.argmax())
    if distances[nearest] <= max(TOLERANCE * distance, 1e-3):
        pair = f"{names[nearest]} and {names[nearest + 1]}"
        raise InputError(f"{series}: {pair} lie at the same position (a duplicate, or a series over time)")
    if distances[widest] > 1.5 * distance:
        i = widest
        raise InputError(
            f"{series}: slices are missing between {names[i]} and {names[i + 1]}, which lie {distances[i]:.4g} mm apart "
            f"(the others {distance:.4g} mm)"
        )
    if len(files) == 1 and not (np.diff(along) > 0).all() and not (np.diff(along) < 0).all():
        raise InputError(f"{series}: the frames of {Path(files[0]).name} are not in the order of their positions")
    even = np.linspace(places[0], places[-1], len(places))
    if np.abs(places - even).max() > TOLERANCE * distance:
        raise InputError(f"{series}: slices lie at uneven distances, {distances.min():.4g} to {distances.max():.4g} mm")
    shifts = np.asarray(positions)[order] @ np.stack([row, column], 1)
    if np.abs(shifts - shifts[0]).max() > TOLERANCE * distance:
        raise InputError(f"{series}: slices are not stacked at right angles (a tilted gantry), by {np.ptp(shifts, 0).max():.4g} mm")


def _slices(file: str | Path) -> list[Slice]:
    """The slice of a file, or all that are in it: enhanced DICOM keeps what they share apart from what each has of its own."""
    header = pydicom.dcmread(file, stop_before_pixels=True)
    name = Path(file).name
    if int(header.get("NumberOfFrames") or 1) == 1:
        return [Slice(name, *(_numbers(header, key) for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")))]
    elements = {
        "PlanePositionSequence": "ImagePositionPatient",
        "PlaneOrientationSequence": "ImageOrientationPatient",
        "PixelMeasuresSequence": "PixelSpacing",
    }
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    frames = header.get("PerFrameFunctionalGroupsSequence") or [pydicom.Dataset()] * int(header.NumberOfFrames)
    slices = []
    for number, frame in enumerate(frames, 1):
        groups = [(frame.get(group) or shared[0].get(group) or [pydicom.Dataset()])[0] for group in elements]
        slices.append(Slice(f"frame {number} of {name}", *map(_numbers, groups, elements.values())))
    return slices


def _numbers(dataset: pydicom.Dataset, key: str) -> list[float]:
    return [float(number) for number in dataset.get(key) or []]
