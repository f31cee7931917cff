import json
from dataclasses import replace
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
import toy
from monai.data import MetaTensor

from bundle.acquisition import Acquisition, Sampling, sampled
from bundle.intensity import ScaleIntensityByPercentiled
from bundle.loading import LoadVolumed
from bundle.ranges import STATISTICS, compare, describe, measure, read_ranges
from bundle.resampling import downsample, enlarge, upsample
from bundle.results import Consistencyd

CONFIGS = Path(__file__).parents[1] / "configs"


def statistics(path, factor=1):
    return describe(ScaleIntensityByPercentiled("image")(LoadVolumed("image")({"image": str(path)}))["image"], factor)


class TestDescribe:
    def test_statistics_are_those_of_the_volume(self, tmp_path):
        array = np.zeros((10, 10, 4))
        array[:5] = np.linspace(1, 200, 200).reshape(5, 10, 4)
        found = statistics(toy.write_nifti(tmp_path / "a.nii.gz", array, toy.affine((1, 2, 3), (10, 20, 30))), factor=2)
        expected = {
            "factor_x": 2,
            "factor_y": 2,
            "factor_z": 1,
            "spacing_x": 0.5,
            "spacing_y": 1,
            "spacing_z": 3,
        }
        assert found.pop("noise") < 0.005
        assert found == pytest.approx(expected, abs=1e-5)
        assert found.keys() | {"noise"} == STATISTICS.keys()

    def test_noise_is_that_of_the_scan(self, tmp_path):
        random = np.random.default_rng(0)
        array = toy.head((64, 60, 6))
        noise = 0.04 * array.max() * random.standard_normal((2, *array.shape))
        noisy = np.hypot(array + noise[0], noise[1])
        clean, found = (statistics(toy.write_nifti(tmp_path / "a.nii.gz", a))["noise"] for a in (array, noisy))
        assert clean < 0.015
        assert found == pytest.approx(0.04, rel=0.3)

    def test_each_axis_has_a_factor_of_its_own(self, tmp_path):
        found = statistics(toy.write_nifti(tmp_path / "a.nii.gz", to_world=toy.affine((1, 2, 3))), factor=(2.5, 4, 6))
        assert [found[f"{name}_{axis}"] for name in ("factor", "spacing") for axis in "xyz"] == pytest.approx([2.5, 4, 6, 0.4, 0.5, 0.5])

    def test_units_do_not_matter(self, tmp_path):
        one, other = (statistics(toy.write_nifti(tmp_path / f"{u}.nii.gz", toy.head() * u)) for u in (1, 1000))
        assert one == pytest.approx(other, rel=1e-4)

    def test_negative_volume_has_statistics(self, tmp_path):
        found = statistics(toy.write_nifti(tmp_path / "a.nii.gz", -toy.head()))
        assert found["noise"] == 0
        assert compare(found, {name: [0.5, 0.6] for name in STATISTICS})  # told, not failed
        json.loads(json.dumps(found, allow_nan=False))


