from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .files import write_atomically

__all__ = ["PICTURE_MARK", "Panel", "save_panels"]

PICTURE_MARK = "brain_mri_super_resolution"  # in every picture


class Panel(NamedTuple):
    """One picture of a figure: a slice (width, height)."""

    title: str
    image: Tensor
    vmin: float = 0.0
    vmax: float = 1.0
    colours: str = "gray"
    error: Tensor | None = None  # (X, Y), drawn below from 0 to 0.1


OPPOSITE = dict(zip("RLAPSI", "LRPAIS"))


def save_panels(
    path: Path,
    panels: Sequence[Panel],
    aspect: float = 1.0,
    zoom: float = 0.0,
    columns: int | None = None,
    axcodes: tuple[str, str] = ("R", "A"),
) -> None:
    """Save slices side by side as a PNG in the radiological convention, labelled: the patient's right on the left, anterior or superior up.

    Args:
        path: of the PNG, written atomically.
        panels: slices of one shape.
        aspect: height of a pixel over its width, i.e. spacing along Y over spacing along X.
        zoom: side of the square cut out around the brightest region for a second row, as a fraction of the slice; 0 for none.
        columns: panels in a row of the figure; ``None`` puts all into one.
        axcodes: directions of width and height of the slices, such as ``("R", "A")`` for axial slices of a RAS volume.
    """
    left, bottom = (code if code in "RAS" else OPPOSITE[code] for code in axcodes)  # a sagittal plane has anterior on the left
    bottom = OPPOSITE[bottom]
    flips = [axis for axis, (code, first) in enumerate(zip(axcodes, (left, bottom))) if code == first]
    width, height = panels[0].image.shape
    columns = min(columns or len(panels), len(panels))
    rows = 1 + bool(zoom) + any(panel.error is not None for panel in panels)  # of one panel: slice, window, error
    bands = math.ceil(len(panels) / columns)
    side = 3.4 * min(2.0, max(0.5, aspect * height / width))
    figure = Figure(figsize=(3.4 * columns, bands * (rows * side + 0.3)), layout="constrained")
    axes = figure.subplots(bands * rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})  # ticks are slow to lay out
    for number, panel in enumerate(panels):
        cells = axes[rows * (number // columns) :, number % columns]
        image = _drawn(panel.image, flips)
        style = {"cmap": panel.colours, "vmin": panel.vmin, "vmax": panel.vmax, "origin": "lower", "interpolation": "nearest"}
        cells[0].imshow(image, aspect=aspect, **style)
        cells[0].set_title(panel.title, fontsize=10)
        for letter, x, y in ((left, 0.03, 0.5), (OPPOSITE[left], 0.97, 0.5), (OPPOSITE[bottom], 0.5, 0.96), (bottom, 0.5, 0.04)):
            cells[0].text(x, y, letter, transform=cells[0].transAxes, fontsize=8, color="C1", ha="center", va="center")
        if zoom:
            cells[1].imshow(image[_window(panels[0].image.flip(flips), zoom)], aspect=aspect, **style)
        if panel.error is not None:
            error = _drawn(panel.error, flips)
            cells[rows - 1].imshow(error, aspect=aspect, **{**style, "cmap": "magma", "vmin": 0, "vmax": 0.1})
    for axis in axes.flat:
        axis.set_axis_off()
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, metadata={"Software": PICTURE_MARK}))


def _drawn(image: Tensor, flips: list[int]) -> np.ndarray:
    """Rows and columns of a slice (width, height), flipped along some axes."""
    return image.detach().float().cpu().flip(flips).numpy().T


def _window(image: Tensor, fraction: float) -> tuple[slice, slice]:
    """Rows (Y) and columns (X) of the window to zoom into: a quarter off the centre of the foreground, where cortex is."""
    bright = np.argwhere(image.detach().cpu().numpy() > 0.2)
    centre = bright.mean(0) if len(bright) else np.array(image.shape) / 2
    spread = np.ptp(bright, 0) if len(bright) else np.zeros(2)
    slices = []
    for axis in (1, 0):
        side = max(2, int(fraction * image.shape[axis]))
        start = int(centre[axis] + 0.25 * spread[axis] - side / 2)
        start = min(max(start, 0), image.shape[axis] - side)
        slices.append(slice(start, start + side))
    return tuple(slices)  # type: ignore[return-value]
