"""Headers of DICOM files, and which files of a folder form a volume.

For pixels see :mod:`bundle.dicom_volume`; docs/dicom.md explains why this uses pydicom.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from .headers import RESULT_MARK

__all__ = [
    "Slice",
    "files_of",
    "find_dicom",
    "find_series",
    "header_of",
    "in_order",
    "is_dicom",
    "is_dicom_volume",
    "passed_over",
    "slices_of",
    "volumes_in",
]

SCREENSHOT = "1.2.840.10008.5.1.4.1.1.7"  # Secondary Capture Image Storage, and the prefix of its multi-frame classes
SAME_DIRECTION = 5e-3  # largest difference between equal direction cosines, which anonymisers round
COMPONENTS = {"P": "phase", "PHASE": "phase", "R": "real", "REAL": "real", "I": "imaginary", "IMAGINARY": "imaginary"}
GE_COMPONENTS = {1: "phase", 2: "real", 3: "imaginary"}


class _Once(logging.Filter):
    """Passes each message once: pydicom repeats one about an unknown character set for every name in every file."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


logging.getLogger("pydicom").addFilter(_Once())


class Slice(NamedTuple):
    """Position and values of one slice: a file, a frame or a mosaic tile. Unknown lists are empty."""

    file: str
    frame: int | None  # from 0; None: the file is one plane
    name: str  # for messages
    uid: str
    sop_class: str
    series: str
    modality: str
    size: tuple[int, int]  # rows, columns
    position: list[float]  # of the centre of the first pixel, in mm, in DICOM's coordinates (left, posterior, superior)
    orientation: list[float]  # of a row and a column
    spacing: list[float]  # of the rows and of the columns, in mm
    thickness: float | None  # in mm
    distance: float | None  # "spacing between slices" of the header, in mm
    slope: float
    intercept: float
    inverted: bool  # MONOCHROME1: the smallest value is white
    echo_number: str
    echo_time: float | None  # in ms
    component: str  # magnitude, phase, real or imaginary
    tiles: int  # number of tiles of its mosaic; 0 if it is not in a mosaic
    result: bool  # whether it is a result of this program
    padding: tuple[int, int] | None  # smallest and largest stored value of padding
    problem: str = ""  # why it cannot be used


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM, by its content, not its name. The preamble may be missing."""
    try:
        with Path(path).open("rb") as stream:
            start = stream.read(132)
    except OSError:  # a folder, or no permission to read it
        return False
    if start[128:] == b"DICM":
        return True
    if start[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):  # the groups that a file without a preamble starts with
        return False
    try:
        header = header_of(path)
        return "SOPClassUID" in header or "SeriesInstanceUID" in header
    except Exception:  # arbitrary bytes
        return False


def is_dicom_volume(path: str | Path) -> bool:
    """Whether the path of a volume is a DICOM file, a folder of them or a series in one, ``folder/identifier``."""
    return Path(path).is_dir() or not Path(path).exists() or is_dicom(path)


def header_of(file: str | Path) -> pydicom.FileDataset:
    """The header of a DICOM file, without its pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that do not follow the standard
        return pydicom.dcmread(file, stop_before_pixels=True, force=True)


def find_series(folder: str | Path) -> dict[str, list[str]]:
    """Volumes in a folder, without its subfolders: identifier to files, in the order of their positions.

    The identifier is the SeriesInstanceUID. If a series holds several volumes of different orientation, size, echo or component
    (magnitude, phase), a suffix is added. :func:`bundle.dicom_volume.load_series` loads ``folder/identifier``.
    """
    return {identifier: list(dict.fromkeys(s.file for s in slices)) for identifier, slices in volumes_in(folder)[0].items()}


