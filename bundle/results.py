"""Results of a run: their paths, whether they are up to date, and the transforms that write them."""

from __future__ import annotations

import glob
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from . import version
from .acquisition import Sampling, acquired_fraction, filtered, sampled
from .arguments import paths
from .conditions import spectral_facts
from .dicom import is_dicom_volume
from .errors import switch
from .figures import PICTURE_MARK, Panel, save_panels
from .files import fingerprint, save_nifti, sha256, write_atomically, write_json, write_text
from .grid import acquired_fractions, acquired_samples, oriented
from .headers import RESULT_MARK, bids_root, by, file_format, sidecar, start_of, strip_extension
from .ranges import compare, describe, read_ranges
from .report import INDEX_MARK, PAGE_MARK, Entry, Layer, Row, html_index, html_report
from .transforms import name_of
from .uncertainty import INTERVAL, NOT_COMPARED, TOO_FAR, Head, Z

__all__ = ["CompareWithTrainingd", "Consistencyd", "Results", "SaveComparisond", "SaveHtmlReportd", "SaveReportd", "SaveVolumed"]

logger = logging.getLogger(__name__)

BIDS_FOLDERS = ("anat", "dwi", "fmap", "func", "perf")
# entries of a source's sidecar that also apply to the result
ACQUISITION = (
    *("Manufacturer", "ManufacturersModelName", "MagneticFieldStrength", "MRAcquisitionType", "ScanningSequence", "SequenceVariant"),
    *("SequenceName", "EchoTime", "EchoTime1", "EchoTime2", "RepetitionTime", "InversionTime", "FlipAngle", "ContrastBolusIngredient"),
    *("PhaseEncodingDirection", "TotalReadoutTime", "SpatialReference"),
)
BIDS_IGNORED = "*.png\n*.html\nfailed.csv\n*_sr.*\n*_sd.nii.gz\n*_sr_dicom/\n"  # pictures, reports, results of volumes without a BIDS name
BIDS_README = """# Super-resolved MRI

`brain_mri_super_resolution` {version} made these volumes. Each `*_desc-sr_*.nii.gz` is a scan on a finer grid; its `.json` file names the
source, the settings and the warnings. The detail that the network adds is an estimate, not a measurement. Not for diagnosis.
"""
DICOM_ENDING = "_sr_dicom"  # of the folder of a series
MAP_ENDING = "_sd.nii.gz"  # of an uncertainty map
DESCRIPTION = "standard deviation of the error of a super-resolved volume"
HOT = 6.0  # magnitude in the intensity scale that no ordinary voxel has
FILLED = 0.8  # fraction of k-space below which a grid is worth a remark
THICK = (2.5, 2.0)  # slices count as thick from so many mm, and so many times the smallest side


