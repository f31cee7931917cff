import numpy as np
import pytest
import toy
from monai.data import MetaTensor

from bundle.grid import Upsampled
from bundle.intensity import ClipToInputRanged, ScaleIntensityByPercentiled, find_scale

SHAPE = (64, 60, 20)


def test_hot_spots_do_not_set_the_scale():
    head = toy.head(SHAPE)
    hot = head.copy()
    hot[:4, :10, :8] = 60000
    scale = find_scale(hot)
    assert scale.scale == pytest.approx(find_scale(head).scale, rel=5e-3)
    assert scale.remarks[0].startswith("hot spots")
    assert not find_scale(head).remarks


@pytest.mark.parametrize("offset", [-300, 500, 10000])
def test_offset_is_subtracted_and_restored(offset):
    head = toy.head(SHAPE)
    scale = find_scale(head + offset)
    assert (scale.offset, scale.scale) == (offset, pytest.approx(find_scale(head).scale, rel=1e-3))
    transform = ScaleIntensityByPercentiled("image")
    image = {"image": MetaTensor(head[None] + offset)}
    np.testing.assert_allclose(transform.inverse(transform(image))["image"][0], head + offset, atol=0.01)


@pytest.mark.parametrize("change", [lambda v: v - 1000, lambda v: (v - v.mean()) / v.std(), lambda v: 2 * v / v.max() - 1])
def test_noise_in_the_air_does_not_hide_an_offset(change):
    """The network sees the same volume, whatever was subtracted and divided by."""
    head, noise = toy.head(SHAPE), np.random.default_rng(0).normal(0, 10, (2, *SHAPE))
    noisy = np.hypot(head + noise[0], noise[1]).astype(np.float32)
    changed = change(noisy)
    plain, scale = find_scale(noisy), find_scale(changed)
    assert plain.offset == 0
    seen = (changed - scale.offset) / scale.scale
    np.testing.assert_allclose(seen, noisy / plain.scale, atol=0.02)


def test_a_small_head_in_a_large_field_of_view_is_not_a_hot_spot():
    noise = np.random.default_rng(0).normal(0, 10, (2, 128, 128, 40))
    low = np.zeros((128, 128, 40))
    low[40:80, 40:80, 12:28] = toy.head((40, 40, 16))
    scale = find_scale(np.hypot(low + noise[0], noise[1]).astype(np.float32))
    assert scale.scale == pytest.approx(find_scale(toy.head((40, 40, 16))).scale, rel=0.1)
    assert not scale.remarks


@pytest.mark.parametrize("factor", [1, 2, 1.5])
def test_z_scores_on_a_background_of_zero(factor):
    """The network sees the brain as it was before, and the background stays 0."""
    head = toy.head(SHAPE) + 200.0 * (toy.head(SHAPE) > 0)
    head[:, 12:] = 0  # a small part of the volume
    inside = head > 0
    mean, deviation = head[inside].mean(), head[inside].std()
    z_scores = np.where(inside, (head - mean) / deviation, 0).astype(np.float32)
    transform = ScaleIntensityByPercentiled("image")
    affine = np.diag([1, 1.2, 3, 1])
    image = transform({"image": MetaTensor(z_scores[None], affine=affine)})["image"]
    assert "as in z-scores" in image.meta["remarks"]
    assert not image[0][~inside].any()
    seen = image[0].numpy()[inside] * image.meta["unit_intensity"] + image.meta["zero_intensity"]
    np.testing.assert_allclose(seen, z_scores[inside], atol=1e-5)
    assert float((image[0] < -0.05).float().mean()) < 1e-3
    image.meta["factor"] = [factor, factor]
    finer = transform.inverse(Upsampled("image", "nearest")({"image": image}))["image"]
    rows, columns = (np.rint((np.arange(int(n * factor)) + 0.5) / factor - 0.5 - 1e-9).astype(int) for n in SHAPE[:2])
    assert finer.shape[1:] == (len(rows), len(columns), SHAPE[2])
    outside = ~inside[rows][:, columns]
    assert not finer[0].numpy()[outside].any()
    if factor != 1.5:  # where both take the same neighbour
        np.testing.assert_allclose(finer[0], z_scores[rows][:, columns], atol=1e-5)


def test_values_below_the_air_are_said():
    signed = toy.head(SHAPE) * np.where(np.arange(SHAPE[0]) % 2, 1, -1)[:, None, None] + np.random.default_rng(0).normal(0, 5, SHAPE)
    assert "far below that of the air" in find_scale(signed.astype(np.float32)).remarks[0]


def test_noise_in_the_air_is_said():
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.8
    head = (np.where(inside, 1800 + 1200 * np.sin(3 * x) + 500 * np.cos(4 * y), 0)).astype(np.float32)
    uni = np.where(inside, head, np.random.default_rng(0).uniform(0, 4095, SHAPE)).astype(np.float32)
    scale = find_scale(uni)
    assert "noise of full strength" in scale.remarks[0]
    assert scale.scale == pytest.approx(find_scale(head).scale, rel=0.1)
    assert not find_scale(head).remarks


@pytest.mark.parametrize(("bounds", "expected"), [((0, 100), (0, 110)), ((20, 100), (0, 110)), ((-50, 100), (-55, 110))])
def test_clip_keeps_the_input_s_range(bounds, expected):
    image = MetaTensor(np.linspace(-500, 500, 64, dtype=np.float32).reshape(1, 4, 4, 4), meta={"intensity_range": list(bounds)})
    clipped = ClipToInputRanged("pred")({"pred": image})["pred"]
    assert (float(clipped.min()), float(clipped.max())) == pytest.approx(expected)
    kept = ClipToInputRanged("pred", clip="false")({"pred": image})["pred"]
    np.testing.assert_array_equal(kept, image)
    scaled = MetaTensor((image.as_tensor() - 40) / 25, meta={**image.meta, "zero_intensity": 40.0, "unit_intensity": 25.0})
    ClipToInputRanged("pred", scaled=True)({"pred": scaled})
    np.testing.assert_allclose(scaled.as_tensor() * 25 + 40, clipped.as_tensor(), atol=1e-4)
