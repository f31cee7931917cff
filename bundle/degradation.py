"""High to low resolution and back: pure functions of slices (..., H, W).

Both directions share one geometry. A low-resolution pixel covers ``factor`` x ``factor`` high-resolution pixels, so the
high-resolution index i lies at the low-resolution index (i + 0.5) / factor - 0.5: nothing drifts, whatever the size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

__all__ = ["DEGRADATIONS", "INTERPOLATIONS", "check_factor", "degrade", "downsample", "upsample"]

DEGRADATIONS = ("bicubic", "kspace")
INTERPOLATIONS = ("bicubic", "kspace", "bilinear", "nearest")


def downsample(image: Tensor, factor: int, mode: str = "bicubic") -> Tensor:
    """Low-resolution version of an image.

    Args:
        image: (..., H, W), floating point. Where ``factor`` does not divide H or W, the last row or column is repeated
            until it does, so that the geometry stays exact.
        factor: integer factor of both axes.
        mode: ``"bicubic"``: antialiased bicubic (Keys' kernel, a = -0.5), the field's convention; equals MATLAB ``imresize``
            and PIL. ``"kspace"``: truncation of k-space, as a scanner with a smaller acquisition matrix does.

    Returns:
        (..., ceil(H / factor), ceil(W / factor)).

    Raises:
        ValueError: for an unknown ``mode``, or a ``factor`` that is not a positive integer (:class:`~bundle.errors.InputError`).
    """
    _check_mode(mode, DEGRADATIONS)
    check_factor(factor)
    height, width = image.shape[-2:]
    image = _pad_end(image, -height % factor, -width % factor)
    size = (image.shape[-2] // factor, image.shape[-1] // factor)
    return _resize(image, size) if mode == "bicubic" else _resize_kspace(image, size)


def upsample(image: Tensor, factor: int, mode: str = "bicubic") -> Tensor:
    """Image on a grid refined by ``factor``: (..., H, W) to (..., factor H, factor W). Arguments as of :func:`downsample`.

    ``"bicubic"`` interpolates with the same kernel; ``"kspace"`` fills the outer k-space with zeros; ``"bilinear"`` and
    ``"nearest"`` are there to be compared with.
    """
    _check_mode(mode, INTERPOLATIONS)
    check_factor(factor)
    size = (image.shape[-2] * factor, image.shape[-1] * factor)
    return _resize_kspace(image, size) if mode == "kspace" else _resize(image, size, mode)


def degrade(image: Tensor, factor: int, mode: str = "bicubic", interpolation: str | None = None) -> Tensor:
    """Down- and up-sampled image, (..., H, W) to the same shape: the network's input for the target ``image`` (section 3.3).

    Args:
        image, factor, mode: see :func:`downsample`.
        interpolation: mode of :func:`upsample`; ``None`` is that of the degradation.
    """
    return upsample(downsample(image, factor, mode), factor, interpolation or mode)[..., : image.shape[-2], : image.shape[-1]]


def check_factor(factor: int) -> None:
    """Refuse what is not a positive integer."""
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise InputError(f"factor must be a positive integer, got {factor!r}")


def _check_mode(mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise ValueError(f"mode must be one of {known}, got {mode!r}")


def _pad_end(image: Tensor, rows: int, columns: int) -> Tensor:
    if rows:
        image = torch.cat([image, image[..., -1:, :].expand(*image.shape[:-2], rows, -1)], -2)
    if columns:
        image = torch.cat([image, image[..., -1:].expand(*image.shape[:-1], columns)], -1)
    return image


def _resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    flat = image.reshape(-1, 1, *image.shape[-2:])
    if mode == "nearest":
        flat = F.interpolate(flat, size=size, mode="nearest-exact")
    else:  # antialias=True selects a = -0.5 for bicubic when enlarging too, where nothing needs to be smoothed
        flat = F.interpolate(flat, size=size, mode=mode, antialias=True, align_corners=False)
    return flat.view(*image.shape[:-2], *size)


def _resize_kspace(image: Tensor, size: tuple[int, int]) -> Tensor:
    for axis, points in zip((-2, -1), size):
        image = _resize_kspace_axis(image.movedim(axis, -1), points).movedim(-1, axis)
    return image


def _resize_kspace_axis(image: Tensor, size: int) -> Tensor:
    """Keep or zero-fill the spectrum of the last axis. The phase ramp moves sample 0 to the centre of the new first pixel."""
    length = image.shape[-1]
    if size == length:
        return image
    spectrum = torch.fft.rfft(image)
    keep = (min(length, size) + 1) // 2  # drops the Nyquist frequency of an even size, whose phase is not determined
    shift = (length / size - 1) / 2  # in pixels of the given grid
    phase = 2 * math.pi * shift / length * torch.arange(keep, dtype=image.dtype, device=image.device)
    spectrum = spectrum[..., :keep] * torch.polar(torch.ones_like(phase), phase)
    return torch.fft.irfft(spectrum, n=size) * (size / length)