class Results:
    """The results of one run.

    Results have the same relative paths as their volumes, so that equal names in different folders do not collide.

    Args:
        output_dir: folder of the results.
        dataset_dir: the path, pattern or list that :func:`bundle.subjects.find_volumes` searched.
        volumes: what it found.
        settings: everything else that affects a result; a result with other settings is computed again.
        weights: file that the network is loaded from, in any format; ``None`` for a network without weights.
        head: uncertainty head, by which each result gets a map; ``None`` for none.
        report: whether to write an HTML report for each result.
        dicom: whether to write a DICOM series for each volume that came as DICOM.
        overwrite: whether to compute up-to-date results again.
        bids: whether ``output_dir`` becomes a BIDS derivative data set: the result of ``sub-01_T1w.nii.gz`` is
            ``sub-01/anat/sub-01_desc-sr_T1w.nii.gz``. Volumes without a BIDS name keep theirs.

    Raises:
        InputError: if ``weights`` cannot be read, or ``report``, ``dicom``, ``overwrite`` or ``bids`` is neither true nor false.
    """

    def __init__(
        self,
        output_dir: str | Path,
        dataset_dir: Any,
        volumes: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        weights: str | Path | None = None,
        head: Head | None = None,
        report: bool | str = False,
        dicom: bool | str = False,
        overwrite: bool | str = False,
        bids: bool | str = False,
    ) -> None:
        self.output_dir = Path(str(output_dir))
        self.root, self.volumes = _shared_path(dataset_dir, volumes), volumes
        hashed = None if weights is None else sha256(weights)
        # as JSON returns them, to be comparable: it has no tuples, and the command line gives true and false as text
        text = json.dumps({**(settings or {}), "weights": hashed}, default=float)
        self.settings = {k: {"true": True, "false": False}.get(str(v).lower(), v) for k, v in json.loads(text).items()}
        self.head = None if head is None else {"weights": head.weights, **head.calibration._asdict()}
        self.report, self.dicom, self.overwrite = switch("report", report), switch("dicom", dicom), switch("overwrite", overwrite)
        self.bids = switch("bids", bids)
        sources = {bids_root(volume) for volume in volumes} if self.bids else set()
        self.raw = sources.pop() if len(sources) == 1 else None  # the one BIDS data set that all volumes come from
        with_name: dict[Path, list[str]] = {}
        for volume in volumes:
            with_name.setdefault(self.path(volume, ""), []).append(volume)
        self.name_clashes = {v: same[i - 1] for same in with_name.values() if len(same) > 1 for i, v in enumerate(same)}
        """Volumes whose results would have the same path (``t1.nii.gz`` beside a DICOM folder ``t1``), each with another of them."""

    def path(self, volume: str | Path, ending: str) -> Path:
        """Path of a result file: ``output_dir``, the relative path of the volume without its extension, and ``ending``.

        Example:
            >>> results = Results("out", "/in", ["/in/site/sub-01.nii.gz"])
            >>> str(results.path("/in/site/sub-01.nii.gz", "_sr.nii.gz"))
            'out/site/sub-01_sr.nii.gz'
        """
        path = Path(os.path.abspath(volume))
        derivative = _bids_name(path) if self.bids else None
        if derivative is not None and ending == MAP_ENDING:
            return self.output_dir / derivative.with_name(re.sub(r"sr(_[^_]+)$", r"sd\1.nii.gz", derivative.name))
        if derivative is not None:
            return self.output_dir / derivative.with_name(derivative.name + ending.removeprefix("_sr"))
        name = path.name
        # a DICOM folder, or a series in one, may be named after a UID, full of dots
        if file_format(path) and not path.is_dir():
            name = strip_extension(name)
        elif path.is_file():
            name = name.removesuffix(path.suffix)
        return self.output_dir / path.relative_to(os.path.abspath(self.root)).parent / (name + ending)

    def is_own(self, volume: str | Path, ending: str) -> bool:
        """Whether this program wrote a result file: a volume, a map, a page, a picture or a report. One that cannot be read counts as
        damaged."""
        path = self.path(volume, ending)
        if ending in ("_sr.nii.gz", MAP_ENDING):
            start = start_of(path)
            return not start or RESULT_MARK.encode() in start
        if ending == "_sr.html":
            return PAGE_MARK.encode() in start_of(path, 2048)
        if ending == "_sr.png" and PICTURE_MARK.encode() in start_of(path, 2048):
            return True
        content = self._content(volume)
        if content is None:
            return ending != "_sr.png"
        return "settings" in content  # a picture of an earlier version has no mark, but a report

    def _content(self, volume: str | Path) -> dict[str, Any] | None:
        """Content of the report of a volume; ``None`` if there is none that can be read."""
        try:
            content = json.loads(self.path(volume, "_sr.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def of_another(self, volume: str) -> str | None:
        """Another volume whose result has the path of that of a volume, in an earlier run, if the other one still exists."""
        other = (self._content(volume) or {}).get("volume")
        if self.overwrite or not isinstance(other, str) or not os.path.exists(other) or not os.path.exists(volume):
            return None
        return None if os.path.samefile(other, volume) else other

    def in_the_way(self, volume: str | Path) -> Path | None:
        """A file with the name of a result of a volume that this program did not write, if there is one."""
        endings = ("_sr.nii.gz", "_sr.json", "_sr.png", *["_sr.html"] * self.report, *[MAP_ENDING] * (self.head is not None))
        foreign = (ending for ending in endings if self.path(volume, ending).exists() and not self.is_own(volume, ending))
        return next((self.path(volume, ending) for ending in foreign), None)

    def remove(self, volume: str | Path, ending: str) -> None:
        """Remove a result file of an earlier run, but no file that this program did not write."""
        if self.is_own(volume, ending):
            self.path(volume, ending).unlink(missing_ok=True)

    def write(self, volume: str | Path, ending: str, write: Callable[[Path], object]) -> None:
        """Write one result file atomically by calling ``write(path)``."""
        write_atomically(self.path(volume, ending), write)

    def bids_facts(self, volume: str) -> dict[str, Any]:
        """Entries of BIDS for the sidecar of a result: its source, and how that was acquired; empty if the result is not a BIDS
        derivative. The first call also writes ``dataset_description.json``, ``README.md`` and ``.bidsignore``."""
        if not self.bids or _bids_name(Path(volume)) is None:
            return {}
        if not (self.output_dir / "dataset_description.json").exists():
            made_by = {"Name": "brain_mri_super_resolution", "Version": version()}
            description: dict[str, Any] = {
                "Name": "Super-resolved MRI",
                "BIDSVersion": "1.10.0",
                "DatasetType": "derivative",
                "GeneratedBy": [made_by],
            }
            if self.raw is not None:
                description["DatasetLinks"] = {"raw": Path(os.path.relpath(self.raw, self.output_dir)).as_posix()}
            for name, text in (("README.md", BIDS_README.format(version=version())), (".bidsignore", BIDS_IGNORED)):
                if not (self.output_dir / name).exists():
                    write_text(self.output_dir / name, text)
            write_json(self.output_dir / "dataset_description.json", description)
        source = sidecar(volume)
        facts: dict[str, Any] = {key: source[key] for key in ACQUISITION if source.get(key) is not None}
        facts |= {"Description": RESULT_MARK, "SkullStripped": bool(source.get("SkullStripped", False))}
        if "_res-" in Path(volume).name:  # BIDS then requires an explanation
            facts["Resolution"] = "finer than that of the source, by the factors that are given here"
        if self.raw is not None:
            facts["Sources"] = [f"bids:raw:{Path(os.path.abspath(volume)).relative_to(self.raw).as_posix()}"]
        return facts

    def write_index(self, failures: Sequence[tuple[str, str]] = (), passed_over: Sequence[str] = ()) -> None:
        """Write ``index.html`` into ``output_dir``: a picture, warnings and a link for each result, then failures and skipped files.

        A run without reports writes no index, but updates one of an earlier run. An ``index.html`` of others stays as it is.

        Args:
            failures: volumes, each with the reason of its failure.
            passed_over: one line for each file that was skipped.
        """
        index = self.output_dir / "index.html"
        if not self.report and not index.exists():
            return
        if index.exists() and INDEX_MARK not in index.read_text(encoding="utf-8", errors="replace"):
            if self.report:
                logger.warning("%s is not of this program: no index was written", index)
            return
        failed, entries = dict(failures), []
        for volume in self.volumes:
            page, result, picture = (self.path(volume, f"_sr.{ending}") for ending in ("html", "nii.gz", "png"))
            warnings = (self._content(volume) or {}).get("warnings")
            if warnings is None or volume in failed:  # no result of this bundle, or one from an earlier run
                continue
            links = [path.relative_to(self.output_dir).as_posix() if path.exists() else None for path in (page, result, picture)]
            entries.append(Entry(self.name(volume), warnings, links[0] or links[1] or "", links[2]))
        reasons = [(self.name(volume), why.removeprefix(f"{volume}: ")) for volume, why in failed.items()]
        title = os.path.basename(os.path.abspath(self.root))
        root = os.path.join(self.root, "")
        others = [line.replace(root, "") for line in (*getattr(self.volumes, "passed_over", ()), *passed_over)]
        text = html_index(title, entries, reasons, others)
        write_text(index, text)

    def name(self, volume: str) -> str:
        """Name of a volume in reports: its path relative to ``dataset_dir``."""
        return os.path.relpath(volume, self.root)

    def is_done(self, volume: str) -> bool:
        """Whether the result of a volume is up to date: complete, and from the same input with the same settings."""
        endings = ["_sr.json", "_sr.nii.gz"] + ["_sr.html"] * self.report
        endings += [MAP_ENDING] * (self.head is not None)
        endings += [DICOM_ENDING] * (self.dicom and is_dicom_volume(volume))
        if self.overwrite or not all(self.path(volume, ending).exists() for ending in endings):
            return False
        done = self._content(volume) or {}  # written last
        if self.head is not None and done.get("uncertainty") != self.head:
            return False
        return done.get("settings") == self.settings and done.get("input") == fingerprint(volume)


def _bids_name(path: Path) -> Path | None:
    """Path of the derivative of a volume in a BIDS data set, without extension; ``None`` if the volume has no BIDS name.

    Example:
        >>> _bids_name(Path("sub-01_ses-2_acq-x_T1w.nii.gz")).as_posix()
        'sub-01/ses-2/anat/sub-01_ses-2_acq-x_desc-sr_T1w'
    """
    *entities, suffix = strip_extension(path.name).split("_")
    if not file_format(path) or not entities or not entities[0].startswith("sub-") or not all("-" in e for e in entities):
        return None
    description = next((e for e in entities if e.startswith("desc-")), "desc-")
    entities = [f"{e}sr" if e.startswith("res-") else e for e in entities]  # it is that of the source no longer
    folders = [e for e in entities if e.startswith(("sub-", "ses-"))]
    kind = path.parent.name if path.parent.name in BIDS_FOLDERS else "anat"
    return Path(*folders, kind, "_".join([*(e for e in entities if e != description), f"{description}sr", suffix]))


def _shared_path(dataset_dir: Any, volumes: Sequence[str]) -> str:
    """The folder to which result paths are relative: ``dataset_dir``, the folder of a single volume, the common folder of several paths,
    or the part of a pattern before its first wildcard."""
    given, taken = paths(dataset_dir), set(map(os.path.abspath, volumes))
    single = os.path.abspath(given[0])
    if len(given) > 1:
        searched = [_before_wildcards(os.path.abspath(path)) for path in given]
        return os.path.commonpath([p if os.path.isdir(p) and p not in taken else os.path.dirname(p) for p in searched])
    return os.path.dirname(single) if single in taken else _before_wildcards(single)


def _before_wildcards(path: str) -> str:
    """A path as it is, or the folder before the first wildcard of a pattern."""
    if os.path.lexists(path) or not glob.has_magic(path):
        return path
    return str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts[:-1])))


