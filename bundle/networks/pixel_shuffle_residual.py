from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import start_at_zero

__all__ = ["PixelShuffleResidualNet"]


class PixelShuffleResidualNet(nn.Module):
    """Residual network that works on the coarser grid: the choice for CPUs (``docs/fast_network.md``).

    The interpolated slice holds nothing that its coarse grid does not, so the slice is folded into channels (pixel-unshuffle), all
    convolutions run on ``1 / stride**2`` of the pixels, and their result, unfolded (pixel-shuffle: Shi W. et al., CVPR 2016, doi
    10.1109/CVPR.2016.207), is added to the slice. The blocks are those of EDSR (Lim B. et al., CVPR Workshops 2017, doi
    10.1109/CVPRW.2017.151): no batch normalisation. Every block starts as the identity, and the untrained network returns its input.

    Args:
        features: filters of every convolution but the last.
        num_blocks: residual blocks of two convolutions.
        stride: pixels of the slice per pixel of the coarse grid, along each axis. It need not be the factor of super-resolution.
    """

    def __init__(self, features: int = 64, num_blocks: int = 9, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.shallow = _conv(stride**2, features)
        self.deep = nn.Sequential(*(ResidualBlock(features) for _ in range(num_blocks)), _conv(features, features))
        self.reconstruct = start_at_zero(_conv(features, stride**2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W), for any H and W: the last row and column are repeated up to a multiple of ``stride``."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        shallow = self.shallow(F.pixel_unshuffle(padded, self.stride))
        residual = F.pixel_shuffle(self.reconstruct(shallow + self.deep(shallow)), self.stride)
        return x + residual[..., :height, :width]


class ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(features, features), nn.ReLU(), start_at_zero(_conv(features, features)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        return x + self.body(x)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
