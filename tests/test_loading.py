import gzip
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


@pytest.mark.parametrize("z", [slice(None), slice(3, 4)])
def test_nan_inside_the_head_is_refused_whatever_is_outside(z, tmp_path):
    head = toy.head()
    volume = np.where(head > 0, head, np.nan)
    volume[18:20, 17, 3] = np.nan  # a hole
    with pytest.raises(InputError, match=r"a\.nii: 2 voxels are not finite"):
        load(toy.write_nifti(tmp_path / "a.nii", volume[..., z]))


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


@pytest.mark.parametrize("name", ["a.img", "A.IMG", "a.img.gz"])
def test_the_mat_of_spm_gives_the_orientation(name, tmp_path):
    to_world = toy.affine((1, 1, 2), (12, 0, 5))
    for folder, at in ((tmp_path, to_world), (tmp_path / "moved", toy.affine(origin=(0, 0, 0)) @ to_world)):
        folder.mkdir(exist_ok=True)
        nib.Spm99AnalyzeImage(toy.head().astype(np.int16), at).to_filename(folder / name.lower())
        for file in list(folder.glob("a.*")):
            file.rename(folder / (file.name.upper() if name.isupper() else file.name))
    image = load(tmp_path / name)
    np.testing.assert_array_equal(image[0], toy.head())
    np.testing.assert_allclose(image.affine, to_world, atol=1e-6)
    assert image.meta["remarks"] == ""
    before = fingerprint(str(tmp_path / name))
    (mat,) = (path.name for path in tmp_path.iterdir() if ".mat" in path.name.lower())
    (tmp_path / "moved" / mat).replace(tmp_path / mat)
    assert fingerprint(str(tmp_path / name)) != before
    (tmp_path / mat).unlink()
    assert "left and right are a guess" in load(tmp_path / name).meta["remarks"]


def test_a_pair_of_which_one_is_compressed_is_refused(tmp_path):
    path = toy.write_analyze(tmp_path / "a.img")
    (tmp_path / "a.img.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    for name in ("a.img.gz", "a.hdr"):
        with pytest.raises(InputError, match=rf"{name}: a\.img\.gz is compressed, a\.hdr is not: compress both or neither"):
            load(tmp_path / name)


@pytest.mark.parametrize("first", [True, False])
def test_an_axis_of_one_value_in_nrrd(first, tmp_path):
    """Slicer writes an axis for the components of a voxel, also if there is one."""
    directions = ["(1,0,0)", "(0,1,0)", "(0,0,2)"]
    directions.insert(0 if first else 3, "none")
    kinds = ["domain"] * 3
    kinds.insert(0 if first else 3, "list")
    head = toy.head()[None] if first else toy.head()[..., None]
    lines = ["NRRD0005", "type: float", "dimension: 4", "space: right-anterior-superior", f"sizes: {' '.join(map(str, head.shape))}"]
    lines += [f"space directions: {' '.join(directions)}", f"kinds: {' '.join(kinds)}", "endian: little", "encoding: raw"]
    lines += ["space origin: (-20,-18,5)", "", ""]
    (tmp_path / "a.nrrd").write_bytes("\n".join(lines).encode() + head.astype("<f4").tobytes(order="F"))
    image = load(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(image[0], toy.head())
    np.testing.assert_allclose(image.affine, toy.affine())


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_a_form_with_an_undefined_code_is_used_with_a_remark(form, tmp_path):
    to_world = toy.affine((1, 1, 2), (12, 0, 5))
    image = nib.Nifti1Image(toy.head(), to_world)
    image.set_qform(to_world)
    nib.save(image, tmp_path / "a.nii")
    codes = {"sform_code": 0, "qform_code": 0, f"{form}_code": 7}
    image = load(toy.edit_header(tmp_path / "a.nii", **codes))
    np.testing.assert_allclose(image.affine, to_world, atol=1e-5)
    assert image.meta["remarks"] == f"{form}_code is 7, which NIfTI does not define: taken for 2 (aligned)"


def test_an_unusable_sform_with_an_undefined_code_is_left_out(tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(toy.head(), toy.affine())
    image.set_qform(toy.affine())
    nib.save(image, path)
    image = load(toy.edit_header(path, sform_code=7, qform_code=1, srow_x=0, srow_y=0, srow_z=0))
    np.testing.assert_allclose(image.affine, toy.affine(), atol=1e-5)
    assert "the sform is unusable and left out" in image.meta["remarks"]


def test_metres_without_a_unit_are_said(tmp_path):
    image = load(toy.write_nifti(tmp_path / "a.nii", to_world=np.diag([1e-3, 1e-3, 1e-3, 1]) @ toy.affine((0.9, 0.9, 1.1))))
    np.testing.assert_allclose(image.pixdim, (9e-4, 9e-4, 1.1e-3), rtol=1e-5)
    assert "voxels of 0.0009 x 0.0009 x 0.0011 mm are hardly those of an MRI scan" in image.meta["remarks"]


def test_what_the_name_does_not_say_is_named(tmp_path):
    path = toy.write_nifti(tmp_path / "a.nii").rename(tmp_path / "a")
    with pytest.raises(InputError, match=r"a: holds NIfTI; give it the extension \.nii or \.nii\.gz"):
        load(path)


def test_sidecar_is_read(tmp_path):
    path = toy.write_nifti(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "sub-01_T1w.json").write_text(json.dumps({"Modality": "MR", "SliceThickness": 1.5, "SpacingBetweenSlices": 3}))
    image = load(path)
    assert (image.meta["modality"], image.meta["slice_thickness"]) == ("MR", 1.5)
    assert "slices are 3 mm apart" in image.meta["remarks"]
    (tmp_path / "sub-01_T1w.json").write_text(json.dumps({"SliceThickness": 2}), encoding="utf-8-sig")  # as Windows programs write it
    assert load(path).meta["slice_thickness"] == 2


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