class CompareWithTrainingd(MapTransform):
    """Log how a volume differs from the training data, and add the warnings to the sample's ``"report"``, a dictionary.

    Args:
        keys: the volume (1, X, Y, Z) with scaled intensities, before it is refined; ``meta["factor"]`` holds the factors.
        ranges: JSON file of :func:`bundle.ranges.measure`; if it is missing, nothing is compared.
        uncertainty: whether there will be an uncertainty map, which is not calibrated far from the training data.
        from_acquired: whether the network starts from the samples that were acquired before the scanner zero-filled
            (:class:`bundle.grid.Upsampled`); their factors and noise are then compared.
    """

    def __init__(self, keys: KeysCollection, ranges: str | None = None, uncertainty: bool = False, from_acquired: bool = False) -> None:
        super().__init__(keys)
        self.ranges, self.uncertainty, self.from_acquired = read_ranges(ranges), uncertainty, from_acquired

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        image = data[self.keys[0]]
        fractions = [acquired_fraction(image.as_tensor()[0], axis) if thin else 1.0 for axis, thin in enumerate(_thin(image))]
        image.meta["acquired_fraction"] = [fraction if fraction < FILLED else 1.0 for fraction in fractions]
        statistics = describe(image, image.meta["factor"])
        if self.from_acquired:
            statistics |= _of_acquired_samples(image)
        far = compare(statistics, self.ranges, image.meta.get("modality", ""))
        if self.uncertainty and (far or not self.ranges):
            far.append(TOO_FAR if far else NOT_COMPARED)
        advice = _thick_slices(image) if len(image.meta["factor"]) == 2 else []
        advice += _zero_filled(image, fractions)
        for line in (*advice, *far):
            logger.warning("%s: %s", name_of(image), line)
        report = {
            "warnings": [*filter(None, image.meta.get("remarks", "").split("\n")), *advice, *far],
            "input_spacing": image.pixdim.tolist(),
            "acquired_spacing": [float(side) / fraction for side, fraction in zip(image.pixdim, fractions)],
            "statistics": statistics,
            "training_ranges": self.ranges or None,
        }
        return {**data, "report": report}


