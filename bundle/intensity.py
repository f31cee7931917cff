"""Intensities: the scale for the network, and the range of its results."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from scipy import ndimage

from .errors import switch
from .transforms import add_remarks

__all__ = ["ClipToInputRanged", "ScaleIntensityByPercentiled"]

OUTLYING = 4.0  # times the 95th percentile of the magnitudes; in 70 ordinary scans the 99.9th was at most 2.5 times the 95th
OBJECT = 0.01  # fraction of the voxels: what is bright and connected and larger is the anatomy, not a hot spot
BELOW_AIR = 0.05  # fraction of the non-zero voxels far below 0, from which on the background is not the lowest value
OVERSHOOT = 1.1  # largest magnitude of a result, as a multiple of that of the input


class Scale(NamedTuple):
    """``scaled = (value - offset) / scale``, with remarks about unusual intensities. If ``masked``, voxels of exactly 0 are background,
    whatever the offset: they become 0."""

    offset: float
    scale: float
    remarks: list[str]
    masked: bool = False


class ScaleIntensityByPercentiled(MapTransform, InvertibleTransform):
    """Divide by a high percentile of the non-zero magnitudes, so that a single outlier does not set the scale.

    Hot spots (small, and far brighter than everything else) and full-strength noise in the air are ignored. If the air is not near zero,
    its value is subtracted first. If the values of a masked brain lie above and below its background of 0 (z-scores), the lowest one is
    subtracted from the brain alone; the inverse gives the background its 0 back. Each case is logged and added to ``meta["remarks"]``.
    ``meta["unit_intensity"]`` is the scale, ``meta["zero_intensity"]`` the offset.

    Args:
        keys: volumes (1, X, Y, Z).
        percentile: in percent.
        clip: whether to clip to [0, 1] (training and evaluation); the inverse does not undo clipping.

    Raises:
        ValueError: for a percentile outside (0, 100].
    """

    def __init__(self, keys: KeysCollection, percentile: float = 99.9, clip: bool = False) -> None:
        super().__init__(keys)
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be in (0, 100], got {percentile}")
        self.percentile, self.clip = percentile, clip

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            offset, scale, remarks, masked = find_scale(d[key].as_tensor()[0].numpy(), self.percentile)
            extra_info: dict = {"scale": scale, "offset": offset}
            if masked:
                background = d[key].as_tensor()[0] == 0
                extra_info |= {"background": background.numpy(), "affine": d[key].affine.cpu().numpy()}
            d[key] = (d[key] - offset) / scale if offset else d[key] / scale
            if masked:
                d[key].as_tensor()[0][background] = 0
            d[key].meta["unit_intensity"], d[key].meta["zero_intensity"] = scale, offset
            add_remarks(d[key], remarks)
            if self.clip:
                d[key] = d[key].clamp(0, 1)
            self.push_transform(d, key, extra_info=extra_info)
        return d

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            info = self.pop_transform(d, key)["extra_info"]
            d[key].as_tensor().mul_(info["scale"]).add_(info["offset"])  # in place: results are the largest thing in memory
            if "background" in info:
                _restore_background(d[key], info["background"], info["affine"])
        return d


class ClipToInputRanged(MapTransform):
    """Clip a result to a range derived from its input: no negative values if the input has none, nothing beyond 1.1 times its extremes.

    Interpolation and networks overshoot at sharp edges. Negative values break logarithms, N4 and display windows that start at the minimum.

    Args:
        keys: results (1, X, Y, Z) in the units of the input, with its ``meta["intensity_range"]``.
        clip: whether to clip.
        scaled: whether the results still have the scale of :class:`ScaleIntensityByPercentiled`; they are then clipped in place.
    """

    def __init__(self, keys: KeysCollection, clip: bool | str = True, scaled: bool = False) -> None:
        super().__init__(keys)
        self.clip, self.scaled = switch("clip", clip), scaled

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            bounds = d[key].meta.get("intensity_range")
            if self.clip and bounds is not None:
                low, high = min(0.0, OVERSHOOT * float(bounds[0])), max(0.0, OVERSHOOT * float(bounds[1]))
                if self.scaled:
                    zero, unit = float(d[key].meta["zero_intensity"]), float(d[key].meta["unit_intensity"])
                    low, high = (low - zero) / unit, (high - zero) / unit
                d[key].as_tensor().clamp_(low, high)  # in place, as the scale before
        return d


def find_scale(volume: np.ndarray, percentile: float = 99.9) -> Scale:
    """Offset and scale of the intensities of a volume (X, Y, Z)."""
    remarks = []
    offset = _offset(volume)
    if offset:
        remarks.append(f"the air has the value {offset:g}: subtracted for the network, added again to the result")
    shifted = volume - np.float32(offset) if offset else volume
    magnitudes = np.abs(shifted)
    nonzero = magnitudes[magnitudes > 0]
    # torch.quantile refuses more than 16 million elements
    scale, bulk = (float(p) for p in np.percentile(nonzero, (percentile, min(95, percentile))))
    below, above = (0.0, 0.0) if offset else _far_from_zero(volume, 0.2 * scale)
    if min(below, above) > BELOW_AIR and float(np.mean(volume[_shell(volume.shape)] == 0)) > 0.5:
        lowest = float(np.percentile(volume[volume != 0], 0.1))
        inside = find_scale(np.where(volume == 0, 0, volume - np.float32(lowest)), percentile)
        remarks.append(
            f"values above and below a background of 0, as in z-scores: the lowest, {lowest:.4g}, is subtracted for the network, "
            "added again to the result"
        )
        return Scale(lowest, inside.scale, remarks, masked=True)
    if below > BELOW_AIR:
        remarks.append("many values lie far below that of the air: the network was trained on magnitudes")
    if scale > OUTLYING * bulk > 0 and len(nonzero) > 1000:
        bright = magnitudes > OUTLYING * bulk
        if not _one_object(bright):
            ordinary = nonzero[nonzero <= OUTLYING * bulk]
            scale = float(np.percentile(ordinary, percentile))
            share = 1 - len(ordinary) / len(nonzero)
            remarks.append(
                f"hot spots: {share:.2%} of the voxels lie far above the rest, and do not count for the intensity scale of {scale:.4g}"
            )
            return Scale(offset, scale, remarks)
        scale = float(np.percentile(magnitudes[bright], percentile))  # the anatomy in a large field of view
    head = _head_in_noise(magnitudes, scale)
    if head is not None:
        scale = float(np.percentile(magnitudes[head], percentile))
        remarks.append(
            "the air around the head holds noise of full strength (as MP2RAGE's uniform image does): "
            "the network sharpens it too; mask it, or give the denoised image"
        )
    return Scale(offset, scale, remarks)


def _offset(volume: np.ndarray) -> float:
    """Value of the air if it is not near zero; 0 for an ordinary volume."""
    low, high = (float(p) for p in np.percentile(volume, (1, 99.9)))
    smallest = float(volume.min())
    if volume.size < 1000 or high <= low:
        return 0.0
    shared = float(np.mean(volume == smallest))
    if smallest != 0 and shared > 0.05 and abs(smallest) > 0.02 * (high - smallest):  # one value for all of the air
        return smallest
    if smallest < 0:  # a constant was subtracted, or the values were normalised; noise in the air gives it many values
        air = float(np.median(volume[_shell(volume.shape)]))
        if air < -0.05 * (high - low) and air - low < 0.1 * (high - low):
            return air
    return low if low > 0.4 * high > 0 else 0.0


def _far_from_zero(volume: np.ndarray, level: float) -> tuple[float, float]:
    """Fractions of the non-zero voxels below ``-level`` and above ``level``; 0 and 0 if there are none below."""
    if volume.min() >= -level:
        return 0.0, 0.0
    values = volume[volume != 0]
    return float(np.mean(values < -level)), float(np.mean(values > level))


def _restore_background(result: MetaTensor, background: np.ndarray, affine: np.ndarray) -> None:
    """Set the voxels of a result (1, X, Y, Z) to 0 whose nearest voxel of the input is background, in place. The axes of both grids are
    parallel."""
    to_input = np.linalg.inv(affine) @ result.affine.cpu().numpy()
    nearest = [
        np.rint(np.arange(count) * to_input[axis, axis] + to_input[axis, 3]).astype(int).clip(0, background.shape[axis] - 1)
        for axis, count in enumerate(result.shape[1:])
    ]
    outside = torch.from_numpy(background)
    for n, z in enumerate(nearest[2]):  # slice by slice: the result is the largest thing in memory
        result.as_tensor()[0, :, :, n][outside[:, :, z][nearest[0]][:, nearest[1]].to(result.device)] = 0


def _one_object(bright: np.ndarray) -> bool:
    """Whether bright voxels are the anatomy in a large field of view: a connected part too large for a hot spot."""
    parts, _ = ndimage.label(bright)
    return float(np.bincount(parts.ravel())[1:].max(initial=0)) > OBJECT * bright.size


def _shell(shape: tuple[int, ...]) -> np.ndarray:
    """Mask of the voxels near the border of a volume."""
    shell = np.ones(shape, bool)
    shell[tuple(slice(max(2, n // 16), n - max(2, n // 16)) for n in shape)] = False
    return shell


def _head_in_noise(magnitudes: np.ndarray, scale: float) -> np.ndarray | None:
    """Mask of the head, if the air around it is noise as bright as the head; otherwise ``None``."""
    if min(magnitudes.shape) < 8:
        return None
    shell = _shell(magnitudes.shape)
    outside = magnitudes[shell]
    if float(np.mean(outside > 0.2 * scale)) < 0.5:
        return None
    small = torch.as_tensor(magnitudes / scale)[None, None]
    mean = torch.nn.functional.avg_pool3d(small, 3, 1, 1, count_include_pad=False)
    spread = (torch.nn.functional.avg_pool3d(small**2, 3, 1, 1, count_include_pad=False) - mean**2).clamp(min=0).sqrt()[0, 0].numpy()
    noise = float(np.median(spread[shell]))
    head = spread < 0.5 * noise
    return head if noise > 0.15 and 0.02 < float(head.mean()) < 0.98 else None
