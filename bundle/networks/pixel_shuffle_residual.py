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
        experts: number of further sets of filters in each block; needs ``facts``. The perceptron chooses a combination of them, which is
            added to the block's own filters. Each scan so has filters of its own, at no cost per pixel (Yang B. et al., CondConv,
            NeurIPS 2019, arXiv 1904.04971). They start at zero, so that a network with experts can load weights of one without.

    Raises:
        ValueError: for facts without positions, or experts without facts.
    """

    def __init__(
        self,
        features: int = 64,
        num_blocks: int = 9,
        stride: int = 2,
        positions: bool = False,
        facts: bool = False,
        experts: int = 0,
    ) -> None:
        super().__init__()
        if facts and not positions:
            raise ValueError("facts need positions")
        if experts and not facts:
            raise ValueError("experts need facts")
        self.stride, self.images, self.experts = stride, IMAGES if facts else 1, experts
        self.channels = self.images + 6 + FACTS * facts if positions else 1
        self.shallow = _conv(self.images * stride**2, features)
        position_channels = 6 * stride**2 if positions else 0
        self.embedding = nn.Sequential(nn.Linear(2 + FACTS, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()) if facts else None
        blocks = [ResidualBlock(features, position_channels, 32 if facts else 0, experts) for _ in range(num_blocks)]
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
        scans = _scans(facts) if self.experts else [x.shape[0]]
        for layer in self.deep:
            deep = layer(deep, positions, facts, scans)
        return shallow + deep, positions, facts

    def embedded(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """From the positions and facts (N, C, H, W) of an input: the positions on the coarse grid, and the embedded facts."""
        positions = F.pixel_unshuffle(maps[:, :6], self.stride)
        if self.embedding is None:
            return positions, maps[:, :0, 0, 0]
        return positions, self.embedding(torch.cat([maps[:, 2:3, 0, 0], maps[:, 5:, 0, 0]], 1))  # both factors, then the facts

    @torch.no_grad()
    def folded(self, maps: Tensor, regular: bool) -> PixelShuffleResidualNet:
        """This network for one scan, with its facts folded into the weights, which is faster.

        Args:
            maps: (6 + 25, stride, stride), positions and facts of the first group of pixels.
            regular: whether all groups of ``stride`` x ``stride`` pixels have the same positions, as with factors of 1 and 2 and a stride
                of 2. The positions are then folded too, and the result takes images alone: (N, images, H, W) -> (N, 1, H, W).
        """
        positions, facts = self.embedded(maps[None])
        blocks = [layer.folded(positions, facts, regular) if isinstance(layer, ResidualBlock) else layer for layer in self.deep]
        plain = with_modules(self, deep=nn.ModuleList(blocks))
        plain.experts = 0
        if regular:
            plain.embedding, plain.channels = None, self.images
        return plain

    def result(self, x: Tensor, features: Tensor) -> Tensor:
        """The result (N, 1, H, W) of an input and its ``features``."""
        residual = F.pixel_shuffle(self.reconstruct(features), self.stride)
        return x[:, :1] + residual[..., : x.shape[2], : x.shape[3]]


class ResidualBlock(nn.Module):
    def __init__(self, features: int, position_channels: int = 0, embedded: int = 0, experts: int = 0) -> None:
        super().__init__()
        self.body: Any = nn.Sequential(_conv(features, features), nn.ReLU(), start_at_zero(_conv(features, features)))
        self.modulation = start_at_zero(nn.Conv2d(position_channels, 2 * features, 1)) if position_channels else None
        self.adaptation = start_at_zero(nn.Linear(embedded, 2 * features)) if embedded else None
        self.combination = nn.Linear(embedded, experts) if experts else None
        self.experts = nn.Parameter(torch.zeros(experts, 2, features, features, 3, 3)) if experts else None
        self.register_load_state_dict_pre_hook(_complete)

    def forward(self, x: Tensor, positions: Tensor, facts: Tensor, scans: list[int]) -> Tensor:
        """(N, features, H, W) -> (N, features, H, W); ``positions`` are (N, position_channels, H, W), ``facts`` (N, embedded);
        ``scans`` are the numbers of consecutive slices that share their filters."""
        first, second = self.kernels(facts, scans)
        hidden = _convolved(x, first, self.body[0].bias, scans)
        if self.modulation is not None:
            scale, shift = self.changes(positions, facts).chunk(2, 1)
            hidden = torch.addcmul(hidden + shift, hidden, scale)
        return x + _convolved(self.body[1](hidden), second, self.body[2].bias, scans)

    def changes(self, positions: Tensor, facts: Tensor) -> Tensor:
        """By how much the features are scaled and shifted: (N, 2 * features, H, W)."""
        assert self.modulation is not None
        changes = self.modulation(positions)
        return changes if self.adaptation is None else changes + self.adaptation(facts)[:, :, None, None]

    def kernels(self, facts: Tensor, scans: list[int]) -> tuple[Tensor, Tensor]:
        """Filters of the first and of the second convolution for each scan: (S, features, features, 3, 3), twice."""
        first, second = self.body[0].weight[None], self.body[2].weight[None]
        if self.combination is None or self.experts is None:
            return first, second
        facts = facts[:1] if len(scans) == 1 else torch.stack([slices[0] for slices in facts.split(scans)])
        added = torch.einsum("se,ekoihw->skoihw", self.combination(facts), self.experts)
        return first + added[:, 0], second + added[:, 1]

    def folded(self, positions: Tensor, facts: Tensor, regular: bool) -> ResidualBlock:
        """This block for constant facts (1, embedded), without experts; if ``regular``, also for constant positions
        (1, position_channels, 1, 1), without modulation."""
        first, activation, second = copy.deepcopy(self.body)
        first.weight[:], second.weight[:] = (kernels[0] for kernels in self.kernels(facts, [1]))
        if not regular:
            return with_modules(self, body=nn.Sequential(first, activation, second), combination=None)
        body = nn.Sequential(folded(first, self.changes(positions, facts)), activation, second)
        return with_modules(self, body=body, modulation=None, adaptation=None, combination=None)


def with_modules(module: Any, **modules: nn.Module | None) -> Any:
    """A copy of a module with some other submodules. It shares the rest."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **modules}
    return copied


