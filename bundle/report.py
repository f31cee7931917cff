"""The HTML report of a result: one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib.image import imsave
from monai.data import MetaTensor

from .metrics import FOREGROUND

__all__ = ["Row", "html_report"]

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
PLANES = {"Axial": (0, 1), "Coronal": (0, 2), "Sagittal": (1, 2)}  # the axes along width and height
ENDS = ("RL", "AP", "SI")  # of each axis, from the left or from above: radiologists have the patient's right on the left
COLOURS = "RdBu_r"
VIEW = Template("""
<figure class="$kind" style="flex-grow: $width">
  <div class="view" style="aspect-ratio: $width / $height">$images<b class="left">$left</b><b class="right">$right</b><b class="top">$top</b><b class="bottom">$bottom</b></div>
  <figcaption>$caption</figcaption>
</figure>""")  # noqa: E501


class Row(NamedTuple):
    """A row of the table; without ``result``, ``given`` holds for both."""

    name: str
    given: str
    result: str | None = None


def html_report(title: str, before: MetaTensor, after: MetaTensor, unit: float, rows: Iterable[Row], warnings: Iterable[str]) -> str:
    """A page that compares a result with the interpolated input: three planes with a slider, the residuals below, a table, warnings.

    The planes pass through the centre of the foreground, and lie as radiologists have them.

    Args:
        title: name of the volume.
        before, after: the interpolated input and the result, each (1, X, Y, Z) on one grid, RAS, intensities scaled.
        unit: what the intensity 1 stands for, in the input's units.
        rows: of the table.
        warnings: a line each.
    """
    a, b = (v.as_tensor()[0].float().cpu().numpy()[::-1, ::-1, ::-1] for v in (before, after))
    cut = _centre(a)
    extent = [size * spacing for size, spacing in zip(a.shape, before.pixdim.tolist())]  # in mm: the planes have one scale
    slices = {plane: tuple(np.take(v, cut[_across(plane)], _across(plane)).T for v in (a, b)) for plane in PLANES}
    lowest = min(float(np.percentile(x, 1)) for x, _ in slices.values())
    lowest = lowest if lowest < -FOREGROUND else 0.0  # where interpolation falls a little below 0, black is 0
    largest = max(float(np.percentile(np.abs(y - x), 99.9)) for x, y in slices.values()) or 1.0  # 0 is white
    views, residuals = "", ""
    for plane, (x, y) in slices.items():
        wide, high = PLANES[plane]
        number, count = a.shape[_across(plane)] - cut[_across(plane)], a.shape[_across(plane)]
        common = {
            "width": f"{extent[wide]:.6g}",
            "height": f"{extent[high]:.6g}",
            **dict(zip(("left", "right", "top", "bottom"), ENDS[wide] + ENDS[high])),
        }
        images = _image(x, lowest, 1, f"{plane}, input") + _image(y, lowest, 1, f"{plane}, result")
        views += VIEW.substitute(common, kind="pair", images=images, caption=f"{plane}, slice {number} of {count}")
        images = _image(y - x, -largest, largest, f"{plane}, residual", COLOURS)
        residuals += VIEW.substitute(common, kind="residual", images=images, caption=plane)
    tilt = _tilt(before.affine.cpu().numpy())
    return PAGE.substitute(
        title=escape(title),
        wide_to_high=f"{sum(extent[n] for n, _ in PLANES.values()) / max(extent[n] for _, n in PLANES.values()):.6g}",
        views=views,
        residuals=residuals,
        bar=_image(np.linspace(-1, 1, 256)[None], -1, 1, "scale of the residual", COLOURS),
        largest=_number(largest * unit),
        window=f"{_number(lowest * unit)} to {_number(unit)}",
        tilt=f" The planes are those of the voxel grid, tilted by {tilt:.0f}° against the patient's axes." if tilt >= 1 else "",
        rows="".join(f"\n<tr><th>{escape(row.name)}</th>{_cells(row)}</tr>" for row in rows),
        warnings="".join(f"\n<li>{escape(line)}</li>" for line in warnings) or "\n<li>none</li>",
    )


def _centre(volume: np.ndarray) -> list[int]:
    """Index of the centre of the foreground, in sums along the axes: a list of all its voxels would be larger than the volume."""
    foreground = volume > FOREGROUND
    centre = []
    for axis, size in enumerate(volume.shape):
        profile = foreground.sum(tuple(n for n in range(3) if n != axis))
        centre.append(int(np.average(np.arange(size), weights=profile if profile.any() else None)))
    return centre


def _across(plane: str) -> int:
    """The axis at right angles to a plane."""
    return 3 - sum(PLANES[plane])


def _tilt(affine: np.ndarray) -> float:
    """Largest angle between an axis of a RAS volume and the patient's, in degrees."""
    cosines = np.diagonal(affine)[:3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())


def _image(slice_: np.ndarray, vmin: float, vmax: float, name: str, colours: str = "gray") -> str:
    png = BytesIO()
    imsave(png, slice_, vmin=vmin, vmax=vmax, cmap=colours, format="png")
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def _number(value: float) -> str:
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def _cells(row: Row) -> str:
    if row.result is None:
        return f'<td colspan="2">{escape(row.given)}</td>'
    return f"<td>{escape(row.given)}</td><td>{escape(row.result)}</td>"
