import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from bundle.losses import PixelTVLoss, PSNRLoss, total_variation

FORMS = ("isotropic", "squared", "anisotropic")


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def loop_mse(prediction, target):
    """(17)"""
    total = 0.0
    for index in np.ndindex(*prediction.shape):
        total += (prediction[index] - target[index]) ** 2
    return total / prediction.size


def loop_tv(image, form):
    """(18), pixel by pixel."""
    total = 0.0
    for n, c, i, j in np.ndindex(*image.shape):
        dy = image[n, c, i + 1, j] - image[n, c, i, j] if i + 1 < image.shape[2] else 0.0
        dx = image[n, c, i, j + 1] - image[n, c, i, j] if j + 1 < image.shape[3] else 0.0
        total += {"isotropic": np.hypot(dx, dy), "squared": dx**2 + dy**2, "anisotropic": abs(dx) + abs(dy)}[form]
    return total / image.size


def loop_loss(prediction, target, tv_weight, form, peak):
    """(19)"""
    prediction, target = peak * prediction.double().numpy(), peak * target.double().numpy()
    return loop_mse(prediction, target) + tv_weight * loop_tv(prediction, form)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (1, 3, 3, 6), (1, 1, 1, 1), (1, 1, 1, 5), (1, 1, 5, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_total_variation_equals_a_loop_over_the_pixels(form, shape):
    image = 255 * images(*shape)
    assert total_variation(image, form).item() == pytest.approx(loop_tv(image.double().numpy(), form), rel=1e-5, abs=2e-4)


@pytest.mark.parametrize("peak", [1, 255])
@pytest.mark.parametrize("form", FORMS)
def test_loss_equals_a_loop_over_the_pixels(form, peak):
    prediction, target = images(2, 2, 4, 5), images(2, 2, 4, 5, seed=1)
    loss = PixelTVLoss(tv_weight=0.3, tv_form=form, peak=peak)(prediction, target)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loop_loss(prediction, target, 0.3, form, peak), rel=1e-5)


def test_default_is_isotropic_on_8_bit_levels_with_the_papers_weight():
    prediction, target = images(2, 1, 4, 5), images(2, 1, 4, 5, seed=1)
    assert PixelTVLoss()(prediction, target).item() == pytest.approx(loop_loss(prediction, target, 0.1, "isotropic", 255), rel=1e-5)


@pytest.mark.parametrize("peak", [1, 255])
def test_without_total_variation_the_loss_is_the_scaled_mse(peak):
    prediction, target = images(2, 1, 6, 5), images(2, 1, 6, 5, seed=1)
    expected = peak**2 * (prediction - target).square().mean().item()
    assert PixelTVLoss(tv_weight=0, peak=peak)(prediction, target).item() == pytest.approx(expected, rel=1e-5)


def test_total_variation_is_that_of_the_prediction():
    flat, rough = torch.full((1, 1, 6, 6), 0.5), images(1, 1, 6, 6)
    plain, regularised = PixelTVLoss(tv_weight=0), PixelTVLoss(tv_weight=1)
    assert (regularised(flat, rough) - plain(flat, rough)).item() == pytest.approx(0, abs=2e-3)
    assert (regularised(rough, flat) - plain(rough, flat)).item() > 10


@pytest.mark.parametrize("form", FORMS)
def test_constant_image_has_no_total_variation(form):
    assert 0 <= total_variation(torch.full((2, 1, 7, 6), 200.0), form).item() <= 1.01e-4


@pytest.mark.parametrize("form, power", [("isotropic", 1), ("squared", 2), ("anisotropic", 1)])
def test_step_edge_counts_its_height_once_per_row(form, power):
    image = torch.zeros(1, 1, 6, 8)
    image[..., 3:] = 40
    assert total_variation(image, form).item() == pytest.approx(40**power / 8, rel=1e-4)
    assert total_variation(image.mT, form).item() == pytest.approx(40**power / 8, rel=1e-4)


def test_forms_differ_at_a_corner():
    image = torch.zeros(1, 1, 2, 2)
    image[..., 0, 0] = 3.0  # dx = dy = -3 at one pixel, 0 at the other three
    found = [total_variation(image, form).item() for form in FORMS]
    assert found == pytest.approx([3 * 2**0.5 / 4, 18 / 4, 6 / 4], rel=1e-4)


@pytest.mark.parametrize("peak", [1, 255])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_constant_image_is_finite(form, peak):
    prediction = torch.full((1, 1, 5, 5), 0.5, requires_grad=True)
    PixelTVLoss(tv_form=form, peak=peak)(prediction, images(1, 1, 5, 5)).backward()
    assert prediction.grad.isfinite().all()
    assert prediction.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_descending_the_gradient_smooths(form):
    image = (255 * images(1, 1, 8, 8)).requires_grad_()
    before = total_variation(image, form)
    (gradient,) = torch.autograd.grad(before, image)
    assert total_variation(image - gradient, form) < before


def test_half_precision_prediction_is_weighed_in_single_precision():
    prediction, target = images(2, 1, 6, 6).bfloat16(), images(2, 1, 6, 6, seed=1)
    loss = PixelTVLoss()(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(PixelTVLoss()(prediction.float(), target).item())


@pytest.mark.parametrize(
    "arguments, value",
    [
        ({"tv_weight": -0.1}, "-0.1"),
        ({"tv_form": "huber"}, "'huber'"),
        ({"tv_form": None}, "None"),
        ({"peak": 0}, "0"),
        ({"peak": -255.0}, "-255.0"),
    ],
)
def test_bad_argument_is_named(arguments, value):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must .* got {value}$"):
        PixelTVLoss(**arguments)


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="got 'huber'"):
        total_variation(torch.zeros(1, 1, 3, 3), "huber")


@pytest.mark.parametrize("shape", [(1, 1, 4, 5), (2, 1, 4, 4), (4, 4)])
def test_shapes_must_agree(shape):
    with pytest.raises(ValueError, match="one shape"):
        PixelTVLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(shape))


def test_psnr_loss_is_the_mean_over_patches_of_what_scikit_image_says():
    prediction, target = images(3, 1, 8, 7), images(3, 1, 8, 7, seed=1)
    prediction[1] = target[1] + 0.01
    values = [peak_signal_noise_ratio(t.numpy(), p.numpy(), data_range=1) for p, t in zip(prediction, target)]
    assert float(PSNRLoss(floor=0)(prediction, target)) == pytest.approx(-np.mean(values), abs=1e-3)


def test_pixels_of_the_psnr_loss_have_weights():
    prediction, target, weights = images(4, 1, 8, 7), images(4, 1, 8, 7, seed=1), 1 + 9 * images(4, 1, 8, 7, seed=2)
    squares = np.square(prediction.numpy() - target.numpy()).reshape(2, -1)
    means = [np.average(square, weights=weight) for square, weight in zip(squares, weights.numpy().reshape(2, -1))]
    loss = PSNRLoss(floor=0, patches=2)
    assert float(loss(prediction, torch.cat([target, weights], 1))) == pytest.approx(10 * np.log10(means).mean(), abs=1e-4)
    torch.testing.assert_close(loss(prediction, torch.cat([target, torch.ones_like(target)], 1)), loss(prediction, target))


def test_psnr_loss_of_a_perfect_prediction_is_finite_and_has_a_gradient():
    prediction = images(2, 1, 8, 7).requires_grad_()
    loss = PSNRLoss()(prediction, prediction.detach().clone())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-60) and prediction.grad.isfinite().all()
