"""The uncertainty map: the head, its calibration, and the map beside a result."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy
import toy_dicom
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from bundle.conditions import NEIGHBOURS, conditions
from bundle.errors import InputError, reason
from bundle.files import sha256
from bundle.grid import InPlaneFactorsd
from bundle.inferers import ForegroundInferer, OrthogonalSlices
from bundle.losses import LaplaceLoss
from bundle.metrics import head_of
from bundle.networks import FSRCNN, PixelShuffleResidualNet, WithUncertainty
from bundle.networks.uncertainty import LEVEL, Calibration
from bundle.preflight import CheckMemoryd
from bundle.uncertainty import Z, attach, calibrated_head, calibration, left_out, measured, quality

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"features": 8, "num_blocks": 1, "experts": 2}


def network(seed=0):
    torch.manual_seed(seed)
    net = PixelShuffleResidualNet(**SMALL, positions=True, facts=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return net


def randomise(head, seed=1):
    torch.manual_seed(seed)
    for parameter in head.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return head


def calibrate_at(folder, factor=1.5):
    content = {"weights": sha256(folder / "uncertainty.pt"), "factor": factor, "exponent": 1.0}
    (folder / "uncertainty.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network, its head, and a calibration."""
    folder = tmp_path_factory.mktemp("weights")
    net = network()
    torch.save(net.state_dict(), folder / "model.pt")
    torch.save(randomise(WithUncertainty(net)).state_dict(), folder / "uncertainty.pt")
    calibrate_at(folder)
    return folder


@pytest.fixture
def infer(weights, tmp_path):
    def run(scan, *overlays, output="out", **options):
        given = {"checkpoint": str(weights / "model.pt"), "device": "cpu", "precision": "float32", "uncertainty": True, **options}
        small = {f"network_def::{key}": value for key, value in SMALL.items()} if "network_def" not in options else {}
        monai.bundle.run(
            config_file=[str(CONFIGS / f"{name}.json") for name in ("inference", *overlays)], dataset_dir=str(scan),
            output_dir=str(tmp_path / output), **small, **given,
        )  # fmt: skip
        return tmp_path / output

    return run


def scan_at(path, spacing=(1, 1, 3), seed=0, shape=(43, 41, 5)):
    return toy.write_nifti(path, toy.head(shape, seed=seed), toy.affine(spacing))


class TestHead:
    @pytest.mark.parametrize("size", [(32, 28), (33, 31)])
    def test_the_result_is_that_of_the_network(self, size):
        net = network()
        x = torch.rand(2, net.channels, *size)
        expected = net(x).detach()
        both = randomise(WithUncertainty(net))(x)
        assert both.shape == (2, 2, *size)
        assert torch.equal(both[:, :1], expected)
        assert float(both[:, 1:].min()) > 0

    def test_it_takes_at_most_a_tenth_of_the_arithmetic(self):
        from torch.utils.flop_counter import FlopCounterMode

        net = PixelShuffleResidualNet(positions=True, facts=True)
        x, operations = torch.rand(1, net.channels, 64, 64), []
        for module in (net, WithUncertainty(net)):
            with FlopCounterMode(display=False) as counter:
                module(x)
            operations.append(counter.get_total_flops())
        assert operations[0] < operations[1] <= 1.1 * operations[0]

    def test_training_changes_the_head_alone_and_finds_where_errors_are_large(self):
        net = network()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        head = WithUncertainty(net)
        optimizer = torch.optim.Adam((p for p in head.parameters() if p.requires_grad), 0.01)
        torch.manual_seed(0)
        maps = conditions((2, 2), slice(0, 24), slice(0, 24), (0, 0), 0.0, torch.zeros(10))
        for _ in range(300):
            image = torch.rand(8, 1, 1, 1).expand(-1, 1, 24, 24) * (torch.arange(24) > 11)
            x = torch.cat([image, torch.zeros_like(image), *[image] * len(NEIGHBOURS), maps.expand(8, -1, -1, -1)], 1)
            with torch.no_grad():
                truth = net(x) + torch.randn_like(image) * torch.where(image > 0, 0.2, 0.02)
            optimizer.zero_grad()
            LaplaceLoss()(head(x), truth).backward()
            optimizer.step()
        deviation = head(x)[0, 1]
        assert float(deviation[8:16, 16:20].mean()) == pytest.approx(0.2, rel=0.3)
        assert float(deviation[8:16, 4:8].mean()) == pytest.approx(0.02, rel=0.5)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_its_file_holds_the_head_alone_and_fits_only_its_network(self, weights, tmp_path):
        state = torch.load(weights / "uncertainty.pt", weights_only=True)
        assert not [key for key in state if key.startswith("network.")]
        half = {name: value.half() for name, value in network().state_dict().items()}  # as weights are shipped
        torch.save({name: value.float() for name, value in half.items()}, tmp_path / "model.pt")
        head = calibrated_head(True, str(weights / "uncertainty.pt"), network())
        assert attach(network(), head, str(tmp_path / "model.pt")).calibration == Calibration(1.5, 1.0)
        torch.save(network(seed=2).state_dict(), tmp_path / "other.pt")
        with pytest.raises(InputError) as raised:
            attach(network(), head, str(tmp_path / "other.pt"))
        assert reason(raised.value).startswith(f"{weights / 'uncertainty.pt'}: this uncertainty head was trained for other weights")