class TestCompare:
    RANGES = {"spacing_x": [1.0, 1.0], "noise": [0.4, 0.5]}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("spacing", "noise", "far"),
        [
            (1.0, 0.45, []),
            (1.09, 0.59, []),
            (0.91, 0.31, []),
            (1.2, 0.45, ["voxel size of the result along x, in mm, is 1.2; of the training data 1 to 1"]),
            (0.8, 0.45, ["voxel size"]),
            (1.0, 0.61, ["standard deviation of the noise, relative to the brightest tissue, is 0.61; of the training data 0.4 to 0.5"]),
            (1.0, 0.29, ["standard deviation"]),
            (3.0, 0.9, ["voxel size", "standard deviation"]),
        ],
    )
    def test_far_is_outside_by_more_than_the_width(self, spacing, noise, far):
        lines = compare({"spacing_x": spacing, "noise": noise}, self.RANGES)
        assert len(lines) == len(far)
        assert all(line.startswith(start) for line, start in zip(lines, far))

    @pytest.mark.parametrize(("factor", "number"), [(1.5, 0), (4.3, 0), (5, 1), (1, 1)])
    def test_factor_outside_those_of_the_training_is_told(self, factor, number):
        lines = compare({"factor_x": factor}, {"factor_x": [1.5, 4]})
        assert lines == [f"factor along x is {factor}; of the training data 1.5 to 4"][:number]

    @pytest.mark.parametrize(("modality", "number"), [("", 0), ("MR", 0), ("CT", 1)])
    def test_modality_is_told_where_it_is_another(self, modality, number):
        assert len(compare({}, {}, modality)) == number


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ranges": {"noise": 3}}', '{"ranges": {"noise": ["a", 1]}}', '{"ranges": [1]}'])
def test_what_holds_no_ranges_is_ignored_with_a_warning(text, tmp_path, caplog):
    (tmp_path / "model.json").write_text(text)
    assert read_ranges(tmp_path / "model.json") == {}
    assert "model.json: ignored, it does not contain ranges of training data" in caplog.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of an untrained network, with the ranges of two subjects beside it, measured as docs/training.md says."""
    folder = tmp_path_factory.mktemp("ranges")
    toy.write_subjects(folder / "data", 4)
    toy.save_checkpoint(folder / "models" / "model.pt", random=False)
    monai.bundle.run(
        config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "measure_ranges.json")],
        dataset_dir=str(folder / "data"),
        output_dir=str(folder),
        split=[2, 1, 1],
        **toy.TINY_OVERRIDES,
    )
    return folder


def test_ranges_are_those_of_the_training_subjects(trained):
    content = json.loads((trained / "models" / "model.json").read_text())
    found = [statistics(trained / "data" / f"sub-{n:02d}.nii.gz") for n in (1, 2)]
    assert content["volumes"] == 2
    for name, (low, high) in content["ranges"].items():
        factors = {"factor_x": (2, 2), "factor_y": (2, 2), "factor_z": (1, 1), "noise": (0, 0.02)}
        expected = factors.get(name) or sorted(f[name] for f in found)
        assert (low, high) == pytest.approx(expected, rel=1e-5)


def test_network_of_any_plane_has_one_range_of_spacings(tmp_path):
    scan = toy.write_nifti(tmp_path / "a.nii.gz", to_world=toy.affine((0.8, 0.9, 1.2)))
    volumes = [ScaleIntensityByPercentiled("image")(LoadVolumed("image")({"image": str(scan)}))]
    measure(volumes, tmp_path / "model.json", in_plane_factors=(1, 2), across_factors=(1.5, 7), largest_noise=0.05)
    ranges = read_ranges(tmp_path / "model.json")
    assert [ranges[f"spacing_{axis}"] for axis in "xyz"] == [pytest.approx([0.8, 1.2], rel=1e-5)] * 3
    assert [ranges[f"factor_{axis}"] for axis in "xyz"] == [[1, 2], [1, 2], [1.5, 7]]
    assert ranges["noise"] == [0, 0.05]


@pytest.fixture
def report(trained, tmp_path, monkeypatch):
    """``report(volume, **overrides)``: super-resolve it by 2 and return what the JSON beside the result says."""

    def run(volume, **overrides):
        given = {"checkpoint": str(trained / "models" / "model.pt"), **toy.TINY_INFERENCE, **overrides}
        monai.bundle.run(
            config_file=str(CONFIGS / "inference.json"),
            logging_file=str(CONFIGS / "logging.conf"),
            dataset_dir=str(volume),
            output_dir=str(tmp_path / "out"),
            **given,
        )
        (file,) = (tmp_path / "out").glob("*.json")
        return json.loads(file.read_text(encoding="utf-8"))

    return run


def coarse():
    """A training subject at half the resolution, as inference gets it."""
    return toy.head(seed=1)[::2, ::2], toy.affine((2, 2, 2))


def test_volume_like_the_training_data_is_not_warned_about(report, tmp_path):
    found = report(toy.write_nifti(tmp_path / "a.nii.gz", *coarse()))
    assert found["warnings"] == []
    assert found["training_ranges"]["spacing_x"] == [1, 1]


def test_far_volume_is_told_in_log_and_report(report, tmp_path, capfd):
    array = np.sqrt(np.abs(coarse()[0])) + 10 * np.random.default_rng(0).random((20, 18, 6))
    found = report(toy.write_nifti(tmp_path / "a.nii.gz", array, toy.affine((0.5, 2, 6))))
    for name in ("spacing_x", "spacing_z", "noise"):
        (line,) = (line for line in found["warnings"] if line.startswith(STATISTICS[name]))
        assert line in capfd.readouterr().out or name != "spacing_x"
    assert found["statistics"]["spacing_x"] == pytest.approx(0.25)


def test_other_modality_is_told(report, tmp_path):
    series = toy.write_dicom(tmp_path / "series", *coarse())
    for path in series.iterdir():
        ds = pydicom.dcmread(path)
        ds.Modality = "CT"
        ds.save_as(path)
    assert "modality CT: the training data are MR" in report(series)["warnings"]


def test_weights_without_ranges_are_not_compared(report, tmp_path):
    found = report(toy.write_nifti(tmp_path / "a.nii.gz", toy.head() ** 2, toy.affine((9, 9, 9))), training_ranges="")
    assert (found["warnings"], found["training_ranges"]) == ([], None)


def test_consistency_is_that_of_the_result_degraded_again(report, tmp_path):
    array = toy.head((21, 18, 3))
    found = report(toy.write_nifti(tmp_path / "a.nii.gz", array))
    scale = np.percentile(array[array > 0], 99.9)
    slices = torch.from_numpy(array).movedim(-1, 0)
    error = (downsample(upsample(slices, 2), 2) - slices) / scale
    expected = -10 * np.log10(float(error.square().mean()))
    assert found["fitting_acquisition"] in ("kspace", "bicubic", "gaussian", "box")
    assert found["consistency_db"]["result"] >= expected - 0.02  # bicubic, or what fits better
    assert found["consistency_db"]["interpolated"] >= expected - 0.02
    if found["fitting_acquisition"] == "bicubic":
        assert found["consistency_db"]["result"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("profile", ["kspace", "bicubic", "gaussian", "box"])
@pytest.mark.parametrize("factors", [(2, 2), (1.5, 2.5), (1, 1, 4)])
def test_the_acquisition_that_fits_is_found(profile, factors):
    """The truth, acquired again in the way of the scan, is the scan."""
    if len(factors) > 2 and profile in ("kspace", "bicubic"):
        pytest.skip("no slice profile")
    truth = torch.from_numpy(toy.head((43, 40, 12))).float() / 1000
    truth = truth + 0.05 * torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    scan = sampled(truth, [Sampling(factor, profile) for factor in (*factors, 1)[:3]])
    image = MetaTensor(truth[None], meta={"factor": list(factors), "filename_or_obj": "a.nii.gz"})
    found = Consistencyd(("image", "pred"))({"image": image, "pred": image, "before": scan[None]})
    assert found["acquisition"] == profile
    assert found["consistency"]["result"] > 80


@pytest.mark.parametrize(
    ("factors", "sampling"),
    [((2, 2), Sampling(profile="kspace", window="hamming")), ((2, 1), Sampling(profile="gaussian", width=1.3)),
     ((1, 1, 4), Sampling(profile="trapezoid", width=0.8))],
)  # fmt: skip
def test_the_recognized_acquisition_overrides_the_one_that_fits(factors, sampling):
    """With its width and window, the truth, acquired again, is the scan."""
    truth = torch.from_numpy(toy.head((43, 40, 12))).float() / 1000
    axes = [replace(sampling, factor=factor) if factor > 1 else Sampling() for factor in (*factors, 1)[:3]]
    scan = Acquisition(axes)(truth)
    image = MetaTensor(truth[None], meta={"factor": list(factors), "filename_or_obj": "a.nii.gz"})
    kind = {"text": "", "profile": sampling.profile, "width": sampling.width, "window": sampling.window}
    pred = MetaTensor(truth[None], meta={**image.meta, "recognized": kind})
    found = Consistencyd(("image", "pred"))({"image": image, "pred": pred, "before": scan[None]})
    assert found["acquisition"] == sampling.profile
    assert found["consistency"]["result"] > 80


def test_consistency_of_a_zero_filled_scan_is_that_of_its_acquired_samples():
    """The scanner interpolated 26 acquired samples to 38 and 32 to 48; the grid of the truth is 1.67 and 2 times finer."""
    head = torch.from_numpy(toy.head((64, 96, 6))).float() / 1000
    truth = head + 0.05 * torch.rand(head.shape, generator=torch.Generator().manual_seed(0))
    kind = {"text": "", "profile": "gaussian", "width": 1.2, "window": "none"}
    axes = [Sampling(factor, "gaussian", 1.2) for factor in (2.5, 3)]
    acquired = Acquisition([*axes, Sampling()])(truth).movedim(-1, 0)
    stored = enlarge(acquired, (1.5, 1.5), (38, 48), "kspace").movedim(0, -1)
    factors = {"factor": [2.5 / 1.5, 2.0], "acquired_factor": [2.5, 3.0]}
    image = MetaTensor(truth[None], meta={**factors, "filename_or_obj": "a.nii.gz"})
    pred = MetaTensor(truth[None], meta={**image.meta, "recognized": kind})
    assert Consistencyd(("image", "pred"))({"image": image, "pred": pred, "before": stored[None]})["consistency"]["result"] > 60
    pred.meta["recognized"] = {**kind, "width": 0.7}
    assert Consistencyd(("image", "pred"))({"image": image, "pred": pred, "before": stored[None]})["consistency"]["result"] < 50


def test_shipped_ranges_are_of_the_fifteen_training_subjects():
    content = json.loads((CONFIGS.parent / "models" / "baselines" / "proposed.json").read_text())
    assert content["volumes"] == 15
    sub_01 = CONFIGS.parents[1] / "shared" / "data" / "ds002748" / "sub-01.nii.gz"
    if not sub_01.exists():
        pytest.skip("needs ../shared/data/ds002748")
    header = nib.load(sub_01).header
    assert content["ranges"]["spacing_x"] == pytest.approx([header.get_zooms()[0]] * 2, rel=1e-4)
