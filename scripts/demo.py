"""Super-resolve a real head MRI and compare the result with the known original.

A slab of the MNI152 T1 template (it travels with the nilearn package) is acquired at half its in-plane resolution as a scanner does it:
k-space is truncated, and there is noise of 1 % of the brightest tissue. It is written as a NIfTI volume and given to
configs/inference.json, like any scan. The result is compared with the template itself, beside cubic B-splines and zero-filling of k-space.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai import bundle
from nilearn.datasets import load_mni152_template

from bundle.acquisition import Acquisition, Sampling
from bundle.figures import Panel, save_panels
from bundle.metrics import psnr, ssim
from bundle.resampling import upsample

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/demo"), help="folder of the volumes and the picture")
    parser.add_argument("--axial_slices", type=int, nargs=2, default=(91, 98), metavar=("FIRST", "LAST"), help="slab, counted from 1")
    parser.add_argument("--scale", type=int, default=2, help="factor of the acquisition and of the super-resolution")
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation, relative to the brightest tissue")
    arguments = parser.parse_args()
    first, last = arguments.axial_slices
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    template = load_mni152_template(resolution=1)
    slab = template.slicer[..., first - 1 : last]
    truth = torch.from_numpy(slab.get_fdata(dtype=np.float32)).movedim(-1, 0)[:, None]  # slices (N, 1, X, Y)
    truth = (truth / np.percentile(truth[truth > 0], 99.9)).clamp(0, 1)

    sampling = Sampling(arguments.scale, "kspace")
    low = Acquisition((sampling, sampling), arguments.noise)(truth, np.random.default_rng(0))
    path = arguments.output_dir / "mni152_low.nii.gz"
    nib.Nifti1Image(low[:, 0].movedim(0, -1).numpy(), slab.affine @ to_fine(arguments.scale)).to_filename(path)
    print(f"simulated scan (k-space truncated, {arguments.noise:.0%} noise), {tuple(low.shape[2:])} x {len(low)}: {path}")

    bundle.run(
        config_file=str(ROOT / "configs" / "inference.json"),
        logging_file=str(ROOT / "configs" / "logging.conf"),
        meta_file=str(ROOT / "configs" / "metadata.json"),
        dataset_dir=str(path),
        output_dir=str(arguments.output_dir),
        scale=arguments.scale,
    )

    result = nib.load(arguments.output_dir / "mni152_low_sr.nii.gz")
    shape = truth.shape[2:]
    network = torch.from_numpy(result.get_fdata(dtype=np.float32)).movedim(-1, 0)[:, None, : shape[0], : shape[1]]
    spline, filled = (upsample(low, arguments.scale, mode)[..., : shape[0], : shape[1]] for mode in ("spline", "kspace"))
    panels = [Panel("original", truth[len(truth) // 2, 0])]
    print(f"{'':18} PSNR (dB)   SSIM   mean of {len(truth)} slices")
    for name, volume in (("cubic B-spline", spline), ("zero-filled", filled), ("super-resolved", network)):
        decibel, similarity = float(psnr(volume, truth).mean()), float(ssim(volume, truth).mean())
        print(f"{name:18} {decibel:9.2f}   {similarity:.4f}")
        panels.append(Panel(f"{name}\n{decibel:.2f} dB / {similarity:.4f}", volume[len(truth) // 2, 0]))
    picture = arguments.output_dir / "comparison.png"
    save_panels(picture, panels, zoom=0.25)
    print(f"picture: {picture}")


def to_fine(scale: int) -> np.ndarray:
    """Index on the coarse grid to index on the fine one: the centre of coarse pixel j lies at (j + 0.5) scale - 0.5."""
    matrix = np.diag([scale, scale, 1.0, 1.0])
    matrix[:2, 3] = (scale - 1) / 2
    return matrix


if __name__ == "__main__":
    main()
