import json
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
import toy
from monai.data import MetaTensor
from toy import volume

from bundle.acquisition import Acquisition, Sampling
from bundle.acquisition_report import measure_acquisitions
from bundle.conditions import (
    FACTS,
    MIDDLES,
    NEIGHBOURS,
    SPECTRUM,
    conditions,
    measured_samples,
    positions,
    spectral_facts,
    with_measured_kspace,
    zero_filled_excess,
)
from bundle.errors import InputError
from bundle.inferers import OrthogonalSlices
from bundle.networks import FSRCNN, PixelShuffleResidualNet
from bundle.networks.pixel_shuffle_residual import IMAGES
from bundle.patches import AcquiredPatches, RandomAcquisition, RandomContrast, RandomLesions
from bundle.resampling import downsample, enlarge, refined_size

CONFIGS = Path(__file__).parents[1] / "configs"


class Fixed:
    """An acquisition that is always the same, in the place of a random one."""

    def __init__(self, noise=0.02):
        self.noise = noise

    def __call__(self, random):
        return Acquisition((Sampling(2, "box", 0.8), Sampling(1.5)), noise=self.noise), (0.8, 0.0), (True, False)


class TestAcquiredPatches:
    def test_items_are_a_function_of_seed_and_index(self):
        first, second = (AcquiredPatches([volume(), volume()], RandomAcquisition(), RandomContrast(), size=32, seed=3) for _ in range(2))
        for index in (0, 5, 1000):
            for a, b in zip(first[index], second[index]):
                assert torch.equal(a["image"], b["image"])
                assert torch.equal(a["label"], b["label"])
        other = AcquiredPatches([volume(), volume()], RandomAcquisition(), RandomContrast(), size=32, seed=4)
        assert not torch.equal(first[0][0]["image"], other[0][0]["image"])

    def test_the_network_is_told_what_was_done(self):
        patches = AcquiredPatches([volume()], Fixed(), size=32, patches_per_slice=5)[0]
        assert len(patches) == 5
        for patch in patches:
            assert patch["image"].shape == (IMAGES + 6 + FACTS, 32, 32)
            assert patch["label"].shape == (2, 32, 32)
            assert bool((patch["label"][1] == 1).all())  # without lesions, all pixels weigh the same
            told = patch["image"][IMAGES:, 0, 0]
            torch.testing.assert_close(told[[2, 5, 6, 7]], torch.tensor([1 / 2, 1 / 1.5, 0.8, 0.0]))
            assert 0.5 < float(told[8]) < 2  # in units of 0.02; measured
            assert bool((patch["image"][IMAGES + 6 :] == told[6:, None, None]).all())
            assert float((patch["image"][0] - patch["label"][0]).abs().mean()) < 0.1

    def test_a_blind_network_receives_the_slice_alone(self):
        told, blind = (
            AcquiredPatches([volume()], Fixed(), size=32, positions=facts, facts=facts, interpolation="bicubic")[0]
            for facts in (True, False)
        )
        for a, b in zip(told, blind, strict=True):
            assert torch.equal(a["image"][:1], b["image"])
            assert torch.equal(a["label"], b["label"])

    def test_the_slice_is_interpolated_as_in_inference(self):
        """A whole slice is what its mode makes of the samples found in it, and not what the other mode does."""
        for mode, other in (("spline", "bicubic"), ("bicubic", "spline")):
            data = AcquiredPatches([volume((40, 40, 40))], Fixed(noise=0.0), size=40, patches_per_slice=1, interpolation=mode)
            image = data[0][0]["image"][0]
            same, different = (enlarge(measured_samples(image, (2, 1.5), m), (2, 1.5), image.shape, m) for m in (mode, other))
            torch.testing.assert_close(same, image, atol=1e-4, rtol=0)
            assert float((different - image).abs().max()) > 1e-3

    def test_neighbours_are_acquired_alike(self):
        """With one contrast and no noise, the neighbours in a volume of equal slices are equal to the slice, otherwise they differ."""
        equal = volume()
        equal["image"][:] = equal["image"][..., 30:31].clone()
        for item, same in ((equal, True), (volume(), False)):
            data = AcquiredPatches([item], Fixed(noise=0.0), RandomContrast(), size=32, patches_per_slice=1)
            data.volumes = [(data.volumes[0][0], [2], data.volumes[0][2])]
            images = torch.stack([data[n][0]["image"][:IMAGES] for n in range(20)])
            differences = (images[:, 2:] - images[:, :1]).abs().amax((1, 2, 3))
            assert bool((differences < 1e-5).all()) == same
            assert 0 < int((differences > 1e-3).sum()) < 20 or same  # some have no neighbours

    def test_lesions_reach_into_the_neighbours_that_are_close(self):
        image = torch.full((1 + len(NEIGHBOURS), 48, 48), 0.5)
        lesions = RandomLesions(probability=1, count=1, sizes=(4, 5))
        for distance, reached in ((0.5, 5), (1.8, 3), (5.0, 1)):  # the slice, those beside it, those beyond
            changed = (lesions(image, np.random.default_rng(1), distance)[0] - image).abs().amax((1, 2)) > 0.02
            assert changed.tolist() == [n < reached for n in range(5)]

    @pytest.mark.parametrize("size", [2.5, 9.0])
    def test_a_lesion_weighs_the_same_whatever_its_size(self, size):
        image = torch.full((1 + len(NEIGHBOURS), 48, 48), 0.5)
        lesions = RandomLesions(probability=1, count=1, sizes=(size, size), emphasis=70)
        changed, weights = lesions(image, np.random.default_rng(1))
        assert float((weights - 1).sum()) == pytest.approx(70, rel=1e-4)
        assert bool(((weights > 2) <= ((changed[0] - image[0]).abs() > 1e-3)).all())
        assert bool((RandomLesions(probability=0)(image, np.random.default_rng(1))[1] == 1).all())

    def test_planes_across_thick_slices_are_no_truth(self):
        data = AcquiredPatches([volume((64, 60, 50), (1, 1, 4))], RandomAcquisition(), size=32)
        assert [planes for _, planes, _ in data.volumes] == [[2]]

    def test_a_volume_without_a_plane_is_refused_by_name(self):
        with pytest.raises(InputError, match=r"b\.nii\.gz: 40 x 64 x 60 voxels have no plane of 48 x 48"):
            AcquiredPatches([volume((40, 64, 60), (1, 1, 4), "b.nii.gz")], RandomAcquisition(), size=48)

    @pytest.mark.parametrize("factors", [(2, 1), (0.5, 2)])
    def test_factors_are_checked(self, factors):
        with pytest.raises(InputError, match="factor"):
            RandomAcquisition(in_plane=factors)

    def test_all_acquisitions_can_be_usual_ones(self):
        random, draw = np.random.default_rng(0), RandomAcquisition(usual=1)
        for _ in range(100):
            acquisition, _, across = draw(random)
            assert [(axis.factor, axis.coverage) for axis in acquisition.axes] == [(2, 1)] * 2 and not any(across)

    def test_contrast_keeps_the_air(self):
        random = np.random.default_rng(0)
        contrast = RandomContrast(probability=1, bias=1)
        image = torch.linspace(0, 1.2, 64).expand(3, 8, 64).contiguous()
        for _ in range(20):
            changed = contrast(image, random)
            assert float(changed[..., 0].abs().max()) < 1e-6
            assert bool(torch.isfinite(changed).all())


