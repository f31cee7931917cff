import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bundle.metrics import SliceMetric, psnr, ssim

METRICS = {"psnr": psnr, "ssim": ssim}
IMAGES = ("random", "smooth", "head")


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def truth(kind, height=40, width=33):
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    smooth = 0.5 + 0.4 * torch.sin(3 * y + 1) * torch.cos(4 * x)
    if kind == "random":
        return noise(height, width)
    if kind == "smooth":
        return smooth
    return torch.where(y**2 / 0.4 + x**2 / 0.3 < 1, smooth, 0)  # a head: most of the slice is air, exactly 0


def pair(kind):
    """Prediction and target, (1, 1, H, W); the error is largest where the image is dark, so that masks matter."""
    target = truth(kind)
    return (target + 0.4 * (noise(*target.shape, seed=1) - 0.5) * (1.2 - target))[None, None], target[None, None]


def arrays(*tensors):
    return [t.squeeze().double().numpy() for t in tensors]


def reference_ssim(prediction, target, **kwargs):
    return structural_similarity(target, prediction, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, **kwargs)


def volume(*shape, seed=0):
    """Prediction and target (1, 1, X, Y, Z) whose error grows along every axis, most of all from slice to slice."""
    target = noise(1, 1, *shape, seed=seed)
    x, y, z = (torch.linspace(0, 1, n) for n in shape)
    error = (0.01 + 0.2 * z**2 + 0.03 * y[:, None] + 0.02 * x[:, None, None]) * (noise(1, 1, *shape, seed=seed + 1) - 0.5)
    return target + error, target


def slices(name, prediction, target):
    """The metric of every axial slice, by scikit-image."""
    prediction, target = arrays(prediction, target)
    reference = reference_ssim if name == "ssim" else lambda p, t: peak_signal_noise_ratio(t, p, data_range=1)
    return [reference(prediction[..., k], target[..., k]) for k in range(target.shape[-1])]


@pytest.mark.parametrize("kind", IMAGES)
def test_psnr_equals_scikit_image(kind):
    prediction, target = pair(kind)
    p, t = arrays(prediction, target)
    assert psnr(prediction, target).item() == pytest.approx(peak_signal_noise_ratio(t, p, data_range=1), abs=1e-4)


@pytest.mark.parametrize("kind", IMAGES)
def test_psnr_is_that_of_8_bit_levels(kind):
    prediction, target = pair(kind)
    p, t = (255 * a for a in arrays(prediction, target))
    mse = sum((p[index] - t[index]) ** 2 for index in np.ndindex(*t.shape)) / t.size
    assert psnr(prediction, target).item() == pytest.approx(10 * math.log10((2**8 - 1) ** 2 / mse), abs=1e-4)


@pytest.mark.parametrize("kind", IMAGES)
def test_ssim_equals_scikit_image(kind):
    prediction, target = pair(kind)
    expected = reference_ssim(*arrays(prediction, target))
    assert expected < 0.995
    assert ssim(prediction, target).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["random", "head"])
def test_foreground_psnr_equals_a_loop_over_the_foreground(kind):
    prediction, target = pair(kind)
    p, t = arrays(prediction, target)
    errors = [(p[index] - t[index]) ** 2 for index in np.ndindex(*t.shape) if t[index] > 0.05]
    assert 0 < len(errors) < t.size
    assert psnr(prediction, target, foreground=True).item() == pytest.approx(-10 * math.log10(sum(errors) / len(errors)), abs=1e-4)