class Consistencyd(MapTransform):
    """Simulate the acquisition of the result and compare it with the input. The detail added by the network should vanish.

    The acquisition is the recognised one (:mod:`bundle.consistency`). If none was recognised, the one that fits best is used: k-space
    truncation, bicubic, Gaussian or box. Adds ``"consistency"`` to the sample: PSNR in dB, peak 1 (the intensity scale), of the result and
    of the interpolation after the simulated acquisition; ``"acquisition"``, its profile; and ``"recognized"``, what was recognised, or
    ``None``. Where the network started from the samples that the scanner had acquired before it zero-filled
    (:class:`bundle.grid.Upsampled`), these are compared.

    Args:
        keys: the interpolated input, with its ``meta["factor"]`` (and ``"acquired_factor"``), and the result
            (1, factor X, factor Y, Z).
        input_key: the volume before interpolation, (1, X, Y, Z), intensities scaled.
    """

    def __init__(self, keys: KeysCollection, input_key: str = "before") -> None:
        super().__init__(keys)
        self.input_key = input_key

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        meta = data[self.keys[0]].meta
        factors = [float(f) for f in meta.get("acquired_factor", meta["factor"])]
        before = torch.as_tensor(data[self.input_key])[0].float().cpu().movedim(-1, 0).contiguous()  # its slices are read one by one
        before = acquired_samples(before, [float(f) / factor for f, factor in zip(meta["factor"][:2], factors)])
        # the finer grid may end before the last acquired sample
        rows, columns = (Sampling(factor).count(side) for factor, side in zip(factors, data[self.keys[0]].shape[1:3]))
        before = before[:, :rows, :columns]
        # exclude hot spots and their surroundings, which would dominate the error
        ordinary = torch.ones_like(before, dtype=torch.bool)
        if max(float(before.max()), -float(before.min())) > HOT:
            away = torch.nn.functional.max_pool2d(before.abs(), 11, 1, 5) <= HOT
            ordinary = away if away.any() else ordinary
        recognized = data[self.keys[-1]].meta.get("recognized")
        truncated = recognized is not None and recognized["profile"] == "kspace"
        coverage = [round(acquired_fraction(before, axis), 3) if truncated else 1.0 for axis in (1, 2)]

        def error(key: Hashable, kind: Sampling, slices: Sequence[int]) -> float:
            volume = data[key].as_tensor()[0]
            if len(factors) > 2:
                volume = sampled(volume, [replace(kind, factor=factors[2])])
                kind = Sampling(profile=kind.profile)  # the width is that of the slices
            axes = [replace(kind, factor=f, coverage=part) if f > 1 else Sampling() for f, part in zip(factors, coverage)]
            again = (filtered(sampled(volume[..., n].float().cpu(), axes), axes) for n in slices)
            squares = ((measured - before[n]).square()[ordinary[n]] for n, measured in zip(slices, again))
            return sum(float(s.sum()) for s in squares) / max(sum(int(ordinary[n].sum()) for n in slices), 1)

        if recognized is not None:
            fitting = Sampling(1, recognized["profile"], recognized["width"], window=recognized["window"])
        else:
            if len(factors) == 2:
                kinds = [Sampling(1, profile) for profile in ("kspace", "bicubic", "gaussian", "box")]
            else:
                width = min(data[self.keys[0]].meta.get("slice_width") or 1.0, 3.0)
                kinds = [Sampling(1, profile, width) for profile in ("gaussian", "box")]
            some = torch.linspace(0, len(before) - 1, min(len(before), 8)).round().long().tolist()
            fitting = min(kinds, key=lambda kind: error(self.keys[-1], kind, some))
        errors = {name: error(key, fitting, range(len(before))) for name, key in zip(("interpolated", "result"), self.keys)}
        values = {name: round(-10 * math.log10(max(e, 1e-20)), 2) for name, e in errors.items()}
        name = name_of(data[self.keys[-1]])
        logger.info(
            "%s: after a simulated acquisition (%s), the result agrees with the input to %.2f dB", name, fitting.profile, values["result"]
        )
        if recognized is not None:
            logger.info("%s: acquired by %s", name, recognized["text"])
        return {**data, "consistency": values, "acquisition": fitting.profile, "recognized": recognized}


