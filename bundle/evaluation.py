"""Evaluation: reports of the scores, and the division of the volumes among processes."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.data import Dataset, Sampler

from .errors import InputError
from .figures import Panel, save_panels
from .files import write_atomically, write_json, write_text
from .metrics import has_foreground, psnr, ssim, volume_psnr, volume_ssim
from .resampling import acquire_slices, interpolate_slices
from .transforms import name_of, slice_factor

__all__ = ["EvaluationReport", "ThickSlicesReport", "VolumeSampler", "repeated"]

logger = logging.getLogger(__name__)


class VolumeSampler(Sampler[int]):
    """The volumes of one process of a distributed run. No volume is evaluated twice.

    If there are fewer volumes than processes, every process evaluates all of them: the metrics need every process, and the average over
    equal copies is the same.

    Args:
        dataset: the volumes.
    """

    def __init__(self, dataset: Dataset) -> None:
        rank, world_size, count = idist.get_rank(), idist.get_world_size(), len(dataset)  # type: ignore[arg-type]
        self.indices = range(count) if count < world_size else range(rank, count, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def repeated(data: Sequence[dict], thicknesses: Sequence[float] | None = None) -> list[dict]:
    """The items, or each item once for every slice thickness in mm, with the key ``"thickness"``."""
    return list(data) if thicknesses is None else [{**item, "thickness": t} for t in thicknesses for item in data]


class EvaluationReport:
    """PSNR and SSIM of the network's result and of its input, the interpolated low-resolution image: per slice, per volume and overall.

    Writes into ``output_dir``: ``metrics.csv`` (a line per slice), ``summary.json`` (per volume, and mean and standard deviation over
    volumes) and ``comparison.png`` (the middle slice of the first volume: truth, input, result and the errors of both). In a
    distributed run the first process gathers all values. Slices without foreground are left out; their values in ``metrics.csv``
    are NaN.

    Args:
        output_dir: folder of the report.
        first_slice: number of the first evaluated slice, counted from 1.
        interpolation: name of the degradation, for the picture and the columns.
    """

    def __init__(self, output_dir: str, first_slice: int = 1, interpolation: str = "bicubic") -> None:
        self.output_dir, self.first_slice, self.interpolation = Path(output_dir), first_slice, interpolation
        self.rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda engine: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.measure)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def measure(self, engine: Engine) -> None:
        """Measure the volumes of one iteration."""
        for item in engine.state.output:  # type: ignore[union-attr]  # a list after decollation
            # (1, X, Y, Z) to slices (Z, 1, X, Y)
            truth, given, result = (item[key].as_tensor().detach().cpu().movedim(-1, 0) for key in ("label", "image", "pred"))
            columns = {}
            for method, slices in ((f"{self.interpolation}_", given), ("", result)):
                for region in (False, True):
                    for metric in (psnr, ssim):
                        name = method + metric.__name__ + ("_foreground" if region else "")
                        values = metric(slices, truth, foreground=region)
                        columns[name] = values.masked_fill(~has_foreground(truth), torch.nan).tolist()
            volume = name_of(item["label"])
            for index, scores in enumerate(zip(*columns.values())):
                self.rows.append({"volume": volume, "slice": self.first_slice + index, **dict(zip(columns, scores))})
            if idist.get_rank() == 0 and engine.state.iteration == 1:
                self._draw(truth, given, result, item["label"].pixdim)

    def write(self, engine: Engine) -> None:
        """Write ``metrics.csv`` and ``summary.json``, and log the result."""
        rows = _gathered(self.rows, "volume", "slice")
        if idist.get_rank() > 0:
            return
        summary = summarise(rows)
        write_atomically(self.output_dir / "metrics.csv", lambda path: _write_csv(path, rows))
        write_json(self.output_dir / "summary.json", summary)
        logger.info("%d volumes, %d slices; mean (standard deviation) over volumes:", len(summary["volumes"]), len(rows))
        for name, value in summary["overall"].items():
            if value["mean"] is not None:
                logger.info("  %-26s %8.4f (%.4f)", name, value["mean"], value["std"] or 0.0)
        logger.info("report in %s", self.output_dir)

    def _draw(self, truth: torch.Tensor, given: torch.Tensor, result: torch.Tensor, spacing: torch.Tensor) -> None:
        middle = len(truth) // 2
        truth, given, result = (v[middle : middle + 1] for v in (truth, given, result))

        def label(name: str, slices: torch.Tensor) -> str:
            return f"{name}\n{float(psnr(slices, truth)):.2f} dB / {float(ssim(slices, truth)):.4f}"

        images = [("HR", truth), (label(f"LR, {self.interpolation}", given), given), (label("network", result), result)]
        errors = [("error of LR, 0 to 0.1", given), ("error of network, 0 to 0.1", result)]
        panels = [Panel(title, v[0, 0]) for title, v in images]
        panels += [Panel(title, (v - truth).abs()[0, 0], 0.0, 0.1, "magma") for title, v in errors]
        save_panels(self.output_dir / "comparison.png", panels, aspect=float(spacing[1] / spacing[0]), zoom=0.25)


class ThickSlicesReport:
    """PSNR and SSIM in 3D of thick slices restored to thin ones: by the network, and by linear and cubic B-spline interpolation.

    Writes into ``output_dir``: ``thick_slices.json`` (per thickness and volume, and over volumes), ``thick_slices.md`` (the table) and, for
    the first volume, ``<thickness>mm_<plane>.png`` in three planes. A single process writes after each volume, so that an interrupted run
    leaves its results; with several processes, the first one writes at the end.

    Args:
        output_dir: folder of the report.
        profile, gap: of the thick slices, see :class:`bundle.transforms.ThickSlicesd`.
    """

    METHODS = ("linear", "cubic B-spline", "network")

    def __init__(self, output_dir: str, profile: str = "gaussian", gap: float = 0.0) -> None:
        self.output_dir, self.profile, self.gap = Path(output_dir), profile, gap
        self.rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda engine: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.measure)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def measure(self, engine: Engine) -> None:
        """Measure the volumes of one iteration, and write the report so far."""
        for item in engine.state.output:  # type: ignore[union-attr]  # a list after decollation
            truth, network = (item[key].as_tensor().detach().cpu() for key in ("label", "pred"))
            if "thickness" not in item["image"].meta:
                raise InputError("configs/evaluate_thick_slices.json needs configs/thick_slices.json, which makes the slices thick")
            thickness = float(item["image"].meta["thickness"])
            factor = slice_factor(item["label"], thickness)
            thick = acquire_slices(truth, factor, self.profile, self.gap)
            splines = [interpolate_slices(thick, factor, truth.shape[-1], order) for order in (1, 3)]
            results = dict(zip(self.METHODS, (*splines, network)))
            row = {"volume": name_of(item["label"]), "thickness": thickness}
            for method, result in results.items():
                row[f"{method} psnr"] = volume_psnr(result, truth)
                row[f"{method} psnr_foreground"] = volume_psnr(result, truth, foreground=True)
                row[f"{method} ssim"] = volume_ssim(result, truth)
            self.rows.append(row)
            if idist.get_rank() == 0 and row["volume"] == self.rows[0]["volume"]:
                self._draw(truth, results, row, item["label"].pixdim)
        if idist.get_world_size() == 1:
            self._write()

    def finish(self, engine: Engine) -> None:
        """Write the results of all processes."""
        self.rows = _gathered(self.rows, "thickness", "volume")
        if idist.get_rank() == 0:
            self._write()

    def _write(self) -> None:
        write_json(self.output_dir / "thick_slices.json", {"profile": self.profile, "gap": self.gap, **self._summary()})
        write_text(self.output_dir / "thick_slices.md", self._table())

    def _summary(self) -> dict:
        summary: dict = {}
        for thickness in sorted({row["thickness"] for row in self.rows}):
            rows = [row for row in self.rows if row["thickness"] == thickness]
            metrics = [key for key in rows[0] if key not in ("volume", "thickness")]
            gains = [row["network psnr"] - row["cubic B-spline psnr"] for row in rows]
            summary[f"{thickness:g} mm"] = {
                "volumes": {row["volume"]: {m: _finite_mean([row[m]]) for m in metrics} for row in rows},
                "overall": {m: _mean_and_spread([_finite_mean([row[m]]) for row in rows]) for m in metrics},
                "gain_over_cubic_b_spline_db": {**_mean_and_spread(gains), "smallest": min(gains)},
            }
        return summary

    def _table(self) -> str:
        lines = [
            "| slices | " + " | ".join(self.METHODS) + " | gain over cubic B-spline, dB (smallest) |",
            "|---" * (len(self.METHODS) + 2) + "|",
        ]
        for thickness, values in self._summary().items():
            overall, gain = values["overall"], values["gain_over_cubic_b_spline_db"]
            cells = [f"{overall[f'{m} psnr']['mean']:.2f} dB / {overall[f'{m} ssim']['mean']:.4f}" for m in self.METHODS]
            lines.append(f"| {thickness} | " + " | ".join(cells) + f" | {gain['mean']:+.2f} ({gain['smallest']:+.2f}) |")
        return "\n".join(lines) + "\n"

    def _draw(self, truth: torch.Tensor, results: dict[str, torch.Tensor], row: dict, spacing: torch.Tensor) -> None:
        for axis, plane in enumerate(("sagittal", "coronal", "axial")):
            middle = truth.shape[1 + axis] // 2
            height, width = (float(s) for other, s in reversed(list(enumerate(spacing))) if other != axis)
            shown = truth[0].select(axis, middle)
            panels = [Panel("thin slices", shown)]
            for method, result in results.items():
                image = result[0].select(axis, middle)
                title = f"{method}\n{row[f'{method} psnr']:.2f} dB / {row[f'{method} ssim']:.4f}"
                panels.append(Panel(title, image, error=(image - shown).abs()))
            axcodes = "RAS".replace("RAS"[axis], "")
            path = self.output_dir / f"{row['thickness']:g}mm_{plane}.png"
            save_panels(path, panels, aspect=height / width, zoom=0.3, axcodes=(axcodes[0], axcodes[1]))


def _gathered(rows: list[dict], *keys: str) -> list[dict]:
    """Rows of all processes, one for each combination of values of ``keys``, sorted by them."""
    if idist.get_world_size() == 1:
        return rows
    parts: list = [None] * idist.get_world_size()
    torch.distributed.all_gather_object(parts, rows)
    unique = {tuple(row[key] for key in keys): row for part in parts for row in part}
    return [unique[key] for key in sorted(unique)]


def _mean_and_spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {"mean": _finite_mean(known), "std": float(np.std(known, ddof=1)) if len(known) > 1 else 0.0}


def _finite_mean(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN; ``None`` if there are none or the mean is infinite, which JSON cannot express."""
    known = [value for value in values if not math.isnan(value)]
    mean = sum(known) / len(known) if known else math.nan
    return mean if math.isfinite(mean) else None


def summarise(rows: list[dict]) -> dict:
    """Mean of each volume over its slices; mean and standard deviation over the volumes, which are the independent samples.

    Args:
        rows: one dictionary per slice: ``"volume"``, ``"slice"`` and metrics. NaN (a slice without foreground) is left out.

    Returns:
        ``{"volumes": {name: {metric: mean}}, "overall": {metric: {"mean": …, "std": …}}}``, with ``None`` for a mean that is not finite.
    """
    metrics = [key for key in rows[0] if key not in ("volume", "slice")]
    volumes: dict[str, dict[str, float | None]] = {}
    for volume in dict.fromkeys(row["volume"] for row in rows):
        of_volume = [row for row in rows if row["volume"] == volume]
        volumes[volume] = {m: _finite_mean([row[m] for row in of_volume]) for m in metrics}
    values = {m: [v[m] for v in volumes.values()] for m in metrics}
    overall = {m: _mean_and_spread(v) for m, v in values.items()}
    return {"volumes": volumes, "overall": overall}


def _write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
