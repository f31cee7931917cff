from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AcquisitionClassifier"]

BANDS = 24  # of frequencies along the rows
GROUPS = (0.25, 0.6)  # borders of groups of frequencies along the columns, in Nyquist frequencies


class AcquisitionClassifier(nn.Module):
    """Recognise how slices were sampled along their rows, and their noise, from the measured samples.

    Convolutions see ringing and texture, the power spectrum shows how much of each frequency was kept. A perceptron joins both.

    Args:
        kinds: number of kinds of sampling (:data:`bundle.consistency.KINDS`).
        features: filters of the first convolution; the others have more.
        size: side of the slices.
    """

    def __init__(self, kinds: int = 12, features: int = 24, size: int = 96) -> None:
        super().__init__()
        widths = [features, 4 * features // 3, 2 * features, 8 * features // 3, 8 * features // 3]
        layers: list[nn.Module] = []
        for n, (inputs, outputs) in enumerate(zip([2, *widths], widths)):
            layers += [nn.Conv2d(inputs, outputs, 3 if n else 5, padding=1 if n else 2, stride=2 if n in (1, 3) else 1), nn.ReLU()]
        self.texture = nn.Sequential(*layers)
        spectrum = BANDS * (len(GROUPS) + 1)
        self.join = nn.Sequential(
            nn.Linear(2 * widths[-1] + spectrum + 2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, kinds + 1)
        )
        self.size = size
        self.window: Tensor
        window = torch.hann_window(size + 2, periodic=False)[1:-1]
        self.register_buffer("window", window[:, None] * window, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, kinds + 1).

        Args:
            x: measured samples on the scale of the intensities, and constant maps of 1 / factor of the rows and of the columns.

        Returns:
            the logarithms of the probabilities of the kinds up to a constant, and the noise in units of 0.02.
        """
        samples, factors = x[:, 0], x[:, 1:, 0, 0]
        found = self.texture(torch.stack([samples, (samples.clamp(min=0) + 0.01).log() / 4], 1))
        return self.join(torch.cat([found.mean((2, 3)), found.amax((2, 3)), self.spectrum(samples), factors], 1))

    def spectrum(self, samples: Tensor) -> Tensor:
        """(N, size, size) -> (N, 72): decadic logarithm of the power in bands along the rows, for three groups of frequencies along the
        columns, relative to the lowest band of each."""
        power = torch.fft.fft2(samples.float() * self.window).abs().square()[:, : self.size // 2]
        columns = 2 * torch.fft.fftfreq(self.size, device=samples.device).abs()
        group = torch.bucketize(columns, torch.tensor(GROUPS, device=samples.device))
        lines = torch.stack([power[..., group == n].mean(-1) for n in range(len(GROUPS) + 1)], 1)
        bands = (F.adaptive_avg_pool1d(lines, BANDS) + 1e-7).log10()
        return (bands - bands[..., :1]).flatten(1)