def test_thick_slices_lie_across_the_rows_as_in_inference():
    """In training and in inference the same axis is refined across slices, and is not zero-filled."""
    patches = AcquiredPatches([volume()], RandomAcquisition((1, 2), across=(3, 5), thick=1), size=32, patches_per_slice=1)
    seen = []
    inputs = MetaTensor(torch.rand(1, 1, 32, 34, 36), meta={"factor": [1.0, 1.0, 4.0]})
    OrthogonalSlices(positions=True, facts=True, skip_background=False)(inputs, lambda x: seen.append(x) or x[:, :1])
    for maps in (*(patches[n][0]["image"] for n in range(20)), *(x[0] for x in seen)):
        rows, columns = maps[IMAGES + 2, 0, 0], maps[IMAGES + 5, 0, 0]  # 1 / factor
        assert rows < 0.4 <= columns or columns == 1
        if columns == 1:
            assert not maps[1].any()  # nothing was zero-filled across slices


class TestConditions:
    def inputs(self, image, excess, noise, last=None):
        maps = conditions((2, 2), slice(0, 12), slice(0, 12), (0, 0), noise, torch.linspace(-2, 0, SPECTRUM))[None]
        return torch.cat([image, excess, *[image] * (len(NEIGHBOURS) - 1), image if last is None else last, maps], 1)

    def test_positions_then_facts(self):
        spectrum, kinds = torch.linspace(-1, 1, SPECTRUM), torch.rand(FACTS - 3 - SPECTRUM)
        maps = conditions((2, 3), slice(0, 5), slice(1, 7), (0.8, 0), 0.03, spectrum, kinds)
        assert maps.shape == (6 + FACTS, 5, 6)
        assert torch.equal(maps[:6], positions((2, 3), slice(0, 5), slice(1, 7)))
        torch.testing.assert_close(maps[6:, 2, 2], torch.cat([torch.tensor([0.8, 0, 1.5]), spectrum, kinds]))

    def test_facts_and_zero_filling_change_the_result_of_a_trained_network_only(self):
        network = PixelShuffleResidualNet(features=8, num_blocks=2, positions=True, facts=True)
        image, excess = torch.rand(2, 1, 1, 12, 12)
        torch.testing.assert_close(network(self.inputs(image, excess, 0)), image)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        first = network(self.inputs(image, excess, 0))
        for other in (self.inputs(image, excess, 0.05), self.inputs(image, 0 * excess, 0), self.inputs(image, excess, 0, last=0 * image)):
            assert float((network(other) - first).abs().max()) > 1e-4

    def test_weights_of_a_network_that_is_told_less_are_taken(self):
        plain = PixelShuffleResidualNet(features=8, num_blocks=2)
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        told = PixelShuffleResidualNet(features=8, num_blocks=2, positions=True, facts=True)
        told.load_state_dict(plain.state_dict())
        image, excess = torch.rand(2, 1, 1, 12, 12)
        torch.testing.assert_close(told(self.inputs(image, excess, 0.02)), plain(image))
        fewer = {**told.state_dict(), "embedding.0.weight": told.state_dict()["embedding.0.weight"][:, :5]}
        told.load_state_dict(fewer)
        assert not told.embedding[0].weight[:, 5:].any()

    def test_weights_without_experts_keep_their_results(self):
        """Those of versions up to 0.13.0."""
        options = {"features": 8, "num_blocks": 2, "positions": True, "facts": True}
        old, new = toy.random_network(PixelShuffleResidualNet(**options)), PixelShuffleResidualNet(**options, experts=3)
        new.load_state_dict(old.state_dict())
        given = self.inputs(*torch.rand(2, 1, 1, 12, 12), 0.02)
        torch.testing.assert_close(new(given), old(given))

    @pytest.mark.parametrize("experts", [0, 3])
    @torch.no_grad()
    def test_slices_of_a_batch_do_not_mix(self, experts):
        network = toy.random_network(PixelShuffleResidualNet(features=8, num_blocks=2, positions=True, facts=True, experts=experts))
        batch = torch.cat([self.inputs(*torch.rand(2, 1, 1, 12, 12), noise) for noise in (0, 0, 0.05, 0)])
        torch.testing.assert_close(network(batch), torch.cat([network(single[None]) for single in batch]))

    @torch.no_grad()
    def test_each_scan_of_a_batch_has_filters_of_its_own(self):
        network = toy.random_network(PixelShuffleResidualNet(features=8, num_blocks=2, positions=True, facts=True, experts=3))
        image, excess = torch.rand(2, 1, 1, 12, 12)
        batch = torch.cat([self.inputs(image, excess, noise) for noise in (0, 0, 0.05, 0)])
        for block in network.deep[:-1]:
            block.adaptation.weight.zero_()  # the filters alone tell the slices apart
        first, second, third, fourth = network(batch)
        torch.testing.assert_close(second, first)
        torch.testing.assert_close(fourth, first)
        assert float((third - first).abs().max()) > 1e-3

    def test_facts_need_positions(self):
        with pytest.raises(ValueError, match="facts need positions"):
            PixelShuffleResidualNet(facts=True)
        with pytest.raises(ValueError, match="experts need facts"):
            PixelShuffleResidualNet(positions=True, experts=4)


