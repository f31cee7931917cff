"""Weights and training state: loading, saving, resuming."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ignite.distributed as idist
import monai.handlers
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import from_engine
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from . import root
from .errors import InputError, switch
from .files import write_atomically

__all__ = ["CheckpointLoader", "Checkpoints", "load_weights"]

logger = logging.getLogger(__name__)


class CheckpointLoader(monai.handlers.CheckpointLoader):
    """MONAI's loader of weights with one-line errors. It loads nothing but tensors."""

    def __call__(self, engine: Engine) -> None:
        """Load the weights.

        Raises:
            InputError: if the file does not exist, is damaged, contains more than tensors, or belongs to another network.
        """
        try:
            super().__call__(engine)
        except Exception as e:
            raise InputError(f"{self.load_path}: {_why_not_loaded(e)}{_fitting_overlay(self.load_path, e)}") from e


def load_weights(network: torch.nn.Module, path: str | Path) -> None:
    """Load the initial weights of a training.

    Raises:
        InputError: if the file cannot be read, contains more than tensors, or belongs to another network.
    """
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:
        raise InputError(f"{path}: {_why_not_loaded(e)}{_fitting_overlay(path, e)}") from e


class Checkpoints:
    """Save the training state after every epoch, and the best network. A run that was interrupted continues to the same result.

    ``last.pt`` contains everything that the training depends on. ``model.pt`` is the state dictionary of the network with the best key
    metric on the validation subjects, or of the last network if none was validated. Files are written atomically. If the loss or a
    weight is not finite, training stops before it is saved. Attach this handler after those that change the saved objects.

    Args:
        save_dir: folder for both files.
        network, optimizer, lr_scheduler: objects of the training.
        evaluator: validation engine, whose best metric selects ``model.pt``; ``None`` without validation.
        resume: whether to continue from ``last.pt`` if it exists.
        settings: of the training, stored in ``last.pt``; a run with different settings cannot be resumed.
        average: moving average of the weights (:class:`torch.optim.swa_utils.AveragedModel`), updated at each step and saved as
            ``model.pt``; the evaluator must validate it.
    """

    def __init__(
        self,
        save_dir: str,
        network,
        optimizer,
        lr_scheduler,
        evaluator: SupervisedEvaluator | None = None,
        resume: bool | str = False,
        settings: Mapping[str, Any] | None = None,
        average: AveragedModel | None = None,
    ):
        self.last, self.best = Path(save_dir) / "last.pt", Path(save_dir) / "model.pt"
        self.network = network.module if isinstance(network, DistributedDataParallel) else network
        self.parts = {"network": self.network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.average, self.best_network = average, self.network
        if average is not None:
            self.parts["average"] = average
            self.best_network = average.module.module if isinstance(average.module, DistributedDataParallel) else average.module
        self.evaluator, self.resume = evaluator, switch("resume", resume)
        self.settings = json.loads(json.dumps(settings or {}, default=float))

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, trainer: SupervisedTrainer) -> None:
        """Continue from ``last.pt`` if ``resume`` is set.

        Raises:
            InputError: if ``last.pt`` is damaged, belongs to another network or was made with other settings, or if a new run would
                overwrite it.
        """
        if trainer.state.iteration:  # a later run of one trainer is a round of federated learning
            return
        if not self.last.exists():
            if self.best.exists() and not self.resume:
                raise InputError(f"{self.best} holds the weights of another training, which would be lost: choose another folder")
            return
        if not self.resume:
            raise InputError(f"{self.last} is the checkpoint of an earlier run: continue it with '--resume true', or choose another folder")
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            self._compare(state.get("settings", {}))
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except InputError:
            raise
        except Exception as e:
            raise InputError(f"{self.last}: not a checkpoint of this training; {_why_not_loaded(e)}") from e
        trainer.state.iteration, trainer.state.epoch = state["iteration"], state["epoch"]
        torch.set_rng_state(state["random_state"])
        if trainer.scaler is not None and state["scaler"]:
            trainer.scaler.load_state_dict(state["scaler"])
        if self.evaluator is not None:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["best"]
        logger.info("continuing from %s after epoch %d", self.last, state["epoch"])

    def _compare(self, settings: Mapping[str, Any]) -> None:
        changed = [f"{k} {settings[k]!r}, now {v!r}" for k, v in self.settings.items() if k in settings and settings[k] != v]
        if changed:
            raise InputError(f"{self.last} was made with {'; '.join(changed)}: resume it with its own settings, or choose another folder")

    def check(self, trainer: SupervisedTrainer) -> None:
        """Stop if the loss is not finite; update the average of the weights.

        Raises:
            InputError: naming the loss, the step, and the last good checkpoint.
        """
        loss = float(from_engine(["loss"], first=True)(trainer.state.output))
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", trainer)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _diverged(self, what: str, trainer: SupervisedTrainer) -> InputError:
        kept = f"{self.last} holds the last epoch before" if self.last.exists() else "no epoch was complete"
        return InputError(
            f"{what} in epoch {trainer.state.epoch}, step {trainer.state.iteration}: training stopped, {kept}; "
            "a lower learning_rate, or --precision float32, may help"
        )

    def save(self, trainer: SupervisedTrainer) -> None:
        """Write ``last.pt``, and ``model.pt`` if this epoch is the best one.

        Raises:
            InputError: if a weight is not finite; both files then stay unchanged.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise self._diverged("a weight is not finite", trainer)
        if idist.get_rank() > 0:
            return
        best = (self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch) if self.evaluator else (-1, -1)
        if best[1] in (trainer.state.epoch, -1):
            write_atomically(self.best, lambda part: torch.save(self.best_network.state_dict(), part))
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "iteration": trainer.state.iteration,
            "epoch": trainer.state.epoch,
            "random_state": torch.get_rng_state(),
            "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else None,
            "best": best,
            "settings": self.settings,
        }
        write_atomically(self.last, lambda part: torch.save(state, part))


def _why_not_loaded(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnpicklingError):
        return "refused, it does not hold plain tensors: it is damaged, or loading it could run a program"
    if "state_dict" in lines[0]:
        return f"weights of another network ({' '.join(lines[1:2])[:150]})"
    return f"damaged, or no checkpoint ({lines[0][:150]})"


def _fitting_overlay(path: str | Path, error: Exception) -> str:
    """A hint which overlay chooses the network of these weights, if their names and shapes fit one; empty for other errors."""
    if "state_dict" not in str(error).partition("\n")[0]:
        return ""
    shapes = {key: value.shape for key, value in torch.load(path, map_location="cpu", weights_only=True).items()}
    configs = Path(root()) / "configs"
    for overlay in [configs / "general.json", configs / "any_factor.json", *sorted((configs / "networks").glob("*.json"))]:
        parser = ConfigParser()
        parser.read_config([str(configs / "train.json"), str(overlay)])
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
        if shapes == {key: value.shape for key, value in network.state_dict().items()}:
            return f"; they fit the network of {overlay.relative_to(configs.parent)}"
    return ""
