"""From the slices of a DICOM series to a volume with its affine and facts from its header."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import itk
import numpy as np
import pydicom
import torch
from monai.data import MetaTensor
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from .dicom import Slice, in_order, passed_over, slices_of, volumes_in
from .errors import InputError

__all__ = ["TO_RAS", "are_copies", "check_slices", "grid_of_series", "load_series", "make_one_stack", "write_file"]

TOLERANCE = 0.05  # of the slice distance: largest deviation of a slice from an even grid
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM coordinates increase to the left and to the back


def load_series(path: str | Path) -> MetaTensor:
    """The volume of a DICOM folder, of a series in one (``folder/identifier``), or of the series to which a file belongs.

    Args:
        path: folder, ``folder/identifier`` (see :func:`bundle.dicom.find_series`), or file.

    Returns:
        (1, columns, rows, slices) in float32, with its affine (mm, RAS). ``meta`` holds ``"modality"``; ``"slice_thickness"`` (mm, if
        known); ``"slice_spacing"``, the distance between slice centres (mm); ``"remarks"``, anything unusual, one line each; and
        ``"dicom_slices"``, a JSON list of the file and frame of each slice.

    Raises:
        InputError: with the reason: no such series, several series, slices that do not form a volume, unreadable pixels.
    """
    source = Path(path)
    found, remarks = _chosen(source)
    slices, copies = _without_copies(found)
    if copies:
        files = list(dict.fromkeys(Path(copy.file).name for copy, _ in copies))
        remarks.append(f"{len(files)} copies of slices are left out ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''})")
    planes = _Planes(str(source))
    slices, twins = _without_twins(slices, planes)
    if twins:
        names = ", ".join(s.name for s in twins[:3]) + (", ..." if len(twins) > 3 else "")
        remarks.append(f"{len(twins)} slices stored again under another UID are left out ({names})")
    affine, distance = check_slices(str(source), slices)
    volume = np.empty((len(slices), *slices[0].size), np.float32)
    padding = np.zeros(volume.shape, bool)
    for n, slice_ in enumerate(slices):
        volume[n] = planes[slice_]
        if slice_.padding is not None:
            low, high = (np.float32(value * slice_.slope + slice_.intercept) for value in sorted(slice_.padding, reverse=slice_.slope < 0))
            padding[n] = (volume[n] >= low) & (volume[n] <= high)
    for copy, original in copies:
        if not np.array_equal(planes[copy], planes[original]):
            raise InputError(f"{source}: {copy.name} and {original.name} have one SOPInstanceUID and place, but different pixels")
    if slices[0].inverted:
        volume = volume.max(where=~padding, initial=-np.inf) - volume
        remarks.append("MONOCHROME1, the smallest value is white: the intensities are inverted (largest minus value)")
    remarks += _fill_padding(volume, padding)
    remarks += _remarks(slices, distance)
    meta = {
        "modality": slices[0].modality,
        "slice_spacing": distance,
        "original_affine": torch.as_tensor(affine),
        "remarks": "\n".join(remarks),
        "dicom_slices": json.dumps([[s.file, s.frame] for s in slices]),
    }
    if slices[0].thickness:
        meta["slice_thickness"] = float(np.median([s.thickness or slices[0].thickness for s in slices]))
    array = torch.from_numpy(np.ascontiguousarray(volume.transpose(2, 1, 0)))[None]
    return MetaTensor(array, affine=torch.as_tensor(affine), meta=meta)


def _fill_padding(volume: np.ndarray, padding: np.ndarray) -> list[str]:
    """Replace padding that is far from all other values by the smallest of these, in place; returns remarks."""
    if not padding.any() or padding.all():
        return []
    low, high = volume.min(where=~padding, initial=np.inf), volume.max(where=~padding, initial=-np.inf)
    margin = 0.1 * (high - low)
    if low - margin <= volume[padding].min() and volume[padding].max() <= high + margin:
        return []
    volume[padding] = low
    return [f"{padding.mean():.1%} of the voxels are padding by the header: they become {low:g}"]


def grid_of_series(path: str | Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Columns, rows and slices of the volume that :func:`load_series` would return, and its affine (mm, RAS). Reads no pixels.

    Raises:
        InputError: like :func:`load_series`.
    """
    slices, _ = _without_copies(_chosen(Path(path))[0])
    rows, columns = slices[0].size
    return (columns, rows, len(slices)), check_slices(str(path), slices)[0]


