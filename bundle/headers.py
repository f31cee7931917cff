"""Facts about a file that need no voxels: format, shape, affine in mm, companions, BIDS sidecar."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import itk
import nibabel as nib
import numpy as np

from .errors import InputError

__all__ = [
    "RESULT_MARK",
    "Header",
    "bids_root",
    "by",
    "companions",
    "file_format",
    "image_of",
    "in_mm",
    "is_gzip",
    "itk_arguments",
    "length_unit",
    "misnamed",
    "named_as_nibabel_wants",
    "nrrd_field",
    "plausible",
    "read_header",
    "sidecar",
    "start_of",
    "strip_extension",
]

RESULT_MARK = "super-resolved by brain_mri_super_resolution"  # in the header of every result, so that folders skip it as input
NIFTI = (".nii", ".nii.gz", ".img", ".img.gz", ".hdr", ".hdr.gz")  # and Analyze
FREESURFER = (".mgh", ".mgz", ".mgh.gz")
META = (".mha", ".mhd")
NRRD = (".nrrd", ".nhdr")
# longest first: strip_extension must leave no extension
EXTENSIONS = tuple(sorted((*NIFTI, *FREESURFER, *META, *NRRD), key=len, reverse=True))
MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "millimeter": 1.0, "micron": 1e-3, "um": 1e-3, "µm": 1e-3, "cm": 10.0, "meter": 1e3, "m": 1e3}
PLAUSIBLE = (5e-3, 50.0)  # sides of an MRI voxel, in mm


class Header(NamedTuple):
    """Header of a volume."""

    shape: tuple[int, ...]  # along the stored axes; more than three for a series
    channels: int  # values of a voxel: 3 for colours
    affine: np.ndarray  # (4, 4) from index to RAS, in the file's units of length
    dtype: np.dtype
    intent: str  # NIfTI intent, such as "label" or "z score"; "none" if unset, "CIFTI" for values on a surface


def file_format(path: str | Path) -> str:
    """``"nifti"`` (also Analyze), ``"freesurfer"``, ``"metaimage"``, ``"nrrd"`` or ``""``, by the extension in upper or lower case;
    always ``""`` for DICOM and for folders, whatever their names."""
    name = Path(path).name.lower()
    formats = {"nifti": NIFTI, "freesurfer": FREESURFER, "metaimage": META, "nrrd": NRRD}
    kind = next((kind for kind, extensions in formats.items() if name.endswith(extensions)), "")
    return "" if kind and (os.path.isdir(path) or _first_bytes(path, 132)[128:] == b"DICM") else kind


def strip_extension(name: str) -> str:
    """File name of a volume without its extension; ``.nii.gz`` counts as one.

    Example:
        >>> strip_extension("T1.NII.GZ")
        'T1'
    """
    extension = next((e for e in EXTENSIONS if name.lower().endswith(e)), "")
    return name[: len(name) - len(extension)] if extension else name


@contextmanager
def named_as_nibabel_wants(path: str | Path) -> Iterator[str]:
    """A path to the file with the ending that nibabel requires: lower-case, ``.gz`` only for gzip; its companions have the same name. A
    link in a temporary folder if necessary.

    Raises:
        InputError: if one of ``.hdr`` and ``.img`` is gzip and the other is not: nibabel reads both or neither.
    """
    path = Path(path)
    files = [path, *companions(path)] if path.is_file() else []
    pair = [file for file in files[1:] if file_format(file)]
    if pair and all(is_gzip(file) != is_gzip(path) for file in pair):
        packed, plain = sorted((path, pair[0]), key=is_gzip, reverse=True)
        raise InputError(f"{path}: {packed.name} is compressed, {plain.name} is not: compress both or neither")
    if all(file.name == strip_extension(path.name) + _true_ending(file) for file in files):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            (Path(folder) / ("volume" + _true_ending(file))).symlink_to(file.resolve())
        yield str(Path(folder) / ("volume" + _true_ending(path)))


def is_gzip(path: str | Path) -> bool:
    """Whether a file is gzip, by its content."""
    return _first_bytes(path, 2) == b"\x1f\x8b"


def _true_ending(path: Path) -> str:
    """Extension that a NIfTI, Analyze, ``.mat`` or FreeSurfer file should have: in lower case, with ``.gz`` (or ``.mgz``) only for
    gzip."""
    if file_format(path) == "freesurfer":
        return ".mgz" if is_gzip(path) else ".mgh"
    return Path(path.name.lower().removesuffix(".gz")).suffix + ".gz" * is_gzip(path)


def _first_bytes(path: str | Path, count: int) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(count)
    except OSError:
        return b""


def start_of(file: str | Path, size: int = 352) -> bytes:
    """First bytes of a file, decompressed if it is gzip; empty if it is unreadable."""
    if not is_gzip(file):
        return _first_bytes(file, size)
    try:
        with gzip.open(file) as unzipped:
            return unzipped.read(size)
    except (OSError, EOFError, zlib.error):
        return b""


def misnamed(file: str | Path) -> str:
    """What a file holds if its name does not say so: NIfTI without an extension, or DICOM in gzip; otherwise empty."""
    start = start_of(file)
    if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] == b"n+2\0":
        return "holds NIfTI; give it the extension .nii or .nii.gz"
    # in gzip, because plain DICOM already counts as slices
    return "holds DICOM in gzip; unpack it" if start[128:132] == b"DICM" else ""


def _itk_reader(path: str | Path) -> Any:
    """ITK's reader for a file, chosen by the extension in upper or lower case; ``None`` leaves the choice to ITK."""
    reader = {"metaimage": itk.MetaImageIO, "nrrd": itk.NrrdImageIO}.get(file_format(path))
    return None if reader is None else reader.New()


