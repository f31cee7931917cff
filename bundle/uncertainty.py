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
from .metrics import head_of
from .networks.uncertainty import FLOOR, Calibration, WithUncertainty, check_network

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
EXPONENTS = np.arange(0.3, 2.01, 0.05)
SAMPLED = 50_000  # voxels of the head, of each volume in each acquisition
REGION = 6  # pixels, along both sides
RANKS = ("rank", "rank_of_neighbours", "rank_of_regions")
TOO_FAR = "the uncertainty map cannot be trusted: the scan is far from the training data"
NOT_COMPARED = "the uncertainty map may be wrong: the scan was not compared with the training data"


class Head(NamedTuple):
    """Weights of an uncertainty head, and its calibration."""

    path: str
    weights: str  # SHA-256 of the file
    calibration: Calibration


def calibrated_head(uncertainty: bool | str, path: str, network: nn.Module, calibrate: bool | str = False) -> Head | None:
    """The head for an option ``uncertainty``; ``None`` if it is false.

    Args:
        uncertainty: whether there shall be an uncertainty map.
        path: weights of the head; the calibration is the JSON file of the same name.
        network: the network that it belongs to.
        calibrate: whether the head is about to be calibrated: no calibration is then read.

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
        return Head(path, weights, Calibration())
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known, values = str(content["weights"]), Calibration(float(content["factor"]), float(content["exponent"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file}: not the calibration of an uncertainty head ({type(e).__name__}: {e})") from e
    if known != weights or not min(values) > 0:
        raise InputError(f"{file}: calibrates another head than {path}: calibrate it again (docs/uncertainty.md)")
    return Head(path, weights, values)


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
    combined = WithUncertainty(network, weights, head.calibration)
    load_weights(combined, head.path)
    return combined.to(device).eval()


class Cell(NamedTuple):
    """Errors of one volume in one acquisition, compared with the map. Ranks are Spearman's correlations."""

    errors: np.ndarray  # (SAMPLED,), magnitudes at random voxels of the head
    deviations: np.ndarray  # of the map before calibration, at the same voxels
    neighbours: np.ndarray  # root mean squares of the true errors of their 24 neighbours: what even a map that knew these could say
    rank: float  # of the map and the magnitude of the error, voxel by voxel
    rank_of_neighbours: float  # of the neighbours and the magnitude of the error
    rank_of_regions: float  # of the root mean squares of map and error over regions of 6 x 6 pixels


def measured(result: Tensor, deviation: Tensor, truth: Tensor) -> Cell:
    """Compare a map with the true errors in the head (:func:`bundle.metrics.head_of`), on the scale of the intensities.

    The magnitude of a single error is mostly chance, whatever its standard deviation: ``neighbours`` say what even a map reaches that knows
    the true errors around each voxel. ``rank_of_regions`` averages over chance.

    Args:
        result, deviation, truth: (N, H, W). Regions lie in the last two axes.
    """
    inside = head_of(truth)
    error = (result - truth).double()
    errors, deviations = error[inside].abs(), deviation[inside].double()
    around = ((25 * F.avg_pool2d(error.square(), 5, 1, 2) - error.square()) / 24)[inside].clamp(min=0).sqrt() + FLOOR
    # with replacement: every volume counts alike, whatever its size
    some = torch.from_numpy(np.random.default_rng(0).choice(len(errors), SAMPLED))
    errors, deviations, around = errors[some], deviations[some], around[some]
    weight = F.avg_pool2d(inside.double(), REGION)
    squares = (F.avg_pool2d(v.double().square() * inside, REGION)[weight > 0.5] / weight[weight > 0.5] for v in (error, deviation))
    ranks = _rank(errors, deviations), _rank(errors, around), _rank(*squares)
    return Cell(errors.numpy(), deviations.numpy(), around.numpy(), *ranks)


def calibration(cells: Collection[Cell]) -> Calibration:
    """Calibration by which 1.645 standard deviations on each side hold 90 % of the errors of all cells together.

    For each exponent the factor is that of split conformal prediction (Angelopoulos A., Bates S., arXiv 2107.07511). Of all exponents, the
    one with the best interval score is taken (Gneiting T., Raftery A., JASA 2007, doi 10.1198/016214506000001437): the width, and
    2 / (1 - 0.9) times what errors exceed the interval by.
    """
    errors, deviations = (np.concatenate([getattr(cell, name) for cell in cells]) for name in ("errors", "deviations"))

    def score(candidate: Calibration) -> float:
        half = Z * candidate(deviations)
        return float(np.mean(half + np.clip(errors - half, 0, None) / (1 - INTERVAL)))

    candidates = []
    for exponent in EXPONENTS:
        shape = Calibration(exponent=float(exponent))
        candidates.append(shape._replace(factor=float(np.quantile(errors / shape(deviations), INTERVAL)) / Z))
    return min(candidates, key=score)