class TestSpectralFacts:
    @pytest.mark.parametrize("noise", [0.005, 0.02, 0.05])
    @pytest.mark.parametrize("cut", [False, True])
    def test_noise_is_found(self, noise, cut):
        """Also where the air was set to 0 afterwards."""
        random = np.random.default_rng(0)
        head = torch.from_numpy(toy.head((96, 90, 12))).float().movedim(-1, 0)
        head = torch.nn.functional.avg_pool2d(head[:, None] / head.max(), 5, 1, 2)[:, 0]
        noisy = Acquisition((Sampling(), Sampling()), noise)(head, random)
        noisy = torch.where(head > 0.05, noisy, 0) if cut else noisy
        assert spectral_facts(noisy)[0] == pytest.approx(noise, rel=0.35, abs=0.001)

    def test_a_point_spread_lowers_the_end_of_the_spectrum_along_its_axis(self):
        random = torch.Generator().manual_seed(0)
        image = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 128, 120, generator=random), 3, 1, 1)[0]
        sharp, blurred = (Acquisition((Sampling(2, "kspace"), Sampling(2, p, 1)))(image) for p in ("kspace", "gaussian"))
        change = spectral_facts(blurred)[1] - spectral_facts(sharp)[1]
        assert float(change[:5].abs().max()) < 0.1
        assert float(change[-1]) < -0.3

    @pytest.mark.parametrize("shape", [(3, 40, 40), (1, 1, 1), (2, 5, 300)])
    def test_air_and_tiny_slices_have_finite_facts(self, shape):
        for image in (torch.zeros(shape), torch.rand(shape)):
            noise, spectrum = spectral_facts(image)
            assert np.isfinite(noise)
            assert spectrum.shape == (SPECTRUM,)
            assert bool(torch.isfinite(spectrum).all())


