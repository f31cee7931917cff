"""The HTML report of a result, a single self-contained file, and the index page of a run."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
import torch
from matplotlib.colors import Colormap, LinearSegmentedColormap
from PIL import Image
from torch import Tensor

from .metrics import FOREGROUND

__all__ = ["INDEX_MARK", "MAX_BYTES", "PAGE_MARK", "Entry", "Layer", "Row", "html_index", "html_report"]

HERE = Path(__file__).parent
PAGE, INDEX = (Template((HERE / name).read_text(encoding="utf-8")) for name in ("report.html", "index.html"))
SCRIPT, STYLE = ((HERE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
INDEX_MARK = '<meta name="generator" content="brain_mri_super_resolution">'
PAGE_MARK = "<title>Super-resolution of "  # in every report of a volume
MAX_BYTES = 8_000_000  # per page
MAX_VOXELS = 24e6  # per layer: a browser holds all of them, one byte each
QUALITIES = (90, 75)  # of the JPEGs; below that, the grid becomes coarser
AROUND = 4  # voxels shown around the anatomy
BRIGHTEST = 1.25  # intensities above this are shown as white
PLANES = {"Axial": (0, 1), "Coronal": (0, 2), "Sagittal": (1, 2)}  # the axes along width and height
ENDS = ("RL", "AP", "SI")  # of each axis, from the left or from the top; radiological convention: the patient's right is on the left
SIGNED = LinearSegmentedColormap.from_list("signed", ["#b5dcff", "#3a8de0", "#000000", "#e0662b", "#ffd9b0"])
COLOURS: dict[str, Colormap] = {"grey": matplotlib.colormaps["gray"], "signed": SIGNED, "positive": matplotlib.colormaps["magma"]}
VIEW = Template("""
<figure style="flex-grow: $width"><div class="view" style="aspect-ratio: $width / $height">
<img alt="$plane, $name" src="$image">
<b class="left">$left</b><b class="right">$right</b><b class="top">$top</b><b class="bottom">$bottom</b>
</div><figcaption>$plane, slice $number of $count</figcaption></figure>""")


class Row(NamedTuple):
    """A row of the table: ``given`` applies to the input and ``result`` to the result; without ``result``, ``given`` applies to both."""

    name: str
    given: str
    result: str | None = None


class Layer(NamedTuple):
    """A volume that a page shows.

    Args:
        name: title on the page.
        about: description in one sentence.
        volume: MetaTensor (1, X, Y, Z), RAS, intensities scaled; all layers of a page have the same grid.
        kind: ``"grey"``; ``"signed"``, two colours with black for 0; or ``"positive"``, one colour with black for 0. Layers of the same
            kind share a window.
    """

    name: str
    about: str
    volume: Tensor
    kind: Literal["grey", "signed", "positive"] = "grey"


class Entry(NamedTuple):
    """A volume on the index page; ``link`` and ``picture`` are relative to that page."""

    name: str
    warnings: Sequence[str]
    link: str
    picture: str | None = None


def html_report(title: str, layers: Sequence[Layer], unit: float, rows: Iterable[Row], warnings: Iterable[str]) -> str:
    """A page that shows all slices in three planes, of one layer or of two layers side by side, with a table and warnings.

    The page has at most ``MAX_BYTES``: pictures of larger volumes are coarser, and the page says so. Without JavaScript it shows the
    planes through the centre of the foreground. The orientation is radiological.

    Args:
        title: name of the volume.
        layers: the first two, the interpolated input and the result, can be compared side by side.
        unit: the intensity 1 in the units of the input.
        rows: rows of the table.
        warnings: one line each.
    """
    affine = layers[0].volume.affine.cpu().numpy()  # type: ignore[attr-defined]
    volumes = [torch.as_tensor(layer.volume).as_subclass(Tensor)[0].float().cpu().numpy()[::-1, ::-1, ::-1] for layer in layers]
    counts, spacing = volumes[0].shape, np.linalg.norm(affine[:3, :3], axis=0)
    centre = _centre(volumes[0])
    box = _box([v for v, layer in zip(volumes, layers) if layer.kind == "grey"])
    volumes = [v[box] for v in volumes]
    windows = _windows(layers, volumes)
    ranges = {
        "grey": (windows["grey"][0], BRIGHTEST),
        **{kind: (3 * low, 3 * high) for kind, (low, high) in windows.items() if kind != "grey"},
    }
    stored = [_bytes(v, *ranges[layer.kind]) for v, layer in zip(volumes, layers)]
    inside = [c - part.start for c, part in zip(centre, box)]
    extent = [n * s for n, s in zip(volumes[0].shape, spacing)]  # in mm, so that all planes have the same scale
    static = ""
    for layer, volume in zip(layers, volumes):
        views = "".join(_static_view(layer, volume, plane, windows[layer.kind], inside, centre, counts, extent) for plane in PLANES)
        static += f'\n<h3>{escape(layer.name)}</h3>\n<div class="views">{views}\n</div>'
    data = {
        "counts": counts,
        "first": [part.start for part in box],
        "sides": volumes[0].shape,
        "centre": centre,
        "affine": affine[:3].tolist(),
        "unit": unit,
        "colours": {kind: _base64((COLOURS[kind](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes()) for kind in windows},
    }
    descriptions = [
        {"name": layer.name, "about": layer.about, "kind": layer.kind, "range": ranges[layer.kind], "window": windows[layer.kind]}
        for layer in layers
    ]
    tilt = _tilt(affine)
    largest = windows["signed"][1] if "signed" in windows else 0.0

    def page(slices: list[list[str]], grid: list[int], note: str) -> str:
        content = {**data, "grid": grid, "layers": [{**layer, "slices": part} for layer, part in zip(descriptions, slices)]}
        return PAGE.substitute(
            title=escape(title),
            style=STYLE,
            script=SCRIPT,
            wide_to_high=f"{sum(extent[n] for n, _ in PLANES.values()) / max(extent[n] for _, n in PLANES.values()):.6g}",
            static=static,
            data=json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
            note=note,
            largest=_number(largest * unit),
            positive="".join(
                f" {layer.name}: 0 to {_number(windows['positive'][1] * unit)}." for layer in layers if layer.kind == "positive"
            ),
            window=f"{_number(windows['grey'][0] * unit)} to {_number(windows['grey'][1] * unit)}",
            tilt=f" The planes are those of the voxel grid, tilted by {tilt:.0f}° against the patient's axes." if tilt >= 1 else "",
            rows="".join(f"\n<tr><th scope=row>{escape(row.name)}</th>{_cells(row)}</tr>" for row in rows),
            warnings="".join(f"\n<li>{escape(line)}</li>" for line in warnings) or "\n<li>none</li>",
        )

    rows, warnings = list(rows), list(warnings)
    return _small_enough(page, stored, [float(s) for s in spacing])


def html_index(title: str, entries: Iterable[Entry], failures: Iterable[tuple[str, str]], passed_over: Iterable[str]) -> str:
    """The index page of a run: a picture, warnings and a link for each volume, failures with their reasons, and skipped files."""
    entries, failures, passed_over = list(entries), list(failures), list(passed_over)
    cards = "".join(_card(entry) for entry in entries)
    failed = "".join(f"\n<li><b>{escape(name)}</b> {escape(why)}</li>" for name, why in failures)
    passed = "".join(f"\n<li>{escape(line)}</li>" for line in passed_over)
    warned = sum(bool(entry.warnings) for entry in entries)
    return INDEX.substitute(
        mark=INDEX_MARK,
        title=escape(title),
        style=STYLE,
        summary=f"{len(entries)} done, {warned} of them with warnings; {len(failures)} failed; {len(passed_over)} skipped",
        failed=f'<h2>Failed</h2>\n<ul class="failed">{failed}\n</ul>' if failures else "",
        cards=f'<h2>Results</h2>\n<ul class="cards">{cards}\n</ul>' if entries else "",
        passed=f"<h2>Skipped</h2>\n<ul>{passed}\n</ul>" if passed_over else "",
    )


def _small_enough(page: Callable[[list, list, str], str], volumes: Sequence[np.ndarray], spacing: Sequence[float]) -> str:
    """The page with the best pictures that fit into ``MAX_BYTES``."""
    coarser = 1.0
    while True:
        target = min(spacing) * coarser
        grid = [max(1, math.ceil(side * min(1.0, s / target))) for side, s in zip(volumes[0].shape, spacing)]
        small = volumes if grid == list(volumes[0].shape) else [_resized(volume, grid) for volume in volumes]
        note = (
            ""
            if coarser == 1
            else f" To keep the page small, its pictures have voxels of {target:.2g} mm or more: judge detail in the volume."
        )
        for quality in QUALITIES:
            if math.prod(grid) <= MAX_VOXELS:
                slices = [[_jpeg(volume[..., z].T, quality) for z in range(grid[2])] for volume in small]
                text = page(slices, grid, note)
                if len(text.encode(errors="backslashreplace")) <= MAX_BYTES or max(grid) == 1:
                    return text
        coarser *= 1.25


def _static_view(
    layer: Layer,
    volume: np.ndarray,
    plane: str,
    window: tuple[float, float],
    inside: Sequence[int],
    centre: Sequence[int],
    counts: Sequence[int],
    extent: Sequence[float],
) -> str:
    """The slice of a layer through the centre, whose index is ``inside`` in the shown part and ``centre`` in the whole volume."""
    wide, high = PLANES[plane]
    across = 3 - wide - high
    slice_ = np.take(_bytes(volume, *window), inside[across], across).T
    image = COLOURS[layer.kind](slice_)[..., :3] if layer.kind != "grey" else None
    return VIEW.substitute(
        plane=plane,
        name=escape(layer.name.lower()),
        width=f"{extent[wide]:.6g}",
        height=f"{extent[high]:.6g}",
        image="data:image/jpeg;base64," + _jpeg(slice_ if image is None else (image * 255).round().astype(np.uint8), QUALITIES[0]),
        number=counts[across] - centre[across],
        count=counts[across],
        **dict(zip(("left", "right", "top", "bottom"), ENDS[wide] + ENDS[high])),
    )


def _windows(layers: Sequence[Layer], volumes: Sequence[np.ndarray]) -> dict[str, tuple[float, float]]:
    """For each kind of layer, the intensities at the two ends of its colour scale."""
    windows: dict[str, tuple[float, float]] = {}
    for layer, volume in zip(layers, volumes):
        if layer.kind in windows:
            continue
        some = volume[tuple(slice(None, None, max(1, side // 128)) for side in volume.shape)]  # a percentile of all voxels takes seconds
        if layer.kind == "grey":
            lowest = float(np.percentile(some, 1))  # black stays 0 if interpolation goes only slightly below it
            windows[layer.kind] = (lowest if lowest < -FOREGROUND else 0.0, 1.0)
        else:
            largest = float(np.percentile(np.abs(some), 99.9)) or 1.0
            windows[layer.kind] = (-largest if layer.kind == "signed" else 0.0, largest)
    return windows


def _bytes(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((volume - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8)


def _resized(volume: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Means over coarser voxels."""
    means = torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(volume.astype(np.float32))[None], list(grid))  # type: ignore[arg-type]
    return means[0].round().byte().numpy()