def quality(rows: Mapping[str, Mapping[str, Cell]], calibrations: Mapping[str, Calibration]) -> dict[str, dict[str, float]]:
    """Quality of calibrated maps for each acquisition.

    Args:
        rows: acquisition to volume to cell.
        calibrations: of each volume.

    Returns:
        for each acquisition, and for ``"all"`` of them: the number of ``"volumes"``; the ``"coverage"`` of the 90 % interval, mean over
        volumes, ``"smallest"`` and ``"largest"``; the means of the ranks of :class:`Cell`; the mean ``"width"`` of the interval, on the
        intensity scale; and the widths of two intervals that cover as much of this acquisition: a ``"constant"`` one, and one in proportion
        to the ``"neighbours"``.
    """
    table = {}
    for row in (*rows, "all"):
        of_row = [(cell, calibrations[volume]) for name in (rows if row == "all" else [row]) for volume, cell in rows[name].items()]
        halves = [Z * values(cell.deviations) for cell, values in of_row]
        covered = [float(np.mean(cell.errors <= half)) for half, (cell, _) in zip(halves, of_row)]
        errors, neighbours = (np.concatenate([getattr(cell, name) for cell, _ in of_row]) for name in ("errors", "neighbours"))
        table[row] = {
            "volumes": len(of_row),
            "coverage": float(np.mean(covered)),
            "smallest": min(covered),
            "largest": max(covered),
            **{name: float(np.mean([getattr(cell, name) for cell, _ in of_row])) for name in RANKS},
            "width": 2 * float(np.mean(halves)),
            "constant": 2 * float(np.quantile(errors, np.mean(covered))),
            "neighbours": 2 * float(np.quantile(errors / neighbours, np.mean(covered)) * neighbours.mean()),
        }
    return table


def left_out(rows: Mapping[str, Mapping[str, Cell]], person: Mapping[str, str]) -> dict[str, Calibration]:
    """For each volume the calibration by all other persons: coverage is measured on persons that it does not know.

    Args:
        rows: acquisition to volume to cell.
        person: of each volume.

    Raises:
        InputError: if all volumes show one person.
    """
    if len(set(person.values())) < 2:
        raise InputError("calibration needs volumes of at least two persons (subject_pattern finds the person in a path)")
    of_person = {
        one: calibration([cell for cells in rows.values() for volume, cell in cells.items() if person[volume] != one])
        for one in set(person.values())
    }
    return {volume: of_person[one] for volume, one in person.items()}


def write_calibration(head: Head, rows: Mapping[str, Mapping[str, Cell]], table: Mapping[str, Any], persons: int) -> Head:
    """Write the calibration beside the weights of a head, from all volumes, with the ``table`` of :func:`quality`."""
    values = calibration([cell for cells in rows.values() for cell in cells.values()])
    values = Calibration(*(float(f"{value:.4g}") for value in values))
    content = {
        "weights": head.weights,
        **values._asdict(),
        "interval": INTERVAL,
        "deviations": Z,
        "persons": persons,
        "left_one_person_out": {row: {key: round(value, 4) for key, value in q.items()} for row, q in table.items()},
    }
    write_json(Path(head.path).with_suffix(".json"), content)
    return head._replace(calibration=values)


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """The table of :func:`quality`."""
    lines = [
        "| low resolution | volumes | coverage of the 90 % interval: mean (smallest to largest) | rank correlation with the error: voxels "
        "| its upper bound | regions | width of a constant interval | width of the map against it | its lower bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, q in table.items():
        lines.append(
            f"| {row} | {q['volumes']} | {100 * q['coverage']:.1f} % ({100 * q['smallest']:.1f} to {100 * q['largest']:.1f} %) "
            f"| {q['rank']:.2f} | {q['rank_of_neighbours']:.2f} | {q['rank_of_regions']:.2f} | {q['constant']:.4f} "
            f"| {100 * q['width'] / q['constant'] - 100:+.0f} % | {100 * q['neighbours'] / q['constant'] - 100:+.0f} % |"
        )
    return "\n".join(lines) + "\n"


def _rank(first: Tensor, second: Tensor) -> float:
    """NaN-free: 0 where one of both is constant."""
    value = float(spearmanr(first.numpy(), second.numpy()).statistic) if len(first) > 2 else 0.0
    return value if np.isfinite(value) else 0.0
