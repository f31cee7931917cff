"""Recognition of the acquisition, and correction of results by the measured samples."""

from dataclasses import replace
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
import toy
from monai.data import MetaTensor, decollate_batch
from toy import volume

from bundle.acquisition import ACROSS, WITHIN, Acquisition, Sampling, kspace_filter, sampling_matrix
from bundle.consistency import EQUAL, SMALLEST, Correction, Recognition, RecognitionLoss, Recognized, recognition, window_of
from bundle.errors import InputError
from bundle.inferers import ForegroundInferer, OrthogonalSlices
from bundle.loading import LoadVolumed
from bundle.networks import AcquisitionClassifier
from bundle.patches import AcquiredPatches, MeasuredSlices, RandomAcquisition, recognized, told_apart
from bundle.resampling import enlarge, interpolate_slices

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "models" / "acquisition.pt"
WEIGHTS_ACROSS = ROOT / "models" / "isotropic" / "acquisition.pt"
REAL = ROOT.parent / "shared" / "data" / "ds002748" / "sub-16.nii.gz"


def known(kind, probability=1.0, noise=0.0, kinds=WITHIN):
    """Index of the kind, its probability; the others share the rest."""
    probabilities = torch.full((len(kinds),), (1 - probability) / (len(kinds) - 1))
    probabilities[kind] = probability
    return Recognized(probabilities, noise, kinds)


