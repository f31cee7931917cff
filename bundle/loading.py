"""Loading: from a path to a checked volume (1, X, Y, Z) with facts from its header."""

from __future__ import annotations

import gzip
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import monai.data
import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, ITKReader, MetaTensor
from monai.transforms import LoadImage, MapTransform
from scipy import ndimage

from .dicom import is_dicom_volume
from .dicom_volume import load_series
from .errors import InputError
from .headers import (
    by,
    file_format,
    in_mm,
    is_gzip,
    itk_arguments,
    length_unit,
    misnamed,
    named_as_nibabel_wants,
    nrrd_field,
    plausible,
    sidecar,
    start_of,
)
from .recognition import surface_data, values_look_like
from .transforms import add_remarks

__all__ = ["LoadVolumed"]

ALIGNED = 2  # NIfTI's code for coordinates that agree with another file's


class LoadVolumed(MapTransform):
    """Load a volume, or raise an error that names the file.

    :class:`monai.transforms.LoadImage` reads files, :func:`bundle.dicom_volume.load_series` DICOM.

    NIfTI: the sform is used if it is set, otherwise the qform. Lengths become mm, complex values become their magnitude, NaN outside the
    head becomes 0. Assumptions and corrections are logged and added to ``meta["remarks"]``, one line each. ``meta["intensity_range"]``
    holds the smallest and largest value. ``meta["modality"]`` and ``meta["slice_thickness"]`` (mm) are set if the file or its sidecar
    contains them.

    Args:
        keys: file names (NIfTI, Analyze, FreeSurfer, MetaImage, NRRD), DICOM folders or series (see :func:`bundle.subjects.find_volumes`).
        reader: name of a MONAI reader; ``None`` uses nibabel for NIfTI, Analyze and FreeSurfer, and ITK for the others.

    Raises:
        InputError: with the file and the reason, if the file cannot be read or is not a single-channel volume with finite, varying
            intensities, or if a DICOM series has gaps.
    """

    def __init__(self, keys: KeysCollection, reader: str | None = None) -> None:
        super().__init__(keys)
        self.reader = reader
        self.loader = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float32)

    def __call__(self, data: Mapping[Hashable, str]) -> dict:
        return {**data, **{key: self._load(data[key]) for key in self.keys}}

    def _load(self, path: str) -> MetaTensor:
        source, remarks = Path(path), list[str]()
        if source.is_symlink() and not source.exists():
            raise InputError(f"{path}: a link to {source.readlink()}, which does not exist")
        if not source.exists() and not source.parent.is_dir():
            raise InputError(f"{path}: no such file or folder")
        try:
            if not file_format(source) and self.reader is None and is_dicom_volume(source):
                image = load_series(source)
                remarks = image.meta["remarks"].split("\n")
            else:
                image, remarks = self._load_file(source)
        except InputError:
            raise
        except Exception as e:  # a reader can fail in any way on a damaged file
            raise InputError(f"{path}: cannot be read as a volume ({_why_not_read(e.__cause__ or e)})") from e
        sides = " x ".join(str(n) for n in image.shape[1:])
        if image.ndim != 4 or image.shape[0] != 1:
            raise InputError(f"{path}: one grey-scale volume expected, got {image.shape[0]} channel(s) of {sides} voxels")
        surface = surface_data(image.shape[1:])
        if surface:
            raise InputError(f"{path}: {surface}, no volume")
        image, remark = _without_nan(image, path)
        remarks.append(remark)
        image, remark = _without_padding(image)
        remarks.append(remark)
        if image.min() == image.max():
            raise InputError(f"{path}: every voxel has the value {float(image.min()):g}")
        affine = np.asarray(image.affine, dtype=np.float64)
        if _is_singular(affine):
            raise InputError(f"{path}: the affine is singular: {image.affine[:3, :3].tolist()}")
        if not plausible(affine):
            size = by(nib.affines.voxel_sizes(affine))
            remarks.append(f"voxels of {size} mm are hardly those of an MRI scan: the unit of length may be wrong")
        kind = values_look_like(image[0].numpy()[..., max(image.shape[3] // 2 - 1, 0) :][..., :3], path)
        remarks.append(f"looks like {kind}, not like a scan: the result may mean nothing" if kind else "")
        if source.is_file():
            remarks.append(_follow_sidecar(image, sidecar(source)))
        image.meta["filename_or_obj"] = str(path)  # for a DICOM folder, readers store one file or a list
        image.meta["intensity_range"] = [float(image.min()), float(image.max())]
        image.meta["remarks"] = ""  # of a DICOM series: they are among these
        add_remarks(image, list(filter(None, remarks)))
        return image

    def _load_file(self, source: Path) -> tuple[MetaTensor, list[str]]:
        """Volume of a file, its affine in mm, and remarks."""
        _check_bytes(source)
        kind = file_format(source)
        if not kind and self.reader is None and misnamed(source):
            raise InputError(f"{source}: {misnamed(source)}")
        if kind not in ("nifti", "freesurfer"):
            image = self.loader(str(source), reader=self._reader(source))
            return image, _follow_nrrd(image, source) if kind == "nrrd" else []
        with named_as_nibabel_wants(source) as name:
            try:
                header: Any = nib.load(name)
            except nib.filebasedimages.ImageFileError as e:
                raise InputError(f"{source}: cannot be read as a volume ({_why_not_read(e).replace(name, source.name)})") from e
            if isinstance(header, nib.Cifti2Image):
                raise InputError(f"{source}: {surface_data(header.shape, 'CIFTI')}, no volume")
            if header.get_data_dtype().names:
                raise InputError(f"{source}: one grey-scale volume expected, got colours")
            is_complex = header.get_data_dtype().kind == "c"
            loader = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.complex64) if is_complex else self.loader
            start = int(getattr(header.dataobj, "offset", 0))
            if isinstance(header, nib.Nifti1Image) and start < header.header.single_vox_offset:
                raise InputError(f"{source}: the voxels begin at byte {start} by the header, which is within the header")
            image = loader(name, reader=self._reader(source))
            remarks = _restore_codes(header) if isinstance(header, nib.Nifti1Pair) else []
            oriented = "mat" in header.file_map and Path(header.file_map["mat"].filename).exists()  # SPM's file beside Analyze
        if image.ndim > 4 and set(image.shape[4:]) == {1}:
            image = MetaTensor(image.as_tensor().reshape(image.shape[:4]), meta=image.meta)
        if is_complex:
            image = MetaTensor(image.as_tensor().abs(), meta=image.meta)
            remarks.append("complex values: the magnitude is used")
        if isinstance(header, nib.Nifti1Pair):
            remarks += _follow_header(image, header)
        elif isinstance(header, nib.MGHImage):
            if not int(header.header["goodRASFlag"]):
                remarks.append("the header says nothing about orientation (goodRASFlag is 0): left and right are a guess")
        elif not oriented:
            remarks.append("Analyze says nothing about orientation: left and right are a guess")
        return image, remarks

    def _reader(self, source: Path) -> ImageReader:
        # exactly one reader: MONAI would try all in turn, including NumPy's, which runs pickles
        kind = file_format(source)
        name = self.reader or ("NibabelReader" if kind in ("nifti", "freesurfer") else "ITKReader")
        return ITKReader(**itk_arguments(source)) if name == "ITKReader" else getattr(monai.data, name)()


def _check_bytes(source: Path) -> None:
    """Read a file to its end to find damage: nibabel ignores gzip's checksum."""
    with gzip.open(source) if is_gzip(source) else source.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def _why_not_read(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).split("\n\n")[0].strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[-2:]) if lines[-1].startswith("-") else lines[-1]  # nibabel continues a line after a dash


def _is_singular(affine: np.ndarray) -> bool:
    """Whether an affine has no inverse, whatever its unit: its determinant is compared with the voxel sizes."""
    volume = nib.affines.voxel_sizes(affine).prod()
    return not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-6 * volume


def _restore_codes(image: nib.Nifti1Pair) -> list[str]:
    """Set the codes of usable forms again that nibabel clears because NIfTI does not define them; returns remarks.

    By the standard, a form counts if its code is above zero.
    """
    file = image.file_map.get("header") or image.file_map["image"]
    stored = type(image.header)(start_of(str(file.filename), image.header.template_dtype.itemsize), check=False)
    remarks = []
    for form, affine in (("sform", image.header.get_sform), ("qform", image.header.get_qform)):
        code = int(stored[f"{form}_code"])
        if code <= 0 or int(image.header[f"{form}_code"]):
            continue
        try:
            usable = not _is_singular(affine())
        except ValueError:  # no rotation
            usable = False
        image.header[f"{form}_code"] = ALIGNED if usable else 0
        taken = f"taken for {ALIGNED} (aligned)" if usable else f"the {form} is unusable and left out"
        remarks.append(f"{form}_code is {code}, which NIfTI does not define: {taken}")
    return remarks


def _follow_header(image: MetaTensor, header: nib.Nifti1Pair) -> list[str]:
    """Set the affine of a volume from its NIfTI header, and store its codes, unit and differing forms; returns remarks.

    MONAI's reader prefers the qform if only that agrees with pixdim; NIfTI has no such rule.
    """
    unit = length_unit(header)
    affine, remark = in_mm(header.header.get_best_affine(), unit)
    remarks = [remark]
    image.affine = torch.as_tensor(affine)
    image.meta["original_affine"] = torch.as_tensor(affine)
    sform_code = int(header.header["sform_code"])
    qform_code = int(header.header["qform_code"])
    try:
        qform = in_mm(header.get_qform(), unit)[0] if qform_code or not sform_code else None
    except ValueError:
        remarks.append("the qform is no rotation: the sform is used")
        qform, qform_code = None, 0
    if not sform_code and not qform_code:
        remarks.append("the header says nothing about orientation (sform and qform unknown): left and right are a guess")
    if sform_code and qform is not None:
        corners = np.stack(np.meshgrid(*([0, n - 1] for n in image.shape[1:4]), indexing="ij"), -1)
        apart = float(np.abs(nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(qform, corners)).max())
        if apart > 0.1:
            remarks.append(f"sform and qform differ by up to {apart:.3g} mm: the sform is used, and both are kept")
            image.meta["sform"], image.meta["qform"] = torch.as_tensor(affine), torch.as_tensor(qform)
    spacing, zooms = nib.affines.voxel_sizes(affine)[: image.ndim - 1], np.asarray(header.header.get_zooms()[:3], dtype=np.float64)
    zooms = in_mm(np.diag([*zooms, 1.0]), unit)[0].diagonal()[:3] if len(zooms) == 3 else zooms
    if len(zooms) == len(spacing) and not np.allclose(spacing, zooms, rtol=1e-2):
        remarks.append(f"pixdim says {by(zooms)} mm, the affine {by(spacing)} mm: the affine is used")
    image.meta["codes"] = [sform_code or qform_code or ALIGNED, qform_code or sform_code or ALIGNED]
    image.meta["unit"] = "mm"
    return remarks


def _follow_nrrd(image: MetaTensor, source: Path) -> list[str]:
    """Convert the affine of a NRRD file to mm; returns remarks."""
    remarks = []
    if not nrrd_field(source, "space"):
        remarks.append("the header names no space: left and right are a guess")
    units = nrrd_field(source, "space units").split()
    if units:
        affine, remark = in_mm(np.asarray(image.affine, dtype=np.float64), units[0])
        image.affine = torch.as_tensor(affine)
        image.meta["original_affine"] = torch.as_tensor(affine)
        remarks.append(remark)
    return remarks


def _follow_sidecar(image: MetaTensor, facts: Mapping[str, Any]) -> str:
    """Store facts from a BIDS sidecar (``meta["modality"]``, ``meta["slice_thickness"]`` in mm); returns a remark if it contradicts the
    header."""
    if isinstance(facts.get("Modality"), str):
        image.meta["modality"] = facts["Modality"]
    numbers: dict[str, Any] = {key: facts.get(key) for key in ("SliceThickness", "SpacingBetweenSlices")}
    known = {key: float(value) for key, value in numbers.items() if type(value) in (int, float) and 0 < value < 1000}
    if "SliceThickness" in known:
        image.meta["slice_thickness"] = known["SliceThickness"]
    distance = known.get("SpacingBetweenSlices")
    sides = [float(s) for s in image.pixdim]
    if distance and not np.isclose(sides, distance, rtol=0.02).any():
        return f"the sidecar says that slices are {distance:g} mm apart, the header that voxels are {by(sides)} mm: the header is used"
    return ""


def _without_padding(image: MetaTensor) -> tuple[MetaTensor, str]:
    """Replace a negative padding value by 0: almost the only negative value, in at least 1 % of the voxels. Returns a remark."""
    voxels = image.as_tensor()
    low = float(voxels.min())
    filled = voxels == low
    share = float(filled.float().mean())
    others = voxels[~filled]
    if low >= 0 or share < 0.01 or not len(others) or float((others < 0).float().mean()) > 0.005 or -low < 0.1 * float(others.max()):
        return image, ""
    return MetaTensor(torch.where(filled, 0, voxels), meta=image.meta), f"{share:.1%} of the voxels are {low:g}: taken for padding, 0"


def _without_nan(image: MetaTensor, path: str) -> tuple[MetaTensor, str]:
    """Replace NaN by 0 if it marks the background, which means that it is connected to the border of the volume. Returns a remark.

    Raises:
        InputError: if other values are not finite.
    """
    voxels = image.as_tensor()
    finite = np.isfinite(voxels.numpy())  # torch's own functions take eight bytes for each voxel here
    count = finite.size - np.count_nonzero(finite)
    if not count:
        return image, ""
    background = _connected_to_border(np.isnan(voxels.numpy()[0]))[None]
    unusable = count - np.count_nonzero(background) if count < finite.size else count
    if unusable:
        raise InputError(f"{path}: {unusable} voxels are not finite (NaN, or too large for float32)")
    remark = f"{count} voxels ({count / voxels.numel():.1%}) are NaN: taken for background, 0"
    return MetaTensor(torch.where(torch.from_numpy(background), 0, voxels), meta=image.meta), remark


def _connected_to_border(mask: np.ndarray) -> np.ndarray:
    """The parts of a mask, (X, Y, Z), that reach the border of the volume; neighbours share a face, an edge or a corner.

    Axes of one voxel have no border: there, all voxels would lie on it.
    """
    labels, number = ndimage.label(mask, np.ones((3, 3, 3)))
    reaches = np.zeros(number + 1, bool)
    for axis in (axis for axis in range(3) if mask.shape[axis] > 1):
        for end in (0, -1):
            reaches[np.unique(labels.take(end, axis))] = True
    reaches[0] = False  # not of the mask
    return reaches[labels]
