from __future__ import annotations

from torch import nn

from .initialization import pass_image_through

__all__ = ["FSRCNN"]


class FSRCNN(nn.Sequential):
    """Fast super-resolution convolutional network: extraction, shrinking, mapping, expanding, deconvolution.

    Dong C. et al., "Accelerating the super-resolution convolutional neural network", ECCV 2016, doi
    10.1007/978-3-319-46475-6_25. The defaults are its FSRCNN(56, 12, 4): 12,809 parameters, with a PReLU slope per channel.
    The original works on the low-resolution image and its deconvolution enlarges; here the image is already interpolated,
    so the stride is 1: (N, 1, H, W) -> (N, 1, H, W). The untrained network returns its input.

    Args:
        features: filters d of the extraction.
        shrunk: filters s of the mapping.
        num_layers: 3x3 convolutions m of the mapping.
    """

    def __init__(self, features: int = 56, shrunk: int = 12, num_layers: int = 4) -> None:
        mapping = [layer for _ in range(num_layers) for layer in (nn.Conv2d(shrunk, shrunk, 3, padding=1), nn.PReLU(shrunk))]
        super().__init__(
            nn.Conv2d(1, features, 5, padding=2),
            nn.PReLU(features),
            nn.Conv2d(features, shrunk, 1),
            nn.PReLU(shrunk),
            *mapping,
            nn.Conv2d(shrunk, features, 1),
            nn.PReLU(features),
            nn.ConvTranspose2d(features, 1, 9, padding=4),
        )
        pass_image_through([layer for layer in self if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))])