class Told:
    """Recognition of one that knows."""

    def __init__(self, kind, noise=0.0, kinds=WITHIN):
        self.kinds, self.known, self.widths = kinds, known(kind, noise=noise, kinds=kinds), []

    def chosen(self, measured):
        return [len(measured) // 2]

    def __call__(self, measured, factors, result=None, width=0.0):
        self.widths.append(width)
        return self.known


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_correction_is_the_regularised_solution(kind, noise):
    """Against the dense formula, with the sampling of the whole slice as one matrix."""
    factors, size = (2.0, 1.5), (13, 12)
    random = torch.Generator().manual_seed(0)
    rows, columns = (sampling_matrix(n, replace(WITHIN.samplings[kind], factor=f)).double() for n, f in zip(size, factors))
    if WITHIN.samplings[kind].window != "none":
        rows, columns = (kspace_filter(len(m), 1.0, WITHIN.samplings[kind].window).double() @ m for m in (rows, columns))
    result = torch.rand(size, generator=random, dtype=torch.float64)
    measured = torch.rand(len(rows), len(columns), generator=random, dtype=torch.float64)
    whole = torch.from_numpy(np.kron(rows.numpy(), columns.numpy()))
    weight = (SMALLEST + (noise / EQUAL) ** 2) / (factors[0] * factors[1])
    missing = measured.flatten() - whole @ result.flatten()
    expected = result.flatten() + whole.T @ torch.linalg.solve(
        whole @ whole.T + weight * torch.eye(len(whole), dtype=torch.float64), missing
    )
    found = Correction(measured[None], size, factors, known(kind, noise=noise))(result, 0)
    torch.testing.assert_close(found.flatten(), expected, atol=1e-5, rtol=0)


def test_the_truth_is_not_changed():
    truth = torch.from_numpy(toy.head((40, 42, 3)))[..., 1] / 1000
    for index, kind in enumerate(WITHIN.samplings):
        axes = [replace(kind, factor=2.0)] * 2
        scan = Acquisition(axes)(truth)
        corrected = Correction(scan[None], truth.shape, (2, 2), known(index))(truth, 0)
        # except where the magnitude of the overshoot was taken
        assert float((corrected - truth)[truth > 0.2].abs().max()) < 0.03, kind


def test_less_is_corrected_if_the_kind_is_doubtful_or_the_scan_noisy():
    result, scan = torch.full((20, 20), 0.2), torch.full((1, 10, 10), 1.2)
    steps = [
        float(Correction(scan, (20, 20), (2, 2), known(0, p, noise))(result, 0).mean()) - 0.2
        for p, noise in ((1.0, 0.0), (0.6, 0.0), (0.6, 0.05), (0.3, 0.1))
    ]
    assert 1 > steps[0] > 0.9
    assert steps == sorted(steps, reverse=True) and steps[-1] < 0.05


def test_the_air_keeps_the_result_of_the_network():
    truth = torch.zeros(48, 48)
    truth[12:36, 12:36] = 0.8
    axes = [Sampling(2)] * 2
    scan = Acquisition(axes, noise=0.02)(truth, np.random.default_rng(0))
    corrected = Correction(scan[None], truth.shape, (2, 2), known(0, noise=0.02))(truth, 0)
    assert not corrected[:8].any() and not corrected[:, -8:].any()
    assert float((corrected - truth)[16:32, 16:32].abs().mean()) > 1e-3


def test_every_acquisition_has_a_kind():
    random = np.random.default_rng(0)
    seen = {WITHIN.index(axis) for _ in range(500) for axis in RandomAcquisition()(random)[0].axes}
    assert seen == set(range(len(WITHIN)))
    assert WITHIN.index(Sampling(3, "gaussian", 0.97)) == WITHIN.index(Sampling(2, "gaussian", 0.93))
    with pytest.raises(InputError, match="trapezoid"):
        WITHIN.index(Sampling(3, "trapezoid"))


@pytest.mark.parametrize("thick, usual", [(False, 0), (False, 0.5), (True, 0)])
def test_training_tells_honest_probabilities(thick, usual):
    """Whatever a probability is, the kind is right that often. The frequencies of the kinds are those of the acquisitions."""
    random, known = np.random.default_rng(0), ACROSS if thick else WITHIN
    draw = RandomAcquisition(in_plane=(2, 2), thick=float(thick), usual=usual)
    kinds, told = [], []
    for _ in range(4000):
        acquisition, widths, across = draw(random)
        sampling, of = told_apart(acquisition, across)
        assert of is known and sampling.factor > 1
        kinds.append(known.index(sampling))
        told.append(recognized(sampling, known, random, max(widths)))
    right = torch.eye(len(known))[kinds]
    told = torch.stack(told)
    torch.testing.assert_close(told.mean(0), known.priors(), atol=0.02, rtol=0)
    for low, high in ((0.1, 0.2), (0.3, 0.5), (0.5, 0.8), (0.8, 0.99), (0.999, 1.01)):
        inside = (told >= low) & (told < high)
        assert int(inside.sum()) > 150
        assert float(right[inside].mean()) == pytest.approx(float(told[inside].mean()), abs=0.05)


def test_what_is_known_leaves_fewer_kinds():
    for width in (0.6, 0.8, 1.0, 1.3):
        possible = [kind for kind, prior in zip(ACROSS.samplings, ACROSS.priors(width)) if prior]
        assert [kind.profile for kind in possible] == ["gaussian", "box", "trapezoid"]
        assert len({kind.width for kind in possible}) == 1 and abs(possible[0].width - width) < 0.15
    assert {kind.profile for kind, prior in zip(WITHIN.samplings, WITHIN.priors(profile="kspace")) if prior} == {"kspace"}
    assert float(ACROSS.priors(1.0, "box").max()) == 1
    known_width = Recognized(ACROSS.priors(1.0, "box"), 0.0, ACROSS, width=0.97)
    assert known_width.sampling == Sampling(1, "box", 0.97)
    assert str(known_width).startswith("box slice profile, 0.97 slice distances wide (probability 1.00)")
    unsure = torch.zeros(12)  # between box and trapezoid, and between two widths
    unsure[[ACROSS.index(Sampling(1, p, w)) for p, w in (("box", 0.84), ("box", 1), ("trapezoid", 1))]] = torch.tensor([0.3, 0.3, 0.4])
    flat = Recognized(unsure, 0.0, ACROSS)
    assert (flat.sampling.profile, flat.probability) == ("trapezoid", pytest.approx(1))
    assert flat.sampling.width == pytest.approx(0.7 + 0.3 * 0.84, abs=1e-3)


@pytest.mark.parametrize("shape", [(96, 96), (40, 120), (200, 31), (97, 95)])
def test_windows_have_one_size(shape):
    image = torch.rand(shape)
    part = window_of(image)
    assert part.shape == (96, 96)
    assert float(part.sum()) == pytest.approx(float(image[:96, :96].sum()), rel=1e-5)


@pytest.mark.parametrize("thick", [False, True])
def test_slices_for_training_are_a_function_of_seed_and_index(thick):
    def dataset(seed):
        return MeasuredSlices(AcquiredPatches([volume()], RandomAcquisition(thick=float(thick)), size=48, seed=seed))

    first, second, other = dataset(1), dataset(1), dataset(2)
    assert len(first) == 100
    for index in (0, 7, 5000):
        item = first[index]
        assert item["image"].shape == (3, 96, 96)
        assert 0 <= item["label"][0] < 12 and 0 <= item["label"][1] <= 0.05
        assert (0.14 if thick else 0.2) < float(item["image"][1, 0, 0]) <= 1
        assert all(torch.equal(item[key], second[index][key]) for key in item)
    assert not torch.equal(first[0]["image"], other[0]["image"])


def test_loss_is_smallest_for_the_true_kind_and_noise():
    target = torch.tensor([[3.0, 0.02], [11.0, 0.0]])
    right = torch.full((2, len(WITHIN) + 1), -20.0)
    right[0, 3], right[1, 11] = 20.0, 20.0
    right[:, -1] = torch.tensor([1.0, 0.0])  # in units of 0.02
    assert float(RecognitionLoss()(right, target)) < 1e-4
    assert float(RecognitionLoss()(right.roll(1, 0), target)) > 10


def untrained(path):
    torch.manual_seed(0)
    torch.save(AcquisitionClassifier(len(WITHIN)).state_dict(), path)
    return path


@pytest.mark.parametrize("shape", [(5, 30, 180), (1, 96, 96), (40, 130, 20)])
@pytest.mark.parametrize("factors", [(2, 2), (1, 3.5)])
def test_slices_of_any_size_are_looked_at(shape, factors, tmp_path):
    found = Recognition(untrained(tmp_path / "a.pt"))(torch.rand(shape), factors)
    assert 0 < found.probability <= 1 and found.noise >= 0


def test_a_result_is_evidence(tmp_path):
    """A result that one kind of sampling takes to the samples speaks for that kind, whatever an untrained classifier says."""
    look = Recognition(untrained(tmp_path / "a.pt"))
    truth = torch.from_numpy(toy.head((60, 64, 5))).float().movedim(-1, 0) / 1000
    for kind in [WITHIN.samplings[n] for n in (0, 4, 10)]:
        scan = Acquisition([replace(kind, factor=2.0)] * 2)(truth)
        found = look(scan, (2, 2), truth)
        assert found.sampling.profile == kind.profile


def test_air_and_unrefined_scans_are_not_recognised(tmp_path):
    look = Recognition(untrained(tmp_path / "a.pt"))
    air = torch.zeros(3, 50, 50)
    assert look(air[look.chosen(air)], (2, 2)) is None
    assert look(torch.rand(3, 50, 50), (1, 1)) is None


def test_what_is_known_need_not_be_recognised(tmp_path):
    path = untrained(tmp_path / "a.pt")
    for profile in ("kspace", "bicubic", "box", "gaussian"):
        assert Recognition(path, profile)(torch.rand(3, 50, 50), (2, 2)).sampling.profile == profile
    assert Recognition(path, "box")(torch.rand(3, 50, 50), (2, 2)).probability == pytest.approx(1)
    assert recognition("unknown", path) is None
    assert recognition("auto", path, facts=False) is None
    with pytest.raises(InputError, match="acquisition must be auto, unknown, kspace, bicubic, box or gaussian, got 'mean'"):
        recognition("mean", path)


def test_results_are_corrected_slice_by_slice():
    truth = torch.from_numpy(toy.head((40, 44, 3))).float() / 1000
    kind, factors = WITHIN.samplings[0], (2.0, 2.0)
    scan = Acquisition([replace(kind, factor=2.0)] * 2)(truth.movedim(-1, 0))
    interpolated = enlarge(scan, factors, truth.shape[:2], "spline").movedim(0, -1)
    image = MetaTensor(interpolated[None, None], meta={"factor": list(factors)})
    inferer = ForegroundInferer(recognition=Told(0), positions=True, facts=True, roi_size=(-1, -1), spatial_dim=2)
    found = inferer(image, lambda x: 0.9 * x[:, :1])
    plain = ForegroundInferer(positions=True, facts=True, roi_size=(-1, -1), spatial_dim=2)(image, lambda x: 0.9 * x[:, :1])
    again, before = (
        (Acquisition([replace(kind, factor=2.0)] * 2)(x.as_tensor()[0, 0].movedim(-1, 0)) - scan).square().mean() for x in (found, plain)
    )
    assert float(again) < 0.01 * float(before)
    assert found.meta["recognized"]["profile"] == "kspace"
    assert len(decollate_batch(found)) == 1  # MONAI's engines take batches apart
    assert "recognized" not in plain.meta


def test_the_network_is_told_what_was_recognised():
    image = MetaTensor(torch.from_numpy(toy.head((40, 44, 3))).float()[None, None] / 1000, meta={"factor": [2.0, 2.0]})
    options = {"positions": True, "facts": True, "roi_size": (-1, -1), "spatial_dim": 2}
    seen = []

    def network(x):
        seen.append(x[0, -len(WITHIN) :, 0, 0])
        return x[:, :1]

    ForegroundInferer(recognition=Told(4), **options)(image, network)
    first, *others = seen  # evidence is what a network says that is not told
    torch.testing.assert_close(first, WITHIN.priors())
    assert len(others) == 3
    for kinds in others:
        assert torch.equal(kinds, known(4).kinds)
    seen.clear()
    ForegroundInferer(**options)(image, network)
    assert len(seen) == 3 and torch.equal(seen[0], WITHIN.priors())


def test_thick_slices_are_recognised_once_and_both_sets_of_planes_corrected():
    """Bands of different intensity across the slices: the network's result is too weak until the samples correct it."""
    meta = {"factor": [1.0, 1.0, 4.0], "slice_width": 1.0}
    truth = torch.from_numpy(toy.head((40, 44, 32))).float() / 1000
    sampling = Sampling(4, "box")
    scan = Acquisition((Sampling(), Sampling(), sampling))(truth)
    image = MetaTensor(interpolate_slices(scan, 4, 32)[None, None], meta=meta)
    seen = []

    def network(x):
        seen.append(x[0, -len(ACROSS) :, 0, 0])
        return 0.9 * x[:, :1]

    box = ACROSS.index(sampling)
    recognition = Told(box, kinds=ACROSS)
    options = {"positions": True, "facts": True}
    found = OrthogonalSlices(recognition=recognition, **options)(image, network)
    torch.testing.assert_close(seen[0], ACROSS.priors(1.0))
    assert all(torch.equal(kinds, recognition.known.kinds) for kinds in seen[1:]) and len(seen) > 40
    assert recognition.widths == [1.0]
    assert found.meta["recognized"]["profile"] == "box"
    plain = OrthogonalSlices(**options)(image, network)
    again, before = ((Acquisition((Sampling(), Sampling(), sampling))(x.as_tensor()[0, 0]) - scan).square().mean() for x in (found, plain))
    assert float(again) < 0.02 * float(before)
    seen.clear()
    kinds_of_planes = Told(0)  # recognises samplings within planes only
    OrthogonalSlices(recognition=kinds_of_planes, **options)(image, network)
    assert not kinds_of_planes.widths and all(torch.equal(kinds, ACROSS.priors(1.0)) for kinds in seen)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no weights of the classifier")
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name}: real volumes are not part of the repository")
@pytest.mark.parametrize("sampling", [Sampling(2), Sampling(2, "bicubic"), Sampling(2, "gaussian", 1.3)])
def test_a_real_scan_is_recognised(sampling):
    image = LoadVolumed(keys="image")({"image": str(REAL)})["image"].as_tensor()[0].float()
    slices = image[:, 60:230, 60:140:8].movedim(-1, 0)
    slices = slices / torch.quantile(slices[slices > 0][::50], 0.999)
    scan = Acquisition((sampling, sampling), step=0.001)(slices)
    found = Recognition(WEIGHTS)(scan, (2, 2))
    assert found.sampling.profile == sampling.profile, found
    assert found.noise < 0.02


