import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates, zoom

from bundle.conditions import positions
from bundle.resampling import (
    DEGRADATIONS,
    PROFILES,
    acquire_slices,
    check_factor,
    degrade,
    degrade_slices,
    downsample,
    interpolate_slices,
    refined_size,
    upsample,
)

FACTORS = (2, 3, 4)
ANY_FACTORS = (1, *FACTORS, 1.5, 2.5, 2.718, (2, 3), (1, 2.5))
FUNCTIONS = (downsample, upsample, degrade)
every_function_and_mode = pytest.mark.parametrize(("function", "mode"), [(f, mode) for f in FUNCTIONS for mode in DEGRADATIONS])
drawn = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def noise(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def pil_resize(image, height, width):
    return np.asarray(Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC))


def ramp(height, width, axis):
    """The index along one axis: row 7 (or column 7) has the value 7."""
    index = torch.arange(height if axis == 0 else width, dtype=torch.float64)
    return index.view(-1, 1).expand(height, width) if axis == 0 else index.expand(height, width)


def ripple(factor):
    """What Keys' kernel, made wider, may do to a ramp: nothing for a whole factor, else a little to both sides in turn."""
    return 1e-4 if all(f == int(f) for f in check_factor(factor)) else 0.03


def wave(height, width, rows, columns):
    """Cosine with so many periods along the rows and the columns, and some phase."""
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    return torch.cos(2 * math.pi * (rows * y[:, None] / height + columns * x / width) + 0.7)


def blob(height, width, y, x, sigma):
    rows, columns = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2))


def centre_of_mass(image):
    height, width = image.shape
    return [(image * ramp(height, width, axis)).sum().item() / image.sum().item() for axis in (0, 1)]


def away_from_the_border(image, border):
    inner = image[..., border:-border, border:-border]
    assert inner.numel()
    return inner


