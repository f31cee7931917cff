"""Verify an entry of the MONAI Model Zoo: the checks of the zoo's own CI, and inference on a small volume. Started by package.py.

The argument is the folder of the entry; the working directory must contain the schema of the metadata.
"""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out

SIDES = (17, 24)  # an odd and an even one
TOLERANCE = 1e-4
CHANNELS = "_meta_::network_data_format::inputs::image::num_channels"


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    entry = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(entry))  # as the zoo does for a bundle's own Python
    meta = json.loads((entry / "configs" / "metadata.json").read_text())
    check_files(entry)
    check_metadata(entry, meta)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_scans(work / "scans", 3)
        check_properties(entry, work / "scans")
        check_networks(entry, work)
        check_inference(entry, work / "scans" / "scan-1.nii.gz", work)


def check_files(entry: Path) -> None:
    files = [path for path in entry.rglob("*") if path.is_file()]
    needed = ("LICENSE", "configs/metadata.json", "configs/inference.json", "configs/train.json", "configs/logging.conf", "models/model.pt",
              "docs/README.md", "docs/data_license.txt")  # fmt: skip
    missing = [name for name in needed if not (entry / name).is_file()]
    if missing:
        sys.exit(f"error: missing: {', '.join(missing)}")
    largest = max(files, key=lambda path: path.stat().st_size)
    print(f"files: {len(files)}, the largest {largest.relative_to(entry)} with {largest.stat().st_size / 1e6:.1f} MB")


def check_metadata(entry: Path, meta: dict) -> None:
    verify_metadata(meta_file=str(entry / "configs" / "metadata.json"), filepath="schema.json")
    if meta["version"] not in meta["changelog"]:
        sys.exit(f"error: version {meta['version']} is not in the changelog of the metadata")
    print(f"metadata: follow the schema; version {meta['version']} is in the changelog")


def check_properties(entry: Path, scans: Path) -> None:
    configs = entry / "configs"
    workflows = {"train": (["train"], "train"), "evaluate": (["train", "evaluate"], "train"), "inference": (["inference"], "infer")}
    for title, (names, kind) in workflows.items():
        workflow = ConfigWorkflow(
            config_file=[str(configs / f"{name}.json") for name in names], meta_file=str(configs / "metadata.json"), logging_file=False,
            workflow_type=kind, dataset_dir=str(scans), split=[1, 1, 1], patch_size=15,
        )  # fmt: skip
        workflow.initialize()
        missing = workflow.check_properties()
        if missing:
            sys.exit(f"error: properties of {title}: {', '.join(missing)}")
        print(f"properties: those of {title} are complete")


def check_networks(entry: Path, work: Path) -> None:
    """Input and output, weights and TorchScript of the default network and of those in configs/networks with their own weights."""
    configs = entry / "configs"
    overlays = [path for path in sorted((configs / "networks").glob("*.json")) if "checkpoint" in json.loads(path.read_text())]
    for overlay in (None, *overlays):
        title = overlay.stem if overlay else "network"
        files = [str(path) for path in (configs / "inference.json", overlay) if path]
        common = {"config_file": files, "meta_file": str(configs / "metadata.json"), "bundle_root": str(entry)}
        parser = ConfigParser()
        parser.read_config(files)
        parser["bundle_root"] = str(entry)
        network = parser.get_parsed_content("network_def").eval()
        channels = getattr(network, "channels", 1)  # the metadata describe the default network; compared networks take the slice alone
        verify_net_in_out(net_id="network_def", device="cpu", **common, **({CHANNELS: channels} if overlay else {}))
        if not Path(inspect.getfile(type(network))).is_relative_to(entry):
            sys.exit(f"error: {title}: {inspect.getfile(type(network))} is not in the entry")
        checkpoint = Path(parser.get_parsed_content("checkpoint"))
        trained = checkpoint.is_file()
        if not trained:
            checkpoint = work / "untrained.pt"
            torch.save(network.state_dict(), checkpoint)
        elif not checkpoint.is_relative_to(entry):
            sys.exit(f"error: {title}: its weights, {checkpoint}, are not in the entry")
        ckpt_export(ckpt_file=str(checkpoint), filepath=str(work / "network.ts"), **common)
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
        exported = torch.jit.load(work / "network.ts")
        slices = torch.rand(2, channels, *SIDES)
        with torch.inference_mode():
            difference = float((network(slices) - exported(slices)).abs().max())
        if not difference <= TOLERANCE:
            sys.exit(f"error: {title}: TorchScript differs by {difference:.1e}")
        parameters = sum(p.numel() for p in network.parameters())
        weights = "trained weights" if trained else "WITHOUT WEIGHTS"
        print(f"{title}: {parameters:,} parameters, {weights}, input and output as in the metadata, TorchScript equal to {difference:.0e}")


def check_inference(entry: Path, scan: Path, work: Path) -> None:
    command = [sys.executable, "-S", "-m", "monai.bundle", "run", "--config_file", str(entry / "configs" / "inference.json")]
    command += ["--dataset_dir", str(scan), "--output_dir", str(work), "--report", "true"]
    run = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"error: inference failed\n{run.stdout}{run.stderr}")
    given, result = nib.load(scan), nib.load(work / "scan-1_sr.nii.gz")
    expected = (2 * given.shape[0], 2 * given.shape[1], given.shape[2])
    if result.shape != expected or not np.isfinite(result.get_fdata()).all():
        sys.exit(f"error: inference: finite intensities of shape {expected} expected, got {result.shape}")
    if not (work / "scan-1_sr.html").is_file():
        sys.exit("error: inference: no HTML report")
    print(f"inference: {given.shape} to {result.shape}, from another folder")


def write_scans(folder: Path, count: int) -> None:
    folder.mkdir()
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 20, 3)), indexing="ij")
    for n in range(1, count + 1):
        volume = 1000 * np.clip(1 - x**2 - y**2, 0, 1) * (1 + 0.1 * n * x + 0.1 * z)
        nib.Nifti1Image(volume.astype(np.float32), np.eye(4)).to_filename(folder / f"scan-{n}.nii.gz")


if __name__ == "__main__":
    main()