class SaveVolumed(MapTransform):
    """Write a volume as ``<name>_sr.nii.gz``: float32, with its voxels and affine unchanged.

    Both sform and qform hold the affine, with the codes of the input. If they differ in the input, each is refined separately. The
    standard deviation ``"sd"`` of a sample becomes ``<name>_sd.nii.gz``, on the same grid and in the same units; without it, the map of an
    earlier result is removed.

    Args:
        keys: the result (1, X, Y, Z), named after the file that it was loaded from, in its units. ``"sd"`` has the intensity scale and the
            orientation in which the network computes.
        results: of the run.
    """

    def __init__(self, keys: KeysCollection, results: Results) -> None:
        super().__init__(keys)
        self.results = results

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> Mapping:
        for key in self.keys:
            image = data[key]
            volume = name_of(image)
            if "sd" in data:
                deviation = oriented(data["sd"], "".join(nib.aff2axcodes(image.affine.cpu().numpy())))
                in_units = deviation.as_tensor() * float(deviation.meta["unit_intensity"])
                self._save(MetaTensor(in_units, meta=image.meta), volume, MAP_ENDING)
                facts = self.results.bids_facts(volume)
                if facts:  # a BIDS derivative needs a sidecar
                    path = self.results.path(volume, MAP_ENDING)
                    write_json(path.with_name(path.name.replace(".nii.gz", ".json")), {**facts, "Description": DESCRIPTION})
            else:
                self.results.remove(volume, MAP_ENDING)
            self._save(image, volume, "_sr.nii.gz")
        return data

    def _save(self, image: MetaTensor, name: str, ending: str) -> None:
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
        self.results.write(name, ending, partial(save_nifti, volume))