@pytest.mark.parametrize("mode", ["spline", "bicubic"])
@pytest.mark.parametrize("factors", [(2, 2), (1.7, 3), (1, 2.5)])
def test_measured_samples_are_found_again_and_zero_filled(mode, factors):
    image = torch.rand(2, 31, 40)
    size = [refined_size(side, factor) for side, factor in zip(image.shape[1:], factors)]
    enlarged = enlarge(image, factors, size, mode)
    torch.testing.assert_close(measured_samples(enlarged, factors, mode), image, atol=1e-4, rtol=0)
    filled = enlarged + zero_filled_excess(enlarged, factors, mode=mode)
    torch.testing.assert_close(filled, enlarge(image, factors, size, "kspace"), atol=1e-4, rtol=0)
    part = slice(3, 20), slice(5, 9)
    torch.testing.assert_close(zero_filled_excess(enlarged, factors, (False, False), mode, *part), (filled - enlarged)[:, *part])
    assert not zero_filled_excess(enlarged, factors, (True, True), mode).any()


@pytest.mark.parametrize("factors", [(2, 2), (1.5, 3)])
def test_measured_kspace_is_put_back(factors):
    measured, result = torch.rand(2, 31, 39), None
    size = [refined_size(side, factor) for side, factor in zip(measured.shape[1:], factors)]
    interpolated, result = enlarge(measured, factors, size, "spline"), torch.rand(2, *size)
    whole = with_measured_kspace(result, interpolated, factors)
    beyond = [f - enlarge(downsample(f, factors, "kspace"), factors, size, "kspace") for f in (whole, result)]
    if factors == (2, 2):  # elsewhere the last pixel is not covered as a whole
        torch.testing.assert_close(downsample(whole, factors, "kspace"), measured, atol=1e-4, rtol=0)
        torch.testing.assert_close(*beyond, atol=1e-4, rtol=0)
    half = with_measured_kspace(result, interpolated, factors, 0.5)
    torch.testing.assert_close(half, (whole + result) / 2, atol=1e-4, rtol=0)