def check_slices(series: str, slices: Sequence[Slice]) -> tuple[np.ndarray, float]:
    """Refuse slices that are not stacked at equal distances; readers would silently close gaps.

    Args:
        series: name for messages.
        slices: in the order of their positions.

    Returns:
        affine from (column, row, slice) to RAS in mm, and the distance between slices in mm.

    Raises:
        InputError: with the reason and the slices concerned, such as those between which one is missing.
    """
    first = slices[0]
    for slice_ in slices:
        if slice_.problem:
            raise InputError(f"{series}: {slice_.name} is {slice_.problem}")
        if len(slice_.position) != 3 or len(slice_.orientation) != 6:
            raise InputError(f"{series}: {slice_.name} does not say where its slice lies")
        if len(slice_.spacing) != 2 or min(slice_.spacing) <= 0:
            raise InputError(f"{series}: {slice_.name} does not say the size of its pixels")
        if not np.allclose(slice_.spacing, first.spacing, rtol=1e-3):
            raise InputError(f"{series}: {slice_.name} has pixels of {slice_.spacing} mm, {first.name} of {first.spacing} mm")
        if slice_.inverted != first.inverted:
            raise InputError(f"{series}: one of {slice_.name} and {first.name} is MONOCHROME1, the other MONOCHROME2")
    row, column = np.mean([s.orientation for s in slices], 0).reshape(2, 3)
    row = row / np.linalg.norm(row)
    column = column / np.linalg.norm(column)
    if abs(row @ column) > 0.01:
        raise InputError(f"{series}: rows and columns are not at right angles ({first.orientation})")
    column = column - (row @ column) * row
    normal = np.cross(row, column / np.linalg.norm(column))
    positions = np.asarray([s.position for s in slices])
    distance = _even_distance(series, slices, positions, normal, np.stack([row, column], 1))
    to_lps = np.eye(4)
    to_lps[:3, 0], to_lps[:3, 1] = row * first.spacing[1], column / np.linalg.norm(column) * first.spacing[0]
    to_lps[:3, 2], to_lps[:3, 3] = normal * distance, positions[0]
    return TO_RAS @ to_lps, distance


def make_one_stack(parts: Sequence[Sequence[Slice]]) -> bool:
    """Whether slices of one series from several folders form one volume together. Copies do not."""
    slices = in_order([slice_ for part in parts for slice_ in part])
    if len({(s.size, s.component, tuple(np.round(s.orientation, 2))) for s in slices}) > 1:
        return False
    try:
        check_slices("", slices)
    except InputError:
        return False
    return True


def are_copies(slices: Sequence[Slice], originals: Sequence[Slice]) -> bool:
    """Whether all slices of one folder are also in another: same SOPInstanceUID, position and pixels."""
    found = {_identity(slice_): slice_ for slice_ in originals if slice_.uid}
    pairs = [(slice_, found.get(_identity(slice_))) for slice_ in slices]
    planes, others = _Planes(""), _Planes("")  # one for each folder, because each remembers one file
    try:
        return all(other is not None and other.size == s.size for s, other in pairs) and all(
            np.array_equal(planes[s], others[other]) for s, other in pairs if other is not None
        )
    except InputError:  # unreadable pixels: loading reports them
        return False


def _even_distance(series: str, slices: Sequence[Slice], positions: np.ndarray, normal: np.ndarray, in_plane: np.ndarray) -> float:
    """Distance between slices along their normal, (3,), in mm; for a single slice, the distance in its header."""
    if len(slices) == 1:
        return _header_distance(slices[0]) or 1.0
    places, names = positions @ normal, [s.name for s in slices]
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
    shifts = positions @ in_plane
    if np.abs(shifts - shifts[0]).max() > TOLERANCE * distance:
        raise InputError(f"{series}: slices are not stacked at right angles (a tilted gantry), by {np.ptp(shifts, 0).max():.4g} mm")
    return float(places[-1] - places[0]) / (len(places) - 1)


