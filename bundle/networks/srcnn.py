from __future__ import annotations

from torch import nn

from .initialization import pass_image_through

__all__ = ["SRCNN"]


class SRCNN(nn.Sequential):
    """Super-resolution convolutional network: patch extraction, non-linear mapping, reconstruction.

    Dong C. et al., "Image super-resolution using deep convolutional networks", IEEE TPAMI 38(2), 2016, doi
    10.1109/TPAMI.2015.2439281. The defaults are its 9-5-5 network: 57,281 parameters. Unlike the original, layers are
    padded, so the size is kept: (N, 1, H, W) -> (N, 1, H, W), and the untrained network returns its input.

    Args:
        features: filters of the first and of the second layer.
        kernel_sizes: of the three layers, odd.
    """

    def __init__(self, features: tuple[int, int] = (64, 32), kernel_sizes: tuple[int, int, int] = (9, 5, 5)) -> None:
        (a, b), (f, g, h) = features, kernel_sizes
        super().__init__(
            nn.Conv2d(1, a, f, padding=f // 2),
            nn.ReLU(),
            nn.Conv2d(a, b, g, padding=g // 2),
            nn.ReLU(),
            nn.Conv2d(b, 1, h, padding=h // 2),
        )
        pass_image_through([layer for layer in self if isinstance(layer, nn.Conv2d)])
