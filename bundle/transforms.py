"""Dictionary transforms of single-channel volumes (1, X, Y, Z) in RAS orientation: axial slices are the planes of the last axis."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Orientation, SpatialCrop

from . import version
from .degradation import (
    Factor,
    acquire_slices,
    check_factor,
    degrade,
    degrade_slices,
    downsample,
    interpolate_slices,
    refined_size,
    upsample,
)
from .errors import InputError, PassedOver, switch
from .figures import Panel, save_panels
from .files import RESULT_MARK, fingerprint, result_path, write_json, write_whole
from .ranges import compare, describe, read_ranges
from .report import Row, html_report

__all__ = [
    "AxialSlicesd",
    "CompareWithTrainingd",
    "Consistencyd",
    "CropInPlaned",
    "Degraded",
    "SaveComparisond",
    "SaveHtmlReportd",
    "SaveReportd",
    "SaveVolumed",
    "ThickAxisLastd",
    "ThickSlicesd",
    "UpsampleInPlaned",
    "UpsampleToIsotropicd",
]

logger = logging.getLogger(__name__)

ISOTROPIC = 1.1  # largest side of a voxel, as a multiple of the smallest, that counts as isotropic
HOT = 6.0  # magnitude in the intensity scale that no ordinary voxel has
THICK = (2.5, 2.0)  # slices of so many mm, and so many times the smallest side, are worth making isotropic


class AxialSlicesd(MapTransform):
    """Keep a range of axial slices, counted from 1 at the lower (inferior) end, both ends included.

    Args:
        keys: volumes (1, X, Y, Z).
        axial_slices: first and last slice; ``None`` keeps all.

    Raises:
        InputError: when the range is not ascending from 1; when called on a volume with fewer slices, or whose last axis is not the one
            from inferior to superior.
    """

    def __init__(self, keys: KeysCollection, axial_slices: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        if axial_slices is not None and (len(axial_slices) != 2 or not 1 <= axial_slices[0] <= axial_slices[1]):
            raise InputError(f"axial_slices must be [first, last] with 1 <= first <= last, got {axial_slices}")
        self.axial_slices = axial_slices

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        if self.axial_slices is None:
            return d
        first, last = self.axial_slices
        for key in self.keys:
            x, y, z = d[key].shape[1:]
            if nib.aff2axcodes(d[key].affine.numpy())[2] not in "SI":
                raise InputError(f"{name_of(d[key])}: axial_slices {self.axial_slices} asked for, but its thick slices are not axial")
            if last > z:
                raise InputError(f"{name_of(d[key])}: axial slices {first} to {last} asked for, but the volume has {z}")
            d[key] = _crop(d[key], (0, 0, first - 1), (x, y, last))
        return d


class CropInPlaned(MapTransform):
    """Crop each axial slice to one size, with the window around the foreground of the whole volume.

    The window is centred on the bounding box of the foreground (voxels above zero) and moved inside the volume, so
    foreground is cut only where its bounding box is larger than the window.

    Args:
        keys: volumes (1, X, Y, Z).
        size: window along X and Y, in voxels; ``None`` keeps the volume.

    Raises:
        InputError: when called on a volume smaller than the window.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be two positive numbers, got {size}")
        self.size = size

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        if self.size is None:
            return d
        for key in self.keys:
            shape = d[key].shape[1:]
            if any(window > side for window, side in zip(self.size, shape)):
                raise InputError(f"{name_of(d[key])}: slices of {shape[0]} x {shape[1]} voxels are smaller than the crop {self.size}")
            foreground = (d[key].as_tensor()[0] > 0).any(-1)
            start = [_window_start(foreground.any(1 - axis), window, side) for axis, (window, side) in enumerate(zip(self.size, shape))]
            end = [a + window for a, window in zip(start, self.size)]
            d[key] = _crop(d[key], (*start, 0), (*end, shape[2]))
        return d


