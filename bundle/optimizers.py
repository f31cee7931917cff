from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .errors import InputError

__all__ = ["GradientClipping", "layerwise_parameters", "moving_average"]


def layerwise_parameters(network: nn.Module, lr: float, reference_fan_in: int = 256) -> list[dict]:
    """Parameter groups with a learning rate per layer: lr x min(1, reference_fan_in / fan-in).

    An Adam step changes every weight by about the learning rate, so the output of a convolution changes in proportion to its fan-in (6272
    for 7x7 and 128 channels). At the nominal rate of 1e-3 the large branches overshoot and training collapses.

    Args:
        network: its parameters are grouped by rate. A bias has the rate of its layer.
        lr: base learning rate.
        reference_fan_in: layers up to this fan-in learn at the base rate.

    Returns:
        groups for ``torch.optim`` optimizers, highest rate first.

    Raises:
        InputError: for a network without weights.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()  # two modules may share a weight
    for module in network.modules():
        parameters = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in seen]
        if parameters:
            seen.update(parameters)
            groups.setdefault(lr * min(1.0, reference_fan_in / _fan_in(module)), []).extend(parameters)
    if not groups:
        raise InputError(f"{type(network).__name__} has no weights to train")
    return [{"params": groups[rate], "lr": rate} for rate in sorted(groups, reverse=True)]


def moving_average(decay: float) -> Callable:
    """Exponential moving average of the weights, for :class:`torch.optim.swa_utils.AveragedModel`.

    After n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow's ``ExponentialMovingAverage``. Otherwise the average of a short
    fine-tuning would hardly differ from the first weights.

    Args:
        decay: of long trainings, in [0, 1].
    """

    def update(averages: Any, weights: Any, steps: Any) -> None:
        n = float(steps)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, weights, steps)

    return update


class GradientClipping:
    """Limit the norm of the gradients in each step (Pascanu et al., ICML 2013, arXiv 1211.5063).

    Args:
        network: the trained network.
        optimizer: of its parameters. In mixed precision, the gradients are already unscaled when it steps.
        largest: upper limit of the norm of all gradients together.

    Raises:
        InputError: if ``largest`` is not positive.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, largest: float) -> None:
        if not largest > 0:
            raise InputError(f"largest_gradient must be positive, got {largest!r}")
        self.network, self.optimizer, self.largest = network, optimizer, largest
        self.hook: Any = None

    def attach(self, engine: Engine) -> None:
        if self.hook is None:  # a trainer may run several times
            self.hook = self.optimizer.register_step_pre_hook(self.clip)

    def clip(self, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.largest)


def _fan_in(module: nn.Module) -> int:
    """Number of inputs of one output value; 1 for a layer without a weight matrix."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:
        return 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):  # (in, out / groups, ...)
        return weight[:, 0].numel() // module.groups
    return weight[0].numel()
