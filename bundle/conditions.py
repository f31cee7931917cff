"""Inputs of a network beside the pixels: their positions, the sharpness and noise of the scan, and how it was sampled, if that is known.

Nothing here needs the header of the scan. The measured samples are recovered from the interpolated slice, and their spectrum shows how they
were acquired: with a point spread it falls, with k-space truncation it does not, and noise raises its end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .acquisition import WITHIN
from .resampling import PIXEL_FRACTION, downsample, enlarge

__all__ = [
    "FACTS",
    "MIDDLES",
    "NEIGHBOURS",
    "between_neighbours",
    "conditions",
    "measured_samples",
    "positions",
    "slices_with_anatomy",
    "spectral_facts",
    "with_measured_kspace",
    "with_neighbours",
    "zero_filled_excess",
]

NOISE_UNIT = 0.02  # of the intensity scale
BANDS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # borders, in Nyquist frequencies of the measured samples
CORNER = 0.7  # Nyquist frequencies: if both frequencies are above, noise dominates anatomy
NEIGHBOURS = (-1, 1, -2, 2)  # the slices around one that the network sees too, in the order of its inputs
MIDDLES = slice(len(NEIGHBOURS) // 2, None, 1 + len(NEIGHBOURS))  # the slices themselves among those of between_neighbours()
SLICES = 32  # used for the facts, at most
FOREGROUND = 0.05  # of the intensity scale
SPECTRUM = 2 * (len(BANDS) - 2)  # numbers that describe it
FACTS = 3 + SPECTRUM + len(WITHIN)  # constant maps that conditions() adds


def positions(factors: Sequence[float], rows: slice, columns: slice) -> Tensor:
    """Positions of the pixels of an interpolated slice between the measured ones, which let one network serve any factor.

    Args:
        factors: factors of the rows and of the columns.
        rows, columns: part of the slice, in pixels.

    Returns:
        (6, H, W): for the rows, then for the columns, cosine and sine of 2 pi times the low-resolution index of
        :func:`bundle.resampling.downsample`, and 1 / factor. Along an axis that was not refined they are 1, 0 and 1.
    """
    size = (rows.stop - rows.start, columns.stop - columns.start)
    maps = []
    for axis, (part, factor) in enumerate(zip((rows, columns), factors)):
        index = (torch.arange(part.start, part.stop, dtype=torch.float64) + 0.5) / factor - 0.5
        turns = 2 * math.pi * index
        for line in (turns.cos(), turns.sin(), torch.full_like(turns, 1 / factor)):
            maps.append(line.unsqueeze(1 - axis).expand(size))
    return torch.stack(maps).float()


def conditions(
    factors: Sequence[float],
    rows: slice,
    columns: slice,
    widths: Sequence[float],
    noise: float,
    spectrum: Tensor,
    kinds: Tensor | None = None,
) -> Tensor:
    """Condition maps of the general network for a slice.

    Args:
        factors, rows, columns: see :func:`positions`.
        widths: for the rows and the columns, slice thickness divided by slice distance; 0 if unknown or not across thick slices.
        noise: standard deviation, on the scale of the intensities.
        spectrum: (10,), see :func:`spectral_facts`.
        kinds: (12,), the probabilities of the kinds of sampling: of :data:`bundle.acquisition.ACROSS` if an axis runs across thick slices,
            else of :data:`bundle.acquisition.WITHIN`. ``None`` gives zeros.

    Returns:
        (6 + 25, H, W): :func:`positions`, then constant maps of both widths, of the noise in units of 0.02, of the spectrum, and of the
        probabilities, all of order 1.
    """
    maps = positions(factors, rows, columns)
    kinds = torch.zeros(len(WITHIN)) if kinds is None else kinds.cpu()
    facts = torch.cat([torch.tensor([*widths, noise / NOISE_UNIT]), spectrum.cpu(), kinds]).float()
    return torch.cat([maps, facts[:, None, None].expand(FACTS, *maps.shape[1:])])


def spectral_facts(measured: Tensor) -> tuple[float, Tensor]:
    """Noise and sharpness of slices, from their spectrum.

    Args:
        measured: (..., h, w), the measured samples, on the scale of the intensities. The facts are means over the slices with anatomy, or
            over 32 of them, evenly spaced.

    Returns:
        an estimate of the standard deviation of the noise, from the frequencies at which anatomy is weakest (fine anatomy raises it); and
        (10,): for the rows, then for the columns, the decadic logarithm of the power in five frequency bands up to the Nyquist frequency,
        relative to that in a low band.
    """
    slices = torch.as_tensor(measured).reshape(-1, *measured.shape[-2:])
    chosen = slices_with_anatomy(slices, 0.01, SLICES)
    if not chosen:
        return 0.0, torch.zeros(SPECTRUM)
    slices = slices[chosen].float()
    windows = [torch.hann_window(side + 2, periodic=False)[1:-1].to(slices) for side in slices.shape[1:]]
    window = windows[0][:, None] * windows[1]  # otherwise, opposite borders that do not match would look like sharp edges
    power = torch.fft.fft2(slices * window).abs().square()
    frequencies = [2 * torch.fft.fftfreq(side).abs().to(slices) for side in slices.shape[1:]]
    corner = (frequencies[0][:, None] > CORNER) & (frequencies[1] > CORNER)
    if not corner.any():  # a few pixels
        return 0.0, torch.zeros(SPECTRUM)
    covered = (window.square() * (slices > 0)).sum((1, 2))  # zeros in a file were cut off, and have no noise either
    noise = (power[:, corner].mean(1) / covered).sqrt().mean()
    facts = []
    for axis, f in enumerate(frequencies):
        line = power.mean(2 - axis)
        bands = [line[:, (f > low) & (f <= high)] for low, high in itertools.pairwise(BANDS)]
        # with few samples a band may be empty: it then repeats the band below
        levels: list[Tensor] = []
        for band in bands:
            levels.append((band.mean(1) + 1e-6).log10() if band.shape[1] else levels[-1] if levels else torch.zeros(len(line)).to(line))
        facts += [(level - levels[0]).mean() for level in levels[1:]]
    return float(noise), torch.stack(facts).cpu()


def slices_with_anatomy(slices: Tensor, part: float, count: int) -> list[int]:
    """Indices of up to ``count`` slices (n, h, w), evenly spaced among those of which more than ``part`` is anatomy."""
    # one by one: comparing all slices at once would take as much memory as they do
    filled = [n for n, one in enumerate(slices) if float((one > FOREGROUND).float().mean()) > part]
    return [filled[n] for n in torch.linspace(0, len(filled) - 1, min(len(filled), count)).round().long().tolist()]


def with_neighbours(n: int, count: int) -> list[int]:
    """Indices of slice ``n`` and of its :data:`NEIGHBOURS`, for ``count`` slices. Beyond the ends, the last slice is repeated.

    Example:
        >>> with_neighbours(2, 9), with_neighbours(0, 9)
        ([2, 1, 3, 0, 4], [0, 0, 1, 0, 2])
    """
    return [min(max(n + offset, 0), count - 1) for offset in (0, *NEIGHBOURS)]


def between_neighbours(places: Sequence[int], count: int) -> list[int]:
    """Indices of some of ``count`` slices, each between its neighbours, in the order of the volume. Inference finds the neighbours of a
    slice by their place, so the results of :data:`MIDDLES` are those in the whole volume.

    Example:
        >>> between_neighbours([3, 8], 9)
        [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    """
    return [index for n in places for index in sorted(with_neighbours(n, count))]


def measured_samples(image: Tensor, factors: Sequence[float], mode: str = "spline") -> Tensor:
    """Recover the samples (..., h, w) from which :func:`bundle.resampling.enlarge` interpolated slices (..., H, W)."""
    rows, columns = (_inverse(side, factor, mode).to(image) for side, factor in zip(image.shape[-2:], factors))
    return rows @ image @ columns.T


def zero_filled_excess(
    image: Tensor,
    factors: Sequence[float],
    across: Sequence[bool] = (False, False),
    mode: str = "spline",
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """Difference between zero-filling and interpolation of the measured samples.

    If the scanner truncated k-space, zero-filling is exact; across thick slices it is not.

    Args:
        image: (..., H, W), interpolated slices.
        factors: factors of the rows and of the columns.
        across: axes across thick slices, which keep their interpolation.
        mode: mode of the interpolation.
        rows, columns: part of the slices to return.

    Returns:
        (..., rows, columns).
    """
    filled = image
    for axis, (factor, thick, part) in enumerate(zip(factors, across, (rows, columns))):
        if factor > 1 and not thick:
            matrix = _to_zero_filled(image.shape[axis - 2], factor, mode)[part].to(image)
            filled = matrix @ filled if axis == 0 else filled @ matrix.T
        else:
            filled = filled[..., part, :] if axis == 0 else filled[..., part]
    return filled - image[..., rows, columns]


def with_measured_kspace(result: Tensor, image: Tensor, factors: Sequence[float], share: float = 1.0, mode: str = "spline") -> Tensor:
    """Restore the measured samples in the k-space of a result, and with them the noise and texture of the scan.

    Args:
        result: (..., H, W).
        image: (..., H, W), the interpolated slices from which the result was computed.
        factors: factors of the rows and of the columns.
        share: 1 replaces the frequencies of the measured samples in the result, 0 keeps it; values in between mix.
        mode: mode of the interpolation.

    Returns:
        (..., H, W). With a share of 1, k-space truncation of it gives the measured samples.
    """
    missing = measured_samples(image, factors, mode) - downsample(result, factors, "kspace")
    return result + share * enlarge(missing, factors, result.shape[-2:], "kspace")


@functools.lru_cache(maxsize=16)
def _enlargement(size: int, factor: float, mode: str) -> Tensor:
    """Matrix (size, n) of an interpolation along one axis."""
    count = max(1, math.ceil(size / factor - PIXEL_FRACTION))
    return enlarge(torch.eye(count, dtype=torch.float64)[:, :, None], (factor, 1), (size, 1), mode)[..., 0].T.contiguous()


@functools.lru_cache(maxsize=16)
def _inverse(size: int, factor: float, mode: str) -> Tensor:
    """Matrix (n, size) that recovers the samples."""
    return torch.eye(size, dtype=torch.float64) if factor == 1 else torch.linalg.pinv(_enlargement(size, factor, mode))


@functools.lru_cache(maxsize=16)
def _to_zero_filled(size: int, factor: float, mode: str) -> Tensor:
    """Matrix (size, size) from an interpolation to zero-filling."""
    return _enlargement(size, factor, "kspace") @ _inverse(size, factor, mode)
