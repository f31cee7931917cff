from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import start_at_zero

__all__ = ["RDN"]


class RDN(nn.Module):
    """Residual dense network: densely connected blocks, whose outputs are all fused.

    Zhang Y. et al., "Residual dense network for image super-resolution", CVPR 2018, doi 10.1109/CVPR.2018.00262. The defaults
    are its D = 16 blocks of C = 8 layers, growth G = 64. The original enlarges the image at its end (22,121,089 parameters
    at x2); here it is already interpolated, so there is no upsampler (21,973,377), and the image is added to the output.

    Args:
        features: filters G_0 outside the dense layers.
        num_blocks: residual dense blocks D.
        num_layers: dense layers C of a block.
        growth: filters G that each dense layer adds.
    """

    def __init__(self, features: int = 64, num_blocks: int = 16, num_layers: int = 8, growth: int = 64) -> None:
        super().__init__()
        self.shallow1, self.shallow2 = _conv(1, features), _conv(features, features)
        self.blocks = nn.ModuleList(ResidualDenseBlock(features, num_layers, growth) for _ in range(num_blocks))
        self.fusion = nn.Sequential(nn.Conv2d(num_blocks * features, features, 1), _conv(features, features))
        self.reconstruct = start_at_zero(_conv(features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        shallow = self.shallow1(x)
        deep = self.shallow2(shallow)
        outputs = []
        for block in self.blocks:
            deep = block(deep)
            outputs.append(deep)
        return x + self.reconstruct(self.fusion(torch.cat(outputs, 1)) + shallow)


class ResidualDenseBlock(nn.Module):
    def __init__(self, features: int, num_layers: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(features + n * growth, growth) for n in range(num_layers))
        self.fusion = nn.Conv2d(features + num_layers * growth, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        dense = x
        for layer in self.layers:
            dense = torch.cat([dense, F.relu(layer(dense))], 1)
        return x + self.fusion(dense)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
