"""Simulated acquisition of anatomy by a scanner: sampling along each axis, noise, magnitude, whole numbers.

An acquisition is separable. Along each axis of an image x, a matrix maps high-resolution samples to measured ones, so that a slice becomes

    y = round(| F_r (S_r x S_c^T + n) F_c^T |)

with the sampling S of :class:`Sampling` (point spread, slice profile, or k-space truncation), complex Gaussian noise n (which the magnitude
turns into Rician noise: Gudbjartsson & Patz, MRM 1995, doi 10.1002/mrm.1910340618), and the k-space filter F (coverage, apodisation).
The geometry is that of :mod:`bundle.resampling`: high-resolution index i lies at the measured index (i + 0.5) / factor - 0.5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .resampling import PIXEL_FRACTION, downsample

__all__ = [
    "ACROSS",
    "PROFILES",
    "WINDOWS",
    "WITHIN",
    "Acquisition",
    "Kinds",
    "Sampling",
    "acquired_fraction",
    "alternate_brightness",
    "cut_to_acquired",
    "filtered",
    "kspace_filter",
    "sampled",
    "sampling_matrix",
]

PROFILES = ("bicubic", "kspace", "gaussian", "box", "trapezoid")
WINDOWS = ("none", "hamming", "tukey")

RAMP = 0.3  # width of each slope of a trapezoid, as a fraction of its width at half maximum
TAPER = 0.5  # cosine part of a Tukey window, as a fraction of its half-width
STEP = 2.5  # dB: least drop at the end of the acquired k-space, in addition to the slope of the spectrum


@dataclass(frozen=True)
class Sampling:
    """How one axis is sampled.

    Args:
        factor: distance between measured samples, in high-resolution samples; at least 1. 1 applies only the filter.
        profile: ``"kspace"``: truncation to the frequencies that the measured samples hold (frequency and phase encoding).
            ``"gaussian"``, ``"box"``, ``"trapezoid"``: a point spread or slice profile; the trapezoid models a selective pulse of
            finite duration, with slopes of 30 % of its width. ``"bicubic"``: the antialiased kernel of the paper's protocol.
        width: full width at half maximum of ``"gaussian"``, ``"box"`` and ``"trapezoid"``, in sample distances: slice thickness divided
            by slice distance. Below 1 there are gaps; above 1 slices overlap.
        coverage: central fraction of the measured k-space that holds data; the rest is filled with zeros.
        window: apodisation of the covered k-space, see :func:`kspace_filter`.

    Raises:
        InputError: if a value is not one of these or out of range.
    """

    factor: float = 1.0
    profile: str = "kspace"
    width: float = 1.0
    coverage: float = 1.0
    window: str = "none"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise InputError(f"factor must be a number of at least 1, got {self.factor!r}")
        if self.profile not in PROFILES:
            raise InputError(f"profile must be one of {PROFILES}, got {self.profile!r}")
        if not 0 < self.width <= 3:
            raise InputError(f"width must be in (0, 3], got {self.width!r}")
        if not 0 < self.coverage <= 1:
            raise InputError(f"coverage must be in (0, 1], got {self.coverage!r}")
        if self.window not in WINDOWS:
            raise InputError(f"window must be one of {WINDOWS}, got {self.window!r}")

    def count(self, size: int) -> int:
        """Samples that cover an axis of ``size`` high-resolution samples."""
        return max(1, math.ceil(size / self.factor - PIXEL_FRACTION))


@dataclass(frozen=True)
class Kinds:
    """Kinds of sampling that are told apart.

    Args:
        samplings: one of each kind; its factor is 1.
        frequencies: how often training draws each, in total 1.
        spread: by how much the width varies within a kind, where a profile has kinds of several widths.
        across: whether they are profiles of thick slices. Only the axis across the slices is then of the kind; else both axes of the
            plane are.
    """

    samplings: tuple[Sampling, ...]
    frequencies: tuple[float, ...]
    spread: float
    across: bool = False

    def __len__(self) -> int:
        return len(self.samplings)

    def index(self, sampling: Sampling) -> int:
        """Kind of a sampling: that of the same profile and window with the nearest width.

        Raises:
            InputError: if there is none.
        """
        same = [n for n, kind in enumerate(self.samplings) if (kind.profile, kind.window) == (sampling.profile, sampling.window)]
        if not same:
            raise InputError(f"no kind of sampling has the profile {sampling.profile!r} and the window {sampling.window!r}")
        return min(same, key=lambda n: abs(self.samplings[n].width - sampling.width))

    def draw(self, random: np.random.Generator) -> Sampling:
        """A random sampling, its factor 1."""
        kind = self.samplings[random.choice(len(self), p=self.frequencies)]
        several = sum(other.profile == kind.profile and other.width != kind.width for other in self.samplings)
        return replace(kind, width=kind.width + random.uniform(-self.spread, self.spread)) if several else kind

    def priors(self, width: float = 0.0, profile: str | None = None) -> Tensor:
        """Probabilities (kinds,) of the kinds before the scan is looked at.

        Args:
            width: of the slice profile, if it is known: only the kinds of the nearest width are then possible.
            profile: the profile, if it is known.
        """
        right_width = [not width or self.index(replace(kind, width=width)) == n for n, kind in enumerate(self.samplings)]
        right_profile = [profile in (None, kind.profile) for kind in self.samplings]
        priors = torch.tensor(self.frequencies) * torch.tensor(right_width) * torch.tensor(right_profile)
        return priors / priors.sum()


WITH_WIDTH = ("gaussian", "box", "trapezoid")  # profiles
GAUSSIAN = (0.75, 0.85, 0.95, 1.05, 1.15, 1.25, 1.35)  # widths
WITHIN = Kinds(
    (
        *(Sampling(window=window) for window in WINDOWS),
        Sampling(profile="bicubic"),
        Sampling(profile="box"),
        *(Sampling(profile="gaussian", width=width) for width in GAUSSIAN),
    ),
    (0.35, 0.075, 0.075, 0.16, 0.14, *len(GAUSSIAN) * (0.2 / len(GAUSSIAN),)),
    0.05,
)  # within the plane of the slices
THICKNESSES = {0.68: 0.12, 0.84: 0.14, 1.0: 0.62, 1.16: 0.12}  # in slice distances, and their frequencies
ACROSS = Kinds(
    tuple(Sampling(profile=profile, width=width) for profile in WITH_WIDTH for width in THICKNESSES),
    tuple(share * frequency for share in (0.4, 0.3, 0.3) for frequency in THICKNESSES.values()),
    0.08,
    across=True,
)


@dataclass(frozen=True)
class Acquisition:
    """How an image is measured, axis by axis.

    Args:
        axes: sampling along the last axes of the image, in order.
        noise: standard deviation of the noise in each of the two channels of the complex image, on the scale of the intensities.
        brightness: largest relative deviation of a slice's intensity; neighbouring slices of an interleaved sequence deviate in opposite
            directions. The slices lie along the last axis with a slice profile.
        step: difference between two neighbouring stored values, on the scale of the intensities; 0 does not round.

    Example:
        >>> scan = Acquisition((Sampling(2), Sampling(2)), noise=0.02)
        >>> scan(torch.rand(64, 65), np.random.default_rng(0)).shape
        torch.Size([32, 33])
    """

    axes: Sequence[Sampling] = field(default_factory=tuple)
    noise: float = 0.0
    brightness: float = 0.0
    step: float = 0.0

    def __call__(self, image: Tensor, random: np.random.Generator | None = None) -> Tensor:
        """Measured image: (..., n, ...) to (..., ceil(n / factor), ...), not negative, float.

        Args:
            image: floating point; its last ``len(axes)`` axes are sampled.
            random: random generator for noise and brightness; ``None`` uses a new one.
        """
        random = random or np.random.default_rng()
        first = image.ndim - len(self.axes)
        image = sampled(image, self.axes)
        if self.brightness:
            axis = first + max((n for n, s in enumerate(self.axes) if s.profile in WITH_WIDTH), default=0)
            gains = alternate_brightness(image.shape[axis], self.brightness, random).to(image)
            image = image * gains.view(-1, *[1] * (image.ndim - 1 - axis))
        channels = [image]
        if self.noise:
            noise = torch.from_numpy(random.standard_normal((2, *image.shape), dtype=np.float32)).to(image)
            channels = [image + self.noise * noise[0], self.noise * noise[1]]
        channels = [filtered(channel, self.axes) for channel in channels]
        if len(channels) == 2:
            magnitude = torch.hypot(*channels)
        else:  # the paper's bicubic overshoots: clip it like image files without negative values
            magnitude = channels[0].clamp(min=0) if any(s.profile == "bicubic" for s in self.axes) else channels[0].abs()
        return (magnitude / self.step).round() * self.step if self.step else magnitude


def sampled(image: Tensor, axes: Sequence[Sampling]) -> Tensor:
    """Sample an image along its last axes, (..., n, ...) to (..., ceil(n / factor), ...), without noise, magnitude or k-space filter."""
    for axis, sampling in enumerate(axes, image.ndim - len(axes)):
        if sampling.factor > 1:
            image = _along(image, axis, sampling_matrix(image.shape[axis], sampling))
    return image


def filtered(image: Tensor, axes: Sequence[Sampling]) -> Tensor:
    """Apply the k-space filters of the last axes of measured samples, which keep their shape."""
    for axis, sampling in enumerate(axes, image.ndim - len(axes)):
        if sampling.coverage < 1 or sampling.window != "none":
            image = _along(image, axis, kspace_filter(image.shape[axis], sampling.coverage, sampling.window))
    return image


@functools.lru_cache(maxsize=64)
def sampling_matrix(size: int, sampling: Sampling) -> Tensor:
    """Matrix of a sampling: (count, size), float32; each row sums to 1.

    If the factor does not divide ``size``, the last high-resolution sample is repeated to cover the last measured one.
    """
    count, factor = sampling.count(size), sampling.factor
    if sampling.profile in ("bicubic", "kspace"):
        rows = downsample(torch.eye(size, dtype=torch.float64)[:, :, None], (factor, 1), sampling.profile)
        return rows[..., 0].T.float().contiguous()
    padded = max(size, math.ceil(count * factor - PIXEL_FRACTION))
    # borders of the high-resolution samples, from the centre of each measured one, in widths of the profile
    borders = np.arange(padded + 1) - 0.5
    centres = (np.arange(count) + 0.5) * factor - 0.5
    weights = np.diff(_integral(sampling.profile, (borders - centres[:, None]) / (factor * sampling.width)), axis=1)
    weights[:, size - 1] = weights[:, size - 1 :].sum(1)
    weights = weights[:, :size]
    return torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()


@functools.lru_cache(maxsize=64)
def kspace_filter(size: int, coverage: float = 1.0, window: str = "none") -> Tensor:
    """Matrix (size, size) that multiplies the spectrum along an axis by a window, and by 0 outside it.

    Args:
        size: samples of the axis.
        coverage: half-width c of the window, as a fraction of the Nyquist frequency.
        window: ``"none"``: 1. ``"hamming"``: 0.54 + 0.46 cos(pi k / c). ``"tukey"``: 1 up to half of c, then a half period of a cosine
            to 0. Harris, Proc. IEEE 1978, doi 10.1109/PROC.1978.10837.
    """
    k = 2 * np.abs(np.fft.rfftfreq(size)) / coverage
    if window == "hamming":
        weights = 0.54 + 0.46 * np.cos(np.pi * k)
    elif window == "tukey":
        weights = 0.5 + 0.5 * np.cos(np.pi * ((k - 1 + TAPER) / TAPER).clip(0, 1))
    else:
        weights = np.ones_like(k)
    weights[k > 1 + 1e-9] = 0
    matrix = np.fft.irfft(np.fft.rfft(np.eye(size), axis=0) * weights[:, None], size, axis=0)
    return torch.from_numpy(matrix).float()


def alternate_brightness(count: int, largest: float, random: np.random.Generator) -> Tensor:
    """Factors (count,) for the intensities of interleaved slices: odd and even slices deviate in opposite directions, by varying
    amounts."""
    deviation = random.uniform(-largest, largest) / 2 * (-1.0) ** np.arange(count) + random.uniform(-largest, largest, count) / 2
    return torch.from_numpy(1 + deviation)


def _integral(profile: str, x: np.ndarray) -> np.ndarray:
    """Integral of a profile of width 1 and area 1 from its centre to x."""
    if profile == "gaussian":
        return torch.erf(2 * math.sqrt(math.log(2)) * torch.from_numpy(x)).numpy() / 2
    if profile == "box":
        return x.clip(-0.5, 0.5)
    flat, end = (1 - RAMP) / 2, (1 + RAMP) / 2  # of the half-width: where a slope begins and ends
    distance = np.abs(x).clip(0, end)
    slope = (distance - flat).clip(0)
    return np.sign(x) * (distance - slope**2 / (2 * RAMP))


def _along(image: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Apply ``matrix`` (m, n) along an axis of n samples."""
    return torch.tensordot(image, matrix.to(image), ([axis], [1])).movedim(-1, axis)


