"""The default network from a file to a file: what it is told, and what a user can say."""

import json
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy

from bundle.acquisition import Acquisition, Sampling
from bundle.errors import reason
from bundle.networks import PixelShuffleResidualNet
from bundle.resampling import downsample, upsample

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"features": 8, "num_blocks": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones, and those of an untrained network, which returns the interpolated volume."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    network = PixelShuffleResidualNet(**SMALL, positions=True, facts=True)
    torch.save(network.state_dict(), folder / "untrained.pt")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    torch.save(network.state_dict(), folder / "random.pt")
    return folder


@pytest.fixture
def infer(weights, tmp_path):
    def run(scan, *overlays, kind="random", **options):
        options = {"acquisition": "unknown", **options}
        monai.bundle.run(
            config_file=[str(CONFIGS / f"{name}.json") for name in ("inference", *overlays)], dataset_dir=str(scan),
            output_dir=str(tmp_path / "out"), checkpoint=str(weights / f"{kind}.pt"), device="cpu", overwrite=True, clip=False,
            **{f"network_def::{key}": value for key, value in SMALL.items()}, **options,
        )  # fmt: skip
        return nib.load(tmp_path / "out" / "scan_sr.nii.gz")

    return run


def noisy_scan(tmp_path, noise=0.03, spacing=(1, 1, 3), seed=0):
    head = torch.from_numpy(toy.head((43, 41, 5))).float()
    scan = Acquisition((Sampling(), Sampling(), Sampling()), noise * 1000)(head, np.random.default_rng(seed))
    return toy.write_nifti(tmp_path / "scan.nii.gz", scan.numpy(), toy.affine(spacing))


@pytest.mark.parametrize("overlays", [(), ("isotropic",)])
def test_an_untrained_network_returns_cubic_b_splines(overlays, infer, tmp_path):
    result = infer(noisy_scan(tmp_path), *overlays, kind="untrained").get_fdata()
    scan = torch.from_numpy(nib.load(tmp_path / "scan.nii.gz").get_fdata())
    if overlays:
        assert result.shape == (43, 41, 15)
    else:
        expected = upsample(scan.movedim(-1, 0), 2, "spline").movedim(0, -1)
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-2)


def test_the_noise_of_the_scan_is_measured_unless_it_is_given(infer, tmp_path):
    scan = noisy_scan(tmp_path)
    measured = infer(scan).get_fdata()
    noise = json.loads((tmp_path / "out" / "scan_sr.json").read_text())["statistics"]["noise"]
    assert noise == pytest.approx(0.03, rel=0.4)
    np.testing.assert_allclose(infer(scan, noise=noise).get_fdata(), measured, atol=1e-2)
    assert np.abs(infer(scan, noise=0.2).get_fdata() - measured).max() > 1


def test_the_scan_s_own_noise_returns_on_request(infer, tmp_path):
    scan = noisy_scan(tmp_path)
    result = torch.from_numpy(infer(scan, denoise=0).get_fdata()).movedim(-1, 0)
    measured = torch.from_numpy(nib.load(scan).get_fdata()).movedim(-1, 0)
    rest = downsample(result, 2, "kspace") - measured
    assert float(rest.abs().mean()) < 0.1  # of 1000
    every = torch.from_numpy(infer(scan).get_fdata()).movedim(-1, 0)
    assert float((downsample(every, 2, "kspace") - measured).abs().mean()) > 5


def test_what_was_recognised_corrects_the_result_and_is_reported(infer, tmp_path):
    scan = noisy_scan(tmp_path, noise=0)
    network = infer(scan).get_fdata()
    report = json.loads((tmp_path / "out" / "scan_sr.json").read_text())
    assert (report["recognized_acquisition"], report["settings"]["recognition"]) == (None, None)
    measured = torch.from_numpy(nib.load(scan).get_fdata()).movedim(-1, 0)
    errors = [
        float((downsample(torch.from_numpy(result).movedim(-1, 0), 2, "kspace") - measured).abs().mean())
        for result in (network, infer(scan, acquisition="kspace", noise=0).get_fdata())
    ]
    assert errors[1] < 0.3 * errors[0]
    report = json.loads((tmp_path / "out" / "scan_sr.json").read_text())
    assert report["recognized_acquisition"].pop("text").startswith("k-space truncation")
    assert report["recognized_acquisition"].pop("window") in ("none", "hamming", "tukey")
    assert report["recognized_acquisition"] == {"profile": "kspace", "width": 1.0, "probability": pytest.approx(1, abs=0.9), "noise": 0}
    assert len(report["settings"]["recognition"]) == 64
    infer(scan, acquisition="auto")
    assert json.loads((tmp_path / "out" / "scan_sr.json").read_text())["recognized_acquisition"]["probability"] <= 1


def test_a_slice_thickness_reaches_the_network(infer, tmp_path):
    scan = noisy_scan(tmp_path, spacing=(1, 1, 4))
    unknown, gaps = (infer(scan, "isotropic", **given).get_fdata() for given in ({}, {"slice_thickness": 3}))
    assert unknown.shape == (43, 41, 20)
    assert np.abs(unknown - gaps).max() > 0.1


@pytest.mark.parametrize(
    ("overlays", "option", "message"),
    [((), {"acquisition": "mean"}, "acquisition must be auto, unknown, kspace"),
     ((), {"noise": 2}, "noise must be a fraction"), ((), {"denoise": -1}, "denoise must be a number from 0 to 1"),
     (("isotropic",), {"denoise": 0}, "with thick slices it must be 1"),
     (("isotropic",), {"acquisition": "kspace"}, "acquisition must be auto, unknown, gaussian, box or trapezoid, got 'kspace'"),
     (("networks/fast",), {"acquisition": "kspace"}, "acquisition is told to general networks only"),
     (("networks/fast",), {"noise": 0.02}, "noise is told to general networks only"),
     ((), {"margin": -1}, "margin must be a number from 0"),
     (("isotropic",), {"slice_thickness": -3}, "slice_thickness must")],
)  # fmt: skip
def test_impossible_options_are_refused(overlays, option, message, infer, tmp_path):
    with pytest.raises(Exception) as error:
        infer(noisy_scan(tmp_path), *overlays, **option)
    assert message in reason(error.value)


def test_a_zero_filled_grid_is_remarked_on(infer, tmp_path):
    random = np.random.default_rng(0)
    fine = torch.from_numpy(random.standard_normal((3, 64, 60)).astype(np.float32)) * 30 + 300
    scan = upsample(fine, 2, "kspace").movedim(0, -1).numpy()
    infer(toy.write_nifti(tmp_path / "scan.nii.gz", scan, toy.affine((0.5, 0.5, 3))), kind="untrained")
    report = json.loads((tmp_path / "out" / "scan_sr.json").read_text())
    (line,) = (line for line in report["warnings"] if "zeros" in line)
    assert line.startswith("voxels of 0.5 x 0.5 mm along x and y hold detail of 1 x 1 mm only")
    # the network starts from what was acquired, on the grid that was asked for
    result = nib.load(tmp_path / "out" / "scan_sr.nii.gz")
    assert result.shape == (256, 240, 3)
    spline, filled = (np.abs(result.get_fdata() - upsample(fine, 4, mode).movedim(0, -1).numpy()).mean() for mode in ("spline", "kspace"))
    assert spline < 0.5 * filled