class Degraded(MapTransform):
    """Make the training pair: the volume becomes the target, its degraded self the network's input on the same grid.

    Args:
        keys: the high-resolution volume (1, X, Y, Z); replaced by the low-resolution one, interpolated to the same grid.
            ``meta["factor"]`` tells the factors along x and y.
        target_key: where the high-resolution volume goes.
        factor, mode, interpolation: see :func:`bundle.degradation.degrade`.
    """

    def __init__(
        self, keys: KeysCollection, target_key: str = "label", factor: Factor = 2, mode: str = "bicubic", interpolation: str | None = None
    ) -> None:
        super().__init__(keys)
        self.target_key, self.factors, self.mode, self.interpolation = target_key, check_factor(factor), mode, interpolation

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        for key in self.keys:
            d[self.target_key] = d[key]
            slices = d[key].as_tensor().movedim(-1, 0)
            degraded = degrade(slices, self.factors, self.mode, self.interpolation).movedim(0, -1).contiguous()
            d[key] = MetaTensor(degraded, meta={**d[key].meta, "factor": list(self.factors)})
        return d


class ThickSlicesd(MapTransform):
    """Make the pair of thick slices: the volume becomes the target, its axial slices made thick and interpolated back the input.

    Args:
        keys: the volume of thin slices (1, X, Y, Z); replaced. ``meta["thickness"]`` tells the distance of the thick ones,
            ``meta["factor"]`` the factors along the three axes.
        target_key: where the volume of thin slices goes.
        thickness: distance of the thick slices in mm; an item's own ``"thickness"`` goes before it.
        profile, gap: see :func:`bundle.degradation.acquire_slices`.
    """

    def __init__(
        self, keys: KeysCollection, target_key: str = "label", thickness: float = 4.0, profile: str = "gaussian", gap: float = 0.0
    ) -> None:
        super().__init__(keys)
        self.target_key, self.thickness, self.profile, self.gap = target_key, thickness, profile, gap

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            d[self.target_key] = d[key]
            thickness = float(d.get("thickness", self.thickness))
            factor = slice_factor(d[key], thickness)
            degraded = degrade_slices(d[key].as_tensor(), factor, self.profile, self.gap)
            d[key] = MetaTensor(degraded, meta={**d[key].meta, "thickness": thickness, "factor": [1.0, 1.0, factor]})
        return d


def slice_factor(image: MetaTensor, thickness: float) -> float:
    """Distance of slices of a thickness in mm, in those of a volume of thin ones.

    Raises:
        InputError: when the volume's are thicker.
    """
    factor = round(thickness / float(image.pixdim[2]), 4)
    if factor < 1:
        raise InputError(f"{name_of(image)}: slices of {thickness:g} mm cannot be made of slices of {float(image.pixdim[2]):.4g} mm")
    return factor


class ThickAxisLastd(MapTransform, InvertibleTransform):
    """Turn a volume so that the axis of the largest spacing is the last one: sagittal slices to (A, S, R), coronal ones to (R, S, A),
    axial ones, and volumes whose slices are no thicker than their pixels, to RAS.

    Args:
        keys: volumes (1, X, Y, Z) in any orientation.
    """

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            before = nib.aff2axcodes(d[key].affine.numpy())
            spacing = {{"L": "R", "P": "A", "I": "S"}.get(code, code): float(s) for code, s in zip(before, d[key].pixdim)}
            thick = max("SAR", key=lambda code: round(spacing[code], 3))
            d[key] = _oriented(d[key], {"S": "RAS", "A": "RSA", "R": "ASR"}[thick])
            self.push_transform(d, key, extra_info={"axcodes": "".join(before)})
        return d

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.key_iterator(d):
            d[key] = _oriented(d[key], self.pop_transform(d, key)["extra_info"]["axcodes"])
        return d


class UpsampleInPlaned(MapTransform):
    """Interpolate each axial slice to a finer grid; the affine follows, so nothing moves.

    Not invertible on purpose: ``Invertd`` then restores orientation and intensity and leaves the refined grid.

    Args:
        keys: volumes (1, X, Y, Z); become (1, factor X, factor Y, Z). ``meta["factor"]`` tells the factors along x and y.
        factor: of both in-plane axes, or two numbers: along x and along y.
        spacing: voxel size wanted in mm, of both axes or along x and along y; decides instead of ``factor`` where it is given.
        given_key: where to keep the volume as it was given; ``None`` does not.

    Raises:
        InputError: when ``factor`` or ``spacing`` is none; when called on a volume whose voxels are finer than ``spacing``.
    """

    def __init__(self, keys: KeysCollection, factor: Factor = 2, spacing: Factor | None = None, given_key: str | None = None) -> None:
        super().__init__(keys)
        self.refinement, self.given_key = Refinement(factor, spacing), given_key

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d: dict = dict(data)
        for key in self.keys:
            if self.given_key is not None:
                d[self.given_key] = d[key].as_tensor()
            d[key] = _refined(d[key], self.refinement(d[key]))
        return d