def _chosen(source: Path) -> tuple[list[Slice], list[str]]:
    """The slices of the volume at a path, including copies, and remarks."""
    folder = source if source.is_dir() else source.parent
    if source.is_file() and not slices_of(source)[0]:
        raise InputError(f"{source}: no slice of a scan ({slices_of(source)[1]})")
    volumes = volumes_in(folder)[0]
    if source.is_file():
        volumes = {name: slices for name, slices in volumes.items() if any(s.file == str(source) for s in slices)}
        if len(volumes) > 1:
            names = ", ".join(str(folder / name) for name in volumes)
            raise InputError(f"{source}: holds {len(volumes)} volumes of different orientation or echo; name one of them: {names}")
        slices = next(iter(volumes.values()), slices_of(source)[0])  # none for a hidden file
        count = len({(s.uid or s.file, s.frame) for s in slices})
        whole = all(s.file == str(source) for s in slices) or count == 1
        return slices, [] if whole else [f"one of {count} slices: the whole series beside it is taken"]
    if source.is_dir() and len(volumes) > 1:
        first = min(volumes)
        raise InputError(f"{source}: holds {len(volumes)} DICOM series; name one of them: {source / first}, ...")
    if source.is_dir() and not volumes:
        raise InputError(f"{source}: holds no slices of a scan ({passed_over(source) or 'no DICOM file'})")
    identifier = next(iter(volumes)) if source.is_dir() else source.name
    if identifier not in volumes:
        raise InputError(f"{source}: no such file, folder or DICOM series")
    return volumes[identifier], []


def _without_copies(slices: Sequence[Slice]) -> tuple[list[Slice], list[tuple[Slice, Slice]]]:
    """Slices without copies, and the copies, each with its original."""
    kept: dict[tuple, Slice] = {}
    copies = []
    for slice_ in slices:
        key = _identity(slice_)
        if key in kept:
            copies.append((slice_, kept[key]))
        kept.setdefault(key, slice_)
    return list(kept.values()), copies


def _identity(slice_: Slice) -> tuple:
    """What a slice shares with its copies only."""
    return (slice_.uid or slice_.file, slice_.frame, *slice_.position)


def _without_twins(slices: Sequence[Slice], planes: _Planes) -> tuple[list[Slice], list[Slice]]:
    """Slices without repetitions, and the repetitions: slices with the position and the pixels of the one before, but another UID."""
    kept, twins = list(slices[:1]), list[Slice]()
    for slice_ in slices[1:]:
        before, single = kept[-1], slice_.frame is None and len(slice_.position) == 3
        same_place = single and len(before.position) == 3 and np.allclose(slice_.position, before.position, rtol=0, atol=1e-3)
        (twins if same_place and np.array_equal(planes[slice_], planes[before]) else kept).append(slice_)
    return kept, twins


def _header_distance(slice_: Slice) -> float | None:
    """Slice distance from the header: the larger of two values, because some scanners write the gap as the distance."""
    values = [value for value in (slice_.distance, slice_.thickness) if value]
    return max(values) if values else None


def _remarks(slices: Sequence[Slice], distance: float) -> list[str]:
    first, remarks = slices[0], []
    if first.tiles:
        remarks.append(f"a Siemens mosaic, unfolded to {first.tiles} slices")
    if first.component != "magnitude":
        remarks.append(f"by its header a {first.component} image; the network knows magnitudes")
    if len(slices) == 1:
        text = f"{distance:.4g} mm thick by its header" if _header_distance(first) else "of unknown thickness, taken as 1 mm"
        return [*remarks, f"a single slice, {text}"]
    if first.distance and (not first.thickness or first.distance >= 0.99 * first.thickness) and distance > 1.5 * first.distance:
        remarks.append(f"slices lie {distance:.4g} mm apart, {first.distance:.4g} mm by the header: some may be missing")
    elif first.thickness and abs(distance - first.thickness) > TOLERANCE * distance:
        gap = distance - first.thickness
        remarks.append(
            f"slices {first.thickness:.4g} mm thick lie {distance:.4g} mm apart: "
            + (f"a gap of {gap:.4g} mm" if gap > 0 else f"they overlap by {-gap:.4g} mm")
        )
    return remarks


