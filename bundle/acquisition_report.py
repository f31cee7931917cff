"""Gain of a network over interpolation for simulated scans: a table over volumes and acquisitions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from tqdm.auto import tqdm

from .acquisition import Acquisition, Sampling, cut_to_acquired
from .conditions import MIDDLES, between_neighbours, slices_with_anatomy
from .consistency import Recognition
from .errors import switch
from .files import write_json, write_text
from .inferers import ForegroundInferer, OrthogonalSlices
from .metrics import FOREGROUND, head_of, psnr
from .resampling import enlarge, interpolate_slices
from .subjects import by_subject
from .transforms import name_of
from .uncertainty import Cell, Head, left_out, measured, quality, write_calibration
from .uncertainty import markdown as markdown_of_uncertainty

__all__ = ["measure_acquisitions"]

logger = logging.getLogger(__name__)

STEP = 1 / 1000  # between stored values, because files store whole numbers
# profile, width in pixels or slice distances, noise
IN_PLANE: dict[str, tuple[str, float, float]] = {
    "bicubic (the paper's)": ("bicubic", 1, 0),
    "Gaussian point spread": ("gaussian", 1, 0),
    "box (means of pixels)": ("box", 1, 0),
    "k-space truncation": ("kspace", 1, 0),
    "k-space, 1 % noise": ("kspace", 1, 0.01),
    "k-space, 2 % noise": ("kspace", 1, 0.02),
    "k-space, 4 % noise": ("kspace", 1, 0.04),
    "bicubic, 3 % noise": ("bicubic", 1, 0.03),
}
ACROSS: dict[str, tuple[str, float, float]] = {
    "Gaussian": ("gaussian", 1, 0),
    "box": ("box", 1, 0),
    "Gaussian, 80 % of the distance": ("gaussian", 0.8, 0),
    "box, 20 % gap": ("box", 0.8, 0),
    "Gaussian, 2 % noise": ("gaussian", 1, 0.02),
}


def measure_acquisitions(
    volumes: Sequence[Mapping[str, MetaTensor]],
    network: nn.Module,
    output_dir: str,
    factors: Sequence[float] = (2,),
    thicknesses: Sequence[float] = (5,),
    positions: bool = True,
    facts: bool = True,
    interpolation: str = "spline",
    slices: int = 12,
    tell_noise: bool | str = False,
    recognition: Recognition | None = None,
    precision: str = "float32",
    device: torch.device | None = None,
    seed: int = 0,
    head: Head | None = None,
    calibrate: bool | str = False,
    subject_pattern: str | None = None,
) -> dict:
    """Simulate low-resolution scans of volumes, restore them, and compare the network with cubic B-splines and zero-filling.

    Writes ``acquisitions.json`` and ``acquisitions.md`` into ``output_dir``, after each volume, and for a network with an uncertainty head
    ``uncertainty.json`` and ``uncertainty.md`` at the end.

    Args:
        volumes: items with ``"image"``, (1, X, Y, Z) in RAS, intensities scaled to 1. In-plane axes that a scanner zero-filled are cut back
            to the k-space that it acquired.
        network: the network to measure.
        output_dir: folder of the tables.
        factors: in-plane factors, applied to axial slices of every volume.
        thicknesses: slice thicknesses along the last axis, in mm; volumes are used only if their own slices are at most a third as thick.
        positions, facts: inputs of the network, see :class:`bundle.inferers.ForegroundInferer`.
        interpolation: in-plane interpolation of the network's input.
        slices: number of evenly spaced axial slices per volume for the in-plane rows; for thick slices, all planes are used.
        tell_noise: whether the network receives the true noise instead of the measured one.
        recognition: recognises the acquisition, see :class:`bundle.inferers.ForegroundInferer`.
        precision: number format of the network's convolutions (:func:`bundle.precision.choose`).
        device: device of the network; ``None`` is the CPU.
        seed: seed of the noise.
        head: the uncertainty head of the network, if it has one.
        calibrate: whether to write the calibration of the head beside its weights. The tables then leave one person out: the calibration
            of each volume is that of all other persons.
        subject_pattern: finds the person in a path, see :func:`bundle.subjects.split_subjects`.

    Raises:
        InputError: if a calibration has volumes of one person only.

    Returns:
        row to ``{volume: {"psnr": ..., "spline": ..., "zero-filled": ..., "gain": ...}}``, in dB, over the head
        (:func:`bundle.metrics.head_of`).
    """
    network.eval()
    calibrate, tell_noise = switch("calibrate", calibrate), switch("tell_noise", tell_noise)
    options: dict[str, Any] = {"positions": positions, "facts": facts, "precision": precision, "sw_batch_size": 4}

    def apply(volume: Tensor, meta: dict, noise: float, orthogonal: bool = False) -> Tensor:
        kwargs = {**options, "noise": noise if tell_noise else None, "recognition": recognition}
        inferer = (
            OrthogonalSlices(**kwargs)
            if orthogonal
            else ForegroundInferer(roi_size=(-1, -1), spatial_dim=2, interpolation=interpolation, **kwargs)
        )
        with torch.no_grad():
            result = inferer(MetaTensor(volume[None, None], meta=meta).to(device), network)
        return torch.as_tensor(result).as_subclass(Tensor)[0].cpu()

    def note(row: str, volume: str, truth: Tensor, result: Tensor, interpolations: Mapping[str, Tensor]) -> None:
        _note(table, row, volume, truth, result[0], interpolations)
        if head is not None:
            cells.setdefault(row, {})[volume] = measured(result[0], result[1], truth)

    table: dict[str, dict[str, dict[str, float]]] = {}
    cells: dict[str, dict[str, Cell]] = {}
    for item in tqdm(volumes, unit="volume"):
        image = item["image"]
        truth = cut_to_acquired(image.as_tensor()[0], (0, 1))
        groups = _evenly(truth, slices)
        chosen = groups[MIDDLES]
        for factor in factors:
            for title, (profile, width, noise) in IN_PLANE.items():
                sampling = Sampling(float(factor), profile, width)
                scan = Acquisition((sampling, sampling), noise, step=STEP)(groups, np.random.default_rng(seed))
                size = chosen.shape[1:]
                spline, filled = (enlarge(scan, (factor, factor), size, mode) for mode in ("spline", "kspace"))
                given = spline if interpolation == "spline" else enlarge(scan, (factor, factor), size, interpolation)
                result = apply(given.movedim(0, -1), {"factor": [factor, factor]}, noise).movedim(-1, 1)[:, MIDDLES]
                note(f"x{factor:g}: {title}", name_of(image), chosen, result, {"spline": spline[MIDDLES], "zero-filled": filled[MIDDLES]})
        for thickness in thicknesses:
            factor = round(thickness / float(image.pixdim[2]), 4)
            if factor < 3:
                continue
            body = _body(truth)
            for title, (profile, width, noise) in ACROSS.items():
                axes = (Sampling(), Sampling(), Sampling(factor, profile, width))
                scan = Acquisition(axes, noise, step=STEP)(body, np.random.default_rng(seed))
                spline = interpolate_slices(scan, factor, body.shape[2])
                result = apply(spline, {"factor": [1.0, 1.0, factor], "slice_width": width}, noise, orthogonal=True)
                note(f"{thickness:g} mm: {title}", name_of(image), body, result, {"spline": spline})
        write_json(Path(output_dir) / "acquisitions.json", {"rows": table})
        write_text(Path(output_dir) / "acquisitions.md", _markdown(table))
    if head is not None:
        _report_uncertainty(head, cells, calibrate, subject_pattern, Path(output_dir))
    logger.info("gain over the better interpolation, mean and worst volume:\n%s", _markdown(table))
    return table


def _report_uncertainty(head: Head, cells: dict[str, dict[str, Cell]], calibrate: bool, subject_pattern: str | None, folder: Path) -> None:
    names = list(dict.fromkeys(name for volumes in cells.values() for name in volumes))
    calibrations = dict.fromkeys(names, head.calibration)
    if calibrate:
        persons = by_subject(names, subject_pattern)
        calibrations = left_out(cells, {name: person[0] for person in persons for name in person})
        found = quality(cells, calibrations)
        head = write_calibration(head, cells, found, len(persons))
        logger.info("%s: calibrated on %d persons, factor %.3f, exponent %.2f", head.path, len(persons), *head.calibration)
    found = quality(cells, calibrations)
    write_json(
        folder / "uncertainty.json", {"calibrations": {name: values._asdict() for name, values in calibrations.items()}, "rows": found}
    )
    text = markdown_of_uncertainty(found)
    write_text(folder / "uncertainty.md", text)
    logger.info("uncertainty map%s:\n%s", ", each person by the calibration of the others" if calibrate else "", text)


def _evenly(volume: Tensor, count: int) -> Tensor:
    """Evenly spaced axial slices with anatomy, each between its neighbours, which the network sees too: (5 * count, X, Y)."""
    places = slices_with_anatomy(volume.movedim(-1, 0), 0.05, count)
    return volume[..., between_neighbours(places, volume.shape[2])].movedim(-1, 0).contiguous()


def _body(volume: Tensor) -> Tensor:
    """The box around the anatomy."""
    for axis in range(3):
        others = [n for n in range(3) if n != axis]
        filled = ((volume > FOREGROUND).float().mean(others) > 0.005).nonzero().flatten()
        volume = volume.narrow(axis, int(filled[0]), int(filled[-1] - filled[0]) + 1)
    return volume.contiguous()


def _note(table: dict, row: str, volume: str, truth: Tensor, result: Tensor, interpolations: Mapping[str, Tensor]) -> None:
    head = head_of(truth)

    def measured(image: Tensor) -> float:
        return float(psnr(image[head].view(1, 1, 1, -1), truth[head].view(1, 1, 1, -1)))

    values = {name: measured(image) for name, image in interpolations.items()}
    best, own = max(values.values()), measured(result)
    table.setdefault(row, {})[volume] = {"psnr": own, **values, "gain": own - best}


def _markdown(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = ["| low resolution | volumes | better interpolation, dB | network, dB | gain, dB: mean (worst) |", "|---|---|---|---|---|"]
    for row, volumes in table.items():
        own, gain = ([v[key] for v in volumes.values()] for key in ("psnr", "gain"))
        better = [v["psnr"] - v["gain"] for v in volumes.values()]
        lines.append(f"| {row} | {len(gain)} | {np.mean(better):.2f} | {np.mean(own):.2f} | {np.mean(gain):+.2f} ({min(gain):+.2f}) |")
    names = sorted({name for volumes in table.values() for name in volumes})
    header = [f"{path.parent.name}/{path.name.removesuffix('.nii.gz')}" for path in map(Path, names)]
    lines += ["", "Gain of each volume, in dB:", "", f"| low resolution | {' | '.join(header)} |", "|---" * (len(names) + 1) + "|"]
    for row, volumes in table.items():
        gains = [f"{volumes[name]['gain']:+.2f}" if name in volumes else "" for name in names]
        lines.append(f"| {row} | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"
