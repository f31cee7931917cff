"""Inference where there is anatomy, against inference of whole slices."""

from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from monai.data import MetaTensor
from monai.inferers import SliceInferer
from torch import nn
from torch.nn import functional as F

from bundle.conditions import FACTS, positions
from bundle.errors import InputError
from bundle.inferers import AutocastInferer, ForegroundInferer, OrthogonalSlices, foreground_box
from bundle.networks import RCAN, MultiScaleResidualNet, PixelShuffleResidualNet, WithUncertainty, use_fft_convolutions
from bundle.networks.pixel_shuffle_residual import IMAGES
from bundle.resampling import downsample, enlarge

CONFIG = str(Path(__file__).parents[1] / "configs" / "inference.json")
WHOLE = {"roi_size": (-1, -1), "spatial_dim": 2}


def volume(shape=(57, 70, 4), empty=(0,)):
    """Anatomy off the centre of the slices, on zeros; the slices ``empty`` hold none: (1, 1, X, Y, Z)."""
    array = np.zeros(shape, np.float32)
    x, y = shape[0] // 2, shape[1] // 3
    array[5 : 5 + x, shape[1] - y - 9 : shape[1] - 9] = toy.head((x, y, shape[2]), peak=1)
    array[..., list(empty)] = 0
    return torch.from_numpy(array)[None, None]