class Refinement:
    """How much finer the grid of a volume is to be in-plane. Arguments as of :class:`UpsampleInPlaned`."""

    def __init__(self, factor: Factor = 2, spacing: Factor | None = None) -> None:
        self.factors = check_factor(factor)
        pair: Any = spacing if isinstance(spacing, Sequence) and not isinstance(spacing, str) else (spacing, spacing)
        if spacing is not None and (len(pair) != 2 or not all(type(s) in (int, float) and 0 < s < math.inf for s in pair)):
            raise InputError(f"spacing must be a positive number in mm, or two of them, got {spacing!r}")
        self.spacing: tuple[float, float] | None = None if spacing is None else tuple(pair)  # type: ignore[assignment]

    def __call__(self, image: MetaTensor) -> tuple[float, float]:
        """Factors along x and y; an axis that is finer than the spacing wanted stays as it is.

        Raises:
            InputError: when both are.
        """
        if self.spacing is None:
            return self.factors
        x, y = _factors_to(image, self.spacing, " x ".join(f"{side:.4g}" for side in self.spacing))
        return x, y


class UpsampleToIsotropicd(MapTransform):
    """Interpolate a volume of thick slices to voxels of one size along all axes; the affine follows, so nothing moves.

    Args:
        keys: volumes (1, X, Y, Z), the slices across the last axis. ``meta["factor"]`` tells the factors.
        spacing: voxel size in mm; ``None`` is the smallest of the volume's. An axis that is finer stays as it is.
        given_key: where to keep the volume as it was given; ``None`` does not.
    """

    def __init__(self, keys: KeysCollection, spacing: float | None = None, given_key: str | None = None) -> None:
        super().__init__(keys)
        self.refinement, self.given_key = IsotropicRefinement(spacing), given_key

    __call__ = UpsampleInPlaned.__call__


class IsotropicRefinement:
    """How much finer the grid of a volume is to be along each axis.

    Args:
        spacing: as of :class:`UpsampleToIsotropicd`.
        factor: anything but ``None`` is refused, instead of being ignored without a word.
    """

    def __init__(self, spacing: float | None = None, factor: Any = None) -> None:
        if factor is not None:
            raise InputError(f"scale is {factor!r}, but it is the spacing that says how large isotropic voxels are, in mm")
        if spacing is not None and not (type(spacing) in (int, float) and 0 < spacing < math.inf):
            raise InputError(f"spacing must be a positive number in mm, got {spacing!r}")
        self.spacing = spacing

    def __call__(self, image: MetaTensor) -> tuple[float, ...]:
        wanted = self.spacing or float(min(image.pixdim))
        if self.spacing is None and float(max(image.pixdim)) < ISOTROPIC * wanted:
            sides = " x ".join(f"{float(side):.4g}" for side in image.pixdim)
            raise PassedOver(f"{name_of(image)}: voxels of {sides} mm are isotropic already")
        return _factors_to(image, [wanted] * 3, f"{wanted:g}")


