"""DICOM folders: the series in them, and whether the slices of a series make up a volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import itk
import numpy as np

from .errors import InputError

__all__ = ["check_slices", "find_series", "modality"]

TAGS = {"modality": "0008|0060", "position": "0020|0032", "orientation": "0020|0037"}
TOLERANCE = 0.05  # of the slice distance: how far a slice may lie from its place on an even grid


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


def modality(file: str | Path) -> str:
    """Modality (0008,0060) of a DICOM file; empty where it says none."""
    return _header(file)["modality"]


def check_slices(series: str, files: Sequence[str]) -> None:
    """Refuse a series whose slices do not lie one above the other at equal distances: readers would silently stretch the gap away.

    Args:
        series: name for messages.
        files: of the slices, one plane each. A single file may hold a whole volume.

    Raises:
        InputError: naming the slices between which one is missing, those at one position, or what else is wrong.
    """
    if len(files) < 2:
        return
    positions, orientations = [], []
    for file in files:
        header = _header(file)
        position, orientation = (_numbers(header[name]) for name in ("position", "orientation"))
        if len(position) != 3 or len(orientation) != 6:
            raise InputError(f"{series}: {Path(file).name} does not say where its slice lies")
        positions.append(position)
        orientations.append(orientation)
    row, column = np.reshape(orientations[0], (2, 3))
    normal = np.cross(row, column)
    along = np.asarray(positions) @ normal
    order = np.argsort(along, kind="stable")
    places, names = along[order], [Path(files[i]).name for i in order]
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
    even = np.linspace(places[0], places[-1], len(places))
    if np.abs(places - even).max() > TOLERANCE * distance:
        raise InputError(f"{series}: slices lie at uneven distances, {distances.min():.4g} to {distances.max():.4g} mm")
    shifts = np.asarray(positions)[order] @ np.stack([row, column], 1)
    if np.abs(shifts - shifts[0]).max() > TOLERANCE * distance:
        raise InputError(f"{series}: slices are not stacked at right angles (a tilted gantry), by {np.ptp(shifts, 0).max():.4g} mm")


def _header(file: str | Path) -> dict[str, str]:
    """The few tags that are needed, as text; empty where the file has none."""
    image_io = itk.GDCMImageIO.New()
    image_io.SetFileName(str(file))
    image_io.ReadImageInformation()
    header = image_io.GetMetaDataDictionary()  # lives as long as its reader
    return {name: str(header[tag]).strip() if header.HasKey(tag) else "" for name, tag in TAGS.items()}


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split("\\")] if text else []
