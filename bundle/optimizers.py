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
    for module in network.modules():
        parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not parameters:
            continue
        weight = getattr(module, "weight", None)
        fan_in = weight[0].numel() if weight is not None and weight.ndim > 1 else 1
        groups.setdefault(lr * min(1.0, reference_fan_in / fan_in), []).extend(parameters)
    return [{"params": groups[rate], "lr": rate} for rate in sorted(groups, reverse=True)]
