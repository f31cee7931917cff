"""Dictionary transforms of single-channel volumes (1, X, Y, Z) in RAS orientation: axial slices are the planes of the last axis."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.data
import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, ITKReader, MetaTensor
from monai.transforms import InvertibleTransform, LoadImage, MapTransform, SpatialCrop
from pydicom.misc import is_dicom

from .degradation import Factor, check_factor, degrade, degrade_slices
from .dicom import check_slices, find_series, modality
from .errors import InputError

__all__ = [
    "AxialSlicesd",
    "CropInPlaned",
    "Degraded",
    "LoadVolumed",
    "ScaleIntensityByPercentiled",
    "ThickSlicesd",
    "name_of",
]

logger = logging.getLogger(__name__)


class LoadVolumed(MapTransform):
    """Load a volume with :class:`monai.transforms.LoadImage` and refuse, by name, whatever is not one.

    Of a NIfTI file the sform holds where it has one, else the qform, as the format wants it. What is odd about a volume without being
    wrong is told in the log and in ``meta["remarks"]``, a line each.

    Args:
        keys: file names (NIfTI, Analyze, MetaImage, NRRD), DICOM folders or series (see :func:`bundle.data.find_volumes`).
        reader: MONAI reader, by name; ``None`` takes nibabel for NIfTI and Analyze, ITK for the rest.

    Raises:
        InputError: naming the file and the reason, for a file that cannot be read or holds no single-channel volume with
            finite, varying intensities; for a DICOM series with gaps.
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
            if source.is_file():
                _check_bytes(source)
            header: Any = nib.load(path) if _is_nifti(source) and source.is_file() else None
            if header is not None and header.get_data_dtype().names:
                raise InputError(f"{path}: one grey-scale volume expected, got colours")
            if source.is_file() and is_dicom(source):
                check_slices(path, [path])  # it may hold all slices as its frames
            image = self.loader(path, reader=self._reader(source)) if source.is_file() else self._load_series(source)
            if isinstance(header, nib.Nifti1Pair):
                remarks = _follow_header(image, header)
        except InputError:
            raise
        except Exception as e:  # a reader can fail in any way on a damaged file
            raise InputError(f"{path}: cannot be read as a volume ({_why_not_read(e.__cause__ or e)})") from e
        sides = " x ".join(str(n) for n in image.shape[1:])
        if image.ndim != 4 or image.shape[0] != 1:
            raise InputError(f"{path}: one grey-scale volume expected, got {image.shape[0]} channel(s) of {sides} voxels")
        if not torch.isfinite(image).all():
            raise InputError(f"{path}: {int((~torch.isfinite(image)).sum())} voxels are not finite (NaN, or too large for float32)")
        if image.min() == image.max():
            raise InputError(f"{path}: every voxel has the value {float(image.min()):g}")
        affine = image.affine[:3, :3]
        if not torch.isfinite(image.affine).all() or float(torch.linalg.det(affine).abs()) < 1e-9:
            raise InputError(f"{path}: the affine is singular: {affine.tolist()}")
        image.meta["filename_or_obj"] = str(path)  # of a DICOM folder, readers keep one file or a list
        image.meta["remarks"] = "\n".join(remarks)
        for remark in remarks:
            logger.warning("%s: %s", path, remark)
        return image

    def _reader(self, source: Path) -> ImageReader:
        # one reader and no other: MONAI would try all it knows in turn, among them numpy's, which runs what a pickle tells it to
        name = self.reader or ("NibabelReader" if _is_nifti(source) else "ITKReader")
        return getattr(monai.data, name)()

    def _load_series(self, source: Path) -> MetaTensor:
        folder = source if source.is_dir() else source.parent
        series = find_series(folder)
        if source.is_dir() and len(series) > 1:
            raise InputError(f"{source}: holds {len(series)} DICOM series; name one of them: {source / min(series)}, ...")
        identifier = next(iter(series), "") if source.is_dir() else source.name
        if identifier not in series:
            raise InputError(f"{source}: no such file, folder or DICOM series")
        files = series[identifier]
        check_slices(str(source), files)
        reader = self._reader(source) if self.reader else ITKReader(series_name=identifier)
        image = self.loader(str(folder), reader=reader)
        image.meta["modality"] = modality(files[0])
        return image


