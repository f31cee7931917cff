"""Inference over volumes, slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer, SliceInferer
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .conditions import conditions, measured_samples, spectral_facts, with_measured_kspace, zero_filled_excess
from .conditions import positions as subpixel_positions
from .errors import InputError, switch
from .memory import release_freed_memory
from .precision import in_precision

__all__ = ["AutocastInferer", "ForegroundInferer", "OrthogonalSlices", "foreground_box"]

BLOCK = 4  # pixels; boxes start at multiples, so that networks which unshuffle by 2 or 4 group the pixels as in the whole slice
WIDTHS = (0.5, 1.3)  # slice thickness over slice distance: what lies outside was not trained, and is not told
MAX_PIXELS = 512 * 192  # computed at once: the feature maps of larger boxes would need more memory than whole volumes


class AutocastInferer(SimpleInferer):
    """The network on whole patches; weights, result and gradients are float32 whatever it computes in. MONAI's engines have mixed
    precision on GPUs alone (``amp``).

    Args:
        precision: what its convolutions compute in (:func:`bundle.precision.choose`).
    """

    def __init__(self, precision: str = "float32") -> None:
        super().__init__()
        self.precision = precision

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """(N, C, H, W) -> what the network makes of it, as float32."""
        return super().__call__(inputs, in_precision(network, self.precision), *args, **kwargs)


class ForegroundInferer(SliceInferer):
    """Slice-by-slice inference that computes only where there is anatomy: in each slice, the box around it and a margin.

    Outside of the boxes, and in slices without anatomy, the result is the input. A large box is computed in bands, so that the memory
    that the network needs is bounded. For networks that map a slice to one of the same size.

    Args:
        skip_background: ``False`` computes every pixel, as MONAI's inferer does.
        threshold: blocks of 4 x 4 pixels whose mean magnitude exceeds it count as anatomy. 1 is the intensity scale; noise of the air lies
            at a few hundredths, and averages out over a block where it is isolated.
        margin: pixels around the anatomy that are computed with it, rounded up to blocks, for the network's receptive field. What lies
            further away matters less; docs/performance.md says how to measure it.
        positions: whether the network is told the factor of ``inputs.meta["factor"]`` (:func:`bundle.conditions.positions`).
        facts: whether it is also told what zero-filling would give (:func:`bundle.conditions.zero_filled_excess`), the width of the slice
            profile, ``inputs.meta["slice_width"]`` where that is known, the noise and the spectrum (:func:`bundle.conditions.conditions`).
        noise: to tell: standard deviation, as a fraction of the intensity scale; ``None`` tells what is measured.
        denoise: 1 takes the result as it is; 0 keeps the measured k-space of each slice, with its noise, and takes from the result what
            lies beyond it; values in between mix (:func:`bundle.conditions.with_measured_kspace`).
        interpolation: mode by which the slices were interpolated (:func:`bundle.resampling.enlarge`); across thick ones it is ``"spline"``.
        precision: what the network's convolutions compute in (:func:`bundle.precision.choose`).
        progress: whether to show a bar, which counts slices.
        kwargs: of :class:`monai.inferers.SliceInferer`. Its ``roi_size`` and ``sw_batch_size`` hold within a box or band.

    Raises:
        InputError: when ``skip_background`` is not a switch, ``noise`` or ``denoise`` no fraction.
        ValueError: when ``threshold`` or ``margin`` is negative.
    """

    def __init__(
        self,
        skip_background: bool | str = True,
        threshold: float = 0.03,
        margin: int = 8,
        positions: bool = False,
        facts: bool = False,
        noise: float | None = None,
        denoise: float = 1.0,
        interpolation: str = "spline",
        precision: str = "float32",
        progress: bool = False,
        **kwargs: Any,
    ) -> None:
        self.skip_background, self.positions, self.facts = switch("skip_background", skip_background), positions, facts
        if threshold < 0 or margin < 0:
            raise ValueError(f"threshold and margin must not be negative, got {threshold} and {margin}")
        if noise is not None and (not isinstance(noise, (int, float)) or not 0 <= noise < 1):
            raise InputError(f"noise must be a fraction of the intensity scale, such as 0.02, got {noise!r}")
        if not isinstance(denoise, (int, float)) or not 0 <= denoise <= 1:
            raise InputError(f"denoise must be a number from 0 to 1, got {denoise!r}")
        self.noise, self.denoise, self.interpolation, self.precision = noise, denoise, interpolation, precision
        self.threshold, self.margin, self.show_slices = threshold, margin, progress
        super().__init__(progress=progress and not self.skip_background, **kwargs)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """(N, 1, three spatial axes) -> the same shape."""
        network = in_precision(network, self.precision)
        if not (self.skip_background or self.positions):
            every_pixel = super().__call__(inputs, network, *args, **kwargs)
            release_freed_memory()
            return every_pixel
        told = self._telling(inputs) if self.positions else lambda part, rows, columns: part
        given = self._with_excess(inputs) if self.facts else lambda part: part
        axis = self.spatial_dim + 2
        row_axis = 3 if axis == 2 else 2
        sides = [side for n, side in enumerate(inputs.shape[2:]) if n != self.spatial_dim]
        every = slice(0, sides[0]), slice(0, sides[1])
        factors = self._factors(inputs)[0] if self.denoise < 1 else ()
        outputs = inputs.clone()
        # meta data would be copied with every part
        inputs, target = torch.as_tensor(inputs).as_subclass(Tensor), torch.as_tensor(outputs).as_subclass(Tensor)

        def window(n: int, rows: slice, columns: slice) -> list[slice]:
            across = [slice(None), slice(None), rows, columns]
            return [*across[:axis], slice(n, n + 1), *across[axis:]]

        for n in tqdm(range(inputs.shape[axis]), unit="slice", disable=not self.show_slices):
            box = foreground_box(inputs.select(axis, n), self.threshold, self.margin) if self.skip_background else every
            if box is None:
                continue
            whole = given(inputs.narrow(axis, n, 1))
            for kept, rows, columns in bands(box, self.margin, MAX_PIXELS) if self.skip_background else [(box[0], *box)]:
                part = told(whole[*window(0, rows, columns)], rows, columns)
                result: Any = super().__call__(part, network, *args, **kwargs)
                target[*window(n, kept, columns)] = result.narrow(row_axis, kept.start - rows.start, kept.stop - kept.start)
            if self.denoise < 1:
                before, after = (v.narrow(axis, n, 1).movedim(axis, 0) for v in (inputs, target))
                mixed = with_measured_kspace(after, before, factors, 1 - self.denoise, self.interpolation)
                target[*window(n, *every)] = mixed.movedim(0, axis)
        release_freed_memory()
        return outputs

    def _telling(self, inputs: Tensor) -> Callable[[Tensor, slice, slice], Tensor]:
        """Adds what is known of it, as channels, to a part of a slice."""
        factors, across = self._factors(inputs)
        axis = self.spatial_dim + 2
        if self.facts:
            width = float(inputs.meta.get("slice_width", 0))  # type: ignore[attr-defined]
            width = width if WIDTHS[0] <= width <= WIDTHS[1] else 0.0
            widths = [width if thick else 0.0 for thick in across]
            planes = inputs.as_subclass(Tensor).movedim(self.spatial_dim + 2, 0)[:, 0, 0]  # the facts are those of the first volume
            noise, spectrum = spectral_facts(measured_samples(planes, factors, self.interpolation))
            noise = noise if self.noise is None else self.noise

        def told(part: Tensor, rows: slice, columns: slice) -> Tensor:
            maps = conditions(factors, rows, columns, widths, noise, spectrum) if self.facts else subpixel_positions(factors, rows, columns)
            maps = maps.to(inputs.device, inputs.dtype).unsqueeze(axis - 1)
            return torch.cat([part, maps.expand(len(part), *maps.shape)], 1)

        return told

    def _with_excess(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """Adds the excess of zero-filling, as a channel, to some of the slices."""
        factors, across = self._factors(inputs)
        axis = self.spatial_dim + 2

        def given(part: Tensor) -> Tensor:
            planes = torch.as_tensor(part).as_subclass(Tensor).movedim(axis, 0)
            excess = zero_filled_excess(planes, factors, across, self.interpolation)
            return torch.cat([planes, excess], 2).movedim(0, axis)

        return given

    def _factors(self, inputs: Tensor) -> tuple[list[float], list[bool]]:
        """Factors of the rows and columns of the slices, and which of them go across thick slices: the last axis of a volume does."""
        factors = [float(factor) for factor in [*inputs.meta["factor"], 1.0][:3]]  # type: ignore[attr-defined]  # of slices, in-plane
        across = [False, False, factors[2] > 1]
        del factors[self.spatial_dim], across[self.spatial_dim]
        return factors, across


class OrthogonalSlices(Inferer):
    """Run a network of slices on the two families of planes that contain the last axis, across which slices are thick, and average.

    Args:
        denoise: must be 1: across thick slices there is no measured k-space to keep.
        kwargs: of :class:`ForegroundInferer`.

    Raises:
        InputError: for another ``denoise``.
    """

    def __init__(self, denoise: float = 1.0, **kwargs: Any) -> None:
        if denoise != 1:
            raise InputError(f"denoise is for slices within their plane: with thick slices it must be 1, got {denoise!r}")
        self.families = [ForegroundInferer(roi_size=(-1, -1), spatial_dim=axis, **kwargs) for axis in (0, 1)]

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Volumes (N, 1, X, Y, Z) to the same shape."""
        first, second = (torch.as_tensor(family(inputs, network, *args, **kwargs)) for family in self.families)
        return (first + second) / 2


