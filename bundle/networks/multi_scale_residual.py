from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from .initialization import start_at_zero

__all__ = ["MultiScaleResidualNet"]


class MultiScaleResidualNet(nn.Module):
    """Multi-scale residual network for MRI super-resolution.

    "MRI super-resolution with multi-scale residual learning and total-variation regularisation", Pure Mathematics 11(5), 2021,
    doi 10.12677/pm.2021.115104, section 2. The input is already interpolated to the high-resolution grid (pre-upsampled), so
    one network serves every factor:

    - feature extraction, (2) and (3): F_1 = PReLU(H_1(x)), F_2 = PReLU(H_2(F_1));
    - non-linear mapping, (4) to (6): F_Bn = H_Bn(F_Bn-1) + F_2 for n = 1 ... N, with F_B0 = F_2;
    - reconstruction, (7) and (8): y = PReLU(H_R(F_BN)) + x.

    The defaults are the paper's network: 7,362,068 parameters, 19 convolutions on the longest path. The reconstruction
    convolution starts at zero, so an untrained network returns its input: training starts at the interpolated image.

    Args:
        features: filters of every convolution but the last.
        num_modules: number N of multi-scale residual modules.
        multi_scale: whether the modules have their 7x7 and 5x5 branches (``False``: the ablation of table 4).

    Raises:
        ValueError: when ``features`` or ``num_modules`` is not positive.

    Example:
        >>> import torch
        >>> net = MultiScaleResidualNet(features=8, num_modules=1)
        >>> x = torch.rand(2, 1, 31, 20)
        >>> torch.equal(net(x), x)
        True
    """

    def __init__(self, features: int = 128, num_modules: int = 4, multi_scale: bool = True) -> None:
        super().__init__()
        if features < 1 or num_modules < 1:
            raise InputError(f"features and num_modules must be positive, got {features} and {num_modules}")
        self.extract = nn.Sequential(_conv(1, features, 3), nn.PReLU(), _conv(features, features, 3), nn.PReLU())
        self.mapping = nn.ModuleList(MultiScaleResidualModule(features, multi_scale) for _ in range(num_modules))
        self.reconstruct = nn.Sequential(start_at_zero(_conv(features, 1, 3)), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        # F_2; a script knows no autocast
        shallow = self.extract(x) if torch.jit.is_scripting() else self._shallow(x)  # type: ignore[no-untyped-call]
        deep = shallow
        for module in self.mapping:
            deep = module(deep) + shallow  # local residual learning, after every module
        return self.reconstruct(deep) + x  # global residual

    @torch.jit.unused
    def _shallow(self, x: Tensor) -> Tensor:
        """In float32 even where the rest is in half precision: every module's result is added to it, and rounding it costs 0.015 dB."""
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return self.extract(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.extract(x.float())


class MultiScaleResidualModule(nn.Module):
    """H_B, equations (9) to (16): four 3x3 convolutions, with a 7x7 branch of the input added after the second and a 5x5 branch
    added after the fourth.

    Equation (12) as printed adds the 7x7 branch to F_1, which would leave F_2 unused; it is added to F_2 here, as (16) does
    with F_4, and as the stated depth of 19 requires.
    """

    def __init__(self, features: int, multi_scale: bool) -> None:
        super().__init__()
        self.first = _two_convolutions(features)  # (9), (10)
        self.branch7 = _conv(features, features, 7) if multi_scale else None  # (11)
        self.second = _two_convolutions(features)  # (13), (14)
        self.branch5 = _conv(features, features, 5) if multi_scale else None  # (15)

    def forward(self, u: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W)."""
        middle = self.first(u)
        if self.branch7 is not None:
            middle = middle + self.branch7(u)  # (12)
        output = self.second(middle)
        if self.branch5 is not None:
            output = output + self.branch5(u)  # (16)
        return output


def _two_convolutions(features: int) -> nn.Sequential:
    return nn.Sequential(_conv(features, features, 3), nn.PReLU(), _conv(features, features, 3), nn.PReLU())


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