@pytest.mark.parametrize("kind", ["random", "head"])
def test_foreground_ssim_equals_a_loop_over_the_windows_centred_in_it(kind):
    prediction, target = pair(kind)
    p, t = arrays(prediction, target)
    _, similarity = reference_ssim(p, t, full=True)
    height, width = t.shape
    values = [similarity[i, j] for i in range(5, height - 5) for j in range(5, width - 5) if t[i, j] > 0.05]
    assert ssim(prediction, target, foreground=True).item() == pytest.approx(sum(values) / len(values), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_foreground_is_read_from_the_target(metric):
    prediction, target = pair("head")
    assert metric(prediction, target, True).item() != pytest.approx(metric(target, prediction, True).item(), abs=1e-4)
    assert metric(prediction, target, False).item() == pytest.approx(metric(target, prediction, False).item(), abs=1e-4)


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_each_slice_of_a_batch_has_its_own_value(metric, foreground):
    pairs = [pair(kind) for kind in IMAGES]
    predictions, targets = (torch.cat(tensors) for tensors in zip(*pairs))
    expected = torch.cat([metric(p, t, foreground) for p, t in pairs])
    assert metric(predictions, targets, foreground).shape == (3,)
    torch.testing.assert_close(metric(predictions, targets, foreground), expected)


@pytest.mark.parametrize("foreground", [False, True])
def test_equal_slices_are_perfect(foreground):
    _, target = pair("head")
    assert psnr(target, target, foreground).item() == math.inf
    assert ssim(target, target, foreground).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_slice_without_foreground_has_no_foreground_value(metric):
    air = torch.full((1, 1, 16, 16), 0.04)
    assert metric(air + 0.02, air, foreground=True).isnan().all()
    assert metric(air + 0.02, air).isfinite().all()


@pytest.mark.parametrize("size", [(10, 20), (20, 10), (10, 10)])
def test_slice_smaller_than_the_window_is_named(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        ssim(noise(1, 1, *size), noise(1, 1, *size, seed=1))


def test_slice_of_one_window_has_an_ssim():
    prediction, target = noise(1, 1, 11, 11), noise(1, 1, 11, 11, seed=1)
    assert ssim(prediction, target).item() == pytest.approx(reference_ssim(*arrays(prediction, target)), abs=1e-4)


@pytest.mark.parametrize("name", METRICS)
def test_volume_scores_the_mean_of_its_axial_slices(name):
    prediction, target = volume(13, 12, 14)
    metric = SliceMetric(name)
    values = metric(prediction, target)
    expected = slices(name, prediction, target)
    assert values.flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert metric.aggregate().item() == pytest.approx(np.mean(expected), abs=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_list_of_volumes_scores_the_mean_of_all_their_slices(name):
    pairs = [volume(13, 12, 14), volume(12, 15, 3, seed=7)]
    metric = SliceMetric(name)
    metric([p[0] for p, _ in pairs], [t[0] for _, t in pairs])
    expected = [value for p, t in pairs for value in slices(name, p, t)]
    assert metric.aggregate().item() == pytest.approx(np.mean(expected), abs=1e-3)


def test_volumes_of_several_calls_add_up_until_reset():
    pairs = [volume(12, 13, 14), volume(15, 12, 3, seed=7)]
    metric = SliceMetric("psnr")
    for p, t in pairs:
        metric(p, t)
    expected = [value for p, t in pairs for value in slices("psnr", p, t)]
    assert metric.aggregate().item() == pytest.approx(np.mean(expected), abs=1e-3)
    metric.reset()
    metric(*pairs[1])
    assert metric.aggregate().item() == pytest.approx(np.mean(slices("psnr", *pairs[1])), abs=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_meta_tensors_score_as_tensors(name):
    prediction, target = volume(13, 12, 14)
    metric = SliceMetric(name)
    metric([MetaTensor(prediction[0])], [MetaTensor(target[0])])
    assert metric.aggregate().item() == pytest.approx(np.mean(slices(name, prediction, target)), abs=1e-3)


@pytest.mark.parametrize("name, function", METRICS.items())
def test_slices_without_foreground_are_left_out(name, function):
    prediction, target = volume(13, 12, 6)
    target[..., 2], target[..., 5] = 0, 0.01
    metric = SliceMetric(name, foreground=True)
    metric(prediction, target)
    expected = [function(prediction[..., k], target[..., k], True).item() for k in (0, 1, 3, 4)]
    assert metric.aggregate().item() == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["mse", "PSNR", None])
def test_unknown_metric_is_named(name):
    with pytest.raises(ValueError, match=f"got {name!r}"):
        SliceMetric(name)
