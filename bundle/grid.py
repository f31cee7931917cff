"""The voxel grid of a volume (1, X, Y, Z): orientation and refinement."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Orientationd
from torch import Tensor

from .errors import InputError, PassedOver
from .headers import by
from .memory import empty_volume
from .resampling import Factor, check_factor, downsample, enlarge, interpolate_slices, refined_size
from .transforms import add_remarks, name_of

SLICE_WIDTHS = (0.5, 1.3)  # slice thickness over slice distance that networks are told; trained for 0.6 to 1.24
SLICES = 16  # interpolated at a time: more need more memory, fewer need more time
ISOTROPIC = 1.1  # largest side of a voxel, as a multiple of the smallest, that counts as isotropic

__all__ = [
    "InPlaneFactorsd",
    "IsotropicFactorsd",
    "Orientd",
    "ThickAxisLastd",
    "Upsampled",
    "acquired_fractions",
    "acquired_samples",
    "oriented",
    "slice_width",
]


class InPlaneFactorsd(MapTransform):
    """Store the in-plane refinement factors, along x and y, in ``meta["factor"]``.

    Args:
        keys: volumes (1, X, Y, Z).
        factor: one number for both in-plane axes, or two: along x and along y.
        spacing: in-plane voxel size in mm, for both axes or along x and along y; overrides ``factor``. An axis that is already finer does
            not change.

    Raises:
        InputError: for an impossible ``factor`` or ``spacing``, and for a volume that is already finer than ``spacing`` along both axes.
    """

    def __init__(self, keys: KeysCollection, factor: Factor = 2, spacing: Factor | None = None) -> None:
        super().__init__(keys)
        self.factors = check_factor(factor)
        pair: Any = spacing if isinstance(spacing, Sequence) and not isinstance(spacing, str) else (spacing, spacing)
        if spacing is not None and (len(pair) != 2 or not all(_is_size(s) for s in pair)):
            raise InputError(f"spacing must be a positive number in mm, or two of them, got {spacing!r}")
        self.spacing = None if spacing is None else tuple(pair)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            factors = self.factors if self.spacing is None else _factors_to(d[key], self.spacing)
            d[key].meta["factor"] = list(factors)
        return d


class IsotropicFactorsd(MapTransform):
    """Store the three factors that give cubic voxels in ``meta["factor"]``, and the slice thickness as a fraction of the slice distance,
    if it is known, in ``meta["slice_width"]``.

    Args:
        keys: volumes (1, X, Y, Z).
        spacing: voxel size in mm; ``None`` uses the smallest of the volume. An axis that is already finer does not change.
        factor: must be ``None``, because the factors follow from ``spacing``.
        slice_thickness: of the slices across the last axis, in mm; ``None`` takes that of the header, where it is known.

    Raises:
        InputError: for an impossible ``spacing`` or ``slice_thickness``, any ``factor``, and a volume that is already finer than
            ``spacing`` along all axes.
        PassedOver: for a volume whose voxels are already isotropic.
    """

    def __init__(
        self, keys: KeysCollection, spacing: float | None = None, factor: Any = None, slice_thickness: float | None = None
    ) -> None:
        super().__init__(keys)
        if factor is not None:
            raise InputError(f"scale is {factor!r}, but isotropic voxels have the size that spacing says, in mm: use --spacing")
        if spacing is not None and not _is_size(spacing):
            raise InputError(f"spacing must be a positive number in mm, got {spacing!r}")
        if slice_thickness is not None and not _is_size(slice_thickness):
            raise InputError(f"slice_thickness must be a positive number in mm, got {slice_thickness!r}")
        self.spacing, self.slice_thickness = spacing, slice_thickness

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            smallest, largest = float(min(d[key].pixdim)), float(max(d[key].pixdim))
            if self.spacing is None and largest < ISOTROPIC * smallest:
                raise PassedOver(f"{name_of(d[key])}: voxels of {by(d[key].pixdim)} mm are isotropic already")
            d[key].meta["factor"] = list(_factors_to(d[key], [self.spacing or smallest] * 3))
            own, distance = self.slice_thickness, float(d[key].pixdim[2])
            width = own / distance if own else slice_width(d[key])
            if width and not SLICE_WIDTHS[0] <= width <= SLICE_WIDTHS[1]:
                remark = f"slices {width * distance:.4g} mm thick lie {distance:.4g} mm apart; the network is not told, because that is "
                remark += "far outside its training (60 to 124 % of the distance)"
                add_remarks(d[key], [remark])
            d[key].meta["slice_width"] = width
        return d


class Upsampled(MapTransform):
    """Interpolate a volume to a finer grid and update the affine, so that every point keeps its place.

    The transform is not invertible, so that ``Invertd`` restores orientation and intensity and keeps the refined grid.

    Args:
        keys: volumes (1, X, Y, Z), with the factors along x and y, or along all three axes, in ``meta["factor"]``; become
            (1, factor X, factor Y, factor Z).
        mode: in-plane interpolation, see :func:`bundle.resampling.upsample`.
        input_key: key for the volume before interpolation; ``None`` does not keep it.
        from_acquired: start from the samples that were acquired along in-plane axes that are refined and that the scanner zero-filled
            (``meta["acquired_fraction"]``): their noise is not that of finer samples. The grid does not change;
            ``meta["acquired_factor"]`` holds the factors that count from the acquired samples.
    """

    def __init__(self, keys: KeysCollection, mode: str = "bicubic", input_key: str | None = None, from_acquired: bool = False) -> None:
        super().__init__(keys)
        self.mode, self.input_key, self.from_acquired = mode, input_key, from_acquired

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            if self.input_key is not None:
                d[self.input_key] = d[key].as_tensor()
            factors = [float(f) for f in d[key].meta["factor"]]
            d[key] = _refined(d[key], factors, self.mode, acquired_fractions(d[key]) if self.from_acquired else (1.0, 1.0))
        return d


class ThickAxisLastd(MapTransform, InvertibleTransform):
    """Reorient a volume so that the axis with the largest spacing is the last one.

    Sagittal slices become (A, S, R), coronal slices (R, S, A). Axial slices, and volumes whose slices are no thicker than their pixels,
    become RAS.

    Args:
        keys: volumes (1, X, Y, Z) in any orientation.
    """

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            before = nib.aff2axcodes(d[key].affine.numpy())
            spacing = {{"L": "R", "P": "A", "I": "S"}.get(code, code): float(s) for code, s in zip(before, d[key].pixdim)}
            thick = max("SAR", key=lambda code: round(spacing[code], 3))
            d[key] = oriented(d[key], {"S": "RAS", "A": "RSA", "R": "ASR"}[thick])
            self.push_transform(d, key, extra_info={"axcodes": "".join(before)})
        return d

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.key_iterator(d):
            d[key] = oriented(d[key], self.pop_transform(d, key)["extra_info"]["axcodes"])
        return d


class Orientd(Orientationd):
    """:class:`monai.transforms.Orientationd`, whose inverse keeps large volumes in files (:func:`oriented`)."""

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict:  # type: ignore[override]
        d: dict = dict(data)
        for key in self.key_iterator(d):
            before = self.ornt_transform.pop_transform(d[key])["extra_info"]["original_affine"]
            d[key] = oriented(d[key], "".join(nib.aff2axcodes(np.asarray(before))))
        return d


def oriented(image: MetaTensor, axcodes: str) -> MetaTensor:
    """A volume (1, X, Y, Z) with its axes permuted and flipped to ``axcodes``, such as ``"RAS"``; not recorded for inversion. A large
    volume that is flipped is kept in a file (:func:`bundle.memory.empty_volume`). Permuting alone copies nothing."""
    affine = image.affine.cpu().numpy()
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    axes = [1 + int(axis) for axis in turn[:, 0].argsort()]
    flipped = [1 + axis for axis, direction in enumerate(turn[:, 1]) if direction < 0]
    voxels = image.as_tensor()
    if flipped and voxels.device.type == "cpu":
        slowest = max((1, 2, 3), key=voxels.stride)
        turned = empty_volume(voxels.movedim(slowest, 0).shape, voxels.dtype).movedim(0, slowest)
        turned.numpy()[:] = np.flip(voxels.numpy(), tuple(flipped))  # torch would flip into a copy first
        voxels = turned
    elif flipped:
        voxels = voxels.flip(flipped)
    result = MetaTensor(voxels.permute(0, *axes), meta=dict(image.meta), applied_operations=image.applied_operations)
    result.affine = image.affine @ torch.as_tensor(nib.orientations.inv_ornt_aff(turn, image.shape[1:])).to(image.affine)
    return result


def slice_width(image: MetaTensor) -> float:
    """Thickness of the slices across the last axis, as a fraction of their distance: below 1 there are gaps. 0 where the header does not
    say, or says it of another axis."""
    distance = float(image.pixdim[2])
    thickness, spacing = float(image.meta.get("slice_thickness", 0)), float(image.meta.get("slice_spacing", distance))
    return thickness / spacing if thickness and abs(spacing - distance) < 0.01 * distance else 0.0


def acquired_fractions(image: MetaTensor) -> list[float]:
    """Fractions of k-space along x and y that the scanner acquired, before it filled the rest with zeros (``meta["acquired_fraction"]``);
    1 along an axis that is not refined."""
    known = image.meta.get("acquired_fraction", (1.0, 1.0))
    return [fraction if factor > 1 else 1.0 for fraction, factor in zip(known, image.meta["factor"][:2])]


def acquired_samples(slices: Tensor, fractions: Sequence[float]) -> Tensor:
    """Slices (n, ..., H, W) as they were acquired, before the scanner filled k-space with zeros, from their acquired fractions."""
    return slices if min(fractions) == 1 else downsample(slices, [1 / fraction for fraction in fractions], "kspace")


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _factors_to(image: MetaTensor, target: Sequence[float]) -> tuple[float, ...]:
    """Factors to the target voxel size in mm. An axis that is already finer has factor 1; an error if all axes are."""
    sizes = [float(side) for side, _ in zip(image.pixdim, target)]
    factors = [round(size / side, 6) for size, side in zip(sizes, target)]  # the affine may be in single precision
    if max(factors) < 1 - 1e-3:
        asked, present = (by(sides) for sides in (target, sizes))
        raise InputError(f"{name_of(image)}: spacing {asked} mm asked for, but voxels are {present} mm already")
    return tuple(f if f > 1 + 1e-3 else 1.0 for f in factors)


def _refined(image: MetaTensor, factors: Sequence[float], mode: str, acquired: Sequence[float] = (1, 1)) -> MetaTensor:
    """Volume on a finer grid along x and y, and along z if there is a third factor; ``acquired`` is the fraction of k-space along x and y
    that is not zero.

    The centre of refined voxel i lies at the index (i + 0.5) / factor - 0.5 of the input.
    """
    voxels = image.as_tensor()
    if len(factors) > 2:  # first along the thick axis
        voxels = interpolate_slices(voxels, factors[2], refined_size(voxels.shape[-1], factors[2]))
    slices, size = voxels.movedim(-1, 0), [refined_size(side, factor) for side, factor in zip(voxels.shape[1:3], factors)]
    from_acquired = [factor / fraction for factor, fraction in zip(factors, acquired)]

    def enlarged(part: Tensor) -> Tensor:
        return enlarge(acquired_samples(part, acquired), from_acquired, size, mode)

    if len(factors) > 2:  # planes along all axes are looked at
        voxels = enlarged(slices).movedim(0, -1).contiguous()
    else:  # only axial slices are looked at, which lie one after the other in memory
        refined_slices = empty_volume((len(slices), 1, *size), slices.dtype)
        for part, result in zip(slices.split(SLICES), refined_slices.split(SLICES)):
            result.copy_(enlarged(part))
        voxels = refined_slices.movedim(0, -1)
    step = torch.ones(4, dtype=torch.float64)
    step[: len(factors)] /= torch.tensor(factors, dtype=torch.float64)
    to_input = torch.diag(step)
    to_input[:3, 3] = (step[:3] - 1) / 2
    refined = MetaTensor(voxels, meta=image.meta, applied_operations=image.applied_operations)
    refined.affine = image.affine.to(torch.float64) @ to_input
    for name in ("spatial_shape", "original_affine"):  # servers would resample the result to the grid in these entries
        refined.meta.pop(name, None)
    refined.meta["factor"] = list(factors)
    refined.meta["acquired_factor"] = [*from_acquired, *factors[2:]]
    return refined
