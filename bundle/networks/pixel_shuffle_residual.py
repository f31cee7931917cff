from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditions import FACTS, NEIGHBOURS
from .initialization import start_at_zero

__all__ = ["IMAGES", "PixelShuffleResidualNet"]

IMAGES = 2 + len(NEIGHBOURS)  # of a network with facts: the slice, the excess of zero-filling, the neighbouring slices


class PixelShuffleResidualNet(nn.Module):
    """Residual network that computes on a coarser grid, which makes it fast on CPUs (``docs/fast_network.md``).

    Interpolation adds no information to a slice. So the slice is folded into channels (pixel-unshuffle), all convolutions run on
    ``1 / stride**2`` of the pixels, and their result, unfolded (pixel-shuffle: Shi W. et al., CVPR 2016, doi 10.1109/CVPR.2016.207), is
    added to the slice. The blocks are those of EDSR (Lim B. et al., CVPR Workshops 2017, doi 10.1109/CVPRW.2017.151), without batch
    normalisation. Every block starts as the identity, and the untrained network returns its input.

    Args:
        features: filters of every convolution except the last.
        num_blocks: residual blocks of two convolutions.
        stride: pixels of the slice per pixel of the coarse grid, along each axis. It need not be the factor of super-resolution.
        positions: whether the network receives the positions of the pixels (:func:`bundle.conditions.positions`), which scale and shift
            the features of each block (Wang X. et al., CVPR 2018, doi 10.1109/CVPR.2018.00070). Initially it ignores them, so that it
            can load weights of a network without positions.
        facts: whether it also receives constant channels (:func:`bundle.conditions.conditions`). Together with the factors they pass
            through a small perceptron (32 units), which also scales and shifts the features of each block. A network with facts also
            receives :func:`bundle.conditions.zero_filled_excess` and four neighbouring slices. It can load weights of a network with fewer
            images or facts, or none, and initially ignores the new inputs.
    """

    def __init__(self, features: int = 64, num_blocks: int = 9, stride: int = 2, positions: bool = False, facts: bool = False) -> None:
        super().__init__()
        if facts and not positions:
            raise ValueError("facts need positions")
        self.stride, self.images = stride, IMAGES if facts else 1
        self.channels = self.images + 6 + FACTS * facts if positions else 1
        self.shallow = _conv(self.images * stride**2, features)
        position_channels = 6 * stride**2 if positions else 0
        self.embedding = nn.Sequential(nn.Linear(2 + FACTS, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()) if facts else None
        blocks = [ResidualBlock(features, position_channels, 32 if facts else 0) for _ in range(num_blocks)]
        self.deep = nn.ModuleList([*blocks, LastConvolution(features, features, 3, padding=1)])
        self.reconstruct = start_at_zero(_conv(features, stride**2))
        self.register_load_state_dict_pre_hook(_complete_inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W), for any H and W: the last row and column are repeated up to a multiple of ``stride``.

        With ``positions`` the input is (N, 7, H, W): the slice, then its positions. With ``facts`` it is (N, 37, H, W): the slice,
        the excess of zero-filling, the neighbouring slices, the positions, and the constant facts.
        """
        return self.result(x, self.features(x)[0])

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the input of :meth:`forward`: the last features (N, features, h, w) on the coarse grid; the positions on that grid, which
        have no channels without ``positions``; and the embedded facts (N, 32), or (N, 0) without ``facts``."""
        if x.shape[1] != self.channels:
            raise ValueError(f"{self.channels} channels expected, got {x.shape[1]}")
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        shallow = deep = self.shallow(F.pixel_unshuffle(padded[:, : self.images], self.stride))
        positions, facts = self.embedded(padded[:, self.images :])
        for layer in self.deep:
            deep = layer(deep, positions, facts)
        return shallow + deep, positions, facts

    def embedded(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """From the positions and facts (N, C, H, W) of an input: the positions on the coarse grid, and the embedded facts."""
        positions = F.pixel_unshuffle(maps[:, :6], self.stride)
        if self.embedding is None:
            return positions, maps[:, :0, 0, 0]
        return positions, self.embedding(torch.cat([maps[:, 2:3, 0, 0], maps[:, 5:, 0, 0]], 1))  # both factors, then the facts

    @torch.no_grad()
    def folded(self, maps: Tensor) -> PixelShuffleResidualNet:
        """This network for one scan, with its positions and facts folded into the weights: (N, images, H, W) -> (N, 1, H, W).

        It is faster, because the features need not be scaled and shifted. It exists if all groups of ``stride`` x ``stride`` pixels have
        the same positions, as with factors of 1 and 2 and a stride of 2.

        Args:
            maps: (6 + 25, stride, stride), positions and facts of the first group.
        """
        positions, facts = self.embedded(maps[None])
        blocks = [layer.folded(positions, facts) if isinstance(layer, ResidualBlock) else layer for layer in self.deep]
        plain = with_modules(self, deep=nn.ModuleList(blocks), embedding=None)
        plain.channels = self.images
        return plain

    def result(self, x: Tensor, features: Tensor) -> Tensor:
        """The result (N, 1, H, W) of an input and its ``features``."""
        residual = F.pixel_shuffle(self.reconstruct(features), self.stride)
        return x[:, :1] + residual[..., : x.shape[2], : x.shape[3]]


class ResidualBlock(nn.Module):
    def __init__(self, features: int, position_channels: int = 0, embedded: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(features, features), nn.ReLU(), start_at_zero(_conv(features, features)))
        self.modulation = start_at_zero(nn.Conv2d(position_channels, 2 * features, 1)) if position_channels else None
        self.adaptation = start_at_zero(nn.Linear(embedded, 2 * features)) if embedded else None
        self.register_load_state_dict_pre_hook(_complete)

    def forward(self, x: Tensor, positions: Tensor, facts: Tensor) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W); ``positions`` are (N, position_channels, H, W), ``facts`` (N, embedded)."""
        hidden = self.body[0](x)
        if self.modulation is not None:
            scale, shift = self.changes(positions, facts).chunk(2, 1)
            hidden = torch.addcmul(hidden + shift, hidden, scale)
        return x + self.body[2](self.body[1](hidden))

    def changes(self, positions: Tensor, facts: Tensor) -> Tensor:
        """By how much the features are scaled and shifted: (N, 2 * features, H, W)."""
        assert self.modulation is not None
        changes = self.modulation(positions)
        return changes if self.adaptation is None else changes + self.adaptation(facts)[:, :, None, None]

    def folded(self, positions: Tensor, facts: Tensor) -> ResidualBlock:
        """This block for constant positions (1, position_channels, 1, 1) and facts (1, embedded), without modulation."""
        first, *others = self.body
        body = nn.Sequential(folded(first, self.changes(positions, facts)), *others)
        return with_modules(self, body=body, modulation=None, adaptation=None)


def with_modules(module: Any, **modules: nn.Module | None) -> Any:
    """A copy of a module with some other submodules. It shares the rest."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **modules}
    return copied


def folded(convolution: Any, changes: Tensor) -> Any:
    """A convolution whose results are scaled and shifted by constant changes (1, 2 * filters, 1, 1)."""
    scale, shift = changes.flatten().chunk(2)
    plain = copy.deepcopy(convolution)
    plain.weight.mul_((1 + scale)[:, None, None, None])
    plain.bias.mul_(1 + scale).add_(shift)
    return plain


class LastConvolution(nn.Conv2d):
    def forward(self, x: Tensor, positions: Tensor, facts: Tensor) -> Tensor:  # type: ignore[override]
        """(N, features, H, W) -> the same. TorchScript requires layers of the same signature, hence ``positions`` and ``facts``."""
        return self._conv_forward(x, self.weight, self.bias)


def _complete(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Add weights for positions and facts to those of a block without them, so that it ignores them."""
    for name in ("modulation", "adaptation"):
        part = getattr(block, name)
        if part is not None:
            for key, value in part.state_dict(prefix=f"{prefix}{name}.").items():
                state_dict.setdefault(key, torch.zeros_like(value))


def _complete_inputs(network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Add weights for new inputs to those of a network with fewer inputs, so that it ignores the new ones."""
    for key, own in network.state_dict(prefix=prefix).items():
        if key.startswith(f"{prefix}embedding."):
            state_dict.setdefault(key, own)  # the blocks ignore its output, so its initial values are kept
        if key in (f"{prefix}shallow.weight", f"{prefix}embedding.0.weight") and key in state_dict:
            loaded = state_dict[key]
            if loaded.shape[1] < own.shape[1]:
                state_dict[key] = torch.cat([loaded, torch.zeros_like(own[:, loaded.shape[1] :]).to(loaded)], 1)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
