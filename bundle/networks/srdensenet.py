from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import start_at_zero

__all__ = ["SRDenseNet"]


class SRDenseNet(nn.Module):
    """Super-resolution network of dense blocks, in its "all" version: the reconstruction sees the features of every level.

    Tong T. et al., "Image super-resolution using dense skip connections", ICCV 2017, doi 10.1109/ICCV.2017.514. The defaults
    are its 8 blocks of 8 layers with a growth rate of 16: a block gives 8 x 16 = 128 maps, and a 1x1 bottleneck reduces what
    all levels give to 256. The original enlarges the image by deconvolutions at its end; here it is already interpolated, so
    there are none, and the image is added to the output.

    Args:
        num_blocks: dense blocks.
        num_layers: layers of a block.
        growth: maps that each layer adds.
        bottleneck: maps that the reconstruction sees.
    """

    def __init__(self, num_blocks: int = 8, num_layers: int = 8, growth: int = 16, bottleneck: int = 256) -> None:
        super().__init__()
        level = num_layers * growth
        self.shallow = _conv(1, level)
        self.blocks = nn.ModuleList(DenseBlock((n + 1) * level, num_layers, growth) for n in range(num_blocks))
        self.bottleneck = nn.Conv2d((num_blocks + 1) * level, bottleneck, 1)
        self.reconstruct = start_at_zero(_conv(bottleneck, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        levels = F.relu(self.shallow(x))
        for block in self.blocks:
            levels = torch.cat([levels, block(levels)], 1)
        return x + self.reconstruct(F.relu(self.bottleneck(levels)))


class DenseBlock(nn.Module):
    def __init__(self, in_channels: int, num_layers: int, growth: int) -> None:
        super().__init__()
        inputs = [in_channels] + [growth * n for n in range(1, num_layers)]
        self.layers = nn.ModuleList(_conv(n, growth) for n in inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_layers x growth, H, W): the maps of all its layers, without its input."""
        maps: list[Tensor] = []
        for layer in self.layers:
            maps.append(F.relu(layer(torch.cat(maps, 1) if maps else x)))
        return torch.cat(maps, 1)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
