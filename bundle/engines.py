from __future__ import annotations

import csv
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import torch
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose

from .errors import InputError, full_disk, reason
from .files import write_whole

__all__ = ["VolumeInference"]

logger = logging.getLogger(__name__)


class VolumeInference(SupervisedEvaluator):
    """Evaluator that works through a folder of volumes, one per iteration: a volume that fails, at whatever stage, is reported and
    the others are still done. Several processes, each with its share of the volumes, report together.

    Args:
        output_dir: where ``failed.csv`` (volume, reason) is written when a volume failed.
        inspection, postprocessing, saving: transforms of a sample, run one after the other once the network has returned.
        kwargs: of :class:`monai.engines.SupervisedEvaluator`.
    """

    def __init__(self, output_dir: str, inspection: Callable, postprocessing: Callable, saving: Callable, **kwargs) -> None:
        super().__init__(postprocessing=Compose([inspection, postprocessing, saving]), **kwargs)
        self.output_dir = Path(output_dir)
        self.failures: list[tuple[str, str]] = []
        self.done_before = self.passed_over = 0

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]  # MONAI's evaluators take an epoch, Ignite's data
        """Work through all volumes.

        Raises:
            InputError: at the start, when ``output_dir`` cannot be written to; when the disk is full; at the end, when volumes failed
                (says how many and why the first one did).
        """
        self.failures.clear()
        self.done_before = self.passed_over = 0
        list_of_failures = self.output_dir / "failed.csv"
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output_dir).close()  # better known now than after the first volume
            if idist.get_rank() == 0:
                list_of_failures.unlink(missing_ok=True)  # of an earlier run
        except OSError as e:
            raise InputError(f"{self.output_dir}: cannot be written to ({e.strerror})") from e
        if self.state.epoch_length:  # more processes than volumes leave one without
            super().run(global_epoch)
        shares: list = [(self.failures, self.done_before, self.passed_over, self.state.epoch_length)]
        if idist.get_world_size() > 1:
            shares = shares * idist.get_world_size()
            torch.distributed.all_gather_object(shares, shares[0])
        if idist.get_rank() > 0:
            return
        self.failures = sorted(failure for share in shares for failure in share[0])
        done_before, passed, total = (sum(share[n] for share in shares) for n in (1, 2, 3))
        text = (f", {done_before} of them before" if done_before else "") + (f", {passed} passed over" if passed else "")
        logger.info("%d of %d volumes done%s, results in %s", total - len(self.failures) - passed, total, text, self.output_dir)
        if self.failures:
            try:
                write_whole(list_of_failures, self._write_failures)
                where = f"listed in {list_of_failures}"
            except OSError as e:  # the log has them all
                where = f"{list_of_failures} cannot be written ({e.strerror})"
            raise InputError(f"{len(self.failures)} of {total} volumes failed, {where}; {self.failures[0][1]}")

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict) -> dict:
        volume = _volume(batchdata)
        if "passed_over" in batchdata:
            self.passed_over += 1
            logger.warning("passed over: %s", batchdata["passed_over"][0])
            return {}
        if "done" in batchdata:
            self.done_before += 1
            return {}
        try:
            if "error" in batchdata:
                raise InputError(batchdata["error"][0])
            logger.info("volume %d of %d: %s", self.state.iteration, self.state.epoch_length, volume)
            return super()._iteration(engine, batchdata)
        except Exception as e:
            full = full_disk(e)
            if full is not None:  # every other volume would fail too, after hours perhaps
                raise InputError(f"{self.output_dir}: {full.strerror} at {volume}; start again for the rest") from e
            why = reason(e)
            self.failures.append((volume, why if volume in why else f"{volume}: {why}"))
            logger.error("failed: %s", self.failures[-1][1])
            return {}

    def _write_failures(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("volume", "reason"), *self.failures])


def _volume(batch: dict) -> str:
    image = batch["image"]
    return str(image[0] if isinstance(image, list) else image.meta["filename_or_obj"][0])
