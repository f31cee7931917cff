"""Recognises files that are not scans, by name, header and voxels: label maps, series, colour images, phase maps, values on a surface."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import itk
import nibabel as nib
import numpy as np

from .headers import file_format, itk_arguments, named_as_nibabel_wants, read_header, sidecar, strip_extension

__all__ = ["looks_like", "surface_data", "values_look_like"]

# BIDS suffixes, entities for parts of complex data, and endings of dcm2niix
NAMES = {
    "bold": "a BOLD series", "cbv": "a BOLD series", "sbref": "a reference image of a series",
    "dwi": "a diffusion series", "asl": "an ASL series",
    "ph": "a phase map", "phase": "a phase map", "phase1": "a phase map", "phase2": "a phase map", "phasediff": "a phase map",
    "fieldmap": "a field map",
    "probseg": "a probability map", "part-phase": "a phase map", "part-real": "the real part of complex data",
    "part-imag": "the imaginary part of complex data", "imaginary": "the imaginary part of complex data",
}  # fmt: skip
MASKS = ("mask", "dseg", "seg", "label", "labels", "roi", "lesion")
FEW_VALUES = 64
LONGEST_LINE = 1000  # voxels: longer lines (N x 1 x 1) are the vertices of a surface; the coarsest usual one has 2562


def looks_like(path: str | Path) -> str:
    """Kind of image that a file seems to contain instead of a scan, such as ``"a label map (4 whole values)"``; empty for a scan or an
    unreadable file. Only the middle of the volume is read.
    """
    try:
        name = _by_name(path)
        if name:
            return name
        header = read_header(path)
        surface = surface_data(header.shape, header.intent)
        if surface:
            return surface
        if header.channels > 1:
            return f"an image in colours, or of vectors ({header.channels} values a voxel)"
        if math.prod(header.shape[3:]) > 1:
            return f"a series of {math.prod(header.shape[3:])} volumes"
        if header.intent not in ("none", "estimate", ""):
            return f"a map of the kind {header.intent!r}, as its header says"
        return "" if header.dtype.kind == "c" else values_look_like(_middle(path), str(path))
    except Exception:  # loading will report the error
        return ""


def surface_data(shape: Sequence[int], intent: str = "none") -> str:
    """``"values on a surface"`` if the values of a file belong to the vertices of a surface, as FreeSurfer and CIFTI store them; otherwise
    empty. Arguments: see :class:`bundle.headers.Header`.

    Example:
        >>> surface_data((163842, 1, 1))
        'values on a surface'
    """
    if intent == "CIFTI":
        return "CIFTI: values on a surface"
    _, middle, longest = sorted([*shape, 1, 1, 1][:3])
    return "values on a surface" if middle == 1 and longest > LONGEST_LINE else ""


def values_look_like(values: np.ndarray, name: str = "") -> str:
    """Like :func:`looks_like`, but from the voxels of a volume or of some neighbouring planes, (X, Y, ...)."""
    values = values[np.isfinite(values)].reshape(-1) if not np.isfinite(values).all() else values
    low, high = float(values.min()), float(values.max())
    if low == high:
        return ""
    if values.dtype.kind == "f" and -math.pi * 1.001 <= low < -0.98 * math.pi and 0.98 * math.pi < high <= math.pi * 1.001:
        return "a phase map (values from -pi to pi)"
    if -4096 <= low < -4000 and 4000 < high <= 4096 and abs(float(values.mean())) < 1000 < float(values.std()):
        return "a phase map (values from -4096 to 4096)"
    named_mask = any(re.search(rf"(^|[_\-.]){word}$", strip_extension(Path(name).name).lower()) for word in MASKS)
    if named_mask and low >= 0 and high <= 1:
        return "a mask (values from 0 to 1)"
    if (values != np.rint(values)).any():
        return ""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 2 and high > 255 and not named_mask:  # an image of two intensities
        return ""
    background = distinct[counts.argmax()]
    pairs = [(values[1:], values[:-1])] + ([(values[:, 1:], values[:, :-1])] if values.ndim > 1 else [])
    inside = [(a != background) & (b != background) for a, b in pairs]
    number = sum(int(i.sum()) for i in inside)
    flat = sum(int((a == b)[i].sum()) for (a, b), i in zip(pairs, inside)) / max(number, 1)
    if number >= 50 and (flat > 0.9 or (len(distinct) <= FEW_VALUES and flat > 0.6)):
        kind = "a mask" if len(distinct) == 2 else "a label map"
        return f"{kind} ({len(distinct)} whole values, large parts of one value)"
    return "a mask or label map (by its name)" if named_mask and len(distinct) <= FEW_VALUES else ""


def _by_name(path: str | Path) -> str:
    name = strip_extension(Path(path).name)
    words = name.split("_")
    facts = sidecar(path)
    if {"P", "PHASE"} & {str(t).upper() for t in facts.get("ImageType") or ()} and "M" not in (facts.get("ImageType") or ()):
        return "a phase map (ImageType of its sidecar)"
    if len(words) < 2:
        return ""
    return NAMES.get(words[-1], "") or next((NAMES[w] for w in words if w in NAMES and "-" in w), "")


def _middle(path: str | Path) -> np.ndarray:
    """Three planes in the middle of the volume: (X, Y, 3); the whole volume if they are empty."""
    if file_format(path) in ("nifti", "freesurfer"):
        with named_as_nibabel_wants(path) as name:
            voxels = nib.load(name).dataobj  # type: ignore[attr-defined]
            z = voxels.shape[2] // 2
            middle = np.asarray(voxels[:, :, max(z - 1, 0) : z + 2]).squeeze()
            return middle if middle.min() < middle.max() else np.asarray(voxels).squeeze()
    array = np.asarray(itk.array_from_image(itk.imread(str(path), **itk_arguments(path))))
    return np.moveaxis(array, 0, -1)