def write_file(path: str | Path, dataset: pydicom.Dataset) -> None:
    """Write a dataset, little-endian with explicit VRs, or compressed if its file meta information says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values copied from another file that do not follow the standard
        if pydicom.__version_info__[0] == "2":  # the version that MONAI Label requires
            dataset.is_little_endian, dataset.is_implicit_VR = True, False
            pydicom.dcmwrite(path, dataset, write_like_original=False)
        else:
            pydicom.dcmwrite(path, dataset, enforce_file_format=True)


class _Planes:
    """Pixel values of slices, each (rows, columns). The last file is cached for its other frames."""

    def __init__(self, series: str) -> None:
        self.series, self.file, self.frames = series, "", np.empty(0)

    def __getitem__(self, slice_: Slice) -> np.ndarray:
        if slice_.file != self.file:
            try:
                self.frames, self.file = _stored(slice_.file), slice_.file
            except Exception as e:  # a decoder can fail in any way on damaged pixels
                lines = str(e).strip().splitlines() or [type(e).__name__]
                raise InputError(
                    f"{self.series}: the pixels of {Path(slice_.file).name} cannot be read ({lines[-1].split(' - ')[0]})"
                ) from e
        plane = self.frames[0 if slice_.tiles else slice_.frame or 0]
        if slice_.tiles:
            height, width = slice_.size
            row, column = divmod(slice_.frame or 0, plane.shape[1] // width)
            plane = plane[row * height : (row + 1) * height, column * width : (column + 1) * width]
        return plane.astype(np.float64) * slice_.slope + slice_.intercept


def _stored(file: str) -> np.ndarray:
    """Stored values of a file, (frames, rows, columns), read by pydicom or, if compressed by a JPEG method, by ITK's GDCM."""
    ds = pydicom.dcmread(file, force=True)
    meta = ds.file_meta
    if "TransferSyntaxUID" not in meta:  # no preamble
        implicit, little = getattr(ds, "original_encoding", (True, True))
        meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    compressed = meta.TransferSyntaxUID.is_compressed and not meta.TransferSyntaxUID.is_deflated
    if compressed and meta.TransferSyntaxUID != RLELossless:
        array = _decompressed(ds)
    else:
        array = ds.pixel_array
        allocated, stored = int(ds.get("BitsAllocated", 16)), int(ds.get("BitsStored", 16))
        if array.dtype.kind in "iu" and stored < allocated:  # other bits may hold an overlay
            array = (array << (allocated - 1 - int(ds.get("HighBit", stored - 1)))) >> (allocated - stored)
    return array.reshape(-1, *array.shape[-2:])


def _decompressed(ds: pydicom.Dataset) -> np.ndarray:
    """Stored values read by GDCM, from a copy without rescaling: ITK would apply that of the first frame to all, and round the result."""
    copy = pydicom.Dataset()
    for key in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PixelData"):
        copy[key] = ds[key]
    copy.PhotometricInterpretation = "MONOCHROME2"
    copy.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"  # multi-frame grayscale word secondary capture: no geometry is expected
    copy.SOPInstanceUID, copy.Modality = "1.2.3", "OT"
    count = int(ds.get("NumberOfFrames") or 1)
    copy.NumberOfFrames = count
    copy.file_meta = pydicom.dataset.FileMetaDataset()
    copy.file_meta.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pixels.dcm"
        write_file(path, copy)
        return itk.array_from_image(itk.imread(str(path), imageio=itk.GDCMImageIO.New()))