class SaveComparisond(MapTransform):
    """Write ``<name>_sr.png``: the middle plane of the interpolated input and of the result side by side, and an enlarged part.

    Args:
        keys: the interpolated input and the result, each (1, X, Y, Z) in [0, 1] on one grid.
        results: of the run.
        across: axis perpendicular to the plane: 2 for axial slices, or 0 or 1.
    """

    def __init__(self, keys: KeysCollection, results: Results, across: int = 2) -> None:
        super().__init__(keys)
        self.results, self.across = results, across

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> Mapping:
        before, after = (data[key] for key in self.keys)
        middle = before.shape[1 + self.across] // 2
        titles = ("input, interpolated", "super-resolved")
        axcodes = nib.aff2axcodes(before.affine.cpu().numpy())
        width, height = sorted((axis for axis in range(3) if axis != self.across), key=lambda axis: axcodes[axis] in "SI")
        planes = (v.as_tensor()[0].movedim((width, height), (0, 1))[..., middle] for v in (before, after))
        panels = [Panel(title, plane) for title, plane in zip(titles, planes)]
        aspect = float(before.pixdim[height] / before.pixdim[width])
        path = self.results.path(name_of(before), "_sr.png")
        save_panels(path, panels, aspect=aspect, zoom=0.25, axcodes=(axcodes[width], axcodes[height]))
        return data


class SaveHtmlReportd(MapTransform):
    """Write the report ``<name>_sr.html``: all slices of input, result and residual in three planes, warnings, a table.

    If the run writes no reports, the report of an earlier result is removed.

    Args:
        keys: the interpolated input and the result, each (1, X, Y, Z) on one grid; the sample has ``"report"`` and ``"consistency"``.
        results: of the run.
        input_key: the volume before interpolation.
    """

    def __init__(self, keys: KeysCollection, results: Results, input_key: str = "before") -> None:
        super().__init__(keys)
        self.results, self.input_key = results, input_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping:
        image = data[self.keys[0]]
        volume = name_of(image)
        if not self.results.report:
            self.results.remove(volume, "_sr.html")
            return data
        before, after = (oriented(data[key], "RAS") for key in self.keys)
        report = data["report"]
        axes = [nib.aff2axcodes(image.affine.numpy()).index(code) for code in "RAS"]
        sides = [" x ".join(str(data[key].shape[1 + axis]) for axis in axes) for key in (self.input_key, self.keys[1])]
        spacing = [by(v[axis] for axis in axes) for v in (report["input_spacing"], image.pixdim)]
        rows = [
            Row("Voxels, left-right x posterior-anterior x inferior-superior", *sides),
            Row("Spacing, mm", *spacing),
            Row("Consistency, dB", *(f"{data['consistency'][name]:.2f}" for name in ("interpolated", "result"))),
            *(Row("SHA-256 of the weights" if k == "weights" else k, str(v)) for k, v in self.results.settings.items() if v is not None),
            Row("Version of the bundle", version()),
            Row("Date", datetime.now().astimezone().isoformat(" ", "minutes")),
        ]
        not_compared = ["not compared with the training data: no ranges beside the weights"] * (not report["training_ranges"])
        layers = [
            Layer("Input", "The input, interpolated to the grid of the result.", before),
            Layer("Result", "The network's result for the input.", after),
            Layer("Residual", "Result minus input: what the network added, an estimate and not a measurement.", after - before, "signed"),
        ]
        if "sd" in data:
            about = (
                f"Standard deviation of the error. {100 * INTERVAL:g} % of the voxels of the head should lie within {Z} of it on each side."
            )
            layers.append(Layer("Uncertainty", about, oriented(data["sd"], "RAS"), "positive"))
            interval = f"result ± {Z} times the map: should hold {100 * INTERVAL:g} % of the head's voxels, in scans like the training data"
            rows.insert(3, Row(f"Uncertainty, {100 * INTERVAL:g} % interval", interval))
        title, unit = self.results.name(volume), float(before.meta["unit_intensity"])
        page = html_report(title, layers, unit, rows, [*report["warnings"], *not_compared])
        write_text(self.results.path(volume, "_sr.html"), page)
        return data


