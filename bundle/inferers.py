"""Inference over volumes, slice by slice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .acquisition import ACROSS, WITHIN
from .conditions import conditions, measured_samples, spectral_facts, with_measured_kspace, with_neighbours, zero_filled_excess
from .conditions import positions as subpixel_positions
from .consistency import Correction, Recognition, Recognized
from .errors import InputError, switch
from .grid import SLICE_WIDTHS
from .memory import empty_volume, release_freed_memory
from .networks.uncertainty import WithUncertainty
from .precision import in_precision

__all__ = ["AutocastInferer", "ForegroundInferer", "OrthogonalSlices", "Scan", "foreground_box"]

BLOCK = 4  # pixels; boxes start at multiples, so that networks which unshuffle by 2 or 4 group the pixels as in the whole slice
MAX_PIXELS = 512 * 192  # per call of the network: the feature maps of larger boxes would need more memory than whole volumes


class AutocastInferer(SimpleInferer):
    """Run the network on whole patches, with its convolutions in ``precision``. Weights, result and gradients stay float32. MONAI's
    own mixed precision (``amp``) is for GPUs only.

    Args:
        precision: number format of the convolutions (:func:`bundle.precision.choose`).
    """

    def __init__(self, precision: str = "float32") -> None:
        super().__init__()
        self.precision = precision

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """(N, C, H, W) -> the network's result in float32."""
        return super().__call__(inputs, in_precision(network, self.precision), *args, **kwargs)


