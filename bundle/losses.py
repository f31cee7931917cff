from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError

__all__ = ["LaplaceLoss", "PSNRLoss", "PixelTVLoss", "total_variation"]

TV_FORMS = ("isotropic", "squared", "anisotropic")


class PixelTVLoss(nn.Module):
    """Pixel loss plus total variation of the prediction, equation (19): L = L_pixel + phi L_TV.

    L_pixel is the mean squared error (17), L_TV the total variation (18). The paper does not state the intensity scale of phi. It matters,
    because one term is quadratic and the other linear: ``peak`` sets it.

    Args:
        tv_weight: phi. 0 switches the total variation off (the ablation of table 4).
        tv_form: reading of (18), see :func:`total_variation`.
        peak: value of intensity 1 in the loss: 255 (8-bit levels, as in the paper's PSNR) or 1.

    Raises:
        InputError: for a negative ``tv_weight``, an unknown ``tv_form`` or a ``peak`` that is not positive.
    """

    def __init__(self, tv_weight: float = 0.1, tv_form: str = "isotropic", peak: float = 255.0) -> None:
        super().__init__()
        if tv_weight < 0:
            raise InputError(f"tv_weight must not be negative, got {tv_weight}")
        if tv_form not in TV_FORMS:
            raise InputError(f"tv_form must be {', '.join(TV_FORMS[:-1])} or {TV_FORMS[-1]}, got {tv_form!r}")
        if peak <= 0:
            raise InputError(f"peak must be positive, got {peak}")
        self.tv_weight, self.tv_form, self.peak = tv_weight, tv_form, peak

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of two (N, C, H, W) tensors in [0, 1].

        Raises:
            ValueError: when the shapes differ.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction and target must have one shape, got {prediction.shape} and {target.shape}")
        prediction, target = self.peak * prediction.float(), self.peak * target.float()
        loss = F.mse_loss(prediction, target)
        if self.tv_weight:
            loss = loss + self.tv_weight * total_variation(prediction, self.tv_form)
        return loss


class PSNRLoss(nn.Module):
    """Negative PSNR of each patch or slice, in dB, averaged (Chen L. et al., ECCV 2022, doi 10.1007/978-3-031-20071-7_2).

    Slices of all factors have equal weight. In a mean squared error, those of the largest factors would dominate, because their error is
    several times larger.

    Args:
        floor: added to the mean squared error (intensities in [0, 1]), so that errors below it hardly matter.
        patches: number of consecutive patches that belong to one slice and share its PSNR.
    """

    def __init__(self, floor: float = 1e-6, patches: int = 1) -> None:
        super().__init__()
        self.floor, self.patches = floor, patches

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of a prediction (N, 1, H, W) in [0, 1] and a target of the same shape, or (N, 2, H, W) with the weight of each
        pixel as second channel; N is a multiple of ``patches``."""
        target = target.float()
        weights = target[:, 1:] if target.shape[1] == 2 else torch.ones_like(target)
        slices = (len(target) // self.patches, -1)
        errors = ((prediction.float() - target[:, :1]).square() * weights).reshape(slices).sum(1) / weights.reshape(slices).sum(1)
        return 10 * (errors + self.floor).log10().mean()


class LaplaceLoss(nn.Module):
    """Negative log-likelihood of the errors by a Laplace distribution whose standard deviation is predicted for each pixel.

    Errors of super-resolution have heavy tails: small in flat tissue, large at few edges. It teaches an uncertainty head
    (:class:`bundle.networks.WithUncertainty`).
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of a prediction (N, 2, H, W), result and standard deviation, and a target (N, 1, H, W);
        further channels of the target are ignored."""
        deviation = prediction[:, 1:].float()
        errors = (prediction[:, :1].float() - target[:, :1].float()).abs()
        return (deviation.log() + math.sqrt(2) * errors / deviation).mean()


def total_variation(image: Tensor, form: str = "isotropic") -> Tensor:
    """Total variation per pixel, equation (18): differences to the lower and the right neighbour, zero at the last row and column.

    Args:
        image: (N, C, H, W).
        form: ``"isotropic"``, the mean of sqrt(dx^2 + dy^2); ``"squared"``, of dx^2 + dy^2; ``"anisotropic"``, of |dx| + |dy|.

    Returns:
        a scalar, in the units of ``image`` (their square for ``"squared"``).
    """
    dy = F.pad(image[..., 1:, :] - image[..., :-1, :], (0, 0, 0, 1))
    dx = F.pad(image[..., 1:] - image[..., :-1], (0, 1))
    if form == "anisotropic":
        return (dx.abs() + dy.abs()).mean()
    squared = dx.square() + dy.square()
    if form == "squared":
        return squared.mean()
    if form == "isotropic":
        # the root has no gradient at 0; the offset keeps it finite and adds less than 1e-4 of a level to the 8-bit value
        return (squared + 1e-8).sqrt().mean()
    raise ValueError(f"form must be one of {TV_FORMS}, got {form!r}")