def itk_arguments(path: str | Path) -> dict[str, Any]:
    """Arguments of ``itk.imread`` for a file."""
    reader = _itk_reader(path)
    if reader is None:
        return {}
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    # a NRRD file with an axis of one value holds vectors of one value, a type that ITK lacks in Python
    one = reader.GetNumberOfComponents() == 1 and reader.GetPixelType() == itk.CommonEnums.IOPixel_VECTOR
    return {"imageio": reader, "pixel_type": itk.F} if one else {"imageio": reader}


def read_header(path: str | Path) -> Header:
    """Header of a volume in a file (not DICOM). Errors are those of the reader."""
    if file_format(path) in ("nifti", "freesurfer"):
        with named_as_nibabel_wants(path) as name:
            image: Any = nib.load(name)
        shape, dtype = tuple(int(n) for n in image.shape), image.get_data_dtype()
        if isinstance(image, nib.Cifti2Image):
            return Header(shape, 1, np.eye(4), dtype, "CIFTI")
        intent = image.header.get_intent()[0] if isinstance(image, nib.Nifti1Pair) else "none"
        return Header(shape, len(dtype.names or "1"), np.asarray(image.affine, dtype=np.float64), dtype, intent)
    image = _itk_reader(path) or itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if image is None:
        raise InputError(f"{path}: of an unknown format")
    image.SetFileName(str(path))
    image.ReadImageInformation()
    axes = range(image.GetNumberOfDimensions())
    affine = np.eye(4)
    for axis in list(axes)[:3]:
        affine[:3, axis] = np.array([*image.GetDirection(axis), 0, 0])[:3] * image.GetSpacing(axis)
    to_ras = np.diag([-1.0, -1, 1, 1])
    names = {"unsigned_char": "u1", "char": "i1", "unsigned_short": "u2", "short": "i2", "float": "f4", "double": "f8"}
    dtype = np.dtype(names.get(image.GetComponentTypeAsString(image.GetComponentType()), "i4"))
    return Header(tuple(int(image.GetDimensions(a)) for a in axes), int(image.GetNumberOfComponents()), to_ras @ affine, dtype, "none")


def in_mm(affine: np.ndarray, unit: str) -> tuple[np.ndarray, str]:
    """An affine in mm, and a remark if the file uses another unit of length.

    If the unit gives impossible voxel sizes and mm gives possible ones, the unit is treated as a mistake.

    Args:
        affine: (4, 4), in ``unit``.
        unit: name of the unit in NIfTI or NRRD.
    """
    factor = MM_PER_UNIT.get(unit.strip('" ').lower())
    if factor is None:
        return affine, f"unknown unit of length {unit!r}: taken for mm"
    if factor == 1:
        return affine, ""
    sides = nib.affines.voxel_sizes(affine)
    possible = [plausible(affine * f) for f in (factor, 1)]
    text = by(sides)
    if possible == [False, True]:
        return affine, f"the header gives voxels of {text} {unit}, which is impossible: taken for mm"
    return np.diag([factor, factor, factor, 1]) @ affine, f"lengths are in {unit} ({text}): converted to mm"


def by(sides: Iterable[float]) -> str:
    """Sizes of voxels as a text: ``"0.5 x 0.5 x 3"``."""
    return " x ".join(f"{float(side):.4g}" for side in sides)