class SaveVolumed(MapTransform):
    """Write a volume as ``<name>_sr.nii.gz``: float32, voxels and affine as they stand. The file appears only when complete.

    Both sform and qform hold the affine, under the input's code; where those of the input differ, each is refined by itself.

    Args:
        keys: volumes (1, X, Y, Z); the name is that of the file they were loaded from.
        output_dir: folder of the results.
        root: the part of the volume's path that is not repeated below ``output_dir``.
    """

    def __init__(self, keys: KeysCollection, output_dir: str, root: str) -> None:
        super().__init__(keys)
        self.output_dir, self.root = output_dir, root

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> Mapping:
        for key in self.keys:
            image = data[key]
            volume = nib.Nifti1Image(image.as_tensor()[0].float().cpu().numpy(), image.affine.cpu().numpy())
            sform_code, qform_code = (int(n) for n in image.meta.get("codes", (1, 1)))
            qform = volume.affine
            if "qform" in image.meta:
                to_index = np.linalg.inv(np.asarray(image.meta["sform"], dtype=np.float64))
                qform = np.asarray(image.meta["qform"], dtype=np.float64) @ to_index @ volume.affine
            volume.set_sform(volume.affine, code=sform_code)
            volume.set_qform(qform, code=qform_code)
            if not np.allclose(volume.get_qform(), qform, atol=1e-4):  # a qform cannot hold a shear
                volume.set_qform(None, code="unknown")
            unit = image.meta.get("unit", "mm")
            volume.header.set_xyzt_units("mm" if unit == "unknown" else unit)
            volume.header["descrip"] = RESULT_MARK
            write_whole(result_path(name_of(image), self.output_dir, self.root, "_sr.nii.gz"), volume.to_filename)
        return data


class SaveComparisond(MapTransform):
    """Write ``<name>_sr.png``: the middle plane of the interpolated input beside that of the result, and a part enlarged.

    Args:
        keys: the interpolated input and the result, each (1, X, Y, Z) in [0, 1] on one grid.
        output_dir, root: as of :class:`SaveVolumed`.
        across: axis that the plane lies across: the last one, for axial slices, or 0 or 1.
    """

    def __init__(self, keys: KeysCollection, output_dir: str, root: str, across: int = 2) -> None:
        super().__init__(keys)
        self.output_dir, self.root, self.across = output_dir, root, across

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> Mapping:
        before, after = (data[key] for key in self.keys)
        middle = before.shape[1 + self.across] // 2
        titles = ("input, interpolated", "super-resolved")
        panels = [Panel(title, v.as_tensor()[0].select(self.across, middle)) for title, v in zip(titles, (before, after))]
        spacing = [float(s) for axis, s in enumerate(before.pixdim) if axis != self.across]
        path = result_path(name_of(before), self.output_dir, self.root, "_sr.png")
        save_panels(path, panels, aspect=spacing[1] / spacing[0], zoom=0.25)
        return data


class CompareWithTrainingd(MapTransform):
    """Say in the log what about a volume is far from the training data, and keep it for the report in ``meta["report"]``.

    Args:
        keys: volumes (1, X, Y, Z) with scaled intensities, before they are refined.
        ranges: JSON file of :func:`bundle.ranges.measure`; where there is none, nothing is compared.
        factor, spacing: of the refinement to come, see :class:`UpsampleInPlaned`.
        isotropic: whether it is that of :class:`UpsampleToIsotropicd`; ``factor`` is ``None`` then.
    """

    def __init__(
        self, keys: KeysCollection, ranges: str | None = None, factor: Any = 1, spacing: Any = None, isotropic: bool = False
    ) -> None:
        super().__init__(keys)
        self.refinement: Any = IsotropicRefinement(spacing, factor) if isotropic else Refinement(factor, spacing)
        self.ranges, self.isotropic = read_ranges(ranges), isotropic

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = dict(data)
        for key in self.keys:
            meta = d[key].meta
            statistics = describe(d[key], self.refinement(d[key]))
            if not self.isotropic:
                meta["remarks"] = "\n".join(filter(None, [meta.get("remarks", ""), _thick_slices(d[key])]))
            far = compare(statistics, self.ranges, meta.get("modality", ""))
            for line in far:
                logger.warning("%s: %s", name_of(d[key]), line)
            warnings = [*filter(None, meta.get("remarks", "").split("\n")), *far]
            report = {"warnings": warnings, "input_spacing": d[key].pixdim.tolist(), "statistics": statistics}
            meta["report"] = json.dumps({**report, "training_ranges": self.ranges or None})
        return d


