import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, convolve1d
from scipy.stats import rice

from bundle.acquisition import PROFILES, WINDOWS, Acquisition, Sampling, acquired_fraction, kspace_filter, sampling_matrix
from bundle.errors import InputError
from bundle.resampling import acquire_slices, downsample, upsample


def smooth(*shape):
    image = np.random.default_rng(0).random(shape)
    for axis in range(len(shape)):
        image = convolve1d(image, np.hanning(11) / np.hanning(11).sum(), axis)
    return torch.from_numpy(image).float()


class TestSampling:
    @pytest.mark.parametrize("profile", PROFILES)
    @pytest.mark.parametrize(("factor", "size"), [(1.5, 40), (2, 41), (3.7, 64)])
    def test_a_constant_stays_one(self, profile, factor, size):
        matrix = sampling_matrix(size, Sampling(factor, profile, 0.8))
        assert matrix.shape == (-(-size // factor) if factor == 2 else np.ceil(size / factor), size)
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("profile", ["gaussian", "box", "trapezoid"])
    def test_a_line_is_measured_at_the_centres(self, profile):
        """Geometry: a straight line has its value at index (i + 0.5) factor - 0.5, whatever the symmetric profile."""
        measured = sampling_matrix(60, Sampling(2.5, profile, 0.7)) @ torch.arange(60.0)
        expected = (torch.arange(24) + 0.5) * 2.5 - 0.5
        torch.testing.assert_close(measured[2:-2], expected[2:-2], atol=0.05, rtol=0)  # voxels are piecewise constant

    @pytest.mark.parametrize("profile", ["gaussian", "box"])
    def test_profiles_are_those_of_thick_slices(self, profile):
        image = torch.rand(5, 33)
        torch.testing.assert_close(image @ sampling_matrix(33, Sampling(2.5, profile, 0.8)).T, acquire_slices(image, 2.5, profile, 0.2))

    @pytest.mark.parametrize("profile", ["bicubic", "kspace"])
    def test_kernels_are_those_of_the_degradation(self, profile):
        image = torch.rand(30, 33)
        acquired = Acquisition((Sampling(2, profile), Sampling(2.5, profile)))(image)
        torch.testing.assert_close(acquired, downsample(image, (2, 2.5), profile).abs(), atol=1e-5, rtol=0)

    def test_trapezoid_is_one_ramp_convolved_with_a_box(self):
        """A trapezoid is a box convolved with the box of its slope: here both sampled a hundred times finer."""
        fine, factor = 100, 6
        box, slope = np.ones(fine * factor), np.ones(round(0.3 * fine * factor))
        expected = np.convolve(box, slope)
        row = sampling_matrix(42, Sampling(factor, "trapezoid"))[3].numpy()
        centred = np.zeros(42 * fine)
        centre = round((3.5 * factor) * fine)  # borders of the high-resolution samples count from 0
        start = centre - len(expected) // 2
        centred[start : start + len(expected)] = expected / expected.sum()
        np.testing.assert_allclose(row, centred.reshape(42, fine).sum(1), atol=2e-3)

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"factor": 0.5}, "0.5"),
            ({"profile": "sinc"}, "sinc"),
            ({"width": 0}, "width"),
            ({"coverage": 1.2}, "1.2"),
            ({"window": "hann"}, "hann"),
        ],
    )
    def test_what_is_no_sampling_is_refused(self, given, named):
        with pytest.raises(InputError, match=named):
            Sampling(**given)


class TestKspace:
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("size", [32, 33])
    def test_filter_scales_waves(self, window, size):
        """A wave comes out as itself times the window at its frequency, and 0 beyond the coverage."""
        k, coverage = 5, 0.8
        place = 2 * k / size / coverage
        gain = {"none": 1, "hamming": 0.54 + 0.46 * np.cos(np.pi * place), "tukey": 0.5 + 0.5 * np.cos(np.pi * max(0, place - 0.5) / 0.5)}
        wave = torch.cos(2 * torch.pi * k * torch.arange(size) / size)
        torch.testing.assert_close(kspace_filter(size, coverage, window) @ wave, gain[window] * wave, atol=1e-5, rtol=0)
        assert float((kspace_filter(size, 0.2, window) @ wave).abs().max()) < 1e-5

    def test_what_was_acquired_is_found(self):
        """A grid that was filled with zeros is told from one that was not."""
        random = np.random.default_rng(0)
        image = smooth(64, 96) + 0.01 * torch.from_numpy(random.standard_normal((64, 96))).float()
        assert [acquired_fraction(image, axis) for axis in (0, 1)] == [1, 1]
        filled = upsample(image, (1, 1.5), "kspace")
        assert acquired_fraction(filled, 0) == 1
        assert acquired_fraction(filled, 1) == pytest.approx(1 / 1.5, abs=0.04)

    def test_repeated_edges_are_not_taken_for_zero_filling(self):
        """Their spectrum has gaps, but rises again."""
        blocks = torch.zeros(64, 72)
        for start in range(8, 64, 12):
            blocks[8:56, start : start + 6] = 1
        assert acquired_fraction(blocks, 1) == 1


class TestAcquisition:
    def test_noise_is_rician(self):
        """The magnitude's mean and deviation are those of SciPy's Rice distribution, in the air and in tissue."""
        for level in (0.0, 0.03, 0.5):
            scan = Acquisition((Sampling(), Sampling()), noise=0.02)(torch.full((300, 300), level), np.random.default_rng(0))
            expected = rice(level / 0.02, scale=0.02)
            assert float(scan.mean()) == pytest.approx(expected.mean(), rel=0.01)
            assert float(scan.std()) == pytest.approx(expected.std(), rel=0.02)

    def test_whole_numbers(self):
        scan = Acquisition((Sampling(2), Sampling(2)), noise=0.02, step=0.01)(torch.rand(20, 20), np.random.default_rng(0))
        torch.testing.assert_close(scan, (scan * 100).round() / 100)
        assert float(scan.min()) >= 0

    def test_brightness_alternates(self):
        axes = (Sampling(), Sampling(), Sampling(4, "gaussian"))
        steps = []
        for seed in range(5):
            scan = Acquisition(axes, brightness=0.05)(torch.ones(3, 3, 40), np.random.default_rng(seed))
            assert scan.shape == (3, 3, 10)
            assert 0 < float((scan - 1).abs().max()) <= 0.05
            assert float(scan.std((0, 1)).max()) < 1e-6
            steps.append(abs(float(scan[0, 0, 0::2].mean() - scan[0, 0, 1::2].mean())))
        assert max(steps) > 0.02

    def test_a_seed_makes_one_scan(self):
        scan = Acquisition((Sampling(2), Sampling(2)), noise=0.02)
        image = torch.rand(20, 20)
        first, second, other = (scan(image, np.random.default_rng(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_nothing_done_is_the_image(self):
        image = torch.rand(9, 8)
        assert torch.equal(Acquisition((Sampling(), Sampling()))(image), image)


def test_splines_refine_as_scipy_does():
    image = smooth(12, 15)
    refined = upsample(image, (2, 1.5), "spline")
    expected = affine_transform(image.numpy(), [1 / 2, 1 / 1.5], [-0.25, 0.5 / 1.5 - 0.5], (24, 22), order=3, mode="nearest")
    np.testing.assert_allclose(refined.numpy()[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-4)
