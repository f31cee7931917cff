"""Dictionary transforms of single-channel volumes (1, X, Y, Z) in RAS orientation: axial slices are the planes of the last axis."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialCrop

from .errors import InputError
from .resampling import Factor, check_factor, degrade, degrade_slices

logger = logging.getLogger(__name__)

__all__ = [
    "AxialSlicesd",
    "CropInPlaned",
    "Degraded",
    "ThickSlicesd",
    "add_remarks",
    "name_of",
]


class AxialSlicesd(MapTransform):
    """Keep a range of axial slices, counted from 1 at the lower (inferior) end, both ends included.

    Args:
        keys: volumes (1, X, Y, Z).
        axial_slices: first and last slice; ``None`` keeps all.

    Raises:
        InputError: if the range is not ascending from 1; when called on a volume with fewer slices, or whose last axis does not run
            between inferior and superior.
    """

    def __init__(self, keys: KeysCollection, axial_slices: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        pair: Any = axial_slices
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(n) is int for n in pair)
        if pair is not None and not (whole and 1 <= pair[0] <= pair[1]):
            raise InputError(f"axial_slices must be [first, last], whole numbers with 1 <= first <= last, got {axial_slices!r}")
        self.axial_slices = axial_slices

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        if self.axial_slices is None:
            return d
        first, last = self.axial_slices
        for key in self.keys:
            x, y, z = d[key].shape[1:]
            if nib.aff2axcodes(d[key].affine.numpy())[2] not in "SI":
                raise InputError(f"{name_of(d[key])}: axial_slices {self.axial_slices} asked for, but its thick slices are not axial")
            if last > z:
                raise InputError(f"{name_of(d[key])}: axial slices {first} to {last} asked for, but the volume has {z}")
            d[key] = _crop(d[key], (0, 0, first - 1), (x, y, last))
        return d


class CropInPlaned(MapTransform):
    """Crop each axial slice to one size, with one window for the whole volume.

    The window is centred on the bounding box of the foreground (voxels above zero) and shifted into the volume. It cuts foreground only
    if the bounding box is larger than the window.

    Args:
        keys: volumes (1, X, Y, Z).
        size: window along X and Y, in voxels; ``None`` keeps the volume.

    Raises:
        InputError: if ``size`` is not two positive whole numbers; when called on a volume smaller than the window.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        if size is not None and (not isinstance(size, Sequence) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size)):
            raise InputError(f"crop_size must be two positive whole numbers, got {size!r}")
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
    """Make a training pair: the volume becomes the target, its degraded version the network's input on the same grid.

    Args:
        keys: the high-resolution volume (1, X, Y, Z); replaced by the low-resolution one, interpolated to the same grid.
            ``meta["factor"]`` receives the factors along x and y.
        target_key: key for the high-resolution volume.
        factor, mode, interpolation: see :func:`bundle.resampling.degrade`.
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
    """Make a training pair for thick slices: the volume becomes the target, its interpolated thick axial slices the input.

    Args:
        keys: the volume of thin slices (1, X, Y, Z); replaced by the input. ``meta["thickness"]`` receives the distance of the thick slices
            in mm, ``meta["factor"]`` the factors along the three axes.
        target_key: key for the volume of thin slices.
        thickness: distance of the thick slices in mm; an item's ``"thickness"`` overrides it.
        profile, gap: see :func:`bundle.resampling.acquire_slices`.
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
    """Thickness in mm divided by the slice distance of a volume.

    Raises:
        InputError: if the volume's slices are thicker.
    """
    factor = round(thickness / float(image.pixdim[2]), 4)
    if factor < 1:
        raise InputError(f"{name_of(image)}: slices of {thickness:g} mm cannot be made of slices of {float(image.pixdim[2]):.4g} mm")
    return factor


def name_of(image: MetaTensor) -> str:
    """File that a volume was loaded from."""
    return str(image.meta.get("filename_or_obj", "volume"))


def add_remarks(image: MetaTensor, remarks: Sequence[str]) -> None:
    """Log remarks on a volume, one line each, and add them to ``meta["remarks"]``."""
    image.meta["remarks"] = "\n".join(filter(None, [image.meta.get("remarks", ""), *remarks]))
    for remark in remarks:
        logger.warning("%s: %s", name_of(image), remark)


def _crop(image: MetaTensor, start: Sequence[int], end: Sequence[int]) -> MetaTensor:
    return SpatialCrop(roi_start=start, roi_end=end)(image)  # type: ignore[return-value]


def _window_start(occupied: torch.Tensor, window: int, side: int) -> int:
    indices = occupied.nonzero().flatten()
    first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, side - 1)
    return min(max((first + last + 1 - window) // 2, 0), side - window)
