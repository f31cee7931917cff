"""DICOM as scanners, archives and anonymisers leave it: catalogues of kinds, in the form of those of toy.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
import toy
from pydicom.dataset import Dataset
from pydicom.uid import GrayscaleSoftcopyPresentationStateStorage, SecondaryCaptureImageStorage, generate_uid
from toy import Stored

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def edit(change: Callable[[Dataset, int], object], folder: Path) -> Path:
    """Change every file of a series: ``change`` gets each and its number."""
    for number, path in enumerate(sorted(folder.iterdir())):
        ds = pydicom.dcmread(path)
        change(ds, number)
        ds.save_as(path)
    return folder


def series(folder: Path, change: Callable[[Dataset, int], object] | None = None, **arguments) -> Path:
    """A series of six slices, changed."""
    written = toy.write_dicom(folder, **arguments)
    return edit(change, written) if change else written


def rename(folder: Path, name: Callable[[Dataset, int], str]) -> Path:
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / name(pydicom.dcmread(path), number))
    return folder


def set_values(ds: Dataset, array: np.ndarray, slope: float = 1, intercept: float = 0) -> None:
    """Store (columns, rows) of values."""
    ds.RescaleSlope, ds.RescaleIntercept = f"{slope:g}", f"{intercept:g}"
    ds.PixelData = np.rint((array.T - intercept) / slope).astype("<i2").tobytes()


def without_preamble(folder: Path) -> Path:
    """Files as old programs write them: no preamble, no file meta information."""
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        del ds.file_meta
        ds.preamble = None
        pydicom.dcmwrite(path, ds, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    return folder


def jitter(ds: Dataset, number: int) -> None:
    """What varies from slice to slice without meaning anything."""
    ds.SliceThickness = ("2", "2.0", "1.9999")[number % 3]
    ds.SequenceName = f"*tfl3d1_{number % 2}"
    ds.SeriesDate, ds.ContentDate = ("20200101", "20200102")[number // 3], "20200102"
    ds.ImageOrientationPatient = [f"{v + 1e-6 * (number % 3):.9f}" for v in ds.ImageOrientationPatient]


def copies(folder: Path) -> Path:
    for path in list(folder.iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem} (1){path.suffix}"))
    return folder


def add_screenshot(folder: Path) -> Path:
    """A screenshot, a presentation state and the index of a disc beside the slices."""
    ds = pydicom.dcmread(min(folder.iterdir()))
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(ds, key)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.save_as(folder / "screenshot.dcm")
    for key in ("PixelData", "Rows", "Columns"):
        delattr(ds, key)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = GrayscaleSoftcopyPresentationStateStorage
    ds.Modality, ds.SeriesInstanceUID = "PR", generate_uid()
    ds.save_as(folder / "state.dcm")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    return folder


def enhance(folder: Path, frames: Sequence[int], slopes: Sequence[tuple[float, float]]) -> Path:
    """One file of several frames in any order, each with a slope and an intercept."""
    array = toy.head()
    edit(lambda ds, number: set_values(ds, array[..., number], *slopes[number]), folder)
    toy.enhance_dicom(folder, frames)
    ds = pydicom.dcmread(folder / "frames.dcm")
    for group, number in zip(ds.PerFrameFunctionalGroupsSequence, frames):
        values = Dataset()
        values.RescaleSlope, values.RescaleIntercept = (f"{v:g}" for v in slopes[number])
        group.PixelValueTransformationSequence = [values]
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.save_as(folder / "frames.dcm")
    return folder


def mosaic(folder: Path, tiles: int | None = 6, name: str = "mosaic.dcm") -> Path:
    """The six slices as tiles of one plane, three by three, with the position that one large slice would have."""
    files = sorted(folder.iterdir())
    slices = [pydicom.dcmread(path) for path in files]
    ds, array = slices[0], toy.head()
    plane = np.zeros((3 * 40, 3 * 36))
    for n in range(6):
        plane[n % 3 * 40 : n % 3 * 40 + 40, n // 3 * 36 : n // 3 * 36 + 36] = array[..., n]
    row, column = np.reshape([float(v) for v in ds.ImageOrientationPatient], (2, 3))
    corner = np.asarray(ds.ImagePositionPatient, float) - row * ds.PixelSpacing[1] * 40 - column * ds.PixelSpacing[0] * 36
    ds.ImagePositionPatient = [f"{v:.9g}" for v in corner]
    ds.Rows, ds.Columns, ds.ImageType = 108, 120, ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    ds.SpacingBetweenSlices = ds.SliceThickness
    if tiles:
        ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", tiles)
    set_values(ds, plane)
    for path in files:
        path.unlink()
    ds.save_as(folder / name)
    return folder


def mosaics_over_time(folder: Path) -> Path:
    mosaic(folder, name="first.dcm")
    ds = pydicom.dcmread(folder / "first.dcm")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.save_as(folder / "second.dcm")
    return folder


def localizer(folder: Path, orientations: Sequence[Sequence[int]] = (AXIAL, CORONAL, SAGITTAL)) -> Path:
    """Two slices of each orientation, under one SeriesInstanceUID."""

    def change(ds: Dataset, number: int) -> None:
        orientation = orientations[number // 2 % len(orientations)]
        normal = np.cross(*np.reshape(orientation, (2, 3)))
        ds.ImageOrientationPatient = list(orientation)
        ds.ImagePositionPatient = [float(v) for v in normal * 10 * (number % 2)]
        ds.SliceThickness = 8

    return series(folder, change)


def two_echoes(folder: Path, numbered: bool = True) -> Path:
    """Each position twice, the second echo at half the intensity."""
    array = toy.head()

    def first(ds: Dataset, number: int) -> None:
        ds.EchoTime = 20
        if numbered:
            ds.EchoNumbers = 1

    for path in sorted(series(folder, first).iterdir()):
        ds = pydicom.dcmread(path)
        ds.EchoTime = 80
        if numbered:
            ds.EchoNumbers = 2
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        set_values(ds, np.floor(array[..., ds.InstanceNumber - 1] / 2))
        ds.save_as(path.with_name(f"second {path.name}"))
    return folder


def _invert(ds: Dataset, number: int) -> None:
    ds.PhotometricInterpretation = "MONOCHROME1"
    set_values(ds, 4095 - toy.head()[..., number])


def _overlay(ds: Dataset, number: int) -> None:
    stored = np.frombuffer(ds.PixelData, "<u2") & 0x0FFF
    ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 12, 11
    ds.PixelData = (stored | (np.arange(stored.size, dtype=np.uint16) % 16 << 12)).astype("<u2").tobytes()


def _whole_then_fraction(ds: Dataset, number: int) -> None:
    ds.RescaleSlope, ds.RescaleIntercept = 1 + number / 8, 0


def _odd(write: Callable[[Path], Path], array: np.ndarray | None = None) -> Callable[[Path], Stored]:
    return lambda folder: Stored(write(folder / "odd series"), toy.head() if array is None else array, toy.affine())


def _bad(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    return lambda folder: write(folder / "bad series")


def _padded(value: int, photometric: str = "MONOCHROME2") -> Callable[[Dataset, int], None]:
    """Rows of padding at the top of each slice, which are told by PixelPaddingValue."""

    def change(ds: Dataset, number: int) -> None:
        array = toy.head()[..., number].T
        array = array if photometric == "MONOCHROME2" else toy.head().max() - array
        array[:3] = value
        ds.PhotometricInterpretation, ds.PixelRepresentation = photometric, int(value < 0)
        ds.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
        ds.PixelData = array.astype("<i2" if value < 0 else "<u2").tobytes()

    return change


def _stored_again(folder: Path) -> Path:
    ds = pydicom.dcmread(folder / "slice003.dcm")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.save_as(folder / "again.dcm")
    return folder


def _one_uid(ds: Dataset, number: int) -> None:
    """An anonymiser gave all slices one SOPInstanceUID, and a scanner went over one place twice."""
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], 5 + 2 * (number // 2)]


def _mixed_photometry(ds: Dataset, number: int) -> None:
    ds.PhotometricInterpretation = "MONOCHROME1" if number == 2 else "MONOCHROME2"


SLOPES = [(0.5, -10.0), (1.0, 0.0), (0.25, 7.5), (2.0, 0.0), (0.1, 0.0), (1.5, -3.0)]
PADDED = toy.head() * (np.arange(36) >= 3)[:, None]
ENHANCED = np.stack([np.rint((toy.head()[..., n] - b) / a) * a + b for n, (a, b) in enumerate(SLOPES)], -1)

ODD_VOLUMES: dict[str, Callable[[Path], Stored]] = {
    "DICOM: files named MR.UID": _odd(lambda f: rename(series(f), lambda ds, n: f"MR.{ds.SOPInstanceUID}")),
    "DICOM: files named scan.001": _odd(lambda f: rename(series(f), lambda ds, n: f"scan.{n:03d}")),
    "DICOM: files named .dicom": _odd(lambda f: rename(series(f), lambda ds, n: f"{n}.dicom")),
    "DICOM: no preamble": _odd(lambda f: without_preamble(series(f))),
    "DICOM: thickness, date, sequence and orientation vary in the last digits": _odd(lambda f: series(f, jitter)),
    "DICOM: every file twice": _odd(lambda f: copies(series(f))),
    "DICOM: a screenshot, a presentation state and an index among the slices": _odd(lambda f: add_screenshot(series(f))),
    "DICOM: RescaleSlope 1, then fractions": _odd(lambda f: series(f, _whole_then_fraction), toy.head() * (1 + np.arange(6) / 8)),
    "DICOM: MONOCHROME1": _odd(lambda f: series(f, _invert)),
    "DICOM: files named .img": _odd(lambda f: rename(series(f), lambda ds, n: f"{n}.img")),
    "DICOM: padding of 65535": _odd(lambda f: series(f, _padded(65535)), PADDED),
    "DICOM: padding of -32768": _odd(lambda f: series(f, _padded(-32768)), PADDED),
    "DICOM: padding of 65535, MONOCHROME1": _odd(lambda f: series(f, _padded(65535, "MONOCHROME1")), PADDED),
    "DICOM: a slice stored again under another UID": _odd(lambda f: _stored_again(series(f))),
    "DICOM: 12 bits, an overlay in the others": _odd(lambda f: series(f, _overlay)),
    "DICOM: a Siemens mosaic": _odd(lambda f: mosaic(series(f))),
    "DICOM, enhanced: frames in no order": _odd(lambda f: toy.enhance_dicom(series(f), [0, 2, 4, 1, 3, 5])),
    "DICOM, enhanced: another slope in each frame": _odd(lambda f: enhance(series(f), [3, 0, 5, 1, 4, 2], SLOPES), ENHANCED),
}

BAD_VOLUMES: dict[str, Callable[[Path], Path]] = {
    "DICOM: a mosaic that does not say of how many slices": _bad(lambda f: mosaic(series(f), None)),
    "DICOM: a mosaic of too many slices": _bad(lambda f: mosaic(series(f), 50)),
    "DICOM: mosaics over time": _bad(lambda f: mosaics_over_time(series(f))),
    "DICOM: one UID and place for different slices": _bad(lambda f: series(f, _one_uid)),
    "DICOM: some slices inverted": _bad(lambda f: series(f, _mixed_photometry)),
    "DICOM: no size of the pixels": _bad(lambda f: series(f, lambda ds, n: delattr(ds, "PixelSpacing"))),
}
