"""Compare ways to make thick slices isotropic, side by side on the same files: cubic B-splines, zero-filling, ECLARE and the network.

A slab of each high-resolution volume is made cubic, acquired in thick slices in a simulation, and written as a NIfTI volume. Every method
reads that file and writes another one, as a user runs it. The results are compared with the slab. Writes peers.json and peers.md into the
output folder after each row; rows of earlier runs stay. Run one at a time: two would overwrite each other's rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from nibabel.processing import resample_from_to
from torch import Tensor

import bundle
from bundle.acquisition import Acquisition, Sampling
from bundle.errors import InputError, reason
from bundle.files import write_atomically, write_json
from bundle.grid import oriented
from bundle.metrics import FOREGROUND, volume_psnr, volume_ssim
from bundle.resampling import downsample, enlarge, interpolate_slices
from bundle.subjects import find_volumes

ROOT = Path(bundle.root())
UNIT = 1000  # stored value of intensity 1: files store whole numbers
KERNELS = {"gaussian": "gaussian", "box": "boxcar"}  # slice profiles, and what ECLARE calls them
SAME = 0.001  # voxels: grids that differ by less are one


class Thick(NamedTuple):
    """A simulated scan: its file, the truth on the grid of the results, the slice distance in voxels of the truth, and the profile."""

    path: Path
    truth: nib.Nifti1Image
    factor: float
    profile: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("volumes", nargs="+", help="files, folders or patterns of high-resolution volumes that no method was trained on")
    parser.add_argument("--output_dir", type=Path, default=Path("output/peers"), help="folder of the scans, the results and the table")
    parser.add_argument("--eclare", metavar="COMMAND", help="path of run-eclare; without it ECLARE is skipped")
    parser.add_argument("--patches", type=int, default=1_000_000, help="patches that ECLARE trains on, for each scan")
    parser.add_argument("--profile", default="gaussian", choices=list(KERNELS), help="slice profile")
    parser.add_argument("--thickness", type=float, default=5, help="slice thickness and slice distance in mm")
    parser.add_argument("--slab", type=int, default=48, help="width of the slab from left to right, in voxels")
    given = parser.parse_args()
    try:
        if given.eclare and not shutil.which(given.eclare):
            raise InputError(f"--eclare {given.eclare}: no such command")
        if not given.eclare:
            print("ECLARE is skipped: --eclare does not name its command")
        for volume in find_volumes(given.volumes):
            compare(volume, given)
    except InputError as e:
        sys.exit(f"error: {reason(e)}")
    print((given.output_dir / "peers.md").read_text(encoding="utf-8"))


def compare(volume: str, given: argparse.Namespace) -> None:
    """Measure every method on one volume, and write the tables after each."""
    scan = acquired(volume, given)
    methods: dict[str, tuple[str, Callable[[Thick, Path], Path]]] = {
        "cubic B-spline": ("spline", spline),
        "zero-filling": ("zero_filled", zero_filled),
        "network": ("network", network),
    }
    if given.eclare:
        apply_eclare = partial(eclare, command=given.eclare, patches=given.patches)
        methods[f"ECLARE, {given.patches:,} patches"] = ("eclare", apply_eclare)
    title = f"{Path(volume).name.split('.')[0]}, {given.thickness:g} mm, {given.profile}"
    file = given.output_dir / "peers.json"
    for method, (name, apply) in methods.items():
        folder = scan.path.parent / name
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir()
        started, used = time.perf_counter(), processor_time()
        path = apply(scan, folder)
        seconds, processor = time.perf_counter() - started, processor_time() - used
        result, moved = on_grid_of(scan.truth, nib.load(path), path)
        prediction, truth = (torch.from_numpy(v / np.float32(UNIT))[None] for v in (result, scan.truth.get_fdata(dtype=np.float32)))
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        rows.setdefault(title, {})[method] = {
            "psnr": round(volume_psnr(prediction, truth, foreground=True), 3),
            "ssim": round(volume_ssim(prediction, truth), 4),
            "seconds": round(seconds, 1),
            "processor_seconds": round(processor, 1),
            "resampled_by_voxels": moved,
        }
        write_json(file, rows)
        table = markdown(rows)
        write_atomically(given.output_dir / "peers.md", lambda path, table=table: path.write_text(table, encoding="utf-8"))


def acquired(volume: str, given: argparse.Namespace) -> Thick:
    """Write the thick scan of a slab, ``<name>_thick.nii.gz``, and the slab, ``<name>_truth.nii.gz``: stored values are whole numbers."""
    config = ConfigParser()
    config.read_config(str(ROOT / "configs" / "inference.json"))
    config.update({"scale_intensity::clip": False})
    load, scale = (config.get_parsed_content(key) for key in ("load", "scale_intensity"))
    image = oriented(scale(load({"image": volume}))["image"], "RAS")
    truth, affine = cubic(image.as_tensor()[0].float(), image.affine.numpy().astype(float))
    spacing = float(np.linalg.norm(affine[:3, 2]))
    factor = given.thickness / spacing
    if factor < 3:
        raise InputError(f"{volume}: slices of {spacing:.3g} mm are more than a third of --thickness {given.thickness:g}")
    first, size = slab(truth > FOREGROUND, given.slab, factor)
    truth = truth[tuple(slice(start, start + n) for start, n in zip(first, size))]
    affine = affine @ nib.affines.from_matvec(np.eye(3), first)
    measured = Acquisition((Sampling(), Sampling(), Sampling(factor, given.profile)))(truth)
    to_truth = nib.affines.from_matvec(np.diag([1, 1, factor]), [0, 0, (factor - 1) / 2])
    name = Path(volume).name.split(".")[0]
    folder = given.output_dir / f"{name}_{given.profile}"
    for voxels, to_world, what in ((measured, affine @ to_truth, "thick"), (truth, affine, "truth")):
        save(voxels, to_world, folder / f"{name}_{what}.nii.gz")
    return Thick(folder / f"{name}_thick.nii.gz", nib.load(folder / f"{name}_truth.nii.gz"), factor, given.profile)


def cubic(volume: Tensor, affine: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """A volume (X, Y, Z) with cubic voxels as large as its slice distance: k-space is truncated within the plane, nothing is
    interpolated across it."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    factors = sides[2] / sides[:2]
    if min(factors) < 0.99:
        raise InputError(f"slices are {sides[2]:.3g} mm apart, closer than the pixels of {sides[0]:.3g} x {sides[1]:.3g} mm")
    if max(factors) > 1.01:
        volume = downsample(volume.movedim(-1, 0), [max(f, 1.0) for f in factors], "kspace").movedim(0, -1).abs()
        affine = affine @ nib.affines.from_matvec(np.diag([*factors, 1]), [*(factors - 1) / 2, 0])
    return volume, affine


