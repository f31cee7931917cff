from __future__ import annotations

import logging
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError
from .files import write_whole

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """Save the state of training after every epoch, and the best network, so that a killed run can go on to the same result.

    ``last.pt`` holds everything that training depends on; ``model.pt`` is the plain state dictionary of the network with the best key
    metric on the validation subjects (of the last one, where none was validated). Both appear under their name only
    when complete. Attach after the handlers that change what is saved.

    Args:
        save_dir: folder for both files.
        network, optimizer, lr_scheduler: what is trained.
        evaluator: validation engine, whose best metric decides about ``model.pt``; ``None`` without validation.
        resume: whether to go on from ``last.pt`` where there is one.
    """

    def __init__(self, save_dir: str, network, optimizer, lr_scheduler, evaluator: Engine | None = None, resume: bool = False):
        self.last, self.best = Path(save_dir) / "last.pt", Path(save_dir) / "model.pt"
        self.network = network.module if isinstance(network, DistributedDataParallel) else network
        self.parts = {"network": self.network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.evaluator, self.resume = evaluator, resume

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, trainer: Engine) -> None:
        """Go on from ``last.pt`` if asked to.

        Raises:
            InputError: when ``last.pt`` is damaged or belongs to another network, or a new run would overwrite it.
        """
        if not self.last.exists():
            return
        if not self.resume:
            raise InputError(f"{self.last} is the checkpoint of an earlier run: go on from it with '--resume true', or choose another folder")
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except Exception as e:
            raise InputError(f"{self.last}: not a checkpoint of this training ({str(e).splitlines()[0]})") from e
        trainer.state.iteration, trainer.state.epoch = state["iteration"], state["epoch"]
        torch.set_rng_state(state["random_state"])
        if getattr(trainer, "scaler", None) is not None and state["scaler"]:
            trainer.scaler.load_state_dict(state["scaler"])
        if self.evaluator is not None:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["best"]
        logger.info("going on from %s after epoch %d", self.last, state["epoch"])

    def save(self, trainer: Engine) -> None:
        """Write ``last.pt``, and ``model.pt`` where this epoch is the best one."""
        if idist.get_rank() > 0:
            return
        scaler = getattr(trainer, "scaler", None)
        best = (self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch) if self.evaluator else (-1, -1)
        if best[1] in (trainer.state.epoch, -1):
            write_whole(self.best, lambda part: torch.save(self.network.state_dict(), part))
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "iteration": trainer.state.iteration,
            "epoch": trainer.state.epoch,
            "random_state": torch.get_rng_state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": best,
        }
        write_whole(self.last, lambda part: torch.save(state, part))
