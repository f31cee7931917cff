from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from pickle import UnpicklingError

import ignite.distributed as idist
import monai.handlers
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import from_engine
from torch.nn.parallel import DistributedDataParallel

from .degradation import acquire_slices, interpolate_slices
from .errors import InputError, switch
from .figures import Panel, save_panels
from .files import write_json, write_whole
from .metrics import psnr, ssim, volume_psnr, volume_ssim
from .transforms import name_of, slice_factor

__all__ = ["CheckpointLoader", "Checkpoints", "EvaluationReport"]

logger = logging.getLogger(__name__)


class CheckpointLoader(monai.handlers.CheckpointLoader):
    """MONAI's loader of weights, which loads tensors and nothing else; what cannot be loaded is refused by name, in one line."""

    def __call__(self, engine: Engine) -> None:
        """Load the weights.

        Raises:
            InputError: when the file does not exist, is damaged, holds more than tensors, or belongs to another network.
        """
        try:
            super().__call__(engine)
        except Exception as e:
            raise InputError(f"{self.load_path}: {_why_not_loaded(e)}") from e


class Checkpoints:
    """Save the state of training after every epoch, and the best network, so that a killed run can go on to the same result.

    ``last.pt`` holds everything that training depends on; ``model.pt`` is the plain state dictionary of the network with the best key
    metric on the validation subjects (of the last one, where none was validated). Both appear under their name only
    when complete. A loss or a weight that is not finite ends the training before it is saved. Attach after the handlers that change
    what is saved.

    Args:
        save_dir: folder for both files.
        network, optimizer, lr_scheduler: what is trained.
        evaluator: validation engine, whose best metric decides about ``model.pt``; ``None`` without validation.
        resume: whether to go on from ``last.pt`` where there is one.
    """

    def __init__(
        self, save_dir: str, network, optimizer, lr_scheduler, evaluator: SupervisedEvaluator | None = None, resume: bool | str = False
    ):
        self.last, self.best = Path(save_dir) / "last.pt", Path(save_dir) / "model.pt"
        self.network = network.module if isinstance(network, DistributedDataParallel) else network
        self.parts = {"network": self.network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.evaluator, self.resume = evaluator, switch("resume", resume)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, trainer: SupervisedTrainer) -> None:
        """Go on from ``last.pt`` if asked to.

        Raises:
            InputError: when ``last.pt`` is damaged or belongs to another network, or a new run would overwrite it.
        """
        if trainer.state.iteration or not self.last.exists():  # a later run of one trainer is a round of federated learning
            return
        if not self.resume:
            raise InputError(
                f"{self.last} is the checkpoint of an earlier run: go on from it with '--resume true', or choose another folder"
            )
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except Exception as e:
            raise InputError(f"{self.last}: not a checkpoint of this training; {_why_not_loaded(e)}") from e
        trainer.state.iteration, trainer.state.epoch = state["iteration"], state["epoch"]
        torch.set_rng_state(state["random_state"])
        if trainer.scaler is not None and state["scaler"]:
            trainer.scaler.load_state_dict(state["scaler"])
        if self.evaluator is not None:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["best"]
        logger.info("going on from %s after epoch %d", self.last, state["epoch"])

    def check(self, trainer: SupervisedTrainer) -> None:
        """Stop at a loss that is not finite.

        Raises:
            InputError: naming the loss, the step, and the checkpoint that is still good.
        """
        loss = float(from_engine(["loss"], first=True)(trainer.state.output))
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", trainer)

    def _diverged(self, what: str, trainer: SupervisedTrainer) -> InputError:
        kept = f"{self.last} holds the last epoch before" if self.last.exists() else "no epoch was complete"
        return InputError(
            f"{what} in epoch {trainer.state.epoch}, step {trainer.state.iteration}: training stopped, {kept}; "
            "a lower learning_rate, or amp off, may help"
        )

    def save(self, trainer: SupervisedTrainer) -> None:
        """Write ``last.pt``, and ``model.pt`` where this epoch is the best one.

        Raises:
            InputError: when a weight is not finite; both files stay as they were.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise self._diverged("a weight is not finite", trainer)
        if idist.get_rank() > 0:
            return
        best = (self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch) if self.evaluator else (-1, -1)
        if best[1] in (trainer.state.epoch, -1):
            write_whole(self.best, lambda part: torch.save(self.network.state_dict(), part))
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "iteration": trainer.state.iteration,
            "epoch": trainer.state.epoch,
            "random_state": torch.get_rng_state(),
            "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else None,
            "best": best,
        }
        write_whole(self.last, lambda part: torch.save(state, part))


def _why_not_loaded(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnpicklingError):
        return "refused, it does not hold plain tensors: it is damaged, or loading it could run a program"
    if "state_dict" in lines[0]:
        return f"weights of another network ({' '.join(lines[1:2])[:150]})"
    return f"damaged, or no checkpoint ({lines[0][:150]})"


class EvaluationReport:
    """PSNR and SSIM of the network beside those of its input, the interpolated low-resolution image, per slice, per volume and overall.

    Writes into ``output_dir``: ``metrics.csv`` (a line per slice), ``summary.json`` (per volume, and mean and standard deviation over
    volumes) and ``comparison.png`` (the middle slice of the first volume: truth, input, result and the errors of both). In a
    distributed run the first process gathers what all have measured.

    Args:
        output_dir: folder of the report.
        first_slice: number of the first slice evaluated, counted from 1.
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
                        columns[name] = metric(slices, truth, foreground=region).tolist()
            volume = name_of(item["label"])
            for index, values in enumerate(zip(*columns.values())):
                self.rows.append({"volume": volume, "slice": self.first_slice + index, **dict(zip(columns, values))})
            if idist.get_rank() == 0 and engine.state.iteration == 1:
                self._draw(truth, given, result, item["label"].pixdim)

    def write(self, engine: Engine) -> None:
        """Write ``metrics.csv`` and ``summary.json``, and log the result."""
        rows = self.rows
        if idist.get_world_size() > 1:
            gathered: list = [None] * idist.get_world_size()
            torch.distributed.all_gather_object(gathered, rows)
            rows = sorted((row for part in gathered for row in part), key=lambda row: (row["volume"], row["slice"]))
        if idist.get_rank() > 0:
            return
        summary = summarise(rows)
        write_whole(self.output_dir / "metrics.csv", lambda path: _write_csv(path, rows))
        write_whole(self.output_dir / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=4) + "\n"))
        logger.info("%d volumes, %d slices; mean (standard deviation) over volumes:", len(summary["volumes"]), len(rows))
        for name, value in summary["overall"].items():
            logger.info("  %-26s %8.4f (%.4f)", name, value["mean"], value["std"])
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
    """PSNR and SSIM, in 3D, of volumes of thick slices brought back to thin ones: by the network, and by linear and cubic B-spline
    interpolation across the slices.

    Writes into ``output_dir``: ``thick_slices.json`` (per thickness and volume, and over volumes), ``thick_slices.md`` (the table) and, of
    the first volume, ``<thickness>mm_<plane>.png`` in three planes. After each volume, so that an interrupted run leaves what it measured.

    Args:
        output_dir: folder of the report.
        profile, gap: with which the slices were made thick, see :class:`bundle.transforms.ThickSlicesd`.
    """

    METHODS = ("linear", "cubic B-spline", "network")

    def __init__(self, output_dir: str, profile: str = "gaussian", gap: float = 0.0) -> None:
        self.output_dir, self.profile, self.gap = Path(output_dir), profile, gap
        self.rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda engine: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.measure)

    def measure(self, engine: Engine) -> None:
        """Measure the volumes of one iteration, and write what is known."""
        for item in engine.state.output:  # type: ignore[union-attr]  # a list after decollation
            truth, network = (item[key].as_tensor().detach().cpu() for key in ("label", "pred"))
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
            if row["volume"] == self.rows[0]["volume"]:
                self._draw(truth, results, row, item["label"].pixdim)
        write_json(self.output_dir / "thick_slices.json", {"profile": self.profile, "gap": self.gap, **self._summary()})
        write_whole(self.output_dir / "thick_slices.md", lambda path: path.write_text(self._table(), encoding="utf-8"))

    def _summary(self) -> dict:
        summary: dict = {}
        for thickness in sorted({row["thickness"] for row in self.rows}):
            rows = [row for row in self.rows if row["thickness"] == thickness]
            metrics = [key for key in rows[0] if key not in ("volume", "thickness")]
            gains = [row["network psnr"] - row["cubic B-spline psnr"] for row in rows]
            summary[f"{thickness:g} mm"] = {
                "volumes": {row["volume"]: {m: row[m] for m in metrics} for row in rows},
                "overall": {m: _mean_and_spread([row[m] for row in rows]) for m in metrics},
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
            save_panels(self.output_dir / f"{row['thickness']:g}mm_{plane}.png", panels, aspect=height / width, zoom=0.3)


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.nanmean(values)), "std": float(np.nanstd(values, ddof=1)) if len(values) > 1 else 0.0}


def summarise(rows: list[dict]) -> dict:
    """Mean per volume over its slices; mean and standard deviation over volumes, which are the independent samples.

    Args:
        rows: a dictionary per slice: ``"volume"``, ``"slice"`` and metrics; NaN (a slice without foreground) is left out.
    """
    metrics = [key for key in rows[0] if key not in ("volume", "slice")]
    volumes: dict[str, dict[str, float]] = {}
    for volume in dict.fromkeys(row["volume"] for row in rows):
        of_volume = [row for row in rows if row["volume"] == volume]
        volumes[volume] = {m: float(np.nanmean([row[m] for row in of_volume])) for m in metrics}
    values = {m: [v[m] for v in volumes.values()] for m in metrics}
    overall = {m: _mean_and_spread(v) for m, v in values.items()}
    return {"volumes": volumes, "overall": overall}


def _write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
