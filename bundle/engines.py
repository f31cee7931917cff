from __future__ import annotations

import csv
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator

from .checkpoints import CheckpointLoader
from .errors import InputError, full_disk, reason
from .files import write_atomically
from .networks import WithUncertainty
from .results import Results
from .transforms import name_of

__all__ = ["VolumeInference"]

logger = logging.getLogger(__name__)

COLUMNS = ("volume", "reason")  # of failed.csv


class VolumeInference(SupervisedEvaluator):
    """Process a folder of volumes, one per iteration. A volume that fails at any stage is reported, and the others are processed.
    Several processes divide the volumes and report together.

    Args:
        results: results of the run. If a volume fails, ``failed.csv`` (volume, reason) is written to their folder.
        load_weights: whether a handler must load the weights.
        inspection, postprocessing, saving: transforms of a sample that run, in this order, after the network.
        kwargs: of :class:`monai.engines.SupervisedEvaluator`.

    Raises:
        InputError: if ``load_weights`` is set but no handler loads them; the results would name the wrong weights.
    """

    def __init__(
        self,
        results: Results,
        inspection: Callable,
        postprocessing: Callable,
        saving: Callable,
        load_weights: bool = False,
        val_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if load_weights and not any(isinstance(handler, CheckpointLoader) for handler in val_handlers or ()):
            raise InputError(
                "the handler that loads the weights is switched off: use --load_weights false for a network without weights, "
                "configs/inference_torchscript.json for TorchScript"
            )
        super().__init__(val_handlers=val_handlers, **kwargs)
        self.results, self.inspect, self.postprocess, self.save = results, inspection, postprocessing, saving
        self.failures: list[tuple[str, str]] = []
        self.passed_over: list[str] = []
        self.done_before = 0

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]  # MONAI's evaluators take an epoch, Ignite's data
        """Process all volumes.

        Raises:
            InputError: at the start, if ``output_dir`` cannot be written to; if the disk is full; at the end, if volumes failed
                (with their number and the first reason).
        """
        self.failures.clear()
        self.passed_over.clear()
        self.done_before = 0
        list_of_failures = self.results.output_dir / "failed.csv"
        try:
            self.results.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.results.output_dir).close()  # fail before the first volume
            if idist.get_rank() == 0 and _is_own(list_of_failures):
                list_of_failures.unlink()  # of an earlier run
        except OSError as e:
            raise InputError(f"{self.results.output_dir}: cannot be written to ({e.strerror})") from e
        if self.state.epoch_length:  # a process may have no volume
            super().run(global_epoch)
        shares: list = [(self.failures, self.done_before, self.passed_over, self.state.epoch_length)]
        if idist.get_world_size() > 1:
            shares = shares * idist.get_world_size()
            torch.distributed.all_gather_object(shares, shares[0])
        if idist.get_rank() > 0:
            return
        self.failures = sorted(failure for share in shares for failure in share[0])
        done_before, total = (sum(share[n] for share in shares) for n in (1, 3))
        passed = [line for share in shares for line in share[2]]
        text = (f", {done_before} of them before" if done_before else "") + (f", {len(passed)} skipped" if passed else "")
        logger.info(
            "%d of %d volumes done%s, results in %s", total - len(self.failures) - len(passed), total, text, self.results.output_dir
        )
        if total > 1:
            try:
                self.results.write_index(self.failures, passed)
            except OSError as e:
                logger.warning("%s: index.html cannot be written (%s)", self.results.output_dir, e.strerror)
        if self.failures:
            where = self._write_failures(list_of_failures)
            raise InputError(f"{len(self.failures)} of {total} volumes failed, {where}; {self.failures[0][1]}")

    def _iteration(self, engine: SupervisedEvaluator, batchdata: list[dict]) -> dict:  # type: ignore[override]
        item = batchdata.pop()  # the engine keeps the list, which would keep the volume in memory
        if "passed_over" in item:
            self.passed_over.append(item["passed_over"])
            logger.warning("skipped: %s", item["passed_over"])
            return {}
        if "done" in item:
            self.done_before += 1
            return {}
        volume = _volume(item)
        try:
            if "error" in item:
                raise InputError(item["error"])
            logger.info("volume %d of %d: %s", self.state.iteration, self.state.epoch_length, volume)
            pred = self.predict(item["image"])
            if isinstance(self.network, WithUncertainty):
                item = {**item, "sd": self.network.calibration(pred[1:])}
            self.results.remove(volume, "_sr.json")  # it would describe the files that are written now
            item = self.inspect({**item, "pred": pred[:1]})
            item["image"] = _without_voxels(item["image"])
            del pred
            item = self.postprocess(item)  # frees the result in the network's orientation before the other one is saved
            self.save(item)
        except Exception as e:
            full = full_disk(e)
            if full is not None:  # all other volumes would fail too
                raise InputError(f"{self.results.output_dir}: {full.strerror} at {volume}; run again for the remaining volumes") from e
            why = reason(e)
            self.failures.append((volume, why if volume in why else f"{volume}: {why}"))
            logger.error("failed: %s", self.failures[-1][1])
        return {}

    def predict(self, image: MetaTensor) -> MetaTensor:
        """The network's result for a volume (1, X, Y, Z), on the same grid; an uncertainty head adds a channel, not calibrated."""
        device = torch.device(self.state.device)  # type: ignore[attr-defined]
        with torch.no_grad():
            return self.inferer(image[None].to(device), self.network)[0]

    def _write_failures(self, path: Path) -> str:
        """Write the list of failures; returns where they are listed."""

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
                csv.writer(stream).writerows([COLUMNS, *self.failures])

        if path.exists():
            return f"listed in the log, because {path} is not of this program"
        try:
            write_atomically(path, write)
        except OSError as e:  # the log lists all failures
            return f"{path} cannot be written ({e.strerror})"
        return f"listed in {path}"


def _is_own(list_of_failures: Path) -> bool:
    """Whether a file is a list of failures."""
    return list_of_failures.is_file() and list_of_failures.read_bytes().startswith(",".join(COLUMNS).encode())


def _without_voxels(image: MetaTensor) -> MetaTensor:
    """What inversion and saving need of the interpolated volume, which is as large as the result: its metadata."""
    return MetaTensor(image.as_tensor().new_empty((1, 0, 0, 0)), meta=image.meta, applied_operations=image.applied_operations)


def _volume(item: dict) -> str:
    return item["image"] if isinstance(item["image"], str) else name_of(item["image"])
