from __future__ import annotations

from torch import Tensor, nn

from .initialization import start_at_zero

__all__ = ["RCAN"]


class RCAN(nn.Module):
    """Residual channel attention network: residual groups of residual blocks that weigh their channels.

    Zhang Y. et al., "Image super-resolution using very deep residual channel attention networks", ECCV 2018, doi
    10.1007/978-3-030-01234-2_18. The defaults are its 10 groups of 20 blocks. The original enlarges the image at its end
    (15,442,337 parameters at x2); here it is already interpolated, so there is no upsampler (15,294,625), and the image is
    added to the output.

    Args:
        features: filters of every convolution but the last.
        num_groups: residual groups.
        num_blocks: residual channel attention blocks of a group.
        reduction: ratio by which the attention squeezes its channels.
    """

    def __init__(self, features: int = 64, num_groups: int = 10, num_blocks: int = 20, reduction: int = 16) -> None:
        super().__init__()
        self.shallow = _conv(1, features)
        groups = (ResidualGroup(features, num_blocks, reduction) for _ in range(num_groups))
        self.deep = nn.Sequential(*groups, _conv(features, features))
        self.reconstruct = start_at_zero(_conv(features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        shallow = self.shallow(x)
        return x + self.reconstruct(shallow + self.deep(shallow))


class ResidualGroup(nn.Module):
    def __init__(self, features: int, num_blocks: int, reduction: int) -> None:
        super().__init__()
        blocks = (ResidualChannelAttentionBlock(features, reduction) for _ in range(num_blocks))
        self.body = nn.Sequential(*blocks, _conv(features, features))

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        return x + self.body(x)


class ResidualChannelAttentionBlock(nn.Module):
    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(features, features), nn.ReLU(), _conv(features, features), ChannelAttention(features, reduction)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        return x + self.body(x)


class ChannelAttention(nn.Module):
    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.weight = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(features, features // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(features // reduction, features, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W): each channel times a weight from the means of all."""
        return x * self.weight(x)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
