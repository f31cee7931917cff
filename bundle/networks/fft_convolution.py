"""Convolution through the discrete Fourier transform: the same result as ``nn.Conv2d`` for a fraction of the arithmetic.

A k x k convolution between C channels costs C k^2 multiply-adds per output value; in the frequency domain it costs
about 4 C whatever k is, because a product of spectra replaces the sum over the kernel. On a CPU this makes the 7x7 and 5x5
branches of :class:`~bundle.networks.MultiScaleResidualNet` several times faster (``scripts/benchmark.py`` measures it).

On small tiles a transform is cheapest as a product with a small cosine / sine matrix: sizes need not be powers of two, and the
optimised matrix multiplication of the platform does all the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["FFTConv2d", "use_fft_convolutions"]

TILE = 32  # largest side transformed at once: arithmetic falls with the tile, the memory of the spectra rises
MAX_PIXELS = 128 * 256  # transformed at once; larger slices are split into bands, whose spectra fit the caches
MIN_CHANNELS = 32  # below this the transforms cost more than they save
MIN_KERNEL = 5  # likewise: 3x3 convolutions measured faster when direct


class FFTConv2d(nn.Conv2d):
    """``nn.Conv2d`` with stride 1 and "same" zero padding, computed in the frequency domain; same parameters, same result."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W)."""
        if torch.is_autocast_enabled(input.device.type):  # direct in half precision: as fast, and spectra would be rounded more than once
            return super().forward(input)
        margin = self.kernel_size[0] // 2
        height, width = input.shape[-2:]
        if max(height, width) <= TILE:
            # two dimensions in front, because the transforms run over the leading one
            output = _FFTConvolution.apply(input.permute(2, 3, 0, 1).contiguous(), self.weight, 0, (height, width))
            return self._biased(output).permute(2, 3, 0, 1)
        tiles = _cut(input, margin)
        size = (_tile(height), _tile(width))
        rows = max(MAX_PIXELS // (len(input) * width * size[0]), 1)
        bands = []
        for band in tiles.split(rows, 2):
            output = _FFTConvolution.apply(band.permute(4, 5, 0, 2, 3, 1).flatten(2, 4).contiguous(), self.weight, -margin, size)
            bands.append(_join(self._biased(output), band.shape))
        return torch.cat(bands, 2)[..., :height, :width]

    def _biased(self, output: Tensor) -> Tensor:
        return output if self.bias is None else output + self.bias


def use_fft_convolutions(network: nn.Module) -> nn.Module:
    """Turn every convolution that becomes faster by it into :class:`FFTConv2d`; parameters and results stay the same.

    Args:
        network: changed in place, except for convolutions with a stride, dilation, groups, a small or even kernel or few channels.

    Returns:
        the same network.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _gains(module):
            module.__class__ = FFTConv2d
    return network


def _gains(convolution: nn.Conv2d) -> bool:
    k = convolution.kernel_size[0]
    return (
        convolution.kernel_size == (k, k)
        and k % 2 == 1
        and k >= MIN_KERNEL
        and convolution.padding == (k // 2, k // 2)
        and convolution.padding_mode == "zeros"
        and convolution.stride == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and min(convolution.in_channels, convolution.out_channels) >= MIN_CHANNELS
    )


def _tile(length: int) -> int:
    """Side of the equal tiles, at most ``TILE``, that cover ``length``."""
    return math.ceil(length / math.ceil(length / TILE))


def _cut(image: Tensor, margin: int) -> Tensor:
    """Overlapping tiles for the overlap-save method, as a view: (N, C, H, W) -> (N, C, rows, columns, h, w)."""
    height, width = image.shape[-2:]
    h, w = _tile(height), _tile(width)
    image = F.pad(image, (margin, margin + -width % w, margin, margin + -height % h))
    return image.unfold(2, h + 2 * margin, h).unfold(3, w + 2 * margin, w)


def _join(tiles: Tensor, shape: Sequence[int]) -> Tensor:
    """Place the tiles of a band, cut in the ``shape`` of :func:`_cut`, side by side: (h, w, tiles, C) -> (N, C, rows h, columns w)."""
    h, w, _, channels = tiles.shape
    batch, _, rows, columns = shape[:4]
    image = tiles.view(h, w, batch, rows, columns, channels).permute(2, 5, 3, 0, 4, 1)
    return image.reshape(batch, channels, rows * h, columns * w)


class _FFTConvolution(torch.autograd.Function):
    """Correlation theorem: spectrum of the output = spectrum of the input x conjugate spectrum of the kernel.

    A transform of n = last input position + margin + 1 points is long enough for the wrap-around of the circular convolution
    to fall outside the output. Complex products are written as real ones, whose matrix multiplication is faster.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, start: int, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """x (h, w, M, C_in) holds positions start, start + 1, ...; returns (size[0], size[1], M, C_out) at positions 0, 1, ..."""
        margin = weight.shape[-1] // 2
        extra = 0 if start else margin  # tiles cut from an image already hold their margin
        points = (x.shape[0] + extra, x.shape[1] + extra)
        kernel = weight.permute(2, 3, 1, 0).contiguous()
        xr, xi = _transform(x, points, start, sign=-1)
        kr, ki = _transform(kernel, points, -margin, sign=1)
        yr = torch.bmm(xr, kr).baddbmm_(xi, ki, alpha=-1)
        yi = torch.bmm(xr, ki).baddbmm_(xi, kr)
        ctx.save_for_backward(xr, xi, kr, ki)
        ctx.geometry = points, start, tuple(x.shape[:2]), tuple(weight.shape[-2:])
        return _inverse(yr, yi, points, 0, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        xr, xi, kr, ki = ctx.saved_tensors
        points, start, x_size, k_size = ctx.geometry
        gr, gi = _transform(grad.contiguous(), points, 0, sign=-1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            kr, ki = kr.mT, ki.mT
            zr = torch.bmm(gr, kr).baddbmm_(gi, ki)
            zi = torch.bmm(gi, kr).baddbmm_(gr, ki, alpha=-1)
            grad_x = _inverse(zr, zi, points, start, x_size)
        if ctx.needs_input_grad[1]:
            gr, gi = gr.mT, gi.mT
            zr = torch.bmm(gr, xr).baddbmm_(gi, xi)
            zi = torch.bmm(gr, xi).baddbmm_(gi, xr, alpha=-1)
            grad_weight = _inverse(zr, zi, points, -(k_size[0] // 2), k_size).permute(2, 3, 0, 1)
        return grad_x, grad_weight, None, None


def _transform(x: Tensor, points: tuple[int, int], start: int, sign: int) -> tuple[Tensor, Tensor]:
    """Half spectrum of the real x (h, w, M, C) as real and imaginary parts, each (frequencies, M, C)."""
    height, width, *rest = x.shape
    rows, real, imaginary = _forward_matrices(points, (height, width), start, sign, x.dtype, x.device)
    # one product per column of the image: each fits the cache, where a single wide product would stream from memory
    half = torch.matmul(rows, x.view(height, width, -1).transpose(0, 1))  # (w, 2 n/2, M C)
    half = half.transpose(0, 1).reshape(points[0] // 2 + 1, 2 * width, -1)
    return torch.matmul(real, half).view(-1, *rest), torch.matmul(imaginary, half).view(-1, *rest)


def _inverse(real: Tensor, imaginary: Tensor, points: tuple[int, int], start: int, size: tuple[int, int]) -> Tensor:
    """Image (size[0], size[1], M, C) at positions start, start + 1, ... from its half spectrum."""
    half = points[0] // 2 + 1
    from_real, from_imaginary, rows = _inverse_matrices(points, size, start, real.dtype, real.device)
    columns = torch.matmul(from_real, real.view(half, points[1], -1))
    columns.baddbmm_(from_imaginary.expand(half, -1, -1), imaginary.view(half, points[1], -1))
    return (rows @ columns.view(2 * half, -1)).view(*size, *real.shape[1:])


def _angles(frequencies: int, points: int, positions: int, start: int) -> Tensor:
    position = torch.arange(start, start + positions, dtype=torch.float64)
    return 2 * math.pi / points * torch.arange(frequencies, dtype=torch.float64)[:, None] * position


@functools.lru_cache(maxsize=64)
def _forward_matrices(
    points: tuple[int, int], size: tuple[int, int], start: int, sign: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows: real to half-complex, (cos, sin) interleaved. Columns: complex to the real and to the imaginary part."""
    a = sign * _angles(points[0] // 2 + 1, points[0], size[0], start)
    rows = torch.stack([a.cos(), a.sin()], 1).flatten(0, 1)
    # the row transform leaves the columns of its output in the order (real of every column, imaginary of every column)
    b = sign * _angles(points[1], points[1], size[1], start)
    real, imaginary = torch.cat([b.cos(), -b.sin()], 1), torch.cat([b.sin(), b.cos()], 1)
    return tuple(m.to(device, dtype) for m in (rows, real, imaginary))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _inverse_matrices(
    points: tuple[int, int], size: tuple[int, int], start: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    b = _angles(points[1], points[1], size[1], start).T
    from_real, from_imaginary = torch.cat([b.cos(), b.sin()]), torch.cat([-b.sin(), b.cos()])
    a = _angles(points[0] // 2 + 1, points[0], size[0], start).T
    weight = torch.full((points[0] // 2 + 1,), 2.0, dtype=torch.float64)  # each also represents its conjugate,
    weight[0] = 1.0  # except the frequencies that are their own conjugate
    if points[0] % 2 == 0:
        weight[-1] = 1.0
    weight /= points[0] * points[1]
    rows = torch.stack([a.cos() * weight, -a.sin() * weight], 2).flatten(1)
    return tuple(m.to(device, dtype) for m in (from_real, from_imaginary, rows))  # type: ignore[return-value]