def _scans(facts: Tensor) -> list[int]:
    """Numbers of consecutive slices with the same facts (N, C). In an export to ONNX, all slices of a call count as one scan, as in
    inference: a graph cannot choose the number of its convolutions."""
    # a script does not know of other exports
    exporting = False if torch.jit.is_scripting() else torch.compiler.is_exporting()  # type: ignore[no-untyped-call]
    if exporting:
        return [facts.shape[0]]
    others = (facts[1:] != facts[:-1]).any(1).long()
    counts: list[int] = F.pad(others, (1, 0)).cumsum(0).bincount().tolist()
    return counts


def _convolved(x: Tensor, kernels: Tensor, bias: Tensor | None, scans: list[int]) -> Tensor:
    """Slices (N, C, H, W) convolved with the filters of their scans (S, C, C, 3, 3)."""
    if len(scans) == 1:
        return F.conv2d(x, kernels[0], bias, padding=1)
    return torch.cat([F.conv2d(slices, kernel, bias, padding=1) for slices, kernel in zip(x.split(scans), kernels.unbind())])


def folded(convolution: Any, changes: Tensor) -> Any:
    """A convolution whose results are scaled and shifted by constant changes (1, 2 * filters, 1, 1)."""
    scale, shift = changes.flatten().chunk(2)
    plain = copy.deepcopy(convolution)
    plain.weight.mul_((1 + scale)[:, None, None, None])
    plain.bias.mul_(1 + scale).add_(shift)
    return plain


class LastConvolution(nn.Conv2d):
    def forward(self, x: Tensor, positions: Tensor, facts: Tensor, scans: list[int]) -> Tensor:  # type: ignore[override]
        """(N, features, H, W) -> the same. TorchScript requires layers of the same signature, hence the other arguments."""
        return self._conv_forward(x, self.weight, self.bias)


def _complete(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Add weights for positions, facts and experts to those of a block without them, so that it ignores them."""
    for key, value in block.state_dict(prefix=prefix).items():
        name = key.removeprefix(prefix)
        if name.startswith(("modulation", "adaptation", "experts")):
            state_dict.setdefault(key, torch.zeros_like(value))
        elif name.startswith("combination"):
            state_dict.setdefault(key, value)  # of experts that are zero


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