class SaveReportd(MapTransform):
    """Write ``<name>_sr.json``: warnings, consistency, the input and the settings of the run.

    It must be the last file written: it marks a result as complete (:meth:`Results.is_done`).

    Args:
        keys: the interpolated input; the sample has ``"report"`` and ``"consistency"``.
        results: of the run.
        computed_in: number format in which the network computed (:func:`bundle.precision.choose`).
    """

    def __init__(self, keys: KeysCollection, results: Results, computed_in: str = "float32") -> None:
        super().__init__(keys)
        self.results, self.computed_in = results, computed_in

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping:
        image = data[self.keys[0]]
        volume = name_of(image)
        report = {
            "volume": os.path.abspath(volume),
            "warnings": data["report"]["warnings"],
            "factor": [float(f) for f in image.meta["factor"]],
            "consistency_db": data["consistency"],
            "fitting_acquisition": data["acquisition"],
            "recognized_acquisition": data["recognized"],
            **{key: value for key, value in data["report"].items() if key != "warnings"},
            **self.results.bids_facts(volume),
            "settings": self.results.settings,
            **({} if self.results.head is None else {"uncertainty": self.results.head}),
            "computed_in": self.computed_in,
            "input": fingerprint(volume),
        }
        write_json(self.results.path(volume, "_sr.json"), report)
        return data


def _of_acquired_samples(image: MetaTensor) -> dict[str, float]:
    """Factors and noise as the network sees them, if the scanner zero-filled k-space along an axis that is refined; otherwise empty."""
    fractions = acquired_fractions(image)
    if min(fractions) == 1:
        return {}
    samples = acquired_samples(image.as_tensor()[0].movedim(-1, 0).float(), fractions)
    factors = {f"factor_{axis}": float(f) / fraction for axis, f, fraction in zip("xy", image.meta["factor"], fractions)}
    return {**factors, "noise": spectral_facts(samples)[0]}


def _thin(image: MetaTensor) -> list[bool]:
    """For each axis, whether it does not run across thick slices. Only along such axes can zero-filled k-space be detected."""
    return [float(side) < THICK[1] * float(min(image.pixdim)) for side in image.pixdim]


def _zero_filled(image: MetaTensor, fractions: Sequence[float]) -> list[str]:
    """Remarks on a volume that the scanner interpolated to a finer grid than it acquired; empty for others."""
    filled = [axis for axis, fraction in enumerate(fractions) if fraction < FILLED]
    if not filled:
        return []
    voxels, acquired = (by(float(image.pixdim[a]) / (f[a] if f else 1) for a in filled) for f in (None, fractions))
    names = " and ".join("xyz"[axis] for axis in filled)
    return [f"voxels of {voxels} mm along {names} hold detail of {acquired} mm only: the scanner filled k-space with zeros"]


def _thick_slices(image: MetaTensor) -> list[str]:
    """Advice for a volume with thick slices; empty for others."""
    sides = [float(side) for side in image.pixdim]
    across = sides.index(max(sides))
    if sides[across] < THICK[0] or sides[across] < THICK[1] * min(sides):
        return []
    axis = ("left to right", "back to front", "bottom to top")[across]
    return [
        f"voxels are {sides[across]:.4g} mm from {axis}, {min(sides):.4g} mm elsewhere: configs/isotropic.json is made for thick slices"
    ]