@pytest.mark.skipif(not WEIGHTS_ACROSS.exists(), reason="no weights of the classifier")
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name}: real volumes are not part of the repository")
@pytest.mark.parametrize("profile", ["gaussian", "box"])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_slice_profile_of_a_real_scan_is_recognised(profile, noise):
    image = LoadVolumed(keys="image")({"image": str(REAL)})["image"].as_tensor()[0].float()
    planes = image[60:140:8, 40:230]
    planes = planes / torch.quantile(planes[planes > 0][::50], 0.999)
    scan = Acquisition((Sampling(), Sampling(5, profile)), noise, step=0.001)(planes, np.random.default_rng(0)).mT
    for width in (0.0, 1.0):
        found = Recognition(WEIGHTS_ACROSS, kinds=ACROSS)(scan, (5, 1), width=width)
        flat = found.sampling.profile in ("box", "trapezoid")  # these two are hardly told apart
        assert flat == (profile == "box") and found.probability > 0.8, found
        assert found.sampling.width == pytest.approx(1, abs=0 if width else 0.1)
        assert found.noise == pytest.approx(noise, abs=0.01)
    assert Recognition(WEIGHTS_ACROSS, "trapezoid", ACROSS)(scan, (5, 1)).sampling.profile == "trapezoid"


@pytest.mark.slow
@pytest.mark.parametrize(("network", "kinds"), [("general", WITHIN), ("thick_slices", ACROSS)])
def test_the_classifier_is_trained_as_the_page_says(tmp_path, network, kinds):
    data = tmp_path / "data" / "ds002748"
    data.mkdir(parents=True)
    for name in ("sub-01", "sub-16"):
        toy.write_nifti(data / f"{name}.nii.gz", toy.head((52, 56, 50)), toy.affine((1, 1, 1)))
    names = ("train", network, "datasets/scans", "random_acquisitions", "acquisition_classifier")
    monai.bundle.run(
        config_file=[str(ROOT / "configs" / f"{name}.json") for name in names],
        dataset_dir=str(data.parent), output_dir=str(tmp_path / "run"), test_volumes=[], device="cpu", slices_per_volume=40, patch_size=48,
        max_epochs=1, warmup_iterations=1,
    )  # fmt: skip
    found = Recognition(tmp_path / "run" / "models" / "model.pt", kinds=kinds)(torch.rand(3, 50, 50), (2, 2))
    assert found is not None and found.known is kinds
