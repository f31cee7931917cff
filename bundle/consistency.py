"""Recognise how a scan was sampled, within its plane or across thick slices, and correct a result so that it agrees with the samples.

A network that does not know the acquisition answers with a compromise between those that fit, and smooths what was measured. Once the
sampling S is known, the network receives it (:func:`bundle.conditions.conditions`), and the measured samples y correct its result x:

    x + S^T (S S^T + w)^-1 (y - S x)

which is the most probable image if the errors of x are white and y has white noise; w is the ratio of their variances. It changes only what
the acquisition passed: detail beyond it stays that of the network. The air around the head keeps the network's result too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .acquisition import ACROSS, WITHIN, Kinds, Sampling, acquired_fraction, filtered, sampling_matrix
from .checkpoints import load_weights
from .conditions import slices_with_anatomy
from .errors import InputError
from .files import sha256
from .networks import AcquisitionClassifier

__all__ = ["Correction", "Recognition", "RecognitionLoss", "Recognized", "recognition", "window_of"]

SIZE = 96  # side of the slices that the classifier sees
SLICES = 16  # of a scan that it sees, at most
NOISE_UNIT = 0.02  # of the classifier's output
EQUAL = 0.012  # noise as large as the usual error of the network: both then count alike; larger values keep more of small lesions
EQUAL_ACROSS = 0.006  # the same across thick slices, where the network errs less in what was measured
SMALLEST = 0.03  # w without noise: samples are rounded, and the model of the sampling is not exact
SCANNER = 1.0  # logarithm of the prior odds of k-space truncation against any other kind, because scanners truncate
DOUBT = 2.0  # part of w if the kind is as likely wrong as right
AGREEMENT = 2.0  # exponent of the disagreement of a result with the samples, as evidence against a kind; chosen on validation volumes
AIR = (0.01, 0.03)  # mean intensities of 5 x 5 pixels: air up to the first, head from the second
FILLED = 0.03  # part of a slice that must be anatomy


def window_of(samples: Tensor, top: int = 0, left: int = 0) -> Tensor:
    """Square of 96 x 96 samples from (h, w), starting at ``top`` and ``left``; smaller images are padded with zeros on all sides."""
    samples = samples[top : top + SIZE, left : left + SIZE]
    rows, columns = SIZE - samples.shape[0], SIZE - samples.shape[1]
    return F.pad(samples, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


@dataclass(frozen=True)
class Recognized:
    """How the refined axes of a scan were sampled.

    Args:
        kinds: (12,), the probabilities of the kinds of ``known``.
        noise: standard deviation that the acquisition added, on the scale of the intensities.
        known: the kinds that were told apart.
        width: of the slice profile, if the header gave it.
    """

    kinds: Tensor
    noise: float
    known: Kinds = WITHIN
    width: float = 0.0

    @functools.cached_property
    def _best(self) -> list[int]:
        """The kinds of the most probable profile, the most probable first. They differ in their widths; box and trapezoid count as one."""
        profiles: dict[tuple[str, str], list[int]] = {}
        for n in self.kinds.argsort(descending=True).tolist():
            kind = self.known.samplings[n]
            profiles.setdefault((kind.profile.replace("trapezoid", "box"), kind.window), []).append(n)
        return max(profiles.values(), key=lambda same: float(self.kinds[same].sum()))

    @property
    def probability(self) -> float:
        """That the profile is right."""
        return float(self.kinds[self._best].sum())

    @functools.cached_property
    def sampling(self) -> Sampling:
        """The most probable profile, with its width and window; its factor is 1."""
        probabilities = self.kinds[self._best]
        widths = torch.tensor([self.known.samplings[n].width for n in self._best])
        width = self.width or round(float((probabilities * widths).sum() / probabilities.sum()), 3)
        return replace(self.known.samplings[self._best[0]], width=width)

    def __str__(self) -> str:
        s = self.sampling
        if self.known.across:
            name = f"{s.profile} slice profile, {s.width:.2f} slice distances wide"
        else:
            names = {"kspace": "k-space truncation", "gaussian": f"Gaussian point spread, {s.width:.2f} pixels wide"}
            name = names.get(s.profile, s.profile)
        window = "" if s.window == "none" else f" with a {s.window.capitalize()} window"
        return f"{name}{window} (probability {self.probability:.2f}), noise {100 * self.noise:.1f} %"

    def facts(self) -> dict[str, Any]:
        """For the metadata of a result: values that MONAI can take apart, and a text."""
        s = self.sampling
        values = {"profile": s.profile, "width": s.width, "window": s.window}
        return {"text": str(self), **values, "probability": round(self.probability, 3), "noise": round(self.noise, 5)}


class Recognition:
    """Recognise the sampling of scans by a trained classifier.

    Args:
        checkpoint: weights of :class:`bundle.networks.AcquisitionClassifier`.
        acquisition: ``"auto"``, or the profile of the sampling where it is known; the classifier then finds the width of a profile, a
            window and the noise only.
        kinds: what it tells apart: :data:`bundle.acquisition.WITHIN` the plane, or ``ACROSS`` thick slices, which lie along the rows.

    Raises:
        InputError: if the weights cannot be loaded, or for another ``acquisition``.
    """

    def __init__(self, checkpoint: str | Path, acquisition: str = "auto", kinds: Kinds = WITHIN) -> None:
        profiles = list(dict.fromkeys(kind.profile for kind in kinds.samplings))
        if acquisition not in ("auto", *profiles):
            raise InputError(f"acquisition must be auto, unknown, {', '.join(profiles[:-1])} or {profiles[-1]}, got {acquisition!r}")
        self.kinds, self.profile = kinds, None if acquisition == "auto" else acquisition
        self.weights = sha256(checkpoint) if Path(checkpoint).is_file() else None
        self.network = AcquisitionClassifier(len(kinds), size=SIZE)
        load_weights(self.network, checkpoint)
        self.network.eval()

    def chosen(self, measured: Tensor) -> list[int]:
        """Indices of the slices (n, h, w) to look at: up to 16 with anatomy, evenly spaced."""
        return slices_with_anatomy(measured, FILLED, SLICES)

    def __call__(self, measured: Tensor, factors: Sequence[float], result: Tensor | None = None, width: float = 0.0) -> Recognized | None:
        """How the refined axes of a scan were sampled.

        Slices count for less than independent evidence, because neighbours resemble each other.

        Args:
            measured: the :meth:`chosen` slices (n, h, w), on the scale of the intensities.
            factors: of the rows and of the columns.
            result: the result (n, H, W) of a network that does not know the kind. The less it agrees with the samples if a kind is assumed,
                the less likely is the kind.
            width: of the slice profile, if the header gives it.

        Returns:
            ``None`` if there is no slice, or no refined axis.
        """
        axes = [axis for axis, factor in enumerate(factors) if factor > 1][: 1 if self.kinds.across else 2]
        if not len(measured) or not axes:
            return None
        slices = measured.float().cpu()
        inputs = []
        for axis in axes:
            along = [1 / factors[axis], 1 / factors[1 - axis]]
            for image in slices if axis == 0 else slices.mT:
                image = window_of(image, *(max(0, side - SIZE) // 2 for side in image.shape))
                inputs.append(torch.stack([image, *(torch.full_like(image, value) for value in along)]))
        with torch.inference_mode():
            output = self.network(torch.stack(inputs))
        evidence = output[:, :-1].log_softmax(1).mean(0) * math.sqrt(len(inputs))
        if result is not None:
            residuals = _residuals(slices, result.float().cpu(), factors, self.kinds)
            evidence = evidence - AGREEMENT * (residuals / residuals.min()).log()
        if not self.kinds.across:
            evidence[0] += SCANNER
        kinds = evidence.masked_fill(self.kinds.priors(width, self.profile) == 0, -math.inf).softmax(0)
        return Recognized(kinds, max(0.0, float(output[:, -1].mean())) * NOISE_UNIT, self.kinds, width)


def recognition(acquisition: str, checkpoint: str | Path, facts: bool = True, across: bool = False) -> Recognition | None:
    """:class:`Recognition` for the option ``acquisition``; ``None`` for ``"unknown"``, and for networks without facts, whose results stay
    as published.

    Raises:
        InputError: if the acquisition is given to a network without facts; also see :class:`Recognition`.
    """
    kinds = ACROSS if across else WITHIN
    if not facts and acquisition not in ("auto", "unknown"):
        raise InputError(f"acquisition is told to general networks only: leave out --acquisition {acquisition}")
    return Recognition(checkpoint, acquisition, kinds) if facts and acquisition != "unknown" else None


class Correction:
    """Correct slices of a result so that they agree with the measured samples.

    Args:
        measured: (n, ..., h, w), all measured slices.
        size: rows and columns of the result.
        factors: of the rows and of the columns.
        recognized: how the refined axes were sampled.
    """

    def __init__(self, measured: Tensor, size: Sequence[int], factors: Sequence[float], recognized: Recognized) -> None:
        self.measured = measured
        matrices = []
        for axis, sampling in enumerate(_samplings(recognized.sampling, factors, recognized.known)):
            coverage = 1.0
            if sampling.profile == "kspace" and sampling.factor > 1:
                coverage = acquired_fraction(measured.cpu(), axis - 2)
            matrices.append(_decomposed(size[axis], sampling, round(coverage, 3)))
        (self.rows, u, d, v), (self.columns, u2, d2, v2) = matrices
        gain = d[:, None] * d2
        weight = SMALLEST + (recognized.noise / (EQUAL_ACROSS if recognized.known.across else EQUAL)) ** 2
        weight += DOUBT * (1 - recognized.probability) / recognized.probability
        gain = gain / (gain.square() + weight / math.prod(factors))
        self.parts = [part.to(measured) for part in (u, u2, v, v2, gain, self.rows, self.columns)]

    def __call__(self, result: Tensor, n: int) -> Tensor:
        """Corrected slice ``n``, (..., H, W) to the same shape."""
        u, u2, v, v2, gain, rows, columns = self.parts
        missing = self.measured[n] - rows @ result @ columns.T
        return result + inside(result) * (v.T @ ((u.T @ missing @ u2) * gain) @ v2)


def inside(result: Tensor) -> Tensor:
    """Weights of slices (..., H, W): 1 in the head, 0 in the air, with a smooth border. The magnitude of noise in the
    air is not what the correction models."""
    means = F.avg_pool2d(result.abs().reshape(-1, 1, *result.shape[-2:]), 5, 1, 2, count_include_pad=False).view(result.shape)
    low, high = AIR
    return ((means - low) / (high - low)).clamp(0, 1)


class RecognitionLoss(nn.Module):
    """Cross-entropy of the kinds, plus the absolute error of the noise in units of 0.02 times ``noise_weight``."""

    def __init__(self, noise_weight: float = 0.4) -> None:
        super().__init__()
        self.noise_weight = noise_weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of (N, kinds + 1) against (N, 2): index of the kind, and the noise on the scale of the intensities."""
        kinds = F.cross_entropy(prediction[:, :-1].float(), target[:, 0].long())
        return kinds + self.noise_weight * F.l1_loss(prediction[:, -1].float(), target[:, 1] / NOISE_UNIT)