def foreground_box(image: Tensor, threshold: float, margin: int) -> tuple[slice, slice] | None:
    """Bounding box of the anatomy of a slice with its margin, on the grid of 4 x 4 blocks.

    Args:
        image: (N, C, H, W); one box for all N and C.
        threshold, margin: see :class:`ForegroundInferer`.

    Returns:
        rows and columns; ``None`` when there is no anatomy.

    Example:
        >>> image = torch.zeros(1, 1, 40, 41)
        >>> image[..., 17:20, 30:40] = 1
        >>> foreground_box(image, threshold=0.03, margin=4)
        (slice(12, 24, None), slice(24, 41, None))
    """
    means = F.avg_pool2d(torch.as_tensor(image).abs(), BLOCK, ceil_mode=True)
    occupied = (means > threshold).any(0).any(0)
    if not occupied.any():
        return None
    around = -(-margin // BLOCK)
    box = []
    for axis, side in enumerate(image.shape[-2:]):
        blocks = occupied.any(1 - axis).nonzero().flatten()
        first, last = int(blocks[0]) - around, int(blocks[-1]) + 1 + around
        box.append(slice(max(first * BLOCK, 0), min(last * BLOCK, side)))
    return box[0], box[1]


def bands(box: tuple[slice, slice], margin: int, max_pixels: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of a box, none of more than about ``max_pixels``: the rows that a part gives, those computed for it (with the ``margin``, as
    far as the box has one), and its columns.

    Example:
        >>> list(bands((slice(8, 40), slice(0, 10)), margin=4, max_pixels=200))
        [(slice(8, 24, None), slice(8, 28, None), slice(0, 10, None)), (slice(24, 40, None), slice(20, 40, None), slice(0, 10, None))]
    """
    (first, last), columns = (box[0].start, box[0].stop), box[1]
    height, around = last - first, -(-margin // BLOCK) * BLOCK
    count = math.ceil(height * (columns.stop - columns.start) / max_pixels)
    part = -(-height // (count * BLOCK)) * BLOCK
    for start in range(first, last, part):
        stop = min(start + part, last)
        yield slice(start, stop), slice(max(start - around, first), min(stop + around, last)), columns
