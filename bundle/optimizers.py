from __future__ import annotations

from torch import nn

__all__ = ["layerwise_parameters"]


def layerwise_parameters(network: nn.Module, lr: float, reference_fan_in: int = 256) -> list[dict]:
    """Parameter groups with a learning rate per layer: lr x min(1, reference_fan_in / fan-in).

    An Adam step changes every weight by about the learning rate, so the output of a convolution moves in proportion to its
    fan-in (6272 for 7x7 of 128 channels): at the nominal rate of 1e-3 the large branches overshoot and training collapses.
    Scaling by the fan-in keeps the nominal rate, and its steps, as the base.

    Args:
        network: its parameters are grouped by rate. A bias takes the rate of its layer.
        lr: base learning rate.
        reference_fan_in: layers up to this fan-in learn at the base rate.

    Returns:
        groups for ``torch.optim`` optimizers, highest rate first.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()  # two modules may share a weight
    for module in network.modules():
        parameters = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in seen]
        if parameters:
            seen.update(parameters)
            groups.setdefault(lr * min(1.0, reference_fan_in / _fan_in(module)), []).extend(parameters)
    return [{"params": groups[rate], "lr": rate} for rate in sorted(groups, reverse=True)]


def _fan_in(module: nn.Module) -> int:
    """Inputs that one output value depends on; 1 for a layer without a weight matrix."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:
        return 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):  # (in, out / groups, ...)
        return weight[:, 0].numel() // module.groups
    return weight[0].numel()
