"""PSNR and SSIM per slice, on whole slices or on the foreground."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric
from monai.metrics.regression import compute_ssim_and_cs
from scipy import ndimage
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

__all__ = ["SliceMetric", "has_foreground", "head_of", "psnr", "ssim", "volume_psnr", "volume_ssim"]

FOREGROUND = 0.05  # intensity above which a pixel of the truth counts as foreground
BRIGHT = 0.1  # mean intensity of 5 x 5 pixels in the head


def psnr(prediction: Tensor, target: Tensor, foreground: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB, equations (20) and (21), for intensities in [0, 1] (peak 1 = peak 255 on 8 bits).

    Args:
        prediction, target: slices (N, 1, H, W).
        foreground: use only the pixels where ``target`` exceeds ``FOREGROUND``.

    Returns:
        (N,); infinite for equal slices, NaN for a slice without foreground.

    Example:
        >>> psnr(torch.full((1, 1, 4, 4), 0.1), torch.zeros(1, 1, 4, 4))
        tensor([20.])
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target must have one shape, got {prediction.shape} and {target.shape}")
    return -10 * torch.log10(_mean((prediction - target).square(), target, foreground))


def ssim(prediction: Tensor, target: Tensor, foreground: bool = False) -> Tensor:
    """Structural similarity, equation (22): 11x11 Gaussian window, sigma 1.5, K 0.01 and 0.03, data range 1.

    Equal to ``skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)``.

    Args:
        prediction, target: slices (N, 1, H, W), at least 11 x 11 pixels.
        foreground: average only over the windows whose centre in ``target`` exceeds ``FOREGROUND``.

    Returns:
        (N,); NaN for a slice without foreground.
    """
    if min(target.shape[-2:]) < 11:
        raise InputError(f"SSIM needs slices of 11 x 11 pixels or more, got {target.shape[-2]} x {target.shape[-1]}")
    similarity, _ = compute_ssim_and_cs(prediction, target, 2, kernel_size=(11, 11), kernel_sigma=(1.5, 1.5))
    return _mean(similarity, target[..., 5:-5, 5:-5], foreground)


def has_foreground(target: Tensor) -> Tensor:
    """Which slices (N, 1, H, W) show anatomy: (N,), boolean. Empty slices have no meaningful PSNR and are left out of averages."""
    return (target > FOREGROUND).flatten(1).any(1)


def head_of(truth: Tensor) -> Tensor:
    """Mask of the head in slices (N, H, W), dark bone and cavities included. A threshold of single voxels would also choose the brightest
    noise in the air, whose errors are large because they were chosen."""
    bright = F.avg_pool2d(truth[:, None], 5, 1, 2, count_include_pad=False)[:, 0] > BRIGHT
    mask = np.zeros(truth.shape, dtype=bool)
    for n, slice_ in enumerate(bright.cpu().numpy()):
        parts, count = ndimage.label(slice_)
        if count:
            mask[n] = ndimage.binary_fill_holes(parts == 1 + np.argmax(np.bincount(parts.flat)[1:]))
    return torch.from_numpy(mask)


def volume_psnr(prediction: Tensor, target: Tensor, foreground: bool = False) -> float:
    """:func:`psnr` of whole volumes (1, X, Y, Z)."""
    return float(psnr(prediction[None].flatten(3), target[None].flatten(3), foreground))


def volume_ssim(prediction: Tensor, target: Tensor) -> float:
    """Structural similarity of volumes (1, X, Y, Z) with a window of 11x11x11 voxels; otherwise as :func:`ssim`."""
    if min(target.shape[1:]) < 11:
        raise InputError(f"SSIM needs volumes of 11 voxels or more along each axis, got {tuple(target.shape[1:])}")

    x, y = (volume[0].double().numpy() for volume in (prediction, target))
    return float(structural_similarity(x, y, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


def _mean(values: Tensor, target: Tensor, foreground: bool) -> Tensor:
    if not foreground:
        return values.mean((1, 2, 3))
    mask = target > FOREGROUND
    return (values * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


class SliceMetric(CumulativeIterationMetric):
    """PSNR or SSIM of every axial slice of volumes (1, 1, X, Y, Z), averaged over all slices that show anatomy.

    Args:
        name: ``"psnr"`` or ``"ssim"``.
        foreground: whether to use only the pixels of the foreground.
    """

    def __init__(self, name: str, foreground: bool = False) -> None:
        super().__init__()
        if name not in ("psnr", "ssim"):
            raise ValueError(f"name must be 'psnr' or 'ssim', got {name!r}")
        self.metric, self.foreground = psnr if name == "psnr" else ssim, foreground

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs) -> Tensor:  # type: ignore[override]
        prediction, target = (torch.as_tensor(v).as_subclass(Tensor).permute(0, 4, 1, 2, 3).flatten(0, 1) for v in (y_pred, y))
        values = self.metric(prediction, target, self.foreground)
        return values.masked_fill(~has_foreground(target), torch.nan)[:, None]

    def aggregate(self, *args, **kwargs) -> Tensor:  # type: ignore[override]
        """Average over the slices of all processes; NaN if none shows anatomy."""
        return self.get_buffer().nanmean()
