"""High to low resolution and back: pure functions of slices (..., H, W).

Both directions share one geometry. A low-resolution pixel covers ``factor`` x ``factor`` high-resolution pixels, so the
high-resolution index i lies at the low-resolution index (i + 0.5) / factor - 0.5: nothing drifts, whatever the size, and whether or
not the factor is a whole number that divides it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from .errors import InputError

__all__ = [
    "DEGRADATIONS",
    "INTERPOLATIONS",
    "PROFILES",
    "Factor",
    "acquire_slices",
    "check_factor",
    "degrade",
    "degrade_slices",
    "downsample",
    "enlarge",
    "interpolate_slices",
    "refined_size",
    "upsample",
]

DEGRADATIONS = ("bicubic", "kspace")
PROFILES = ("gaussian", "box")
INTERPOLATIONS = ("bicubic", "spline", "kspace", "bilinear", "nearest")

Factor = float | Sequence[float]  # of both axes, or of the rows and of the columns

PIXEL_FRACTION = 0.01  # as much of a pixel may be missing or too much: a spacing in a file has few digits


def downsample(image: Tensor, factor: Factor, mode: str = "bicubic") -> Tensor:
    """Low-resolution version of an image.

    Args:
        image: (..., H, W), floating point. If ``factor`` does not divide H or W, the last row or column is repeated to fill the last
            low-resolution pixel, so that the geometry stays exact.
        factor: at least 1: one number for both axes, or two, for H and W.
        mode: ``"bicubic"``: antialiased bicubic (Keys' kernel, a = -0.5), the field's convention; equals MATLAB ``imresize``
            and PIL. ``"kspace"``: truncation of k-space, as a scanner with a smaller acquisition matrix does.

    Returns:
        (..., ceil(H / factor), ceil(W / factor)).

    Raises:
        ValueError: for an unknown ``mode``, or an invalid ``factor`` (:class:`~bundle.errors.InputError`).
    """
    _check_mode(mode, DEGRADATIONS)
    factors = check_factor(factor)
    size = [max(1, math.ceil(side / f - PIXEL_FRACTION)) for side, f in zip(image.shape[-2:], factors)]
    rows, columns = (max(0, math.ceil(n * f - PIXEL_FRACTION) - side) for n, f, side in zip(size, factors, image.shape[-2:]))
    return _resample(_pad_end(image, rows, columns), size, factors, mode)


def upsample(image: Tensor, factor: Factor, mode: str = "bicubic") -> Tensor:
    """Image on a grid refined by ``factor``: (..., H, W) to (..., floor(factor H), floor(factor W)).

    Args:
        image, factor: see :func:`downsample`.
        mode: ``"bicubic"``: the kernel of :func:`downsample`; ``"spline"``: cubic B-splines (:func:`interpolate_slices`); ``"kspace"``:
            the outer k-space is filled with zeros; ``"bilinear"`` and ``"nearest"``: for comparison.
    """
    factors = check_factor(factor)
    return enlarge(image, factors, [refined_size(side, f) for side, f in zip(image.shape[-2:], factors)], mode)


def degrade(image: Tensor, factor: Factor, mode: str = "bicubic", interpolation: str | None = None) -> Tensor:
    """Down- and up-sampled image, (..., H, W) to the same shape: the network's input for the target ``image`` (section 3.3).

    Args:
        image, factor, mode: see :func:`downsample`.
        interpolation: mode of :func:`upsample`; ``None`` uses ``mode``.
    """
    return enlarge(downsample(image, factor, mode), check_factor(factor), image.shape[-2:], interpolation or mode)


def acquire_slices(image: Tensor, factor: float, profile: str = "gaussian", gap: float = 0.0) -> Tensor:
    """Thick slices across the last axis, as a 2D sequence acquires them: weighted means over the slice profile, not decimation.

    Args:
        image: (..., D), floating point.
        factor: distance of the slices, in voxels of ``image``; the geometry is that of :func:`downsample`.
        profile: ``"gaussian"`` or ``"box"``; the full width at half maximum is the slice thickness.
        gap: between slices, as a fraction of their distance; the rest is their thickness.

    Returns:
        (..., ceil(D / factor)).

    Raises:
        ValueError: for an unknown ``profile``, a ``gap`` outside [0, 1), or an invalid ``factor``.
    """
    check_factor(factor)
    if profile not in PROFILES:
        raise InputError(f"profile must be one of {PROFILES}, got {profile!r}")
    if not 0 <= gap < 1:
        raise InputError(f"gap must be in [0, 1), got {gap!r}")
    number = max(1, math.ceil(image.shape[-1] / factor - PIXEL_FRACTION))
    image = _pad_end(image, 0, max(0, math.ceil(number * factor - PIXEL_FRACTION) - image.shape[-1]))
    # from the centre of slice j to the borders of voxel i, in slice thicknesses
    borders = torch.arange(image.shape[-1] + 1, dtype=torch.float64, device=image.device) - 0.5
    centres = (torch.arange(number, dtype=torch.float64, device=image.device) + 0.5) * factor - 0.5
    borders = (borders - centres[:, None]) / (factor * (1 - gap))
    integral = borders.clamp(-0.5, 0.5) if profile == "box" else torch.erf(2 * math.sqrt(math.log(2)) * borders) / 2
    weights = integral.diff()
    return image @ (weights / weights.sum(1, keepdim=True)).T.to(image.dtype)


def degrade_slices(image: Tensor, factor: float, profile: str = "gaussian", gap: float = 0.0) -> Tensor:
    """Thick slices interpolated to the original grid, (..., D) to the same shape. Arguments as for :func:`acquire_slices`."""
    return interpolate_slices(acquire_slices(image, factor, profile, gap), factor, image.shape[-1])


def interpolate_slices(thick: Tensor, factor: float, size: int, order: int = 3) -> Tensor:
    """B-spline interpolation across the last axis, (..., n) to (..., size); the geometry is that of :func:`upsample`.

    Across thick slices it is more accurate than Keys' kernel.

    Args:
        thick: slices.
        factor: distance of the slices, in voxels of the result.
        size: of the last axis of the result.
        order: 3 for the cubic spline, 1 for linear interpolation.
    """
    number = thick.shape[-1]
    to_thick = {"matrix": [1, 1 / factor], "offset": [0, (1 / factor - 1) / 2], "output_shape": (number, size)}
    # interpolation is linear in the slices: interpolating unit vectors gives its weights
    weights = torch.from_numpy(affine_transform(np.eye(number), order=order, mode="nearest", **to_thick))
    return thick @ weights.to(thick)


def refined_size(side: int, factor: float) -> int:
    """Number of refined pixels along an axis of ``side`` pixels: the whole ones that fit into the field of view."""
    return math.floor(side * factor + PIXEL_FRACTION)


def check_factor(factor: Factor) -> tuple[float, float]:
    """Factors of the two axes.

    Raises:
        InputError: unless ``factor`` is a number of at least 1, or two of them.
    """
    factors = tuple(factor) if isinstance(factor, Sequence) and not isinstance(factor, str) else (factor, factor)
    if len(factors) != 2 or not all(isinstance(f, Real) and not isinstance(f, bool) and 1 <= f < math.inf for f in factors):
        raise InputError(f"factor must be a number of at least 1, or two of them, got {factor!r}")
    return factors  # type: ignore[return-value]


def _check_mode(mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise InputError(f"mode must be one of {known}, got {mode!r}")


def _pad_end(image: Tensor, rows: int, columns: int) -> Tensor:
    if rows:
        image = torch.cat([image, image[..., -1:, :].expand(*image.shape[:-2], rows, -1)], -2)
    if columns:
        image = torch.cat([image, image[..., -1:].expand(*image.shape[:-1], columns)], -1)
    return image


def enlarge(image: Tensor, factors: Sequence[float], size: Sequence[int], mode: str = "bicubic") -> Tensor:
    """:func:`upsample` to the size of the image before :func:`downsample`: (..., h, w) to (..., *size)."""
    _check_mode(mode, INTERPOLATIONS)
    if mode == "spline":
        for axis, points, factor in zip((-2, -1), size, factors):
            if factor > 1:
                image = interpolate_slices(image.movedim(axis, -1), factor, points).movedim(-1, axis)
        return image
    return _resample(image, list(size), (1 / factors[0], 1 / factors[1]), mode)


def _resample(image: Tensor, size: list[int], steps: tuple[float, float], mode: str) -> Tensor:
    """Resample each axis: new pixel j lies at index (j + 0.5) step - 0.5 of the input."""
    if mode == "kspace":
        for axis, points, step in zip((-2, -1), size, steps):
            image = _resample_kspace_axis(image.movedim(axis, -1), points, step).movedim(-1, axis)
        return image
    flat = image.reshape(-1, 1, *image.shape[-2:])
    # torch.nn.functional.interpolate takes the size or the factors; where these do not divide, only both together are exact
    scales = (1 / steps[0], 1 / steps[1])
    if mode == "nearest":
        flat = torch.ops.aten._upsample_nearest_exact2d(flat, size, *scales)
    else:  # the antialiased functions use a = -0.5 for bicubic; when enlarging they do not smooth
        resize = getattr(torch.ops.aten, f"_upsample_{mode}2d_aa")
        if size[1] == 1 and size[0] > 1:  # torch 2.13 resamples a single column wrongly, a single row correctly
            flat = resize(flat, [flat.shape[-2], 1], False, 1.0, scales[1]).mT.contiguous()
            flat = resize(flat, [1, size[0]], False, 1.0, scales[0]).mT.contiguous()
        else:
            flat = resize(flat, size, False, *scales)
    return flat.view(*image.shape[:-2], *size)


def _resample_kspace_axis(image: Tensor, size: int, step: float) -> Tensor:
    """Trigonometric interpolation of the last axis at the new centres, without frequencies above the new Nyquist frequency."""
    length = image.shape[-1]
    if size == length and step == 1:
        return image
    cut_off = length / 2 * min(1, 1 / step)  # in periods; exclusive, because the phase is undetermined at the Nyquist frequency
    periods = torch.arange(math.ceil(cut_off - PIXEL_FRACTION / 2), dtype=torch.float64, device=image.device)
    centres = (torch.arange(size, dtype=torch.float64, device=image.device) + 0.5) * step - 0.5
    phase = 2 * math.pi / length * periods[:, None] * centres
    amplitude = (1 + (periods > 0).double()[:, None]) / length  # the spectrum of a real image contains each frequency except 0 twice
    spectrum = torch.fft.rfft(image)[..., : len(periods)]
    return spectrum.real @ (amplitude * phase.cos()).to(image.dtype) - spectrum.imag @ (amplitude * phase.sin()).to(image.dtype)