class Consistencyd(MapTransform):
    """Degrade a result again and compare it with what was given: what the network has added should vanish.

    Adds ``"consistency"`` to the sample: PSNR in dB of the degraded result, and of the degraded interpolation for comparison; the peak is
    1, the intensity scale.

    Args:
        keys: the interpolated input, with its ``meta["factor"]``, and the result (1, factor X, factor Y, Z).
        given_key: the volume as given, (1, X, Y, Z), intensities scaled.
    """

    def __init__(self, keys: KeysCollection, given_key: str = "given") -> None:
        super().__init__(keys)
        self.given_key = given_key

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        given = torch.as_tensor(data[self.given_key]).float().cpu().movedim(-1, 0)
        # hot spots would outweigh everything else: they do not count, nor does what interpolation makes of them around
        ordinary = torch.nn.functional.max_pool2d(given.abs(), 11, 1, 5) <= HOT
        ordinary = ordinary if ordinary.any() else torch.ones_like(ordinary)
        factors = [float(f) for f in data[self.keys[0]].meta["factor"]]
        values = {}
        for name, key in zip(("interpolated", "result"), self.keys):
            volume = data[key].as_tensor()
            if len(factors) > 2:  # the slice profile is not known: a box without gaps
                volume = acquire_slices(volume, factors[2], "box")
            slices = volume.movedim(-1, 0)
            squares = ((downsample(s.float().cpu(), factors[:2]) - g).square() for s, g in zip(slices, given))
            error = sum(float(s[counts].sum()) for s, counts in zip(squares, ordinary))
            values[name] = round(-10 * math.log10(max(error / int(ordinary.sum()), 1e-20)), 2)
        logger.info("%s: degraded again, the result agrees with the input to %.2f dB", name_of(data[self.keys[-1]]), values["result"])
        return {**data, "consistency": values}


