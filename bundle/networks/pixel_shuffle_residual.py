from __future__ import annotations

import torch
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
        phases: whether the network is told the factor (:func:`bundle.degradation.phases`). It starts out ignoring that, and takes
            weights of a network that was never told.
    """

    def __init__(self, features: int = 64, num_blocks: int = 9, stride: int = 2, phases: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.shallow = _conv(stride**2, features)
        self.phases = nn.Conv2d(6 * stride**2, features, 3, padding=1, bias=False) if phases else None
        if self.phases is not None:
            nn.init.zeros_(self.phases.weight)
            self.register_load_state_dict_pre_hook(_ignore_phases)
        self.deep = nn.Sequential(*(ResidualBlock(features) for _ in range(num_blocks)), _conv(features, features))
        self.reconstruct = start_at_zero(_conv(features, stride**2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W), for any H and W: the last row and column are repeated up to a multiple of ``stride``.

        With ``phases``, (N, 7, H, W): the slice, then its phases.
        """
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        shallow = self.shallow(F.pixel_unshuffle(padded[:, :1], self.stride))
        if self.phases is not None:
            shallow = shallow + self.phases(F.pixel_unshuffle(padded[:, 1:], self.stride))
        residual = F.pixel_shuffle(self.reconstruct(shallow + self.deep(shallow)), self.stride)
        return x[:, :1] + residual[..., :height, :width]


class ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(features, features), nn.ReLU(), start_at_zero(_conv(features, features)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        return x + self.body(x)


def _ignore_phases(network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Complete weights of a network that was never told the phases."""
    state_dict.setdefault(f"{prefix}phases.weight", torch.zeros_like(network.phases.weight))  # type: ignore[union-attr, arg-type]


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
