from __future__ import annotations

from torch import Tensor, nn

from .initialization import start_at_zero

__all__ = ["SRResNet"]


class SRResNet(nn.Module):
    """Super-resolution residual network: the generator of SRGAN, trained for the mean squared error.

    Ledig C. et al., "Photo-realistic single image super-resolution using a generative adversarial network", CVPR 2017, doi
    10.1109/CVPR.2017.19. The defaults are its 16 residual blocks of 64 filters. The original enlarges the image at its end;
    here it is already interpolated, so there is no upsampler (1,233,298 parameters), and the image is added to the output.

    Args:
        features: filters of every convolution but the last.
        num_blocks: residual blocks.
    """

    def __init__(self, features: int = 64, num_blocks: int = 16) -> None:
        super().__init__()
        self.shallow = nn.Sequential(nn.Conv2d(1, features, 9, padding=4), nn.PReLU())
        blocks = (ResidualBlock(features) for _ in range(num_blocks))
        self.deep = nn.Sequential(*blocks, _conv(features), nn.BatchNorm2d(features))
        self.reconstruct = start_at_zero(nn.Conv2d(features, 1, 9, padding=4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        shallow = self.shallow(x)
        return x + self.reconstruct(shallow + self.deep(shallow))


class ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(features), nn.BatchNorm2d(features), nn.PReLU(), _conv(features), nn.BatchNorm2d(features)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        return x + self.body(x)


def _conv(features: int) -> nn.Conv2d:
    return nn.Conv2d(features, features, 3, padding=1)
