import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from monai.data import MetaTensor
from monai.transforms import Orientation

from bundle import preflight
from bundle.errors import InputError, PassedOver
from bundle.grid import InPlaneFactorsd, IsotropicFactorsd, ThickAxisLastd
from bundle.loading import LoadVolumed
from bundle.preflight import CheckMemoryd, available_memory
from bundle.resampling import upsample
from bundle.results import CompareWithTrainingd
from bundle.transforms import AxialSlicesd


def load(path):
    return LoadVolumed("image")({"image": str(path)})


@pytest.mark.parametrize("axcodes", ["RAS", "PIR"])
def test_too_large_a_volume_is_refused(axcodes, tmp_path, monkeypatch):
    path = toy.write_nifti(tmp_path / "a.nii", *toy.stored_as(axcodes, toy.head(), toy.affine()))
    monkeypatch.setattr(preflight, "available_memory", lambda: 7 << 20)
    CheckMemoryd("image", InPlaneFactorsd("image", 1))({"image": str(path)})
    with pytest.raises(InputError, match=r"a\.nii: 400 x 360 x 6 voxels need about .* take some slices \(--axial_slices\)"):
        CheckMemoryd("image", InPlaneFactorsd("image", spacing=0.1))({"image": str(path)})


def test_too_large_a_dicom_series_is_refused(tmp_path, monkeypatch):
    folder = toy.write_dicom(tmp_path / "series")
    monkeypatch.setattr(preflight, "available_memory", lambda: 7 << 20)
    for path in (folder, folder / "slice002.dcm"):
        CheckMemoryd("image", InPlaneFactorsd("image", 1))({"image": str(path)})
        with pytest.raises(InputError, match=f"{path.name}: 400 x 360 x 6 voxels need about "):
            CheckMemoryd("image", InPlaneFactorsd("image", spacing=0.1))({"image": str(path)})


def test_long_lines_need_memory_for_their_interpolation(tmp_path, monkeypatch):
    path = toy.write_nifti(tmp_path / "a.nii", toy.head((900, 2, 2)))
    monkeypatch.setattr(preflight, "available_memory", lambda: 40 << 20)
    with pytest.raises(InputError, match=r"a\.nii: 1800 x 4 x 2 voxels need about 0\.0 GiB"):
        CheckMemoryd("image", InPlaneFactorsd("image", 2))({"image": str(path)})


def test_free_memory_is_known():
    assert 1 << 20 < available_memory() < 1 << 50


def test_isotropic_volume_is_passed_over(tmp_path):
    data = load(toy.write_nifti(tmp_path / "a.nii", to_world=toy.affine((0.94, 0.94, 1))))
    with pytest.raises(PassedOver, match="isotropic already"):
        IsotropicFactorsd("image")(data)
    assert IsotropicFactorsd("image", spacing=0.5)(data)["image"].meta["factor"] == pytest.approx([1.88, 1.88, 2])


@pytest.mark.parametrize(
    ("meta", "given", "width"),
    [({}, None, 0), ({"slice_thickness": 4}, None, 0.8), ({}, 4.5, 0.9), ({"slice_thickness": 4, "slice_spacing": 5}, 4.5, 0.9),
     ({"slice_thickness": 4, "slice_spacing": 2}, None, 0)],
)  # fmt: skip
def test_the_width_of_slices_is_that_of_the_header_unless_it_is_given(meta, given, width):
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])), meta=meta)
    assert IsotropicFactorsd("image", slice_thickness=given)({"image": image})["image"].meta["slice_width"] == pytest.approx(width)


@pytest.mark.parametrize(("given", "told"), [(2, False), (4, True), (8, False)])
def test_a_thickness_that_was_not_trained_is_said(given, told):
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    remarks = IsotropicFactorsd("image", slice_thickness=given)({"image": image})["image"].meta.get("remarks", "")
    assert remarks.startswith(f"slices {given} mm thick lie 5 mm apart") != told


def test_pixels_that_are_square_but_for_rounding_are_not_refined():
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([1.0, 1.00001, 5, 1])))
    assert IsotropicFactorsd("image")({"image": image})["image"].meta["factor"] == [1, 1, 5]


@pytest.mark.parametrize("value", [9, "[1, 2]", ["a", "b"], [1.5, 3], [0, 3], [3, 2], [1, 2, 3]])
def test_axial_slices_are_two_whole_numbers(value):
    with pytest.raises(InputError, match=r"axial_slices must be \[first, last\]"):
        AxialSlicesd("image", value)


def test_factors_from_acquired_samples_are_compared(tmp_path):
    """The network starts from the samples that were acquired: it then refines by more than is asked for."""
    ranges = tmp_path / "ranges.json"
    ranges.write_text('{"ranges": {"factor_x": [1, 4], "factor_y": [1, 4]}}')
    acquired = torch.from_numpy(toy.head((40, 36, 6))).float().movedim(-1, 0)
    noisy = acquired + 20 * torch.randn(acquired.shape, generator=torch.Generator().manual_seed(0))
    filled = upsample(noisy, (2, 1), "kspace").movedim(0, -1)[None] / 1000
    for factor, warned in ((3, True), (2, False)):
        image = MetaTensor(filled, meta={"factor": [factor, factor]})
        report = CompareWithTrainingd("image", str(ranges), from_acquired=True)({"image": image})["report"]
        assert report["statistics"]["factor_x"] == pytest.approx(2 * factor, rel=0.1)
        assert report["statistics"]["factor_y"] == factor
        assert report["statistics"]["noise"] == pytest.approx(0.02, rel=0.3)
        assert any("factor along x" in line for line in report["warnings"]) == warned
    assert CompareWithTrainingd("image", str(ranges))({"image": image})["report"]["statistics"]["factor_x"] == 2


def test_thick_slices_are_advised(tmp_path):
    for spacing, advised in (((1, 1, 5), True), ((5, 1, 1), True), ((1, 1, 2), False)):
        data = load(toy.write_nifti(tmp_path / "a.nii", to_world=toy.affine(spacing)))
        data = CompareWithTrainingd("image")(InPlaneFactorsd("image", 2)(data))
        assert any("configs/isotropic.json" in line for line in data["report"]["warnings"]) == advised


def test_axial_slices_of_sagittal_ones_are_refused(tmp_path):
    array, to_world = toy.head((6, 36, 40)), toy.affine((5, 1, 1))
    data = ThickAxisLastd("image")(load(toy.write_nifti(tmp_path / "a.nii", array, to_world)))
    with pytest.raises(InputError, match="its thick slices are not axial"):
        AxialSlicesd("image", [2, 3])(data)
    data["image"] = Orientation("RAS", labels=None)(data["image"])
    assert AxialSlicesd("image", [2, 3])(data)["image"].shape[3] == 2
    assert nib.load(tmp_path / "a.nii").shape == np.shape(array)