def files_of(path: str | Path) -> list[Path]:
    """Files of a DICOM folder, of a series in one (``folder/identifier``), or of the series to which a file belongs; otherwise empty."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return []
    volumes = {name: {s.file for s in slices} for name, slices in volumes_in(folder)[0].items()}
    if not path.is_dir():
        volumes = {name: files for name, files in volumes.items() if name == path.name or str(path) in files}
    return sorted(Path(file) for files in volumes.values() for file in files)


def find_dicom(folder: str | Path, results: bool = False) -> list[str]:
    """Paths of the volumes in a folder, without its subfolders: the folder itself if it holds one, else ``folder/identifier`` of each.

    Results of this program are left out, unless ``results`` is set and there is nothing else.
    """
    volumes = volumes_in(folder)[0]
    scans = {name: slices for name, slices in volumes.items() if not slices[0].result}
    names = scans or (volumes if results else {})
    return [str(folder)] if len(names) == len(volumes) == 1 else [str(Path(folder) / name) for name in names]


def passed_over(folder: str | Path) -> str:
    """DICOM files of a folder that are not slices, each with the reason; empty if there are none."""
    reasons = [f"{Path(file).name} ({why})" for file, why in volumes_in(folder)[1].items()]
    return ", ".join(reasons[:5]) + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")


def volumes_in(folder: str | Path) -> tuple[dict[str, list[Slice]], dict[str, str]]:
    """Identifier to slices of each volume in a folder, in the order of their positions; and the files that are not slices, with the
    reason. Copies of a slice (same SOPInstanceUID) follow it in the list.
    """
    series: dict[str, list[Slice]] = {}
    others = {}
    files = [p for p in Path(folder).iterdir() if p.is_file() and not p.name.startswith(".") and is_dicom(p)]
    for file in sorted(files, key=lambda p: (len(p.name), p.name)):  # a copy has the longer name
        slices, others[str(file)] = slices_of(str(file))
        for slice_ in slices:
            series.setdefault(slice_.series, []).append(slice_)
    placed = any(s.position for slices in series.values() for s in slices)
    for uid, slices in series.items() if placed else ():
        nowhere = {s.file: "does not say where it lies" for s in slices if not s.position and not s.orientation}
        others |= nowhere  # also a kind of screenshot
        series[uid] = [s for s in slices if s.file not in nowhere]
    volumes = {}
    for uid in sorted(series):
        parts = _parts(series[uid])
        for label, slices in parts.items():
            name = re.sub(r"[^0-9A-Za-z_.-]", "_", uid).strip(".") or "no-series-uid"  # becomes part of a path
            name = f"{name}_{label}" if label and len(parts) > 1 else name
            while name in volumes:  # of two UIDs that differ only in what cannot be part of a path
                name += "_"
            volumes[name] = slices
    return volumes, {file: why for file, why in others.items() if why}


def slices_of(file: str | Path) -> tuple[list[Slice], str]:
    """The slices in a DICOM file, or none and the reason why."""
    stat = Path(file).stat()
    return _slices_of(str(file), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=100_000)  # every series in a folder leads to a scan of the whole folder
def _slices_of(file: str, *changed: int) -> tuple[list[Slice], str]:
    try:
        header = header_of(file)
        kind = pydicom.uid.UID(header.get("SOPClassUID", "")).name or "of no known class"
        if "Rows" not in header or "Columns" not in header:
            return [], f"{kind}: no image"
        if int(header.get("SamplesPerPixel") or 1) != 1:
            return [], f"{kind}: a picture in colour"
        if any(word in kind for word in ("Segmentation", "Spectroscopy", "Dose", "Presentation State")):
            return [], f"{kind}: no scan"
        slices = _frames(file, header)
    except Exception as e:  # a damaged header can fail anywhere
        return [], f"its header cannot be read: {str(e).strip() or type(e).__name__}".splitlines()[0]
    if slices[0].sop_class.startswith(SCREENSHOT) and not slices[0].position:
        return [], f"{kind}: a screenshot or a scanned page"
    return slices, ""


def _frames(file: str, header: Dataset) -> list[Slice]:
    """The slices in a file. Enhanced DICOM stores shared and per-frame values separately."""
    name, count = Path(file).name, int(header.get("NumberOfFrames") or 1)
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = header.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * count
    slices = []
    for number, frame in enumerate(frames):

        def get(group: str, key: str, frame: Dataset = frame) -> Any:
            for groups in (frame, shared):
                value = (groups.get(group) or [Dataset()])[0].get(key)
                if value is not None:
                    return value
            return header.get(key) if count == 1 or group != "PlanePositionSequence" else None

        orientation = _numbers(get("PlaneOrientationSequence", "ImageOrientationPatient"))
        time = get("MREchoSequence", "EffectiveEchoTime")
        slice_ = Slice(
            file=file,
            frame=number if count > 1 else None,
            name=f"frame {number + 1} of {name}" if count > 1 else name,
            uid=str(header.get("SOPInstanceUID", "")),
            sop_class=str(header.get("SOPClassUID", "")),
            series=str(header.get("SeriesInstanceUID", "")).strip(),
            modality=str(header.get("Modality", "")),
            size=(int(header.Rows), int(header.Columns)),
            position=_numbers(get("PlanePositionSequence", "ImagePositionPatient")),
            orientation=orientation if any(orientation[:3]) and any(orientation[3:]) else [],
            spacing=_numbers(get("PixelMeasuresSequence", "PixelSpacing")),
            thickness=_positive(get("PixelMeasuresSequence", "SliceThickness")),
            distance=_positive(get("PixelMeasuresSequence", "SpacingBetweenSlices")),
            slope=_number(get("PixelValueTransformationSequence", "RescaleSlope"), 1.0),
            intercept=_number(get("PixelValueTransformationSequence", "RescaleIntercept"), 0.0),
            inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
            echo_number=str(header.get("EchoNumbers") or ""),
            echo_time=_positive(header.get("EchoTime") if time is None else time),
            component=_component(header, get("MRImageFrameTypeSequence", "ComplexImageComponent")),
            tiles=0,
            result=RESULT_MARK in str(header.get("DerivationDescription", "")),
            padding=_padding(header),
        )
        slices += [slice_] if count > 1 else _tiles(slice_, header)
    return slices


def _padding(header: Dataset) -> tuple[int, int] | None:
    """Smallest and largest stored value of padding. Some headers give a signed value for unsigned pixels, or the reverse."""
    bits, signed = int(header.get("BitsStored") or 16), int(header.get("PixelRepresentation") or 0)
    limits = [header.get(key) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if not isinstance(limits[0], int):
        return None
    values = [int(value) % 2**bits for value in limits if isinstance(value, int)]
    values = [value - 2**bits if signed and value >= 2 ** (bits - 1) else value for value in values]
    return min(values), max(values)


def _tiles(plane: Slice, header: Dataset) -> list[Slice]:
    """The slices of a Siemens mosaic, which lie side by side in one plane; any other plane is returned as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing nibabel's reader of Siemens headers warns that it is experimental
        from nibabel.nicom import csareader
    csa = csareader.get_csa_header(header, "image") if (0x0029, 0x0010) in header else None
    tags = (csa or {}).get("tags", {})
    block = header.get((0x0019, 0x0010))
    number = header.get((0x0019, 0x100A)) if block is not None and "SIEMENS" in str(block.value).upper() else None
    count = int(number.value) if number is not None else int((csareader.get_n_mosaic(csa) if "NumberOfImagesInMosaic" in tags else 0) or 0)
    is_mosaic = "MOSAIC" in (header.get("ImageType") or [])
    if not is_mosaic and count < 2:
        return [plane]
    side = int(np.ceil(np.sqrt(count)))
    height, width = (n // max(side, 1) for n in plane.size)
    if count < 1 or height * side != plane.size[0] or width * side != plane.size[1]:
        n = f"{count} slices do not fill {plane.size[0]} x {plane.size[1]} pixels" if count else "the number of its slices is unknown"
        return [plane._replace(problem=f"a Siemens mosaic that cannot be unfolded: {n}")]
    step = plane.distance or plane.thickness
    if len(plane.position) != 3 or len(plane.orientation) != 6 or len(plane.spacing) != 2 or step is None:
        return [plane._replace(problem="a Siemens mosaic that cannot be unfolded: it does not say where its slices lie")]
    row, column = np.reshape(plane.orientation, (2, 3))
    normal = csareader.get_slice_normal(csa) if "SliceNormalVector" in tags else None
    normal = np.cross(row, column) if normal is None else normal
    # the header gives the position of one large slice with the same centre
    corner = np.asarray(plane.position) + row * plane.spacing[1] * (plane.size[1] - width) / 2
    corner = corner + column * plane.spacing[0] * (plane.size[0] - height) / 2
    tile = plane._replace(size=(height, width), tiles=count)
    return [
        tile._replace(frame=n, name=f"tile {n + 1} of the mosaic {plane.name}", position=(corner + n * step * normal).tolist())
        for n in range(count)
    ]


def _component(header: Dataset, component: str | None) -> str:
    ge = header.get((0x0043, 0x102F))
    if ge is not None and "GEMS" in str(header.get((0x0043, 0x0010), "")):
        return GE_COMPONENTS.get(int(np.ravel(ge.value)[0]), "magnitude")
    image_type = header.get("ImageType") or []
    values = [component or "", *([image_type] if isinstance(image_type, str) else image_type)[2:]]
    words = [value.replace(" ", "_").split("_")[0].upper() for value in values]
    return next((COMPONENTS[word] for word in words if word in COMPONENTS), "magnitude")


def _parts(slices: list[Slice]) -> dict[str, list[Slice]]:
    """The volumes in a series, each with a label that distinguishes it. A volume has one size and one orientation, and, if several slices
    have the same position, one echo and one component."""
    found: list[tuple[list[str], list[Slice]]] = []
    directions: list[list[float]] = []
    groups: dict[tuple[tuple[int, int], int], list[Slice]] = {}
    for slice_ in slices:
        same = (n for n, d in enumerate(directions) if np.allclose(d, slice_.orientation or [9.0] * 6, rtol=0, atol=SAME_DIRECTION))
        number = next(same, len(directions))
        if number == len(directions):
            directions.append(slice_.orientation or [9.0] * 6)
        groups.setdefault((slice_.size, number), []).append(slice_)
    several = [len({key[n] for key in groups}) > 1 for n in (0, 1)]
    for (size, number), group in groups.items():
        labels = [f"{size[1]}x{size[0]}"] * several[0] + [_plane(directions[number])] * several[1]
        found += [(labels + more, in_order(part)) for more, part in _apart(group)]
    parts: dict[str, list[Slice]] = {}
    for labels, part in found:
        label = "_".join(labels)
        count = sum(key == label or key.startswith(f"{label}-") for key in parts)
        parts[f"{label}-{count + 1}" if count else label] = part
    return parts


def _apart(slices: list[Slice], depth: int = 0) -> list[tuple[list[str], list[Slice]]]:
    """Split slices at the same position by echo and component, with labels."""
    keys: list[Callable[[Slice], str]] = [
        lambda s: "" if s.component == "magnitude" else s.component,
        lambda s: f"echo{s.echo_number}" if s.echo_number else "",
        lambda s: f"te{s.echo_time:.4g}" if s.echo_time else "",
    ]
    if depth == len(keys) or not _repeats(slices):
        return [([], slices)]
    groups: dict[str, list[Slice]] = {}
    for slice_ in slices:
        groups.setdefault(keys[depth](slice_), []).append(slice_)
    parts = [(label, *rest) for label, group in groups.items() for rest in _apart(group, depth + 1)]
    return [(([label] if label and len(groups) > 1 else []) + more, part) for label, more, part in parts]


def _repeats(slices: list[Slice]) -> bool:
    """Whether two slices that are not copies have the same position."""
    unique = {(s.uid or s.file, s.frame, tuple(s.position)): tuple(round(p, 3) for p in s.position) for s in slices}
    return len(set(unique.values())) < len(unique)


def in_order(slices: list[Slice]) -> list[Slice]:
    """Slices in the order of their positions along the normal of the first."""
    if any(len(s.position) != 3 or len(s.orientation) != 6 for s in slices):
        return slices
    normal = np.cross(*np.reshape(slices[0].orientation, (2, 3)))
    return sorted(slices, key=lambda s: float(np.dot(s.position, normal)))


def _plane(orientation: list[float]) -> str:
    if len(orientation) != 6 or orientation[0] == 9:
        return "nowhere"
    normal = np.cross(*np.reshape(orientation, (2, 3)))
    return ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]


def _numbers(value: Any) -> list[float]:
    return [float(number) for number in value] if value else []


def _number(value: Any, default: float) -> float:
    return default if value in (None, "") else float(value)


def _positive(value: Any) -> float | None:
    """A number above zero, or ``None``: headers mark unknown values by 0 or by an empty value."""
    number = _number(value, 0.0)
    return number if 0 < number < np.inf else None