class ForegroundInferer(SliceInferer):
    """Slice-by-slice inference of the anatomy only: of each slice, the box around it with a margin.

    Outside the boxes the result is the input. Large boxes are computed in bands, which limits the network's memory. The network must
    map a slice to one of the same size.

    Args:
        skip_background: ``False`` computes every pixel, as MONAI's inferer does.
        threshold: blocks of 4 x 4 pixels whose mean magnitude exceeds it count as anatomy. 1 is the intensity scale. Noise in the air is
            a few hundredths, and single bright pixels average out over a block.
        margin: pixels around the anatomy that are computed with it, rounded up to blocks, for the network's receptive field.
            docs/performance.md shows how to measure how much pixels beyond the margin matter.
        positions: whether the network receives the positions of the pixels (:func:`bundle.conditions.positions`); the factors are
            ``inputs.meta["factor"]``.
        facts: whether it also receives the excess of zero-filling (:func:`bundle.conditions.zero_filled_excess`), the neighbouring
            slices, the width of the slice profile (``inputs.meta["slice_width"]``, if known), the noise, the spectrum, and the
            probabilities of the kinds of sampling (:func:`bundle.conditions.conditions`).
        noise: standard deviation as a fraction of the intensity scale; ``None`` uses the measured one.
        denoise: 1 keeps the result as it is; 0 restores the measured k-space of each slice, with its noise, and keeps the result only
            beyond it; values in between mix (:func:`bundle.conditions.with_measured_kspace`).
        recognition: recognises the acquisition. The network receives what was recognised, and the result is corrected to agree with the
            measured samples (:mod:`bundle.consistency`). ``None`` does neither, nor does a recognition of the other kinds (within the
            plane, or across thick slices). What was recognised is in the result's ``meta["recognized"]``.
        interpolation: mode by which the slices were interpolated (:func:`bundle.resampling.enlarge`); ``"spline"`` across thick slices.
        thick_axis: spatial axis across thick slices, if ``inputs.meta["factor"]`` holds three factors.
        precision: number format of the network's convolutions (:func:`bundle.precision.choose`).
        progress: whether to show a progress bar of the slices.
        kwargs: of :class:`monai.inferers.SliceInferer`. Its ``roi_size`` and ``sw_batch_size`` apply within a box or band.

    Raises:
        InputError: if ``skip_background`` is neither true nor false, ``threshold``, ``margin``, ``noise`` or ``denoise`` is out of range,
            or if ``noise`` is given to a network that receives no facts.
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
        recognition: Recognition | None = None,
        interpolation: str = "spline",
        thick_axis: int = 2,
        precision: str = "float32",
        progress: bool = False,
        **kwargs: Any,
    ) -> None:
        self.skip_background, self.positions, self.facts = switch("skip_background", skip_background), positions, facts
        for name, value in (("threshold", threshold), ("margin", margin)):
            if not isinstance(value, (int, float)) or value < 0:
                raise InputError(f"{name} must be a number from 0 upwards, got {value!r}")
        if noise is not None and (not isinstance(noise, (int, float)) or not 0 <= noise < 1):
            raise InputError(f"noise must be a fraction of the intensity scale, such as 0.02, got {noise!r}")
        if noise is not None and not facts:
            raise InputError(f"noise is told to general networks only: leave out --noise {noise}")
        if not isinstance(denoise, (int, float)) or not 0 <= denoise <= 1:
            raise InputError(f"denoise must be a number from 0 to 1, got {denoise!r}")
        self.noise, self.denoise, self.interpolation, self.precision = noise, denoise, interpolation, precision
        self.thick_axis, self.recognition = thick_axis, recognition
        self.threshold, self.margin, self.show_slices = threshold, margin, progress
        super().__init__(progress=progress and not self.skip_background, **kwargs)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """(N, 1, three spatial axes) -> the same shape.

        A network with an uncertainty head (:class:`bundle.networks.WithUncertainty`) adds a second channel, the standard deviation before
        calibration. Outside the boxes it is 0; with ``denoise`` below 1 it includes the noise that is put back.
        """
        if not (self.skip_background or self.positions) and self.denoise == 1:
            every_pixel = super().__call__(inputs, in_precision(network, self.precision), *args, **kwargs)
            release_freed_memory()
            return every_pixel
        scan = self.scan(inputs, network, *args, **kwargs)
        return scan.restored(scan.recognized())

    def scan(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Scan:
        """A volume in the planes of this inferer."""
        return Scan(self, inputs, network, lambda part, network: SlidingWindowInferer.__call__(self, part, network, *args, **kwargs))


class Scan:
    """One volume in the planes of an inferer: its slices, what they show of the acquisition, and the network's result for them.

    Args:
        inferer: the inferer, whose options apply.
        inputs: (N, 1, three spatial axes), with metadata.
        network: the network.
        infer: applies a network to a part of a slice, (N, C, H, W).
    """

    def __init__(
        self, inferer: ForegroundInferer, inputs: Tensor, network: Callable[..., Any], infer: Callable[[Tensor, Callable[..., Any]], Any]
    ) -> None:
        self.inferer, self.network, self.infer = inferer, network, infer
        self.uncertain = isinstance(network, WithUncertainty)
        self.factors, self.across = self._factors(inputs) if inferer.positions or inferer.denoise < 1 else ([], [])
        # plain tensors, (slices, N, C, H, W): metadata would be copied with every part
        self.planes = torch.as_tensor(inputs).as_subclass(Tensor).movedim(inferer.spatial_dim + 2, 0)
        shape = (*self.planes.shape[:2], 1 + self.uncertain, *self.planes.shape[3:])
        # planes across thick slices do not lie one after the other
        in_order = inputs.device.type == "cpu" and self.planes.is_contiguous()
        self.target = empty_volume(shape, inputs.dtype) if in_order else self.planes.new_empty(shape)
        outputs = self.target.movedim(0, inferer.spatial_dim + 2)
        if isinstance(inputs, MetaTensor):
            outputs = MetaTensor(outputs, meta=dict(inputs.meta), applied_operations=inputs.applied_operations)
        self.outputs = outputs
        every = slice(0, self.planes.shape[-2]), slice(0, self.planes.shape[-1])
        self.boxes = {}
        for n, plane in enumerate(self.planes):
            self.target[n, :, :1] = plane
            self.target[n, :, 1:] = 0
            box = foreground_box(plane, inferer.threshold, inferer.margin) if inferer.skip_background else every
            if box is not None:
                self.boxes[n] = box
        self.kinds = None
        if inferer.facts:
            # slice by slice: intermediate results for the whole volume would take half of its memory
            samples = (measured_samples(plane, self.factors, inferer.interpolation) for plane in self.planes)
            first = next(samples)
            self.measured = first.new_empty(len(self.planes), *first.shape)
            for n, of_plane in enumerate(itertools.chain([first], samples)):
                self.measured[n] = of_plane
            width = float(inputs.meta.get("slice_width", 0))  # type: ignore[attr-defined]
            self.width = width if any(self.across) and SLICE_WIDTHS[0] <= width <= SLICE_WIDTHS[1] else 0.0
            noise, self.spectrum = spectral_facts(self.measured[:, 0, 0])
            self.noise = noise if inferer.noise is None else inferer.noise
            self.kinds = ACROSS.priors(self.width) if any(self.across) else WITHIN.priors()

    def recognized(self) -> Recognized | None:
        """How the scan was sampled; ``None`` if that is not asked for, or cannot be told."""
        recognition = self.inferer.recognition
        if not (recognition and self.inferer.facts) or any(self.across) != recognition.kinds.across:
            return None
        chosen = [n for n in recognition.chosen(self.measured[:, 0, 0]) if n in self.boxes]
        untold = self._told(self.kinds)
        # the result of a network that does not know the kind is evidence
        for n in tqdm(chosen, "recognition", unit="slice", disable=not self.inferer.show_slices):
            self._compute(n, *untold)
        found = recognition(self.measured[chosen, 0, 0], self.factors, self.target[chosen, 0, 0], self.width)
        return found if found is None or self.inferer.noise is None else replace(found, noise=self.inferer.noise)

    def restored(self, recognized: Recognized | None) -> Any:
        """The result: (N, 1 or 2, three spatial axes)."""
        denoise = self.inferer.denoise
        knowing = self._told(recognized.kinds if recognized else self.kinds)
        correction = None
        if recognized:
            self.outputs.meta["recognized"] = recognized.facts()  # type: ignore[attr-defined]
            if not any(self.across) or 1 in self.factors:  # how the other axis of planes across thick slices was sampled is not known
                correction = Correction(self.measured, self.planes.shape[-2:], self.factors, recognized)
        for n in tqdm(self.boxes, "restoration", unit="slice", disable=not self.inferer.show_slices):
            self._compute(n, *knowing)
            result = self.target[n, :, :1]  # a view
            if correction:
                result.copy_(correction(result, n))
            if denoise < 1:
                result.copy_(with_measured_kspace(result, self.planes[n], self.factors, 1 - denoise, self.inferer.interpolation))
        if self.uncertain and denoise < 1:
            for n in range(len(self.target)):
                self.target[n, :, 1:] = (self.target[n, :, 1:].square() + ((1 - denoise) * self.noise) ** 2).sqrt()
        release_freed_memory()
        return self.outputs

    def _told(self, kinds: Tensor | None) -> tuple[Callable[..., Any], Callable[[slice, slice], Tensor] | None]:
        """The network for these kinds of sampling, and its condition maps for rows and columns; ``None`` if it needs none."""
        network: Any = self.network
        precision = self.inferer.precision

        def maps(rows: slice, columns: slice) -> Tensor:
            if self.inferer.facts:
                widths = [self.width if thick else 0.0 for thick in self.across]
                return conditions(self.factors, rows, columns, widths, self.noise, self.spectrum, kinds).to(self.planes)
            return subpixel_positions(self.factors, rows, columns).to(self.planes)

        if not self.inferer.positions:
            return in_precision(network, precision), None
        if not hasattr(network, "folded"):  # an export
            return in_precision(network, precision), maps
        first, regular = slice(0, network.stride), all(network.stride % factor == 0 for factor in self.factors)
        return in_precision(network.folded(maps(first, first), regular), precision), None if regular else maps

    def _compute(self, n: int, network: Callable[..., Any], maps: Callable[[slice, slice], Tensor] | None) -> None:
        inferer, planes, box = self.inferer, self.planes, self.boxes[n]
        _, *neighbours = with_neighbours(n, len(planes))
        for kept, rows, columns in bands(box, inferer.margin, MAX_PIXELS) if inferer.skip_background else [(box[0], *box)]:
            part = planes[n][..., rows, columns]
            if inferer.facts:
                excess = zero_filled_excess(planes[n], self.factors, self.across, inferer.interpolation, rows, columns)
                part = torch.cat([part, excess, *(planes[side][..., rows, columns] for side in neighbours)], 1)
            if maps:
                part = torch.cat([part, maps(rows, columns).expand(len(part), -1, -1, -1)], 1)
            result = self.infer(part, network)
            self.target[n][..., kept, columns] = result[..., kept.start - rows.start : kept.stop - rows.start, :]

    def _factors(self, inputs: Tensor) -> tuple[list[float], list[bool]]:
        """Factors of the rows and columns of the slices, and which of them run across thick slices."""
        meta: dict = inputs.meta  # type: ignore[attr-defined]
        factors = [float(factor) for factor in [*meta.get("acquired_factor", meta["factor"]), 1.0][:3]]  # of slices: in-plane
        across = [axis == self.inferer.thick_axis and factor > 1 for axis, factor in enumerate(factors)]
        del factors[self.inferer.spatial_dim], across[self.inferer.spatial_dim]
        return factors, across


class OrthogonalSlices(Inferer):
    """Apply a network to the two sets of planes that contain the last, thick axis, and average the results.

    The rows of the planes lie across the slices, as in training (:class:`bundle.patches.AcquiredPatches`). The slice profile is recognised
    in the first set.

    Args:
        denoise: must be 1: across thick slices there is no measured k-space to keep.
        kwargs: of :class:`ForegroundInferer`.

    Raises:
        InputError: if ``denoise`` is another.
    """

    def __init__(self, denoise: float = 1.0, **kwargs: Any) -> None:
        if denoise != 1:
            raise InputError(f"denoise is for slices within their plane: with thick slices it must be 1, got {denoise!r}")
        self.inferers = [ForegroundInferer(roi_size=(-1, -1), spatial_dim=axis, thick_axis=0, **kwargs) for axis in (1, 2)]

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Volumes (N, 1, X, Y, Z) to the same shape. A second channel, the standard deviation, is that of an equal mixture of both results:
        it also grows where they differ."""
        meta = dict(getattr(inputs, "meta", {}))
        turned = MetaTensor(torch.as_tensor(inputs).as_subclass(Tensor).movedim(-1, 2), meta=meta)
        if "factor" in meta:
            along_x, along_y, across = [*turned.meta.pop("acquired_factor", meta["factor"]), 1.0][:3]
            turned.meta["factor"] = [across, along_x, along_y]
        recognized, results = None, []
        for inferer in self.inferers:
            if not (inferer.skip_background or inferer.positions):
                results.append(inferer(turned, network, *args, **kwargs))
                continue
            scan = inferer.scan(turned, network, *args, **kwargs)
            recognized = recognized or scan.recognized()
            results.append(scan.restored(recognized))
        if recognized:
            meta["recognized"] = recognized.facts()
        first, second = (torch.as_tensor(result).as_subclass(Tensor) for result in results)
        result = (first + second) / 2
        if result.shape[1] > 1:
            differences = (first[:, :1] - second[:, :1]) / 2
            result[:, 1:] = ((first[:, 1:].square() + second[:, 1:].square()) / 2 + differences.square()).sqrt()
        result = result.movedim(2, -1)
        return MetaTensor(result, meta=meta) if isinstance(inputs, MetaTensor) else result


def foreground_box(image: Tensor, threshold: float, margin: int) -> tuple[slice, slice] | None:
    """Bounding box of the anatomy of a slice with its margin, on the grid of 4 x 4 blocks.

    Args:
        image: (N, C, H, W); one box for all N and C.
        threshold, margin: see :class:`ForegroundInferer`.

    Returns:
        rows and columns; ``None`` if there is no anatomy.

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
    """Split a box into bands of at most about ``max_pixels``: for each, the rows to keep, the rows to compute (with the ``margin``,
    within the box), and the columns.

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