class SaveHtmlReportd(MapTransform):
    """Write ``<name>_sr.html``, a page for people: result and interpolated input in three planes, residual, warnings, facts.

    Args:
        keys: the interpolated input and the result, each (1, X, Y, Z) on one grid, with ``meta["report"]``; ``"consistency"`` is there too.
        output_dir, root, made_with: as of :class:`SaveReportd`.
        given_key: the volume as given.
        report: whether to write it; where not, the page of an earlier result is removed.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str, root: str, made_with: dict, given_key: str = "given", report: bool | str = False
    ) -> None:
        super().__init__(keys)
        self.output_dir, self.root, self.made_with = output_dir, root, made_with
        self.given_key, self.report = given_key, switch("report", report)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping:
        turned = data[self.keys[0]]
        before, after = (_oriented(data[key], "RAS") for key in self.keys)
        path = result_path(name_of(before), self.output_dir, self.root, "_sr.html")
        if not self.report:
            path.unlink(missing_ok=True)
            return data
        report = json.loads(before.meta["report"])
        axes = [nib.aff2axcodes(turned.affine.numpy()).index(code) for code in "RAS"]
        sides = [" x ".join(str(data[key].shape[1 + axis]) for axis in axes) for key in (self.given_key, self.keys[1])]
        spacing = [" x ".join(f"{float(v[axis]):.4g}" for axis in axes) for v in (report["input_spacing"], turned.pixdim)]
        rows = [
            Row("Voxels, left-right x posterior-anterior x inferior-superior", *sides),
            Row("Spacing, mm", *spacing),
            Row("Consistency, dB", *(f"{data['consistency'][name]:.2f}" for name in ("interpolated", "result"))),
            *(Row("SHA-256 of the weights" if k == "weights" else k, str(v)) for k, v in self.made_with.items() if v is not None),
            Row("Version of the bundle", version()),
            Row("Date", datetime.now().astimezone().isoformat(" ", "minutes")),
        ]
        warnings = report["warnings"]
        if not report["training_ranges"]:
            warnings.append("not compared with the training data: no ranges beside the weights")
        title = os.path.relpath(name_of(before), self.root)
        page = html_report(title, before, after, float(before.meta["unit_intensity"]), rows, warnings)
        write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))
        return data


class SaveReportd(MapTransform):
    """Write ``<name>_sr.json``: what was odd or far from the training data, the consistency, and what the result was made from and with.

    Write it last: a result counts as complete, and is not made again, where its report says the same (:func:`bundle.files.is_done`).

    Args:
        keys: volumes with ``meta["report"]``.
        output_dir, root: as of :class:`SaveVolumed`.
        made_with: settings of the run.
    """

    def __init__(self, keys: KeysCollection, output_dir: str, root: str, made_with: dict) -> None:
        super().__init__(keys)
        self.output_dir, self.root, self.made_with = output_dir, root, made_with

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> Mapping:
        for key in self.keys:
            volume = name_of(data[key])
            report = json.loads(data[key].meta["report"])
            report = {
                "volume": volume,
                "warnings": report.pop("warnings"),
                "factor": [float(f) for f in data[key].meta["factor"]],
                "consistency_db": data["consistency"],  # type: ignore[call-overload]
                **report,
                "made_with": self.made_with,
                "input": fingerprint(volume),
            }
            write_json(result_path(volume, self.output_dir, self.root, "_sr.json"), report)
        return data


def name_of(image: MetaTensor) -> str:
    """File that a volume was loaded from."""
    return str(image.meta.get("filename_or_obj", "volume"))


def _thick_slices(image: MetaTensor) -> str:
    """Advice for a volume of thick slices; empty for others."""
    sides = [float(side) for side in image.pixdim]
    across = sides.index(max(sides))
    if sides[across] < THICK[0] or sides[across] < THICK[1] * min(sides):
        return ""
    axis = ("left to right", "back to front", "bottom to top")[across]
    line = f"voxels are {sides[across]:.4g} mm from {axis}, {min(sides):.4g} mm elsewhere: configs/isotropic.json is made for thick slices"
    logger.warning("%s: %s", name_of(image), line)
    return line


def _factors_to(image: MetaTensor, wanted: Sequence[float], text: str) -> tuple[float, ...]:
    """Factors that bring the voxels to the sides wanted, in mm; an axis that is finer already stays as it is, and not all may be."""
    given = [float(side) for side, _ in zip(image.pixdim, wanted)]
    factors = [round(g / w, 6) for g, w in zip(given, wanted)]  # of an affine in single precision
    if max(factors) < 1 - 1e-3:
        sides = " x ".join(f"{side:.4g}" for side in given)
        raise InputError(f"{name_of(image)}: spacing {text} mm asked for, but voxels are {sides} mm already")
    return tuple(max(f, 1.0) for f in factors)


def _refined(image: MetaTensor, factors: Sequence[float]) -> MetaTensor:
    """Volume (1, X, Y, Z) on a grid finer along x and y, and z where there is a third factor, in the same place: the centre of refined
    voxel i lies at the given (i + 0.5) / factor - 0.5."""
    voxels = image.as_tensor()
    if len(factors) > 2:  # first along the thick axis
        voxels = interpolate_slices(voxels, factors[2], refined_size(voxels.shape[-1], factors[2]))
    voxels = upsample(voxels.movedim(-1, 0), factors[:2]).movedim(0, -1).contiguous()
    step = torch.ones(4, dtype=torch.float64)
    step[: len(factors)] /= torch.tensor(factors, dtype=torch.float64)
    to_given = torch.diag(step)
    to_given[:3, 3] = (step[:3] - 1) / 2
    refined = MetaTensor(voxels, meta=image.meta, applied_operations=image.applied_operations)
    refined.affine = image.affine.to(torch.float64) @ to_given
    for given in ("spatial_shape", "original_affine"):  # servers put a result back on the grid they find here
        refined.meta.pop(given, None)
    refined.meta["factor"] = list(factors)
    return refined


def _oriented(image: MetaTensor, axcodes: str) -> MetaTensor:
    turn = Orientation(axcodes=axcodes, labels=None)
    with turn.trace_transform(False):
        return turn(image)  # type: ignore[return-value]


def _crop(image: MetaTensor, start: Sequence[int], end: Sequence[int]) -> MetaTensor:
    return SpatialCrop(roi_start=start, roi_end=end)(image)  # type: ignore[return-value]


def _window_start(occupied: torch.Tensor, window: int, side: int) -> int:
    indices = occupied.nonzero().flatten()
    first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, side - 1)
    return min(max((first + last + 1 - window) // 2, 0), side - window)
