from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path

from monai.engines import SupervisedEvaluator
from monai.transforms import Compose

from .errors import InputError, reason
from .files import write_whole

__all__ = ["VolumeInference"]

logger = logging.getLogger(__name__)


class VolumeInference(SupervisedEvaluator):
    """Evaluator that works through a folder of volumes, one per iteration: a volume that fails, at whatever stage, is reported and
    the others are still done.

    Args:
        output_dir: where ``failed.csv`` (volume, reason) is written when a volume failed.
        inspection, postprocessing, saving: transforms of a sample, run one after the other once the network has returned.
        kwargs: of :class:`monai.engines.SupervisedEvaluator`.
    """

    def __init__(self, output_dir: str, inspection: Callable, postprocessing: Callable, saving: Callable, **kwargs) -> None:
        super().__init__(postprocessing=Compose([inspection, postprocessing, saving]), **kwargs)
        self.output_dir = Path(output_dir)
        self.failures: list[tuple[str, str]] = []

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]  # MONAI's evaluators take an epoch, Ignite's data
        """Work through all volumes.

        Raises:
            InputError: at the start, when ``output_dir`` cannot be written to; at the end, when volumes failed (says how many and why
                the first one did).
        """
        self.failures.clear()
        list_of_failures = self.output_dir / "failed.csv"
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            list_of_failures.unlink(missing_ok=True)  # of an earlier run
        except OSError as e:
            raise InputError(f"{self.output_dir}: cannot be written to ({e.strerror})") from e
        super().run(global_epoch)
        done = self.state.epoch_length - len(self.failures)
        logger.info("%d of %d volumes done, results in %s", done, self.state.epoch_length, self.output_dir)
        if self.failures:
            write_whole(list_of_failures, self._write_failures)
            count = f"{len(self.failures)} of {self.state.epoch_length} volumes failed"
            raise InputError(f"{count}, listed in {list_of_failures}; {self.failures[0][1]}")

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict) -> dict:
        try:
            if "error" in batchdata:
                raise InputError(batchdata["error"][0])
            return super()._iteration(engine, batchdata)
        except Exception as e:
            volume = _volume(batchdata)
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