class TestCalibration:
    def cell(self, scale, count=40_000, seed=0, varied=True, side=1):
        """Of a map that is right up to ``scale``, with one standard deviation in each square of ``side`` pixels."""
        random = np.random.default_rng(seed)
        deviation = torch.as_tensor(random.uniform(0.01, 0.1 if varied else 0.0101, (1, count // 100 // side, 100 // side)))
        deviation = deviation.repeat_interleave(side, 1).repeat_interleave(side, 2)
        truth = torch.full_like(deviation, 0.5)
        return measured(truth + scale * deviation * torch.as_tensor(random.standard_normal((1, count // 100, 100))), deviation, truth)

    def test_the_factor_is_that_of_the_errors_and_every_volume_counts_alike(self):
        factor, exponent = calibration([self.cell(2.0)])
        assert exponent == pytest.approx(1, abs=0.11)
        assert Calibration(factor, exponent)(0.05) == pytest.approx(0.1, rel=0.05)
        large_and_small = [self.cell(1.0, count=200_000), self.cell(3.0, count=20_000)]
        assert calibration(large_and_small).factor == pytest.approx(calibration([self.cell(1.0), self.cell(3.0)]).factor, rel=0.05)

    def test_differences_that_are_too_large_are_reduced(self):
        cell = self.cell(1.0)
        exaggerated = cell._replace(deviations=LEVEL * (cell.deviations / LEVEL) ** 2)
        factor, exponent = calibration([exaggerated])
        assert exponent == pytest.approx(0.5, abs=0.06)
        assert factor == pytest.approx(1.0, rel=0.1)
        values = Calibration(factor, exponent)
        for part in (cell.deviations < 0.04, cell.deviations > 0.07):  # also where errors are small, and where they are large
            assert np.mean(cell.errors[part] <= Z * values(exaggerated.deviations[part])) == pytest.approx(0.9, abs=0.02)

    def test_quality_of_a_map_that_knows_the_errors(self):
        rows = {"a": {"v1": self.cell(2.0), "v2": self.cell(2.0, seed=1)}}
        found = quality(rows, dict.fromkeys(("v1", "v2"), Calibration(2.0)))["a"]
        assert found["coverage"] == pytest.approx(0.9, abs=0.01)
        assert found["rank"] > 0.4
        assert found["width"] < 0.95 * found["constant"]
        assert found["neighbours"] > found["constant"]  # here, neighbours say nothing about an error
        smooth = quality({"a": {"v1": self.cell(2.0, side=10)}}, {"v1": Calibration(2.0)})["a"]
        assert found["width"] * 0.9 < smooth["neighbours"] < 0.95 * smooth["constant"]
        blind = quality({"a": {"v1": self.cell(2.0, varied=False)}}, {"v1": Calibration(2.0)})["a"]
        assert abs(blind["rank"]) < 0.05
        assert blind["width"] == pytest.approx(blind["constant"], rel=0.02)
        assert quality(rows, dict.fromkeys(("v1", "v2"), Calibration()))["all"]["coverage"] == pytest.approx(0.59, abs=0.02)

    def test_air_does_not_count_but_cavities_do(self):
        truth = torch.zeros(1, 40, 40)
        truth[:, 8:32, 8:32] = 0.5
        truth[:, 16:22, 16:22] = 0  # a cavity
        truth[:, 2, 2] = 0.4  # noise
        mask = head_of(truth)[0]
        assert bool(mask[18, 18])
        assert not bool(mask[2, 2])
        deviation = torch.where(mask, 0.1, 1e-3)[None]
        np.testing.assert_allclose(measured(truth, deviation, truth).deviations, 0.1, rtol=1e-6)

    def test_the_factor_of_a_person_comes_from_the_others(self):
        rows = {"a": {"v1": self.cell(1.0), "v2": self.cell(1.0), "v3": self.cell(4.0)}}
        factors = left_out(rows, {"v1": "one", "v2": "one", "v3": "two"})
        assert factors["v1"] == factors["v2"]
        assert factors["v1"](0.05) == pytest.approx(0.2, rel=0.05)
        assert factors["v3"](0.05) == pytest.approx(0.05, rel=0.05)
        with pytest.raises(InputError, match="at least two persons"):
            left_out(rows, dict.fromkeys(("v1", "v2", "v3"), "one"))


class TestInferers:
    def volume(self, factors, shape=(48, 44, 6)):
        return MetaTensor(torch.from_numpy(toy.head(shape)).float()[None, None] / 1000, meta={"factor": factors})

    def test_the_mean_stays_and_the_map_covers_the_anatomy(self):
        volume, net = self.volume([2.0, 2.0]), network()
        options = {"roi_size": (-1, -1), "spatial_dim": 2, "sw_batch_size": 1, "positions": True, "facts": True}
        plain = ForegroundInferer(**options)(volume, net).detach()
        both = ForegroundInferer(**options)(volume, randomise(WithUncertainty(net))).detach()
        assert torch.equal(both[:, :1].as_tensor(), plain.as_tensor())
        assert float(both[0, 1][volume[0, 0] > 0.1].min()) > 0

    def test_noise_that_is_put_back_is_in_the_map(self):
        volume, head = self.volume([2.0, 2.0]), randomise(WithUncertainty(network()))
        options = {"roi_size": (-1, -1), "spatial_dim": 2, "sw_batch_size": 1, "positions": True, "facts": True, "noise": 0.2}
        kept, restored = (ForegroundInferer(**options, denoise=d)(volume, head).detach().as_tensor()[:, 1] for d in (1.0, 0.5))
        torch.testing.assert_close(restored, (kept.square() + 0.1**2).sqrt())

    def test_two_sets_of_planes_are_a_mixture(self):
        volume, head = self.volume([1.0, 1.0, 3.0], (40, 40, 30)), randomise(WithUncertainty(network()))
        inferer = OrthogonalSlices(positions=True, facts=True)
        both = inferer(volume, head).detach().as_tensor()
        assert torch.equal(both[:, :1], inferer(volume, head.network).detach().as_tensor())
        turned = MetaTensor(volume.as_tensor().movedim(-1, 2), meta={"factor": [3.0, 1.0, 1.0]})
        one, two = (part(turned, head).detach().as_tensor().movedim(2, -1) for part in inferer.inferers)
        second_moment = ((one[:, 1] ** 2 + one[:, 0] ** 2) + (two[:, 1] ** 2 + two[:, 0] ** 2)) / 2
        torch.testing.assert_close(both[:, 1], (second_moment - both[:, 0] ** 2).clamp(min=0).sqrt(), atol=1e-3, rtol=1e-3)


class TestInference:
    @pytest.mark.parametrize("overlays", [(), ("isotropic",)])
    def test_a_map_lies_beside_the_result(self, overlays, infer, tmp_path):
        scan = toy.write_nifti(tmp_path / "scan.nii.gz", toy.head((43, 41, 9)), toy.affine((1, 1, 4), (10, 5, 3)))
        with_map, without = infer(scan, *overlays), infer(scan, *overlays, output="without", uncertainty=False)
        result, expected = (nib.load(folder / "scan_sr.nii.gz") for folder in (with_map, without))
        deviation = nib.load(with_map / "scan_sd.nii.gz")
        np.testing.assert_array_equal(result.get_fdata(), expected.get_fdata())
        assert deviation.shape == result.shape
        np.testing.assert_array_equal(deviation.affine, result.affine)
        assert not (without / "scan_sd.nii.gz").exists()
        report = json.loads((with_map / "scan_sr.json").read_text())
        assert report["uncertainty"]["factor"] == 1.5

    def test_it_has_the_units_and_the_orientation_of_the_input(self, infer, weights, tmp_path):
        head = toy.head((43, 41, 5))
        first = infer(toy.write_nifti(tmp_path / "scan.nii.gz", head, toy.affine((1, 1, 3))))
        flipped = toy.write_nifti(tmp_path / "b" / "scan.nii.gz", 10 * head[::-1], np.diag([-1.0, 1, 3, 1]))
        second = infer(flipped, output="second")
        one, two = (nib.load(folder / "scan_sd.nii.gz").get_fdata() for folder in (first, second))
        np.testing.assert_allclose(two[::-1], 10 * one, rtol=0.02, atol=0.02 * one.max())
        calibrate_at(weights, factor=3.0)
        try:
            doubled = nib.load(infer(tmp_path / "scan.nii.gz") / "scan_sd.nii.gz").get_fdata()
        finally:
            calibrate_at(weights)
        np.testing.assert_allclose(doubled, 2 * one, rtol=1e-5)  # and another calibration is noticed

    def test_a_run_that_has_the_result_but_no_map_computes_it(self, infer, tmp_path):
        folder, ranges = tmp_path / "scans", tmp_path / "ranges.json"
        ranges.write_text('{"ranges": {"factor_x": [1, 4]}}')
        for n in (1, 2):
            scan_at(folder / f"s{n}.nii.gz", seed=n)
        out = infer(folder, uncertainty=False, report=True, training_ranges=str(ranges))
        index = (out / "index.html").read_text()
        infer(folder, report=True, training_ranges=str(ranges))
        assert all((out / f"s{n}_sd.nii.gz").exists() for n in (1, 2))
        assert "Uncertainty" in (out / "s1_sr.html").read_text()
        assert (out / "index.html").read_text() == index
        times = [path.stat().st_mtime_ns for path in sorted(out.glob("*.nii.gz"))]
        infer(folder, report=True, training_ranges=str(ranges))
        assert times == [path.stat().st_mtime_ns for path in sorted(out.glob("*.nii.gz"))]
        (out / "s1_sd.nii.gz").unlink()
        infer(folder, report=True, training_ranges=str(ranges))
        assert (out / "s1_sd.nii.gz").exists()
        assert times[-1] == (out / "s2_sr.nii.gz").stat().st_mtime_ns
        infer(folder, uncertainty=False, overwrite=True)
        assert not list(out.glob("*_sd.nii.gz"))  # it would belong to another result

    def test_a_folder_with_results_does_not_take_maps_for_scans(self, infer, tmp_path):
        scan_at(tmp_path / "scans" / "s.nii.gz")
        infer(tmp_path / "scans", output="scans")
        infer(tmp_path / "scans", output="again")
        assert sorted(path.name for path in (tmp_path / "again").glob("*.nii.gz")) == ["s_sd.nii.gz", "s_sr.nii.gz"]

    def test_bids(self, infer, tmp_path):
        scan_at(tmp_path / "raw" / "sub-01" / "anat" / "sub-01_desc-x_T1w.nii.gz")
        (tmp_path / "raw" / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
        scan_at(tmp_path / "raw" / "plain.nii.gz")
        top = infer(tmp_path / "raw", bids=True)
        ignored = (top / ".bidsignore").read_text().split()
        maps = [path.name for path in top.rglob("*plain*_sd.nii.gz")]
        assert maps and all(any(fnmatch(name, pattern) for pattern in ignored) for name in maps)  # no names of BIDS
        out = top / "sub-01" / "anat"
        (deviation,) = out.glob("*sd_T1w.nii.gz")
        sidecar = json.loads(deviation.with_name(deviation.name.replace(".nii.gz", ".json")).read_text())
        assert "standard deviation" in sidecar["Description"]
        assert "SkullStripped" in sidecar

    def test_far_from_the_training_data_the_map_is_not_trusted(self, infer, weights, tmp_path):
        ranges = {"factor_x": [1, 4], "factor_y": [1, 4], "noise": [0, 0.05]}
        (tmp_path / "ranges.json").write_text(json.dumps({"ranges": ranges}))
        scan = scan_at(tmp_path / "scan.nii.gz")
        for scale, expected in ((2, False), (6, True)):
            out = infer(scan, scale=scale, training_ranges=str(tmp_path / "ranges.json"), output=f"x{scale}")
            warnings = json.loads((out / "scan_sr.json").read_text())["warnings"]
            assert ("the uncertainty map cannot be trusted: the scan is far from the training data" in warnings) is expected
        out = infer(scan, training_ranges=str(tmp_path / "missing.json"), output="not_compared")
        assert "uncertainty map may be wrong" in json.loads((out / "scan_sr.json").read_text())["warnings"][-1]

    def test_the_page_has_a_layer(self, infer, tmp_path):
        page = (infer(scan_at(tmp_path / "scan.nii.gz"), report=True) / "scan_sr.html").read_text()
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
        layer = data["layers"][-1]
        assert (layer["name"], layer["kind"]) == ("Uncertainty", "positive")
        assert "1.645" in layer["about"]
        (largest,) = re.findall(r"Uncertainty: 0 to ([0-9.]+)\.</p>", page)
        assert float(largest) == pytest.approx(data["unit"] * layer["window"][1], rel=0.01)  # in the input's units

    def test_a_dicom_series_gets_its_map_as_nifti(self, infer, tmp_path):
        out = infer(toy_dicom.series(tmp_path / "scan"), dicom=True)
        assert (out / "scan_sr_dicom").is_dir()
        result, deviation = (nib.load(out / f"scan_{kind}.nii.gz") for kind in ("sr", "sd"))
        assert deviation.shape == result.shape
        np.testing.assert_array_equal(deviation.affine, result.affine)

    def test_it_counts_in_the_estimate_of_memory(self, tmp_path):
        scan, factors = str(scan_at(tmp_path / "scan.nii.gz")), InPlaneFactorsd("image", 2)
        with_map, without = (CheckMemoryd("image", factors, uncertainty=u)._needed(scan)[0] for u in (True, False))
        assert with_map - without == pytest.approx(4 * 4 * (86 * 82 * 5))


@pytest.mark.parametrize("overlays", [(), ("isotropic",)])
def test_shipped_heads_belong_to_the_shipped_weights(overlays):
    parser = ConfigParser()
    parser.read_config([CONFIGS / f"{name}.json" for name in ("inference", *overlays)])
    path = Path(parser.get_parsed_content("uncertainty_checkpoint"))
    if not path.exists():
        pytest.skip(f"{path.relative_to(CONFIGS.parent)} is not shipped")
    net = parser.get_parsed_content("network_def")
    assert 0.3 < attach(net, calibrated_head(True, str(path), net), parser.get_parsed_content("checkpoint")).calibration.factor < 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "uncertainty.pt").unlink(), r"uncertainty\.pt: there is no uncertainty map for these weights"),
            (lambda folder: (folder / "uncertainty.json").unlink(), r"uncertainty\.json: there is no uncertainty map for these weights"),
            (lambda folder: (folder / "uncertainty.json").write_text("{}"), r"uncertainty\.json: not the calibration"),
            (
                lambda folder: (folder / "uncertainty.json").write_text('{"weights": "abc", "factor": 1, "exponent": 1}'),
                "calibrates another head",
            ),
            (lambda folder: torch.save(network(seed=3).state_dict(), folder / "model.pt"), "trained for other weights of the network"),
        ],
    )
    def test_files_that_do_not_belong_together(self, damage, message, infer, weights, tmp_path):
        folder = tmp_path / "weights"
        folder.mkdir()
        for path in weights.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        damage(folder)
        with pytest.raises(Exception) as error:
            infer(scan_at(tmp_path / "scan.nii.gz"), checkpoint=str(folder / "model.pt"))
        line = reason(error.value)
        assert re.search(message, line)
        assert "\n" not in line
        assert not list(tmp_path.glob("out/*.nii.gz"))

    @pytest.mark.parametrize("overlay", ["networks/proposed", "networks/fast", "any_factor"])
    def test_networks_that_have_no_map(self, overlay, infer, tmp_path):
        with pytest.raises(Exception) as error:
            monai.bundle.run(
                config_file=[str(CONFIGS / f"{name}.json") for name in ("inference", overlay)], device="cpu", uncertainty=True,
                dataset_dir=str(scan_at(tmp_path / "scan.nii.gz")), output_dir=str(tmp_path / "out"),
            )  # fmt: skip
        assert reason(error.value).startswith("there is no uncertainty map for this network (")

    def test_the_kind_of_network_is_named(self):
        with pytest.raises(InputError, match=r"\(FSRCNN\): only the general network has one"):
            calibrated_head(True, "x.pt", FSRCNN())
        with pytest.raises(InputError, match="uncertainty must be true or false, got 'maybe'"):
            calibrated_head("maybe", "x.pt", network())
        assert calibrated_head("false", "x.pt", FSRCNN()) is None


@pytest.mark.slow
def test_training_calibration_and_inference_as_the_page_says(tmp_path, monkeypatch):
    """The commands of docs/uncertainty.md, on toy volumes with a small network."""
    for folder, names in (("train", ("a", "b")), ("val", ("sub-1", "sub-2"))):
        for seed, name in enumerate(names):
            toy.write_nifti(tmp_path / folder / f"{name}.nii.gz", toy.head((64, 60, 50), seed=seed + len(folder)))
    torch.save(network().state_dict(), tmp_path / "model.pt")
    common = {
        "dataset_dir": str(tmp_path), "train_patterns": "train/*.nii.gz", "val_patterns": "val/*.nii.gz", "device": "cpu",
        "checkpoint": str(tmp_path / "model.pt"), "precision": "float32", **{f"network_def::{key}": value for key, value in SMALL.items()},
    }  # fmt: skip

    def run(*names, **options):
        monai.bundle.run(config_file=[str(CONFIGS / f"{name}.json") for name in names], **common, **options)

    general = ("train", "general", "datasets/scans")
    short = {"slices_per_volume": 12, "max_epochs": 1, "val_interval": 1, "warmup_iterations": 2, "patch_size": 24, "learning_rate": 0.01}
    run(*general, "random_acquisitions", "uncertainty", output_dir=str(tmp_path / "head"), **short)
    (tmp_path / "uncertainty.pt").write_bytes((tmp_path / "head" / "models" / "model.pt").read_bytes())
    measure = {"evaluated_slices": 3, "evaluated_thicknesses": []}
    with pytest.raises(Exception) as error:
        run(*general, "evaluate_acquisitions", output_dir=str(tmp_path / "early"), uncertainty=True, **measure)
    assert "uncertainty.json: there is no uncertainty map" in reason(error.value)
    run(*general, "evaluate_acquisitions", output_dir=str(tmp_path / "calibration"), calibrate=True, **measure)
    calibrated = json.loads((tmp_path / "uncertainty.json").read_text())
    assert calibrated["persons"] == 2
    run(*general, "evaluate_acquisitions", output_dir=str(tmp_path / "table"), uncertainty=True, **measure)
    table = json.loads((tmp_path / "table" / "uncertainty.json").read_text())
    assert {values["factor"] for values in table["calibrations"].values()} == {calibrated["factor"]}
    # over all acquisitions and volumes together, the factor covers what it was made for
    assert np.mean([row["coverage"] for row in table["rows"].values()]) == pytest.approx(0.9, abs=0.005)
    assert "x2: k-space truncation" in (tmp_path / "table" / "uncertainty.md").read_text()
    assert calibrated["deviations"] == Z
