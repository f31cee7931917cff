"""The uncertainty map: the head that belongs to a network, its calibration, and how good the map is on simulated scans."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoints import load_weights
from .errors import InputError, switch
from .files import sha256, write_json
from .metrics import FOREGROUND
from .networks.uncertainty import WithUncertainty, check_network

__all__ = [
    "INTERVAL",
    "Cell",
    "Head",
    "Z",
    "attach",
    "calibrated_head",
    "calibration",
    "left_out",
    "markdown",
    "measured",
    "quality",
    "write_calibration",
]

INTERVAL = 0.9
Z = 1.645  # standard deviations on each side, which hold 90 % of a normal distribution; calibration makes them hold 90 % of the errors
RATIOS = np.logspace(-4, 4, 3201)  # borders of the bins: errors divided by the standard deviation of the map
ERRORS = np.logspace(-6, 2, 3201)  # errors, on the intensity scale
RANKED = 100_000  # voxels of a volume for the rank correlation
REGION = 6  # pixels, along both sides
RANKS = ("rank", "rank_of_neighbours", "rank_of_regions")
TOO_FAR = "the uncertainty map cannot be trusted: the scan is far from the training data"
NOT_COMPARED = "the uncertainty map may be wrong: the scan was not compared with the training data"


class Head(NamedTuple):
    """Weights of an uncertainty head, and the factor that calibrates its standard deviations."""

    path: str
    weights: str  # SHA-256 of the file
    factor: float


def calibrated_head(uncertainty: bool | str, path: str, network: nn.Module, calibrate: bool | str = False) -> Head | None:
    """The head for an option ``uncertainty``; ``None`` if it is false.

    Args:
        uncertainty: whether there shall be an uncertainty map.
        path: weights of the head; the calibration is the JSON file of the same name.
        network: the network that it belongs to.
        calibrate: whether the head is about to be calibrated: its factor is then 1, and no calibration is read.

    Raises:
        InputError: if the network cannot have a map, or the files of the head are missing or do not belong together.
    """
    calibrate = switch("calibrate", calibrate)
    if not switch("uncertainty", uncertainty) and not calibrate:
        return None
    check_network(network)
    file = Path(path).with_suffix(".json")
    for needed in (Path(path), *([] if calibrate else [file])):
        if not needed.is_file():
            raise InputError(f"{needed}: there is no uncertainty map for these weights (docs/uncertainty.md says how to train one)")
    weights = sha256(path)
    if calibrate:
        return Head(path, weights, 1.0)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known, factor = str(content["weights"]), float(content["factor"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file}: not the calibration of an uncertainty head ({type(e).__name__}: {e})") from e
    if known != weights or not factor > 0:
        raise InputError(f"{file}: calibrates another head than {path}: calibrate it again (docs/uncertainty.md)")
    return Head(path, weights, factor)


def attach(network: nn.Module, head: Head | None, weights: str | None) -> nn.Module:
    """The network with its head (:class:`bundle.networks.WithUncertainty`), or the network itself without one.

    Args:
        network: on its device.
        head: from :func:`calibrated_head`.
        weights: file of the network's weights.

    Raises:
        InputError: if the head was trained for other weights, or there are none.
    """
    if head is None:
        return network
    if weights is None:
        raise InputError("the uncertainty map needs the weights that it was trained for, but load_weights is false")
    device = next(network.parameters()).device
    combined = WithUncertainty(network, weights, head.factor)
    load_weights(combined, head.path)
    return combined.to(device).eval()


class Cell(NamedTuple):
    """Errors of one volume in one acquisition, compared with the map. Ranks are Spearman's correlations."""

    ratios: np.ndarray  # fraction of the voxels in each bin of RATIOS; those below the first border are in the first
    errors: np.ndarray  # the same for ERRORS
    deviation: float  # mean of the map
    rank: float  # of the map and the magnitude of the error, voxel by voxel
    rank_of_neighbours: float  # of the magnitude of the error and the root mean square of those of its 24 neighbours
    rank_of_regions: float  # of the root mean squares of map and error over regions of 6 x 6 pixels


def measured(result: Tensor, deviation: Tensor, truth: Tensor) -> Cell:
    """Compare a map with the true errors in the head (truth above 0.05), on the scale of the intensities.

    The magnitude of a single error is mostly chance, whatever its standard deviation: ``rank_of_neighbours`` says what even a map reaches
    that knows the true errors around each voxel. ``rank_of_regions`` averages over chance.

    Args:
        result, deviation, truth: (N, H, W). Regions lie in the last two axes.
    """
    inside = truth > FOREGROUND
    error = (result - truth).double()
    errors, deviations = error[inside].abs(), deviation[inside].double()
    around = (25 * F.avg_pool2d(error.square(), 5, 1, 2) - error.square())[inside]
    some = torch.from_numpy(np.random.default_rng(0).choice(len(errors), min(len(errors), RANKED), replace=False))
    weight = F.avg_pool2d(inside.double(), REGION)
    squares = (F.avg_pool2d(v.double().square() * inside, REGION)[weight > 0.5] / weight[weight > 0.5] for v in (error, deviation))
    return Cell(
        _histogram(errors.numpy() / deviations.numpy(), RATIOS), _histogram(errors.numpy(), ERRORS), float(deviations.mean()),
        _rank(errors[some], deviations[some]), _rank(errors[some], around[some]), _rank(*squares),
    )  # fmt: skip