class TestReport:
    def test_interpolation_gains_nothing_over_itself(self, tmp_path):
        network = PixelShuffleResidualNet(features=4, num_blocks=1, positions=True, facts=True)
        table = measure_acquisitions([volume()], network, str(tmp_path), slices=3)
        assert {row.split(":")[0] for row in table} == {"x2", "5 mm"}
        for row, volumes in table.items():
            values = volumes["a.nii.gz"]
            assert values["psnr"] == pytest.approx(values["spline"], abs=0.1), row
            assert values["gain"] <= 0.1
        text = (tmp_path / "acquisitions.md").read_text()
        assert "| x2: k-space truncation | 1 |" in text
        assert (tmp_path / "acquisitions.json").is_file()

    def test_noise_in_the_air_does_not_count(self, tmp_path):
        """A network that removes the noise around the head would otherwise make errors at its brightest voxels."""
        head = torch.zeros(1, 60, 60, 9)
        head[:, 12:48, 12:48] = 0.5
        noise = 0.08 * (torch.rand(head.shape, generator=torch.Generator().manual_seed(0)) > 0.7) * (head == 0)

        class Denoised(torch.nn.Module):
            def forward(self, x):
                return x[:, :1] * (x[:, :1] > 0.25)

        networks = {"plain": PixelShuffleResidualNet(features=4, num_blocks=1, positions=True, facts=True), "denoised": Denoised()}
        psnr = {}
        for name, network in networks.items():
            table = measure_acquisitions([{"image": MetaTensor(head + noise)}], network, str(tmp_path), thicknesses=(), slices=3)
            psnr[name] = table["x2: bicubic (the paper's)"]["volume"]["psnr"]
        assert psnr["denoised"] > psnr["plain"] - 0.5

    def test_an_evaluated_slice_stands_between_its_neighbours(self, tmp_path):
        """The slices of this volume differ by one step, so the network sees which ones it gets."""
        image, step, seen = torch.zeros(1, 40, 40, 21), 1 / 25, []
        image[:, 8:32, 8:32] = step * torch.arange(2, 23)

        class Steps(torch.nn.Module):
            def forward(self, x):
                seen.append((x[:, 2:IMAGES] - x[:, :1])[0, :, 20, 20] / step)
                return x[:, :1]

        measure_acquisitions([{"image": MetaTensor(image)}], Steps(), str(tmp_path), thicknesses=(), slices=3)
        first, middle, last = seen[:15][MIDDLES]  # of the first row, bicubic; the others are their neighbours
        for found, expected in ((first, [0, 1, 0, 2]), (middle, [-1, 1, -2, 2]), (last, [-1, 0, -2, 0])):
            assert found.tolist() == pytest.approx(expected, abs=0.1)

    def test_thick_slices_only_of_thin_ones(self, tmp_path):
        network = PixelShuffleResidualNet(features=4, num_blocks=1, positions=True, facts=True)
        table = measure_acquisitions([volume((64, 60, 50), (1, 1, 4))], network, str(tmp_path), slices=2)
        assert not any("mm" in row for row in table)


def test_enlarged_to_the_size_that_it_had():
    image = torch.rand(33, 41)
    coarse = Acquisition((Sampling(2), Sampling(2.5)))(image)
    for mode in ("spline", "bicubic", "kspace"):
        assert enlarge(coarse, (2, 2.5), image.shape, mode).shape == image.shape


def test_general_network_is_trained_and_measured(tmp_path):
    """As the page says it, on toy volumes: random acquisitions in training, the table afterwards."""
    data = tmp_path / "data"
    (data / "ds002748").mkdir(parents=True)
    for name in ("sub-01", "sub-16"):
        toy.write_nifti(data / "ds002748" / f"{name}.nii.gz", toy.head((52, 56, 50)), toy.affine((1, 1, 1)))
    files = ["train", "general", "datasets/scans", "random_acquisitions"]
    common = {"dataset_dir": str(data), "test_volumes": [], "device": "cpu", "network_def::features": 4, "network_def::num_blocks": 1}
    monai.bundle.run(
        config_file=[str(CONFIGS / f"{name}.json") for name in files],
        output_dir=str(tmp_path / "run"),
        slices_per_volume=4,
        patches_per_slice=2,
        patch_size=32,
        max_epochs=1,
        warmup_iterations=1,
        **common,
    )
    files[-1] = "evaluate_acquisitions"
    monai.bundle.run(
        config_file=[str(CONFIGS / f"{name}.json") for name in files],
        output_dir=str(tmp_path / "table"),
        checkpoint=str(tmp_path / "run" / "models" / "model.pt"),
        evaluated_slices=2,
        **common,
    )
    rows = json.loads((tmp_path / "table" / "acquisitions.json").read_text())["rows"]
    assert len(rows) == 13
    assert all(np.isfinite(v["psnr"]) for volumes in rows.values() for v in volumes.values())


def test_a_compared_network_is_trained_on_random_acquisitions(tmp_path):
    (tmp_path / "data" / "ds002748").mkdir(parents=True)
    for name in ("sub-01", "sub-16"):
        toy.write_nifti(tmp_path / "data" / "ds002748" / f"{name}.nii.gz", toy.head((52, 56, 50)), toy.affine((1, 1, 1)))
    options = {"patches_per_slice": 2, "slices_per_volume": 4, "patch_size": 32, "max_epochs": 1, "warmup_iterations": 1}
    monai.bundle.run(
        config_file=[str(CONFIGS / f"{name}.json") for name in ("train", "networks/fsrcnn", "datasets/scans", "random_acquisitions")],
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "run"),
        test_volumes=[],
        device="cpu",
        **options,
    )
    trained = torch.load(tmp_path / "run" / "models" / "model.pt", weights_only=True)
    FSRCNN().load_state_dict(trained)
    assert all(bool(value.isfinite().all()) for value in trained.values())