def plausible(affine: np.ndarray) -> bool:
    """Whether the voxels of an affine in mm have sizes that an MRI scan may have."""
    sides = nib.affines.voxel_sizes(affine)
    return bool((sides > PLAUSIBLE[0]).all() and (sides < PLAUSIBLE[1]).all())


def length_unit(image: nib.Nifti1Pair) -> str:
    """Unit of length of a NIfTI file, for :func:`in_mm`; ``"code 5"`` and the like for codes that NIfTI does not define."""
    code = int(image.header["xyzt_units"]) % 8
    return ("unknown", "meter", "mm", "micron")[code] if code < 4 else f"code {code}"


def nrrd_field(path: str | Path, field: str) -> str:
    """A field of the text header of a NRRD file; empty if it is missing."""
    with Path(path).open("rb") as stream:
        text = stream.read(1 << 16).partition(b"\n\n")[0].decode("utf-8", "replace")
    found = re.search(rf"^{field}:=?\s*(.+?)\s*$", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""


def companions(path: str | Path) -> list[Path]:
    """Files that belong to the file of a volume: the ``.img`` of a ``.hdr`` or the reverse, with SPM's ``.mat``; or the voxel files named
    in a ``.mhd`` or ``.nhdr``."""
    path = Path(path)
    name, ending = strip_extension(path.name), path.name[len(strip_extension(path.name)) :].lower()
    if ending.startswith((".img", ".hdr")):
        other = ".hdr" if ending.startswith(".img") else ".img"
        wanted = {name.lower() + e for e in (other, other + ".gz", ".mat", ".mat.gz")}
        # a name that differs in upper and lower case counts if there is no other
        names = sorted((n for n in os.listdir(path.parent) if n.lower() in wanted), key=lambda n: n.startswith(name))
        return sorted(path.parent / n for n in {n.lower(): n for n in names}.values())
    if ending not in (".mhd", ".nhdr"):
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for number, line in enumerate(lines):
        found = re.match(r"(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", line, re.IGNORECASE)
        if found:
            names = [text.strip() for text in lines[number + 1 :]] if found[1].upper().startswith("LIST") else [found[1]]
            if "%" in found[1]:  # numbered files: a pattern, first and last number, step
                names = [f.name for f in path.parent.glob(re.sub(r"%\d*d", "*", found[1].split()[0]))]
            return sorted(f for f in (path.parent / n for n in names if n) if f.is_file())
    return []


def image_of(path: str | Path) -> Path | None:
    """The ``.img`` or ``.img.gz`` beside a ``.hdr``; ``None`` if there is none, and for other files."""
    if not str(path).lower().endswith((".hdr", ".hdr.gz")):
        return None
    images = [file for file in companions(path) if file_format(file)]
    return min(images, key=lambda file: is_gzip(file) != is_gzip(path), default=None)


def sidecar(path: str | Path) -> dict[str, Any]:
    """Entries of the BIDS sidecars of a volume: of ``<name>.json`` and, within a BIDS data set, of those that it inherits from; empty if
    none can be read."""
    path = Path(os.path.abspath(path))
    *entities, suffix = strip_extension(path.name).split("_")
    folders = [path.parent]
    top = bids_root(path)
    if top is not None:
        folders = [top, *(folder for folder in reversed(path.parents) if folder.is_relative_to(top) and folder != top)]
    facts: dict[str, Any] = {}
    for folder in folders:  # from the top: the nearer one overrides
        for file in _sidecars(folder, entities, suffix) if top else [folder / (strip_extension(path.name) + ".json")]:
            try:
                content = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=lambda name: None)  # NaN and infinity are unknown
            except (OSError, ValueError):
                continue
            facts |= content if isinstance(content, dict) else {}
    return facts


def bids_root(path: str | Path) -> Path | None:
    """The BIDS data set that contains a file or folder: the nearest parent with a ``dataset_description.json``; ``None`` outside."""
    parents = Path(os.path.abspath(path)).parents
    return next((folder for folder in parents if (folder / "dataset_description.json").is_file()), None)


def _sidecars(folder: Path, entities: list[str], suffix: str) -> list[Path]:
    """JSON files of a folder from which a volume inherits in BIDS: those with its suffix and no entity that it lacks. The most specific
    one is last."""
    names = {file: file.stem.split("_") for file in folder.glob(f"*{suffix}.json")}
    return sorted(
        (f for f, words in names.items() if words[-1] == suffix and set(words[:-1]) <= set(entities)), key=lambda f: len(names[f])
    )
