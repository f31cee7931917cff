from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import start_at_zero

__all__ = ["DRCN"]


class DRCN(nn.Module):
    """Deeply recursive convolutional network: one convolution is applied repeatedly, and every recursion is reconstructed.

    Kim J. et al., "Deeply-recursive convolutional network for image super-resolution", CVPR 2016, doi 10.1109/CVPR.2016.181.
    Embedding of two convolutions; D recursions of a shared one; a shared reconstruction of two convolutions turns each
    recursion into a prediction x + r_d, and the output is their weighted mean with learned weights. The defaults are its 256
    filters and 16 recursions: 1,775,121 parameters. Only the output is supervised, not every recursion.

    Args:
        features: filters of every convolution but the last.
        num_recursions: recursions D.
    """

    def __init__(self, features: int = 256, num_recursions: int = 16) -> None:
        super().__init__()
        self.embed = nn.Sequential(_conv(1, features), nn.ReLU(), _conv(features, features), nn.ReLU())
        self.recur = _conv(features, features)
        self.reconstruct = nn.Sequential(_conv(features, features), nn.ReLU(), start_at_zero(_conv(features, 1)))
        self.weights = nn.Parameter(torch.ones(num_recursions))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        h = self.embed(x)
        residual = torch.zeros_like(x)
        for weight in self.weights / self.weights.sum():
            h = F.relu(self.recur(h))
            residual = residual + weight * self.reconstruct(h)
        return x + residual


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