def slab(head: Tensor, width: int, factor: float) -> tuple[list[int], list[int]]:
    """First voxel and size of the box around a head (X, Y, Z): the middle ``width`` voxels along x, whole slices along z."""
    box = []
    for axis in range(3):
        filled = (head.float().mean([n for n in range(3) if n != axis]) > 0.005).nonzero().flatten()
        if not len(filled):
            raise InputError("holds no head")
        box.append((int(filled[0]), int(filled[-1]) + 1))
    middle = sum(box[0]) // 2
    box[0] = (max(middle - width // 2, 0), min(middle + width - width // 2, head.shape[0]))
    slices = max(math.floor((box[2][1] - box[2][0]) / factor + 0.01), 1)
    box[2] = (box[2][0], box[2][0] + round(slices * factor))
    return [start for start, _ in box], [end - start for start, end in box]


def spline(scan: Thick, folder: Path) -> Path:
    """Cubic B-splines across the slices."""
    return save(interpolate_slices(stored(scan), scan.factor, scan.truth.shape[2]), scan.truth.affine, folder / "spline.nii.gz")


def zero_filled(scan: Thick, folder: Path) -> Path:
    """Zeros beyond the k-space of the slices."""
    filled = enlarge(stored(scan), (1, scan.factor), scan.truth.shape[1:], "kspace")
    return save(filled, scan.truth.affine, folder / "zero_filled.nii.gz")


def network(scan: Thick, folder: Path) -> Path:
    """``configs/isotropic.json``."""
    options = {
        "config_file": str([str(ROOT / "configs" / name) for name in ("inference.json", "isotropic.json")]),
        "dataset_dir": str(scan.path),
        "output_dir": str(folder),
        "slice_thickness": f"{scan.factor * spacing_of(scan.truth):.6g}",
    }
    run([sys.executable, "-m", "monai.bundle", "run", *(part for name, value in options.items() for part in (f"--{name}", value))], folder)
    return folder / scan.path.name.replace(".nii", "_sr.nii")


def eclare(scan: Thick, folder: Path, command: str, patches: int) -> Path:
    """``run-eclare``, which trains on the scan's own slices. It is told the slice profile, and runs on the CPU."""
    options = {
        "in-fpath": str(scan.path),
        "out-dir": str(folder),
        "relative-slice-thickness": f"{scan.factor:.6g}",
        "relative-slice-profile-type": KERNELS[scan.profile],
        "n-patches": str(patches),
        "gpu-id": "-1",
    }
    run([command, *(part for name, value in options.items() for part in (f"--{name}", value))], folder)
    return folder / scan.path.name.replace(".nii", "_eclare.nii")


def run(command: list[str], folder: Path) -> None:
    """Run a command; its output goes into ``log.txt`` of the folder."""
    with (folder / "log.txt").open("wb") as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if ended.returncode:
        raise InputError(f"{command[0]} ended with status {ended.returncode}: see {folder / 'log.txt'}")


def stored(scan: Thick) -> Tensor:
    return torch.from_numpy(nib.load(scan.path).get_fdata(dtype=np.float32) / np.float32(UNIT))


def save(volume: Tensor, affine: np.ndarray, path: Path) -> Path:
    """Write intensities (X, Y, Z) as whole numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image((volume * UNIT).round().numpy().astype(np.int16), affine).to_filename(path)
    return path


def spacing_of(image: nib.Nifti1Image) -> float:
    return float(image.header.get_zooms()[2])


def processor_time() -> float:
    """Seconds of all cores that this process and its ended children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def on_grid_of(truth: nib.Nifti1Image, result: nib.Nifti1Image, path: Path) -> tuple[np.ndarray, float]:
    """Voxels of a result on the grid of the truth, by cubic splines where the grids differ, and by how many voxels the corners of the
    fields of view differ.

    Raises:
        InputError: if they differ by a voxel or more.
    """
    to_result = np.linalg.inv(result.affine) @ truth.affine
    corners = np.array([np.full(3, -0.5), np.array(truth.shape) - 0.5])
    own = np.array([np.full(3, -0.5), np.array(result.shape) - 0.5])
    distance = float(np.abs(nib.affines.apply_affine(to_result, corners) - own).max())
    if distance >= 1:
        raise InputError(f"{path}: its field of view differs from that of the truth by {distance:.2f} voxels")
    if distance < SAME and result.shape == truth.shape:
        return result.get_fdata(dtype=np.float32), 0.0
    return resample_from_to(result, truth, order=3, mode="nearest").get_fdata(dtype=np.float32), round(distance, 3)


def markdown(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| scan | method | PSNR, dB | SSIM | seconds | processor seconds |", "|---|---|---|---|---|---|"]
    for scan, methods in rows.items():
        for method, v in methods.items():
            seconds = " | ".join(f"{v[key]:.0f}" if v[key] >= 10 else f"{v[key]:.1f}" for key in ("seconds", "processor_seconds"))
            lines.append(f"| {scan} | {method} | {v['psnr']:.2f} | {v['ssim']:.4f} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