def acquired_fraction(image: Tensor, axis: int) -> float:
    """Acquired fraction of k-space along an axis: below 1 if the scanner filled the rest with zeros to interpolate.

    The spectrum of such an image drops abruptly well below the Nyquist frequency and stays low, while that of anatomy and noise falls
    evenly, and that of repeated sharp edges rises again.

    Args:
        image: any number of axes.
        axis: axis to examine.

    Returns:
        in (0, 1]; 1 if there is no such drop, or too few samples to detect one.
    """
    size = image.shape[axis]
    if size < 32:
        return 1.0
    lines = image.movedim(axis, -1)
    parts = lines if lines.ndim > 2 else lines[None]  # the spectrum of a whole volume would need twice its memory
    power = sum(torch.fft.rfft(part.float()).abs().square().reshape(-1, size // 2 + 1).mean(0) for part in parts) / len(parts)
    level = 10 * (power + power.max() * 1e-12).log10().numpy()
    half = max(2, round(0.05 * len(level)))  # levels are compared over this many frequencies on either side
    steps = [level[i - half : i].mean() - level[i : i + half].mean() for i in range(half, len(level) - half + 1)]
    steps = np.asarray(steps) - np.median(steps)
    steps[: max(0, round(0.4 * len(level)) - half)] = 0  # the spectrum of anatomy is steep at low frequencies
    edge = int(steps.argmax()) + half
    stays_low = level[edge:].max() < level[edge - half : edge].mean()
    return edge / (len(level) - 1) if steps[edge - half] > STEP and stays_low else 1.0


def cut_to_acquired(volume: Tensor, axes: Sequence[int]) -> Tensor:
    """Volume (X, Y, Z) without zero-filled k-space along some axes, if it is more than a tenth: zeros that the scanner filled in are not
    ground truth."""
    for axis in axes:
        fraction = acquired_fraction(volume, axis)
        if fraction < 0.9:
            volume = downsample(volume.movedim(axis, -1), (1, 1 / fraction), "kspace").movedim(-1, axis)
    return volume.contiguous()