@pytest.mark.parametrize("factor", FACTORS)
def test_bicubic_downsampling_equals_pil(factor):
    image = noise(48, 36, dtype=torch.float32)
    np.testing.assert_allclose(downsample(image, factor).numpy(), pil_resize(image, 48 // factor, 36 // factor), atol=2e-6)


@pytest.mark.parametrize("factor", FACTORS)
def test_bicubic_upsampling_equals_pil(factor):
    image = noise(12, 17, dtype=torch.float32)
    np.testing.assert_allclose(upsample(image, factor).numpy(), pil_resize(image, 12 * factor, 17 * factor), atol=2e-6)


@drawn
@given(st.sampled_from(ANY_FACTORS), st.integers(31, 66), st.integers(31, 66), st.sampled_from([0, 1]))
def test_bicubic_ramp_does_not_drift(factor, height, width, axis):
    image = ramp(height, width, axis)
    border = math.ceil(7 * max(check_factor(factor)) / 2)  # 3 low-resolution pixels: both kernels reach 2 of them from a centre
    torch.testing.assert_close(
        away_from_the_border(degrade(image, factor), border), away_from_the_border(image, border), atol=ripple(factor), rtol=0
    )


@drawn
@given(st.sampled_from(ANY_FACTORS), st.integers(31, 66), st.sampled_from([0, 1]))
def test_low_resolution_pixel_lies_at_the_centre_of_the_pixels_it_covers(factor, size, axis):
    low = downsample(ramp(size, size, axis), factor)
    expected = check_factor(factor)[axis] * (ramp(*low.shape, axis) + 0.5) - 0.5
    torch.testing.assert_close(away_from_the_border(low, 3), away_from_the_border(expected, 3), atol=ripple(factor), rtol=0)


@drawn
@given(st.sampled_from(ANY_FACTORS), st.sampled_from(DEGRADATIONS))
def test_constant_stays_constant(factor, mode):
    image = torch.full((2, 31, 40), 0.3, dtype=torch.float64)
    for result in (downsample(image, factor, mode), upsample(image, factor, mode), degrade(image, factor, mode)):
        torch.testing.assert_close(result, torch.full_like(result, 0.3))


@drawn
@given(st.sampled_from(ANY_FACTORS), st.integers(1, 66), st.integers(1, 66), st.sampled_from(DEGRADATIONS))
def test_shapes(factor, height, width, mode):
    image = noise(2, height, width)
    rows, columns = check_factor(factor)
    assert downsample(image, factor, mode).shape == (2, math.ceil(height / rows), math.ceil(width / columns))
    assert upsample(image, factor, mode).shape == (2, math.floor(rows * height), math.floor(columns * width))
    assert degrade(image, factor, mode).shape == image.shape


def keys(x):
    """Keys' cubic convolution kernel, a = -0.5."""
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0


def wide_keys(signal, size, step):
    """Pixel j lies at (j + 0.5) step - 0.5; where the step is long, the kernel is as much wider. Weights add up to 1."""
    result = []
    for j in range(size):
        weights = [keys((i - ((j + 0.5) * step - 0.5)) / max(1, step)) for i in range(len(signal))]
        result.append(sum(w * v for w, v in zip(weights, signal)) / sum(weights))
    return np.array(result)


def dirichlet(signal, size, step):
    """Trigonometric interpolation of a periodic signal, wave by wave, of those slower than half a period per new and old pixel."""
    length = len(signal)
    result = np.full(size, np.mean(signal))
    for k in range(1, length):
        if 2 * k / length >= min(1, 1 / step) - 1e-9:
            break
        cosine, sine = (2 / length * sum(v * f(2 * np.pi * k * i / length) for i, v in enumerate(signal)) for f in (np.cos, np.sin))
        angles = 2 * np.pi * k * ((np.arange(size) + 0.5) * step - 0.5) / length
        result += cosine * np.cos(angles) + sine * np.sin(angles)
    return result


@pytest.mark.parametrize(("mode", "definition"), [("bicubic", wide_keys), ("kspace", dirichlet)])
@pytest.mark.parametrize(("size", "factor"), [(17, 1.5), (30, 2), (17, 2.5), (30, 2.718), (17, 3.7)])
def test_any_factor_follows_the_definition(factor, size, mode, definition):
    image = noise(size, 1).expand(size, 2).contiguous()
    number = math.ceil(size / factor)
    beyond = np.full(math.ceil(number * factor) - size, image[-1, 0])  # the last pixel is covered
    low = definition([*image[:, 0].tolist(), *beyond], number, factor)
    np.testing.assert_allclose(downsample(image, (factor, 1), mode)[:, 0], low, atol=1e-6)
    np.testing.assert_allclose(degrade(image, (factor, 1), mode)[:, 0], definition(low, size, 1 / factor), atol=1e-6)
    high = definition(image[:, 0].tolist(), math.floor(size * factor), 1 / factor)
    np.testing.assert_allclose(upsample(image, (factor, 1), mode)[:, 0], high, atol=1e-6)


@pytest.mark.parametrize("mode", DEGRADATIONS)
@pytest.mark.parametrize("factor", [(2.5, 1), (2, 2), (3, 2)])
def test_single_column_is_resampled_as_one_of_many(factor, mode):
    for columns in (1, 2):
        image = noise(11, 1).expand(11, columns).contiguous()
        many = image[:, :1].expand(11, 8).contiguous()
        for function in FUNCTIONS:
            torch.testing.assert_close(function(image, factor, mode)[:, :1], function(many, factor, mode)[:, 3:4], atol=1e-6, rtol=0)


def test_axes_have_factors_of_their_own():
    image = noise(24, 30)
    for function in FUNCTIONS:
        rows_then_columns = function(function(image, (2, 1)), (1, 2.5))
        torch.testing.assert_close(function(image, [2, 2.5]), rows_then_columns, atol=1e-6, rtol=0)


@drawn
@given(st.integers(1, 300), st.sampled_from([1.5, 2.5, 2.718, 0.8680555 / 0.5, 0.86806 / 0.5]))
def test_degrading_a_refined_image_gives_as_many_pixels_as_there_were(side, factor):
    image = noise(side, 1)
    assert downsample(upsample(image, factor), factor).shape == image.shape


def test_rounded_spacing_loses_no_pixel():
    assert [refined_size(288, spacing / 0.5) for spacing in (0.8680555, 0.86806, 250 / 288)] == [500] * 3


@pytest.mark.parametrize("mode", DEGRADATIONS)
def test_degraded_image_is_the_upsampled_low_resolution_image(mode):
    image = noise(24, 36)
    torch.testing.assert_close(degrade(image, 3, mode), upsample(downsample(image, 3, mode), 3, mode))
    assert not torch.allclose(degrade(image, 3, mode), image, atol=0.1)


@every_function_and_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_slice_is_treated_alike(function, mode, dtype):
    images = noise(2, 3, 13, 10, dtype=dtype)
    result = function(images, 2, mode)
    assert result.dtype == dtype
    for n in range(2):
        for c in range(3):
            torch.testing.assert_close(result[n, c], function(images[n, c], 2, mode))
    torch.testing.assert_close(function(images[:, :, None], 2, mode), result[:, :, None])


@every_function_and_mode
def test_rows_and_columns_are_treated_alike(function, mode):
    image = noise(13, 10)
    torch.testing.assert_close(function(image.mT.contiguous(), 2, mode).mT, function(image, 2, mode))


@pytest.mark.parametrize("mode", DEGRADATIONS)
@pytest.mark.parametrize("factor", FACTORS)
def test_flipping_commutes_with_degrading(factor, mode):
    image = noise(24, 36)
    torch.testing.assert_close(degrade(image.flip(-1, -2), factor, mode).flip(-1, -2), degrade(image, factor, mode))


@every_function_and_mode
def test_factor_1_changes_nothing(function, mode):
    for size in ((12, 10), (11, 9), (12, 9)):
        torch.testing.assert_close(function(noise(*size), 1, mode), noise(*size))


@pytest.mark.parametrize("factor", FACTORS)
def test_kspace_keeps_frequencies_below_the_cut_off(factor):
    for rows, columns in ((3, 2), (0, 4), (5, 0), (5, 4)):
        image = wave(48, 36, rows, columns)
        torch.testing.assert_close(degrade(image, factor, "kspace"), image)


@pytest.mark.parametrize("factor", FACTORS)
def test_kspace_samples_a_slow_wave_at_the_low_resolution_centres(factor):
    y, x = (factor * (torch.arange(n // factor, dtype=torch.float64) + 0.5) - 0.5 for n in (48, 36))
    expected = torch.cos(2 * math.pi * (3 * y[:, None] / 48 + 2 * x / 36) + 0.7)
    torch.testing.assert_close(downsample(wave(48, 36, 3, 2), factor, "kspace"), expected)


@pytest.mark.parametrize("factor", FACTORS)
def test_kspace_removes_frequencies_above_the_cut_off(factor):
    for image in (wave(48, 36, 48 // factor // 2 + 1, 1), wave(48, 36, 1, 36 // factor // 2 + 1)):
        for result in (downsample(image, factor, "kspace"), degrade(image, factor, "kspace")):
            torch.testing.assert_close(result, torch.zeros_like(result))


@pytest.mark.parametrize("factor", FACTORS)
def test_kspace_degrades_once(factor):
    once = degrade(noise(48, 36), factor, "kspace")
    torch.testing.assert_close(degrade(once, factor, "kspace"), once)


@pytest.mark.parametrize("factor", FACTORS)
def test_kspace_keeps_the_mean(factor):
    image = noise(3, 48, 36)
    for result in (downsample(image, factor, "kspace"), upsample(image, factor, "kspace"), degrade(image, factor, "kspace")):
        torch.testing.assert_close(result.mean((-2, -1)), image.mean((-2, -1)))


@pytest.mark.parametrize("mode", DEGRADATIONS)
@pytest.mark.parametrize(("height", "width", "factor"), [(60, 72, 2), (61, 71, 3), (60, 72, 4), (61, 71, 1.5), (61, 71, 2.718)])
def test_blob_stays_where_it_is(factor, height, width, mode):
    centre = (28.3, 36.8)
    image = blob(height, width, *centre, sigma=5)
    assert centre_of_mass(degrade(image, factor, mode)) == pytest.approx(centre, abs=1e-3)
    low = [(c + 0.5) / factor - 0.5 for c in centre]
    assert centre_of_mass(downsample(image, factor, mode)) == pytest.approx(low, abs=1e-3)
    high = [(c + 0.5) * factor - 0.5 for c in centre]
    assert centre_of_mass(upsample(image, factor, mode)) == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_modes_agree_on_a_smooth_image(function):
    image = blob(60, 72, 28.3, 36.8, sigma=6)
    torch.testing.assert_close(function(image, 2, "kspace"), function(image, 2, "bicubic"), atol=0.02, rtol=0)


@pytest.mark.parametrize("factor", [0, -1, 0.9, True, "2", None, math.nan, math.inf, [2], [2, 0.5], [2, 2, 2], "22"])
def test_bad_factor_is_named(factor):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=re.escape(f"factor must be a number of at least 1, or two of them, got {factor!r}")):
            function(noise(8, 8), factor)


@pytest.mark.parametrize("mode", ["trilinear", "", None])
def test_bad_mode_is_named(mode):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=f"mode must be one of .*, got {mode!r}"):
            function(noise(8, 8), 2, mode)


def profile_weight(distance, width, profile):
    return float(abs(distance) <= width / 2) if profile == "box" else math.exp(-4 * math.log(2) * (distance / width) ** 2)


@pytest.mark.parametrize("gap", [0, 0.25])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("factor", [2, 2.5, 6])
def test_thick_slices_are_means_over_their_profile(factor, profile, gap):
    """Against sums over a hundred points in each thin slice; full width at half maximum is the thickness."""
    image = noise(30)
    points = np.repeat(image.numpy(), 100)
    places = (np.arange(len(points)) + 0.5) / 100 - 0.5
    thick = acquire_slices(image[None], factor, profile, gap)[0]
    assert len(thick) == math.ceil(30 / factor)
    for j in range(1, len(thick) - 1):
        centre = (j + 0.5) * factor - 0.5
        near = np.abs(places - centre) < 2 * factor
        if centre - 2 * factor < -0.5 or centre + 2 * factor > 29.5:
            continue  # the profile would leave the volume
        weights = np.array([profile_weight(p - centre, factor * (1 - gap), profile) for p in places[near]])
        assert float(thick[j]) == pytest.approx((weights * points[near]).sum() / weights.sum(), abs=3e-3)


@pytest.mark.parametrize("profile", PROFILES)
def test_thick_slices_stay_in_place(profile):
    line = torch.arange(60.0, dtype=torch.float64).expand(3, 60)
    for factor in (2, 2.5, 4, 5.37):
        torch.testing.assert_close(degrade_slices(line, factor, profile)[:, 18:-18], line[:, 18:-18], atol=0.2, rtol=0)
        flipped = degrade_slices(noise(2, int(factor * 10)).flip(-1), factor, profile)
        if int(factor * 10) == factor * 10:
            torch.testing.assert_close(flipped.flip(-1), degrade_slices(noise(2, int(factor * 10)), factor, profile))
    torch.testing.assert_close(acquire_slices(torch.ones(2, 31), 4.3, profile, 0.2), torch.ones(2, 8))


@pytest.mark.parametrize("order", [1, 3])
def test_interpolated_slices_are_those_of_scipy(order):
    thick = noise(3, 4, 12)
    expected = zoom(thick.numpy(), (1, 1, 4), order=order, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(interpolate_slices(thick, 4, 48, order), expected, atol=1e-6)
    expected = map_coordinates(thick[0, 0].numpy(), [(np.arange(42) + 0.5) / 3.5 - 0.5], order=order, mode="nearest")
    np.testing.assert_allclose(interpolate_slices(thick, 3.5, 42, order)[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(("arguments", "message"), [((0.5,), "factor"), ((2, "sinc"), "profile must be"), ((2, "box", 1), "gap must be")])
def test_impossible_slices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        acquire_slices(noise(3, 8), *arguments)


@pytest.mark.parametrize("factors", [(2, 4), (3, 1.73), (2.2, 1)])
def test_positions_tell_where_the_nearest_measured_pixel_changes(factors):
    """Interpolated by the nearest neighbour, two pixels differ where the place between measured pixels jumps back."""
    rows, columns = slice(5, 38), slice(2, 33)
    image = degrade(noise(40, 36), factors, interpolation="nearest")[rows, columns]
    maps = positions(factors, rows, columns)
    for axis in (0, 1):
        cosine, sine, step = maps[3 * axis : 3 * axis + 3]
        changes = torch.atan2(sine, cosine).diff(dim=axis) < 1e-5  # where an axis is not refined, every pixel is one
        torch.testing.assert_close(image.diff(dim=axis) != 0, changes)
        torch.testing.assert_close(step, torch.full_like(step, 1 / factors[axis]))
