"""Super-resolve a real head MRI and compare the result with the known original.

A slab of the MNI152 T1 template (part of the nilearn package) is reduced to half its in-plane resolution, saved as NIfTI and processed with
configs/inference.json, like any scan. The result is compared with the template.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai import bundle
from nilearn.datasets import load_mni152_template

from bundle.figures import Panel, save_panels
from bundle.metrics import psnr, ssim
from bundle.resampling import downsample, upsample

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/demo"), help="folder of the volumes and the picture")
    parser.add_argument("--axial_slices", type=int, nargs=2, default=(91, 98), metavar=("FIRST", "LAST"), help="slab, counted from 1")
    parser.add_argument("--scale", type=int, default=2, help="factor of the degradation and of the super-resolution")
    arguments = parser.parse_args()
    first, last = arguments.axial_slices
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    template = load_mni152_template(resolution=1)
    slab = template.slicer[..., first - 1 : last]
    truth = torch.from_numpy(slab.get_fdata(dtype=np.float32)).movedim(-1, 0)[:, None]  # slices (N, 1, X, Y)
    truth = (truth / np.percentile(truth[truth > 0], 99.9)).clamp(0, 1)

    low = downsample(truth, arguments.scale)
    path = arguments.output_dir / "mni152_low.nii.gz"
    nib.Nifti1Image(low[:, 0].movedim(0, -1).numpy(), slab.affine @ to_fine(arguments.scale)).to_filename(path)
    print(f"low-resolution volume {tuple(low.shape[2:])} x {len(low)}: {path}")

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
    bicubic = upsample(low, arguments.scale)[..., : shape[0], : shape[1]]
    panels = [Panel("original", truth[len(truth) // 2, 0])]
    print(f"{'':18} PSNR (dB)   SSIM   mean of {len(truth)} slices")
    for name, volume in (("bicubic", bicubic), ("super-resolved", network)):
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
