"""Ranges of the training data, and warnings for volumes outside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from monai.data import MetaTensor

from .conditions import spectral_facts
from .files import write_json
from .resampling import Factor, check_factor

__all__ = ["compare", "describe", "measure", "read_ranges"]

logger = logging.getLogger(__name__)

# key in the files: name in messages
STATISTICS = {
    "factor_x": "factor along x",
    "factor_y": "factor along y",
    "factor_z": "factor across the slices",
    "spacing_x": "voxel size of the result along x, in mm,",
    "spacing_y": "voxel size of the result along y, in mm,",
    "spacing_z": "slice distance, in mm,",
    "noise": "standard deviation of the noise, relative to the brightest tissue,",
}
ORDINARY_NOISE = 0.02  # of the brightest tissue: not worth a warning
TOLERANCE = 0.1  # a value within this fraction of the end of a range does not count as far outside


def describe(image: MetaTensor, factor: Factor = 1) -> dict[str, float]:
    """Statistics that :func:`compare` and :func:`measure` use.

    Args:
        image: (1, X, Y, Z), RAS, intensities scaled by :class:`bundle.intensity.ScaleIntensityByPercentiled`, not clipped. Contrast
            and anatomy do not matter to a network; resolution, noise and factor do (docs/acquisitions.md).
        factor: of the refinement, because the network works on the refined grid: in-plane, of both axes or along x and along y, or
            along all three axes.

    Returns:
        a value for every key of ``STATISTICS``.
    """
    of_three = isinstance(factor, Sequence) and len(factor) == 3
    factors = tuple(factor) if of_three else (*check_factor(factor), 1)  # type: ignore[arg-type]
    spacing = [float(s) for s in image.pixdim]
    return {
        "factor_x": factors[0],
        "factor_y": factors[1],
        "factor_z": factors[2],
        "spacing_x": spacing[0] / factors[0],
        "spacing_y": spacing[1] / factors[1],
        "spacing_z": spacing[2] / factors[2],
        "noise": spectral_facts(image.as_tensor()[0].movedim(-1, 0))[0],
    }


def compare(statistics: Mapping[str, float], ranges: Mapping[str, list[float]], modality: str = "") -> list[str]:
    """Statistics outside the range of the training data by more than its width, and by more than ``TOLERANCE`` of its end.

    Args:
        statistics: of a volume, from :func:`describe`.
        ranges: smallest and largest value of the training subjects, from :func:`measure`.
        modality: from the header of the volume; empty if unknown.

    Returns:
        one line for each.
    """
    lines = [f"modality {modality}: the training data are MR"] if modality not in ("", "MR") else []
    for name, (low, high) in ranges.items():
        value, width = statistics[name], 0 if name.startswith("factor") else high - low  # factors are chosen, not sampled
        if value < low - max(width, TOLERANCE * abs(low)) or value > high + max(width, TOLERANCE * abs(high)):
            lines.append(f"{STATISTICS[name]} is {value:.3g}; of the training data {low:.3g} to {high:.3g}")
    return lines


def measure(
    volumes: Iterable[Mapping],
    path: str | Path,
    key: str = "image",
    in_plane_factors: Sequence[float] = (1, 1),
    across_factors: Sequence[float] = (1, 1),
    largest_noise: float | None = None,
) -> None:
    """Write the range of every statistic over volumes: ``{"volumes": their number, "ranges": {name: [smallest, largest]}}``.

    Args:
        volumes: items with a volume for :func:`describe`.
        path: of the JSON file.
        key: of the volume in an item.
        in_plane_factors: the smallest and the largest that the network is trained for.
        across_factors: the same across the slices. A network that is trained for such saw planes of any orientation: all axes then share
            one range of spacings.
        largest_noise: that was added in training; ``None`` where volumes were taken as they are.
    """
    rows = [describe(item[key]) for item in volumes]
    ranges = {name: [float(f"{f(row[name] for row in rows):.6g}") for f in (min, max)] for name in STATISTICS}
    ranges |= {f"factor_{axis}": [float(f) for f in (across_factors if axis == "z" else in_plane_factors)] for axis in "xyz"}
    ranges["noise"] = [0.0, max(ranges["noise"][1], ORDINARY_NOISE, float(largest_noise or 0))]
    if max(across_factors) > 1:
        spacings = [bound for axis in "xyz" for bound in ranges[f"spacing_{axis}"]]
        ranges |= {f"spacing_{axis}": [min(spacings), max(spacings)] for axis in "xyz"}
    write_json(Path(path), {"volumes": len(rows), "ranges": ranges})
    logger.info("ranges of %d volumes in %s", len(rows), path)


def read_ranges(path: str | Path | None) -> dict[str, list[float]]:
    """Ranges written by :func:`measure`; empty if the file does not exist. A file with other content is ignored with a warning, because
    other weights may have an unrelated JSON file beside them."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        ranges = json.loads(Path(path).read_text(encoding="utf-8"))["ranges"]
        return {name: [float(low), float(high)] for name, (low, high) in ranges.items() if name in STATISTICS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        logger.warning("%s: ignored, it does not contain ranges of training data (%s: %s)", path, type(e).__name__, e)
        return {}
