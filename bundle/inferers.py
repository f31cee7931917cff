from __future__ import annotations

from collections.abc import Callable

import torch
from monai.inferers import Inferer, SliceInferer

__all__ = ["OrthogonalSlices"]


class OrthogonalSlices(Inferer):
    """Run a network of slices on the two families of planes that contain the last axis, across which slices are thick, and average.

    Args:
        batch_size: slices at a time.
        progress: whether to show a bar for each family.
    """

    def __init__(self, batch_size: int = 1, progress: bool = False) -> None:
        self.families = [SliceInferer(roi_size=(-1, -1), spatial_dim=axis, sw_batch_size=batch_size, progress=progress) for axis in (0, 1)]

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Volumes (N, 1, X, Y, Z) to the same shape."""
        first, second = (torch.as_tensor(family(inputs, network, *args, **kwargs)) for family in self.families)
        return (first + second) / 2