def calibration(cells: Collection[Cell]) -> float:
    """Factor of the standard deviations by which 1.645 of them on each side hold 90 % of the errors (split conformal prediction:
    Angelopoulos A., Bates S., arXiv 2107.07511). Every cell has the same weight, whatever its number of voxels."""
    return _quantile(np.mean([cell.ratios for cell in cells], 0), RATIOS, INTERVAL) / Z


def quality(rows: Mapping[str, Mapping[str, Cell]], factors: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Quality of calibrated maps for each acquisition.

    Args:
        rows: acquisition to volume to cell.
        factors: of each volume.

    Returns:
        for each acquisition, and for ``"all"`` of them: the number of ``"volumes"``; the ``"coverage"`` of the 90 % interval, mean over
        volumes, ``"smallest"`` and ``"largest"``; the means of the ranks of :class:`Cell`; the mean ``"width"`` of the interval, on the
        intensity scale; and that of the ``"constant"`` interval that covers as much of this acquisition.
    """
    table = {}
    for row in (*rows, "all"):
        of_row = [(cell, factors[volume]) for name in (rows if row == "all" else [row]) for volume, cell in rows[name].items()]
        covered = [_below(cell.ratios, RATIOS, Z * factor) for cell, factor in of_row]
        table[row] = {
            "volumes": len(of_row),
            "coverage": float(np.mean(covered)),
            "smallest": min(covered),
            "largest": max(covered),
            **{name: float(np.mean([getattr(cell, name) for cell, _ in of_row])) for name in RANKS},
            "width": 2 * Z * float(np.mean([factor * cell.deviation for cell, factor in of_row])),
            "constant": 2 * _quantile(np.mean([cell.errors for cell, _ in of_row], 0), ERRORS, float(np.mean(covered))),
        }
    return table


def left_out(rows: Mapping[str, Mapping[str, Cell]], person: Mapping[str, str]) -> dict[str, float]:
    """For each volume the factor that all other persons give: coverage is measured on persons that the factor does not know.

    Args:
        rows: acquisition to volume to cell.
        person: of each volume.

    Raises:
        InputError: if all volumes show one person.
    """
    if len(set(person.values())) < 2:
        raise InputError("calibration needs volumes of at least two persons (subject_pattern finds the person in a path)")
    factor = {
        one: calibration([cell for cells in rows.values() for volume, cell in cells.items() if person[volume] != one])
        for one in set(person.values())
    }
    return {volume: factor[one] for volume, one in person.items()}


def write_calibration(head: Head, rows: Mapping[str, Mapping[str, Cell]], table: Mapping[str, Any], persons: int) -> Head:
    """Write the calibration beside the weights of a head, from all volumes, with the ``table`` of :func:`quality`."""
    factor = calibration([cell for cells in rows.values() for cell in cells.values()])
    content = {
        "weights": head.weights,
        "factor": float(f"{factor:.6g}"),
        "interval": INTERVAL,
        "deviations": Z,
        "persons": persons,
        "left_one_person_out": {row: {key: float(f"{value:.4g}") for key, value in values.items()} for row, values in table.items()},
    }
    write_json(Path(head.path).with_suffix(".json"), content)
    return head._replace(factor=factor)


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """The table of :func:`quality`."""
    lines = [
        "| low resolution | volumes | coverage of the 90 % interval: mean (smallest to largest) | rank correlation with the error: voxels "
        "| neighbours' true errors | regions | mean width | constant interval (the map against it) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, q in table.items():
        lines.append(
            f"| {row} | {q['volumes']} | {100 * q['coverage']:.1f} % ({100 * q['smallest']:.1f} to {100 * q['largest']:.1f} %) "
            f"| {q['rank']:.2f} | {q['rank_of_neighbours']:.2f} | {q['rank_of_regions']:.2f} | {q['width']:.4f} "
            f"| {q['constant']:.4f} ({100 * q['width'] / q['constant'] - 100:+.0f} %) |"
        )
    return "\n".join(lines) + "\n"


def _rank(first: Tensor, second: Tensor) -> float:
    """NaN-free: 0 where one of both is constant."""
    value = float(spearmanr(first.numpy(), second.numpy()).statistic) if len(first) > 2 else 0.0
    return value if np.isfinite(value) else 0.0


def _histogram(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(np.clip(values, borders[0], borders[-1]), borders)
    return counts / max(len(values), 1)


def _quantile(histogram: np.ndarray, borders: np.ndarray, fraction: float) -> float:
    return float(np.interp(fraction, [0, *np.cumsum(histogram)], borders))


def _below(histogram: np.ndarray, borders: np.ndarray, value: float) -> float:
    return float(np.interp(value, borders, [0, *np.cumsum(histogram)]))