class ScaleIntensityByPercentiled(MapTransform, InvertibleTransform):
    """Divide by a high percentile of the non-zero magnitudes, so that one outlier voxel does not set the scale.

    Args:
        keys: volumes (1, X, Y, Z).
        percentile: in percent.
        clip: whether to clip to [0, 1] (training and evaluation); clipping is not undone by the inverse.

    Raises:
        ValueError: for a percentile outside (0, 100].
    """

    def __init__(self, keys: KeysCollection, percentile: float = 99.9, clip: bool = False) -> None:
        super().__init__(keys)
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be in (0, 100], got {percentile}")
        self.percentile, self.clip = percentile, clip

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            magnitudes = d[key].as_tensor().abs().numpy()
            # torch.quantile refuses more than 16 million elements
            scale = float(np.percentile(magnitudes[magnitudes > 0], self.percentile))
            d[key] = d[key] / scale
            d[key].meta["unit_intensity"] = scale
            if self.clip:
                d[key] = d[key].clamp(0, 1)
            self.push_transform(d, key, extra_info={"scale": scale})
        return d

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            scale = self.pop_transform(d, key)["extra_info"]["scale"]
            d[key] = d[key] * scale
        return d


class AxialSlicesd(MapTransform):
    """Keep a range of axial slices, counted from 1 at the lower (inferior) end, both ends included.

    Args:
        keys: volumes (1, X, Y, Z).
        axial_slices: first and last slice; ``None`` keeps all.

    Raises:
        InputError: when the range is not ascending from 1; when called on a volume with fewer slices.
    """

    def __init__(self, keys: KeysCollection, axial_slices: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        if axial_slices is not None and (len(axial_slices) != 2 or not 1 <= axial_slices[0] <= axial_slices[1]):
            raise InputError(f"axial_slices must be [first, last] with 1 <= first <= last, got {axial_slices}")
        self.axial_slices = axial_slices

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        if self.axial_slices is None:
            return d
        first, last = self.axial_slices
        for key in self.keys:
            x, y, z = d[key].shape[1:]
            if last > z:
                raise InputError(f"{name_of(d[key])}: axial slices {first} to {last} asked for, but the volume has {z}")
            d[key] = _crop(d[key], (0, 0, first - 1), (x, y, last))
        return d


class CropInPlaned(MapTransform):
    """Crop each axial slice to one size, with the window around the foreground of the whole volume.

    The window is centred on the bounding box of the foreground (voxels above zero) and moved inside the volume, so
    foreground is cut only where its bounding box is larger than the window.

    Args:
        keys: volumes (1, X, Y, Z).
        size: window along X and Y, in voxels; ``None`` keeps the volume.

    Raises:
        InputError: when called on a volume smaller than the window.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be two positive numbers, got {size}")
        self.size = size

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        if self.size is None:
            return d
        for key in self.keys:
            shape = d[key].shape[1:]
            if any(window > side for window, side in zip(self.size, shape)):
                raise InputError(f"{name_of(d[key])}: slices of {shape[0]} x {shape[1]} voxels are smaller than the crop {self.size}")
            foreground = (d[key].as_tensor()[0] > 0).any(-1)
            start = [_window_start(foreground.any(1 - axis), window, side) for axis, (window, side) in enumerate(zip(self.size, shape))]
            end = [a + window for a, window in zip(start, self.size)]
            d[key] = _crop(d[key], (*start, 0), (*end, shape[2]))
        return d


class Degraded(MapTransform):
    """Make the training pair: the volume becomes the target, its degraded self the network's input on the same grid.

    Args:
        keys: the high-resolution volume (1, X, Y, Z); replaced by the low-resolution one, interpolated to the same grid.
            ``meta["factor"]`` tells the factors along x and y.
        target_key: where the high-resolution volume goes.
        factor, mode, interpolation: see :func:`bundle.degradation.degrade`.
    """

    def __init__(
        self, keys: KeysCollection, target_key: str = "label", factor: Factor = 2, mode: str = "bicubic", interpolation: str | None = None
    ) -> None:
        super().__init__(keys)
        self.target_key, self.factors, self.mode, self.interpolation = target_key, check_factor(factor), mode, interpolation

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        for key in self.keys:
            d[self.target_key] = d[key]
            slices = d[key].as_tensor().movedim(-1, 0)
            degraded = degrade(slices, self.factors, self.mode, self.interpolation).movedim(0, -1).contiguous()
            d[key] = MetaTensor(degraded, meta={**d[key].meta, "factor": list(self.factors)})
        return d


class ThickSlicesd(MapTransform):
    """Make the pair of thick slices: the volume becomes the target, its axial slices made thick and interpolated back the input.

    Args:
        keys: the volume of thin slices (1, X, Y, Z); replaced. ``meta["thickness"]`` tells the distance of the thick ones,
            ``meta["factor"]`` the factors along the three axes.
        target_key: where the volume of thin slices goes.
        thickness: distance of the thick slices in mm; an item's own ``"thickness"`` goes before it.
        profile, gap: see :func:`bundle.degradation.acquire_slices`.
    """

    def __init__(
        self, keys: KeysCollection, target_key: str = "label", thickness: float = 4.0, profile: str = "gaussian", gap: float = 0.0
    ) -> None:
        super().__init__(keys)
        self.target_key, self.thickness, self.profile, self.gap = target_key, thickness, profile, gap

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            d[self.target_key] = d[key]
            thickness = float(d.get("thickness", self.thickness))
            factor = slice_factor(d[key], thickness)
            degraded = degrade_slices(d[key].as_tensor(), factor, self.profile, self.gap)
            d[key] = MetaTensor(degraded, meta={**d[key].meta, "thickness": thickness, "factor": [1.0, 1.0, factor]})
        return d


def slice_factor(image: MetaTensor, thickness: float) -> float:
    """Distance of slices of a thickness in mm, in those of a volume of thin ones.

    Raises:
        InputError: when the volume's are thicker.
    """
    factor = round(thickness / float(image.pixdim[2]), 4)
    if factor < 1:
        raise InputError(f"{name_of(image)}: slices of {thickness:g} mm cannot be made of slices of {float(image.pixdim[2]):.4g} mm")
    return factor


def name_of(image: MetaTensor) -> str:
    """File that a volume was loaded from."""
    return str(image.meta.get("filename_or_obj", "volume"))


def _is_nifti(source: Path) -> bool:
    return source.name.lower().endswith((".nii", ".nii.gz", ".img", ".img.gz", ".hdr"))


def _check_bytes(source: Path) -> None:
    """Read a file to its end, and say why where that is not possible: nibabel does not look at gzip's checksum."""
    with gzip.open(source) if source.suffix.lower() == ".gz" else source.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def _why_not_read(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it would need more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).split("\n\n")[0].strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[-2:]) if lines[-1].startswith("-") else lines[-1]  # nibabel goes on after a dash


