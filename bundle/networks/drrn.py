from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import start_at_zero

__all__ = ["DRRN"]


class DRRN(nn.Module):
    """Deep recursive residual network: one residual unit is applied repeatedly, and the block's input is added each time.

    Tai Y. et al., "Image super-resolution via deep recursive residual network", CVPR 2017, doi 10.1109/CVPR.2017.298. Each
    recursive block starts with a convolution, h_0, and repeats h_u = W_2 * relu(W_1 * relu(h_u-1)) + h_0 with shared weights.
    The defaults are its B1U25 with 128 filters; 297,216 parameters whatever the number of units. Convolutions have no bias,
    and no batch normalisation before them, as in the public PyTorch versions.

    Args:
        features: filters of every convolution but the last.
        num_blocks: recursive blocks B, each with its own weights.
        num_units: residual units U of a block, which share their weights.
    """

    def __init__(self, features: int = 128, num_blocks: int = 1, num_units: int = 25) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(RecursiveBlock(features if n else 1, features, num_units) for n in range(num_blocks)))
        self.reconstruct = start_at_zero(_conv(features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        return x + self.reconstruct(F.relu(self.blocks(x)))


class RecursiveBlock(nn.Module):
    def __init__(self, in_channels: int, features: int, num_units: int) -> None:
        super().__init__()
        self.num_units = num_units
        self.enter, self.first, self.second = _conv(in_channels, features), _conv(features, features), _conv(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, features, H, W)."""
        # pre-activation, never in place: that would rewrite the identity branch
        identity = self.enter(x if x.shape[1] == 1 else F.relu(x))
        h = identity
        for _ in range(self.num_units):
            h = self.second(F.relu(self.first(F.relu(h)))) + identity
        return h


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return convolution