def _samplings(kind: Sampling, factors: Sequence[float], kinds: Kinds) -> list[Sampling]:
    """Samplings of the rows and the columns of slices of a kind. Across thick slices, only the rows are of the kind."""
    rows, columns = (replace(kind, factor=float(factor)) for factor in factors)
    return [rows, Sampling(columns.factor) if kinds.across else columns]


def _residuals(measured: Tensor, result: Tensor, factors: Sequence[float], kinds: Kinds) -> Tensor:
    """Root mean square, for each kind, of what differs between the samples (n, h, w) and those that it would take of a result (n, H, W)."""
    errors = []
    for kind in kinds.samplings:
        rows, columns = (_matrix(n, s).float() for n, s in zip(result.shape[1:], _samplings(kind, factors, kinds)))
        errors.append((measured - rows @ result @ columns.T).square().mean().sqrt())
    return torch.stack(errors) + 1e-6


def _matrix(size: int, sampling: Sampling, coverage: float = 1.0) -> Tensor:
    """Matrix (n, size) of the sampling of an axis."""
    if sampling.factor == 1:
        return torch.eye(size, dtype=torch.float64)
    return filtered(sampling_matrix(size, sampling).double(), [replace(sampling, coverage=coverage), Sampling()])


@functools.lru_cache(maxsize=8)
def _decomposed(size: int, sampling: Sampling, coverage: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrix (n, size) of the sampling of an axis, and its singular value decomposition."""
    matrix = _matrix(size, sampling, coverage)
    values: Any = torch.linalg.svd(matrix, full_matrices=False)
    return matrix, *values
