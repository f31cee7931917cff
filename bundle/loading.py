"""Loading: from a path to a checked volume (1, X, Y, Z) with what its header says."""

from __future__ import annotations

import gzip
import logging
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
from pydicom.misc import is_dicom

from .dicom import check_slices, find_series, modality
from .errors import InputError

__all__ = ["LoadVolumed"]

logger = logging.getLogger(__name__)


class LoadVolumed(MapTransform):
    """Load a volume with :class:`monai.transforms.LoadImage` and refuse, by name, whatever is not one.

    Of a NIfTI file the sform holds where it has one, else the qform, as the format wants it. What is odd about a volume without being
    wrong is told in the log and in ``meta["remarks"]``, a line each.

    Args:
        keys: file names (NIfTI, Analyze, MetaImage, NRRD), DICOM folders or series (see :func:`bundle.subjects.find_volumes`).
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