def _follow_header(image: MetaTensor, header: nib.Nifti1Pair) -> list[str]:
    """Give a volume the affine of its NIfTI header, and keep what else the header says about space; returns remarks.

    MONAI's reader prefers the qform to the sform where only the former agrees with pixdim; the format knows no such rule.
    """
    remarks = []
    affine = header.affine
    image.affine = torch.as_tensor(affine)
    image.meta["original_affine"] = torch.as_tensor(affine)
    sform_code = int(header.header["sform_code"])
    qform = header.get_qform(coded=True)[0] if not sform_code or int(header.header["qform_code"]) else None
    qform_code = int(header.header["qform_code"])
    if not sform_code and not qform_code:
        remarks.append("the header says nothing about orientation (sform and qform unknown): left and right are a guess")
    if sform_code and qform is not None:
        corners = np.stack(np.meshgrid(*([0, n - 1] for n in image.shape[1:4]), indexing="ij"), -1)
        apart = float(np.abs(nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(qform, corners)).max())
        if apart > 0.1:
            remarks.append(f"sform and qform differ by up to {apart:.3g} mm: the sform is used, and both are kept")
            image.meta["sform"], image.meta["qform"] = torch.as_tensor(affine), torch.as_tensor(qform)
    spacing, zooms = nib.affines.voxel_sizes(affine)[: image.ndim - 1], np.asarray(header.header.get_zooms()[:3])
    if len(zooms) == len(spacing) and not np.allclose(spacing, zooms, rtol=1e-2):
        told = [" x ".join(f"{v:.4g}" for v in values) for values in (zooms, spacing)]
        remarks.append(f"pixdim says {told[0]} mm, the affine {told[1]} mm: the affine is used")
    aligned = 2  # NIfTI's code for coordinates that agree with another file's
    image.meta["codes"] = [sform_code or qform_code or aligned, qform_code or sform_code or aligned]
    image.meta["unit"] = header.header.get_xyzt_units()[0]
    return remarks


def _crop(image: MetaTensor, start: Sequence[int], end: Sequence[int]) -> MetaTensor:
    return SpatialCrop(roi_start=start, roi_end=end)(image)  # type: ignore[return-value]


def _window_start(occupied: torch.Tensor, window: int, side: int) -> int:
    indices = occupied.nonzero().flatten()
    first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, side - 1)
    return min(max((first + last + 1 - window) // 2, 0), side - window)