def _box(volumes: Sequence[np.ndarray]) -> tuple[slice, slice, slice]:
    """The box around the anatomy in some volumes, or the whole grid if there is none."""
    box = []
    for axis, side in enumerate(volumes[0].shape):
        others = tuple(n for n in range(3) if n != axis)
        filled = np.flatnonzero(np.any([(np.abs(v) > FOREGROUND).any(others) for v in volumes], axis=0))
        first, last = (filled[0], filled[-1]) if len(filled) else (0, side - 1)
        box.append(slice(max(int(first) - AROUND, 0), min(int(last) + AROUND + 1, side)))
    return box[0], box[1], box[2]


def _centre(volume: np.ndarray) -> list[int]:
    """Index of the centre of the foreground, from sums along the axes: a list of all its voxels would be larger than the volume."""
    foreground = volume > FOREGROUND
    centre = []
    for axis, size in enumerate(volume.shape):
        profile = foreground.sum(tuple(n for n in range(3) if n != axis))
        centre.append(int(np.average(np.arange(size), weights=profile if profile.any() else None)))
    return centre


def _tilt(affine: np.ndarray) -> float:
    """Largest angle between an axis of a RAS volume and that of the patient, in degrees."""
    cosines = np.diagonal(affine)[:3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())


def _jpeg(image: np.ndarray, quality: int) -> str:
    """Base64 of the JPEG of an image (rows, columns) or (rows, columns, 3), uint8."""
    stream = BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "JPEG", quality=quality, subsampling=0, optimize=True)
    return _base64(stream.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _number(value: float) -> str:
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def _cells(row: Row) -> str:
    if row.result is None:
        return f'<td colspan="2">{escape(row.given)}</td>'
    return f"<td>{escape(row.given)}</td><td>{escape(row.result)}</td>"


def _card(entry: Entry) -> str:
    picture = f'<img alt="" loading="lazy" src="{quote(entry.picture, errors="surrogateescape")}">' if entry.picture else ""
    lines = "".join(f"\n<li>{escape(line)}</li>" for line in entry.warnings)
    warnings = f'\n<ul class="warnings">{lines}\n</ul>' if entry.warnings else '\n<p class="quiet">No warnings</p>'
    return f'\n<li><a href="{quote(entry.link, errors="surrogateescape")}">{picture}<span>{escape(entry.name)}</span></a>{warnings}</li>'
