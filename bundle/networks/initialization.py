"""Initialisation at the interpolated image, so that training improves on interpolation from the first step.

Default initialisations start far below it and spend their first epochs learning to copy the input (``docs/results.md``).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

__all__ = ["pass_image_through", "start_at_zero"]

Layer = TypeVar("Layer", bound=nn.Module)


def start_at_zero(layer: Layer) -> Layer:
    """For the last layer before a residual is added: the untrained network returns its input."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@torch.no_grad()
def pass_image_through(convolutions: list[nn.Conv2d | nn.ConvTranspose2d]) -> None:
    """For a network without a global residual: the first channel carries the image, and the last layer takes no other.

    An image without negative values passes ReLU and PReLU unchanged, so the untrained network returns its input. The other
    channels keep their initial weights.

    Args:
        convolutions: the layers in order; the first has 1 input channel, the last 1 output channel.
    """
    start_at_zero(convolutions[-1])  # type: ignore[arg-type]
    for convolution in convolutions:
        weight = convolution.weight.transpose(0, 1) if isinstance(convolution, nn.ConvTranspose2d) else convolution.weight
        nn.init.zeros_(weight[0])
        weight[0, 0, weight.shape[2] // 2, weight.shape[3] // 2] = 1
        if convolution.bias is not None:
            convolution.bias[0] = 0
