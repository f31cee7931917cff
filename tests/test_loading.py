import json

import nibabel as nib
import numpy as np
import pytest
import toy

from bundle.errors import InputError
from bundle.files import fingerprint
from bundle.loading import LoadVolumed
from bundle.results import Results


def load(path):
    return LoadVolumed("image")({"image": str(path)})["image"]


def test_extensions_in_upper_case(tmp_path):
    for name, new in (("a.nii.gz", "A.NII.GZ"), ("b.nii.gz", "B.Nii.gz"), ("c.nii", "C.NII")):
        toy.write_nifti(tmp_path / name).rename(tmp_path / new)
    toy.write_itk(tmp_path / "d.nrrd").rename(tmp_path / "D.NRRD")
    toy.write_itk(tmp_path / "e.mha").rename(tmp_path / "E.MHA")
    toy.write_analyze(tmp_path / "f.img").rename(tmp_path / "F.Img")
    (tmp_path / "f.hdr").rename(tmp_path / "F.Hdr")
    for name in ("A.NII.GZ", "B.Nii.gz", "C.NII", "D.NRRD", "E.MHA", "F.Img"):
        np.testing.assert_array_equal(np.abs(load(tmp_path / name))[0].sum(), toy.head().sum())
        assert Results("", str(tmp_path), []).path(str(tmp_path / name), "").name == name[0]


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh", "A.MGZ"])
def test_freesurfer_is_read_as_nifti_is(name, tmp_path):
    to_world = toy.affine((1, 1, 2), (12, 0, 5))
    nib.save(nib.MGHImage(toy.head(), to_world), tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    image = load(tmp_path / name)
    np.testing.assert_array_equal(image[0], toy.head())
    np.testing.assert_allclose(image.affine, to_world, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_values_become_their_magnitude(dtype, tmp_path):
    volume = toy.head() * np.exp(1j * np.arange(6))
    nib.save(nib.Nifti1Image(volume.astype(dtype), toy.affine()), tmp_path / "a.nii.gz")
    image = load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image[0], toy.head(), rtol=1e-5)
    assert "complex values: the magnitude is used" in image.meta["remarks"]


@pytest.mark.parametrize(("unit", "factor", "stored"), [("micron", 1e-3, 1e3), ("meter", 1e3, 1e-3), ("meter", 1, 1), ("mm", 1, 1)])
def test_lengths_become_mm(unit, factor, stored, tmp_path):
    to_world = toy.affine()
    to_world[:3] *= stored
    image = nib.Nifti1Image(toy.head(), to_world)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    loaded = load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(loaded.affine, toy.affine(), rtol=1e-5)
    assert (unit in loaded.meta["remarks"]) == (unit != "mm")


def test_lengths_of_nrrd_become_mm(tmp_path):
    to_world = toy.affine()
    to_world[:3] *= 1000
    path = toy.write_itk(tmp_path / "a.nrrd", to_world=to_world)
    path.write_bytes(path.read_bytes().replace(b"kinds:", b'space units: "um" "um" "um"\nkinds:', 1))
    np.testing.assert_allclose(load(path).affine, toy.affine(), rtol=1e-5)


def test_nan_outside_is_background(tmp_path):
    head = toy.head()
    path = toy.write_nifti(tmp_path / "a.nii.gz", np.where(head > 0, head, np.nan))
    image = load(path)
    np.testing.assert_array_equal(image[0], head)
    assert f"{(head == 0).sum()} voxels" in image.meta["remarks"]
    head[20, 18, 3] = np.inf
    with pytest.raises(InputError, match="not finite"):
        load(toy.write_nifti(tmp_path / "b.nii.gz", np.where(head > 0, head, np.nan)))


def test_negative_padding_is_background(tmp_path):
    head = toy.head()
    image = load(toy.write_nifti(tmp_path / "a.nii.gz", np.where(head > 0, head, -1024)))
    np.testing.assert_array_equal(image[0], head)
    assert "-1024: taken for padding" in image.meta["remarks"]


def test_unknown_orientation_is_said(tmp_path):
    assert "left and right are a guess" in load(toy.write_analyze(tmp_path / "a.img")).meta["remarks"]
    path = toy.write_itk(tmp_path / "a.nrrd")
    assert "guess" not in load(path).meta["remarks"]
    path.write_bytes(path.read_bytes().replace(b"space: left-posterior-superior", b"space dimension: 3", 1))
    assert "left and right are a guess" in load(path).meta["remarks"]


def test_sidecar_is_read(tmp_path):
    path = toy.write_nifti(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "sub-01_T1w.json").write_text(json.dumps({"Modality": "MR", "SliceThickness": 1.5, "SpacingBetweenSlices": 3}))
    image = load(path)
    assert (image.meta["modality"], image.meta["slice_thickness"]) == ("MR", 1.5)
    assert "slices are 3 mm apart" in image.meta["remarks"]


def test_sidecar_inherits_within_a_bids_data_set(tmp_path):
    path = toy.write_nifti(tmp_path / "sub-01" / "anat" / "sub-01_acq-x_T1w.nii.gz")
    sidecars = {
        "T1w.json": {"Modality": "MR", "SliceThickness": 5},
        "T2w.json": {"SliceThickness": 7},
        "acq-y_T1w.json": {"SliceThickness": 8},
        "sub-01/sub-01_T1w.json": {"SliceThickness": 1.5},
    }
    for name, facts in sidecars.items():
        (tmp_path / name).write_text(json.dumps(facts))
    assert "modality" not in load(path).meta
    (tmp_path / "dataset_description.json").write_text("{}")
    meta = load(path).meta
    assert (meta["modality"], meta["slice_thickness"]) == ("MR", 1.5)
    path.with_name("sub-01_acq-x_T1w.json").write_text(json.dumps({"SliceThickness": 1.2}))
    assert load(path).meta["slice_thickness"] == 1.2


@pytest.mark.parametrize(("name", "voxels"), [("a.mhd", "a.raw"), ("a.nhdr", "a.raw"), ("a.img", "a.hdr")])
def test_fingerprint_counts_the_file_of_the_voxels(name, voxels, tmp_path):
    path = (toy.write_analyze if name == "a.img" else toy.write_itk)(tmp_path / name)
    before = fingerprint(str(path))
    assert before["files"] == 2
    (tmp_path / voxels).write_bytes((tmp_path / voxels).read_bytes() + b"\0")
    assert fingerprint(str(path)) != before