class Unshuffled(nn.Module):
    """A network on a grid coarser by 4, of any slice: what does not fill a block is filled up."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.PixelShuffle(4))

    def forward(self, x):
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
        return x + self.layers(padded)[..., :height, :width]


def results(network, inputs, **arguments):
    """Of the whole slices, and of the boxes around the anatomy."""
    with torch.no_grad():
        return SliceInferer(**WHOLE)(inputs, network), ForegroundInferer(**WHOLE, **arguments)(inputs, network)


NETWORKS = {
    "multi-scale": (lambda: MultiScaleResidualNet(**toy.TINY), 8),  # reaches 8 pixels
    "unshuffled by 4": (Unshuffled, 8),  # 4 to 7
}


@pytest.mark.parametrize("shape", [(57, 70, 4), (64, 64, 3), (41, 90, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_anatomy_is_as_in_whole_slices(name, shape):
    make, margin = NETWORKS[name]
    inputs, network = volume(shape), toy.random_network(make())
    whole, boxes = results(network, inputs, margin=margin)
    anatomy = inputs > 0.1
    assert anatomy.any()
    assert (whole - inputs)[anatomy].abs().max() > 1e-3  # the network does something
    torch.testing.assert_close(boxes[anatomy], whole[anatomy], rtol=0, atol=1e-6)


def test_only_the_box_around_the_anatomy_is_computed():
    seen = []

    def network(x):
        seen.append(tuple(x.shape))
        return x + 1

    inputs = torch.zeros(1, 1, 60, 61, 5)
    inputs[..., 20:30, 40:61, 1] = 0.5
    inputs[..., 1, 1, 3] = 0.6  # a block of 4 x 4 then has a mean of 0.04
    inputs[..., 30, 30, 4] = 0.3  # a speck of noise
    outputs = ForegroundInferer(**WHOLE, margin=8)(inputs, network)
    assert seen == [(1, 1, 28, 29), (1, 1, 12, 12)]
    changed = outputs - inputs
    assert changed[..., 12:40, 32:61, 1].min() == 1
    assert changed[..., :12, :12, 3].min() == 1
    assert changed.sum() == 28 * 29 + 12 * 12


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_large_slices_are_computed_in_bands(name, axis, monkeypatch):
    monkeypatch.setattr("bundle.inferers.MAX_PIXELS", 500)
    make, margin = NETWORKS[name]
    inputs, network, seen = volume((90, 41, 2), empty=()), toy.random_network(make()), []
    whole = SliceInferer(**WHOLE)(inputs, network).movedim(-1, axis + 2)

    def counted(x):
        seen.append(x.shape[2:])
        return network(x)

    result = ForegroundInferer(roi_size=(-1, -1), spatial_dim=axis, margin=margin)(inputs.movedim(-1, axis + 2), counted)
    anatomy = inputs.movedim(-1, axis + 2) > 0.1
    torch.testing.assert_close(result[anatomy], whole[anatomy], rtol=0, atol=1e-6)
    assert len(seen) == 2 * 2
    assert max(rows for rows, _ in seen) <= 500 / min(columns for _, columns in seen) + 4 + 2 * margin


def test_empty_slices_are_not_computed_and_noise_is_kept():
    inputs = 0.02 * torch.rand(1, 1, 33, 34, 3)
    outputs = ForegroundInferer(**WHOLE)(inputs, lambda x: pytest.fail("no anatomy, nothing to compute"))
    assert torch.equal(outputs, inputs)
    assert outputs is not inputs


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 7, 1), (3, 2, 2), (5, 4, 1), (2, 33, 1)])
def test_tiny_images(shape):
    whole, boxes = results(toy.random_network(MultiScaleResidualNet(**toy.TINY)), torch.rand(1, 1, *shape) + 0.1)
    torch.testing.assert_close(boxes, whole)


def test_receptive_field_may_be_larger_than_the_image():
    network = toy.random_network(RCAN(features=8, num_groups=2, num_blocks=2, reduction=4))  # sees all of it: averages over the image
    inputs = volume((20, 19, 2), empty=()) + 0.1
    whole, boxes = results(network, inputs)
    torch.testing.assert_close(boxes, whole)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_may_lie_along_any_axis(axis):
    inputs, network = volume().movedim(-1, axis + 2), toy.random_network(MultiScaleResidualNet(**toy.TINY))
    result = ForegroundInferer(roi_size=(-1, -1), spatial_dim=axis)(inputs, network)
    expected = ForegroundInferer(**WHOLE)(volume(), network).movedim(-1, axis + 2)
    assert torch.equal(result, expected)


def test_batches_share_the_boxes():
    inputs, network = torch.cat([volume(), volume(empty=(0, 1)).flip(2)]), toy.random_network(MultiScaleResidualNet(**toy.TINY))
    whole, boxes = results(network, inputs)
    anatomy = inputs > 0.1
    torch.testing.assert_close(boxes[anatomy], whole[anatomy], rtol=0, atol=1e-6)


def test_tiles_of_one_size_within_the_boxes():
    sizes = set()

    def engine(x):
        sizes.add(tuple(x.shape[-2:]))
        return x * 2

    inputs = volume()
    outputs = ForegroundInferer(roi_size=(16, 16), spatial_dim=2, sw_batch_size=3, mode="gaussian")(inputs, engine)
    assert sizes == {(16, 16)}
    torch.testing.assert_close(outputs[inputs > 0.1], 2 * inputs[inputs > 0.1])


def test_meta_data_stay():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    outputs = ForegroundInferer(**WHOLE)(MetaTensor(volume(), affine=affine), lambda x: x)
    assert isinstance(outputs, MetaTensor)
    assert torch.equal(outputs.affine.float(), affine)


def test_half_precision_of_the_network_stays_inside_it():
    outputs = ForegroundInferer(**WHOLE)(volume(), lambda x: x.bfloat16())
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize("skip_background", [False, "false", "False"])
def test_switched_off_it_computes_every_pixel(skip_background):
    inputs = volume()
    outputs = ForegroundInferer(skip_background, **WHOLE)(inputs, lambda x: x + 1)
    assert torch.equal(outputs, inputs + 1)


def test_progress_counts_slices_with_anatomy(capfd):
    image = volume()
    filled = int(image.amax((0, 1, 2, 3)).gt(0.1).sum())
    ForegroundInferer(**WHOLE, progress=True)(image, lambda x: x)
    assert filled == 3 and "3/3" in capfd.readouterr().err


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_network_with_facts_sees_the_neighbouring_slices(axis):
    """Beyond the ends of the volume, the last slice is repeated."""
    image = MetaTensor(torch.rand(1, 1, 9, 9, 9), meta={"factor": [2.0, 2.0, 2.0]})
    planes, seen = image.as_tensor()[0, 0].movedim(axis, 0), []
    inferer = ForegroundInferer(roi_size=(-1, -1), spatial_dim=axis, skip_background=False, positions=True, facts=True)
    inferer(image, lambda x: seen.append(x[0, :6]) or x[:, :1])
    assert len(seen) == 9
    for n, (own, excess, *neighbours) in enumerate(seen):
        assert torch.equal(own, planes[n]) and not torch.equal(excess, own)
        for neighbour, place in zip(neighbours, (n - 1, n + 1, n - 2, n + 2), strict=True):
            assert torch.equal(neighbour, planes[min(max(place, 0), 8)])


@pytest.mark.parametrize("factors, folds", [((2.0, 2.0), True), ((1.0, 2.0), True), ((2.0, 1.5), False)])
@pytest.mark.parametrize("kind", [PixelShuffleResidualNet, WithUncertainty])
def test_folded_conditions_change_nothing(factors, folds, kind, monkeypatch):
    """At factors of 1 and 2, positions and facts go into the weights. The result is that of a network that receives them as maps."""
    network = toy.random_network(PixelShuffleResidualNet(features=8, num_blocks=2, positions=True, facts=True, experts=3))
    network = toy.random_network(WithUncertainty(network)) if kind is WithUncertainty else network
    image = MetaTensor(volume((38, 33, 5)), meta={"factor": list(factors), "slice_width": 1.0})
    inferer = ForegroundInferer(**WHOLE, positions=True, facts=True)
    channels = set()
    network.register_forward_hook(lambda _, inputs, result: channels.add(inputs[0].shape[1]))
    with torch.no_grad():
        given = inferer(image, network)
        assert (IMAGES + 6 + FACTS in channels) != folds
        monkeypatch.delattr(kind, "folded")
        expected = inferer(image, network)
    assert IMAGES + 6 + FACTS in channels and float((expected - image).abs().max()) > 0.1
    torch.testing.assert_close(given.as_tensor(), expected.as_tensor(), atol=1e-4, rtol=1e-4)


def test_impossible_arguments_are_refused():
    with pytest.raises(InputError, match="skip_background must be true or false, got 'perhaps'"):
        ForegroundInferer("perhaps", **WHOLE)
    with pytest.raises(ValueError, match="-1"):
        ForegroundInferer(**WHOLE, margin=-1)
    with pytest.raises(ValueError, match=r"-0\.5"):
        ForegroundInferer(**WHOLE, threshold=-0.5)


def test_box_follows_the_anatomy():
    image = volume()[..., 1]
    rows, columns = foreground_box(image, 0.03, 0)
    inside = torch.zeros_like(image, dtype=torch.bool)
    inside[:, :, rows, columns] = True
    assert inside[image > 0.5].all()
    assert rows.start % 4 == columns.start % 4 == 0
    assert float(inside.float().mean()) < 0.35


def test_a_volume_is_super_resolved_as_without_skipping(tmp_path, monkeypatch):
    array = volume((40, 37, 5), empty=(0, 4))[0, 0].numpy() * 1000
    scan = toy.write_nifti(tmp_path / "scan.nii.gz", array)
    weights = toy.save_checkpoint(tmp_path / "tiny.pt")
    found = {}
    for way in ("true", "false"):
        monai.bundle.run(
            config_file=CONFIG, dataset_dir=str(scan), output_dir=str(tmp_path / way), checkpoint=str(weights),
            device="$torch.device('cpu')", skip_background=way, **toy.TINY_INFERENCE,
        )  # fmt: skip
        found[way] = nib.load(tmp_path / way / "scan_sr.nii.gz").get_fdata()
    anatomy = np.kron(array > 100, np.ones((2, 2, 1))) > 0
    np.testing.assert_allclose(found["true"][anatomy], found["false"][anatomy], atol=0.01)
    assert np.abs(found["true"] - found["false"]).max() > 0.01  # what the network makes of the background
    assert not found["true"][..., [0, 4]].any()


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_the_scan_s_own_noise_is_kept_on_request(skip, positions):
    """Whatever the network does, k-space truncation of the result gives the measured samples; in between, a mixture."""
    scan = torch.rand(1, 1, 31, 35, 3)
    size = [62, 70]
    image = enlarge(scan[0, 0].movedim(-1, 0), (2, 2), size, "spline").movedim(0, -1)[None, None]
    inputs = MetaTensor(image, meta={"factor": [2.0, 2.0]})
    inferers = [ForegroundInferer(**WHOLE, skip_background=skip, positions=positions, denoise=d) for d in (1, 0.5, 0)]
    results = [inferer(inputs, lambda x: 0.5 * x[:, :1]) for inferer in inferers]
    every, half, none = (torch.as_tensor(r)[0, 0].movedim(-1, 0) for r in results)
    torch.testing.assert_close(downsample(none, (2, 2), "kspace"), scan[0, 0].movedim(-1, 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(half, (every + none) / 2, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="with thick slices it must be 1"):
        OrthogonalSlices(denoise=0.5)


@pytest.mark.parametrize("part", range(6))
def test_the_network_is_told_the_positions_of_the_pixels_that_it_gets(part):
    """A network that returns what it was told of each pixel; where it is not asked, the result is the input."""
    inputs = MetaTensor(volume(), meta={"factor": [2.5, 3]})
    told = positions((2.5, 3), slice(0, 57), slice(0, 70))[part]

    def network(x):
        return x[:, part + 1 : part + 2]

    every, boxes = (ForegroundInferer(**WHOLE, skip_background=skip, positions=True)(inputs, network)[0, 0] for skip in (False, True))
    torch.testing.assert_close(torch.as_tensor(every), told[..., None].expand(57, 70, 4))
    asked = torch.zeros(57, 70, dtype=torch.bool)
    asked[foreground_box(inputs[..., 1], 0.03, 8)] = True
    torch.testing.assert_close(torch.as_tensor(boxes)[..., 1], torch.where(asked, told, inputs[0, 0, ..., 1].as_tensor()))


def test_planes_across_thick_slices_are_told_the_factors_of_their_axes():
    inputs = MetaTensor(torch.ones(1, 1, 12, 14, 16), meta={"factor": [1.5, 2, 4]})
    # the slices lie across the rows, as in training; 1 / factor of rows and columns, mean of both families
    for part, expected in ((2, 1 / 4), (5, (1 / 2 + 1 / 1.5) / 2)):
        result = OrthogonalSlices(positions=True)(inputs, lambda x, part=part: x[:, part + 1 : part + 2])
        torch.testing.assert_close(torch.as_tensor(result), torch.full((1, 1, 12, 14, 16), expected))


@pytest.mark.parametrize("fft", [False, True])
def test_bfloat16_is_near_float32_and_stays_inside_the_network(fft):
    network = toy.random_network(MultiScaleResidualNet(features=32))
    if fft:
        use_fft_convolutions(network)
    patches = volume()[..., 2]
    results, gradients = [], []
    for precision in ("float32", "bfloat16"):
        network.zero_grad()
        results.append(AutocastInferer(precision)(patches, network))
        results[-1].square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    exact, rounded = results
    assert rounded.dtype == gradients[1].dtype == next(network.parameters()).dtype == torch.float32
    assert torch.equal(exact, network(patches))
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02  # 8 significant bits
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


def test_volumes_in_bfloat16_are_near_those_in_float32():
    network = toy.random_network(MultiScaleResidualNet(features=32))
    with torch.no_grad():
        exact, rounded = (ForegroundInferer(**WHOLE, precision=precision)(volume(), network) for precision in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


def test_only_the_network_is_rounded():
    """What is measured of the volume, and told, is the same in every precision."""
    inputs, told = MetaTensor(volume(), meta={"factor": [2, 2]}), {"float32": [], "bfloat16": []}
    for precision, given in told.items():
        ForegroundInferer(**WHOLE, positions=True, facts=True, precision=precision)(
            inputs, lambda x, given=given: given.append(x) or x[:, :1]
        )
    assert len(told["float32"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*told.values()))
