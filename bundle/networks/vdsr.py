from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from .initialization import start_at_zero

__all__ = ["VDSR"]


class VDSR(nn.Module):
    """Very deep super-resolution network: a plain chain of 3x3 convolutions that learns the residual of the interpolated image.

    Kim J. et al., "Accurate image super-resolution using very deep convolutional networks", CVPR 2016, doi
    10.1109/CVPR.2016.182. The defaults are its network: 20 layers of 64 filters without bias, 664,704 parameters. He
    initialisation, except for the last layer, which starts at zero.

    Args:
        features: filters of every layer but the last.
        num_layers: convolutions in all.
    """

    def __init__(self, features: int = 64, num_layers: int = 20) -> None:
        super().__init__()
        channels = [1] + [features] * (num_layers - 1)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [_conv(inputs, outputs), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
        self.residual = nn.Sequential(*layers, start_at_zero(_conv(features, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        return x + self.residual(x)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
