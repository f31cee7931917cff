import gzip
import logging
import os

import nibabel as nib
import numpy as np
import pytest
import toy

from bundle.errors import InputError
from bundle.grid import InPlaneFactorsd
from bundle.loading import LoadVolumed
from bundle.preflight import CheckMemoryd
from bundle.results import Results
from bundle.subjects import find_volumes, split_subjects


def test_links_are_followed_once(tmp_path, caplog):
    archive, study = tmp_path / "archive", tmp_path / "study"
    one = toy.write_nifti(archive / "sub-01" / "t1.nii.gz")
    toy.write_nifti(study / "sub-02" / "t1.nii.gz")
    toy.write_nifti(study / ".git" / "annex" / "key.nii.gz")
    (study / "sub-01").symlink_to(one.parent)
    (study / "again").symlink_to(one.parent)
    (study / "sub-02" / "circle").symlink_to(study)
    (study / "sub-02" / "up").symlink_to(tmp_path)
    (study / "sub-02" / "other.nii.gz").symlink_to("t1.nii.gz")
    (study / "gone.nii.gz").symlink_to("nowhere.nii.gz")
    found = [os.path.relpath(v, study) for v in find_volumes(study)]
    assert found == ["again/t1.nii.gz", "gone.nii.gz", "sub-02/t1.nii.gz"]
    assert "other.nii.gz: the same file as" in caplog.text
    assert "sub-01: a link to a folder that is searched already" in caplog.text


@pytest.mark.parametrize("what", toy.NO_SCANS)
def test_what_is_no_scan_is_passed_over_by_name(what, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    path = toy.NO_SCANS[what](tmp_path / "in")
    with pytest.raises(InputError, match="1 files skipped, the first: "):
        find_volumes(tmp_path / "in")
    good = toy.write_nifti(tmp_path / "in" / "sub-01_T1w.nii.gz")
    with caplog.at_level(logging.WARNING):
        assert find_volumes(tmp_path / "in") == [str(good)]
    assert f"skipped: {path}: a" in caplog.text
    assert find_volumes(path) == [str(path)]  # named by itself


def test_phase_of_dcm2niix_is_passed_over(tmp_path):
    scan = toy.write_nifti(tmp_path / "swi_e1.nii.gz")
    toy.write_nifti(tmp_path / "swi_e1_ph.nii.gz")
    found = find_volumes(tmp_path)
    assert found == [str(scan)]
    assert list(found.passed_over) == [f"{tmp_path / 'swi_e1_ph.nii.gz'}: a phase map"]


@pytest.mark.parametrize("what", ["mask", "label map", "phase map"])
def test_what_is_named_is_done_with_a_warning(what, tmp_path):
    path = toy.NO_SCANS[what](tmp_path)
    assert "not like a scan" in LoadVolumed("image")({"image": str(path)})["image"].meta["remarks"]


def write_surface(folder, name):
    """Values on the vertices of a hemisphere, as FreeSurfer and the Human Connectome Project store them."""
    values = np.random.default_rng(0).normal(30, 5, 2562).astype(np.float32)
    if name.endswith((".dscalar.nii", ".dtseries.nii")):
        vertices = nib.cifti2.BrainModelAxis.from_surface(np.arange(2562), 2562, "CortexLeft")
        rows = nib.cifti2.ScalarAxis(["sulc"]) if "scalar" in name else nib.cifti2.SeriesAxis(0, 1, 1)
        image = nib.Cifti2Image(values[None], (rows, vertices))
    else:
        image = (nib.MGHImage if name.endswith("h") else nib.Nifti1Image)(values[:, None, None], np.eye(4))
    nib.save(image, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["lh.w-g.pct.mgh", "lh.thickness.nii.gz", "S.sulc.dscalar.nii", "S_bold.dtseries.nii"])
def test_values_on_a_surface_are_no_volume(name, tmp_path):
    scan = toy.write_nifti(tmp_path / "T1.nii", toy.head((1, 1, 6)))
    path = write_surface(tmp_path, name)
    found = find_volumes(tmp_path)
    what = ("CIFTI: " if "S" in name else "") + "values on a surface"
    assert (found, list(found.passed_over)) == ([str(scan)], [f"{path}: {what}"])
    assert find_volumes(path) == [str(path)]
    CheckMemoryd("image", InPlaneFactorsd("image", 2))({"image": str(path)})  # leaves it to loading to say what it is
    with pytest.raises(InputError, match=f"{name}: {what}, no volume"):
        LoadVolumed("image")({"image": str(path)})


def test_a_pair_is_one_volume_by_either_name(tmp_path):
    image = toy.write_analyze(tmp_path / "T1.img")
    header = image.with_suffix(".hdr")
    assert find_volumes(tmp_path) == find_volumes(tmp_path / "T1.*") == [str(image)]
    assert find_volumes(tmp_path / "*.hdr") == [str(header)]
    for pair in ([image, header], [header, image]):
        found = find_volumes(pair)
        assert found == [str(pair[0])]
        assert list(found.passed_over) == [f"{pair[1]}: the same volume as {pair[0]}"]


def test_nifti_without_an_extension_is_named(tmp_path, caplog):
    toy.write_nifti(tmp_path / "a.nii")
    toy.write_nifti(tmp_path / "b.nii").rename(tmp_path / "b")
    assert find_volumes(tmp_path) == [str(tmp_path / "a.nii")]
    assert "b: holds NIfTI" in caplog.text


def test_patterns_and_lists(tmp_path, monkeypatch):
    for folder, name in (("x", "1"), ("x", "2"), ("y", "1")):
        toy.write_nifti(tmp_path / folder / f"{name}.nii")
    monkeypatch.chdir(tmp_path)
    assert find_volumes("x/*.nii") == ["x/1.nii", "x/2.nii"]
    assert Results("", "x/*.nii", ["x/1.nii", "x/2.nii"]).root == str(tmp_path / "x")
    both = ["x/1.nii", "y"]
    assert find_volumes(both) == ["x/1.nii", "y/1.nii"]
    assert Results("", both, ["x/1.nii", "y/1.nii"]).root == str(tmp_path)
    with pytest.raises(InputError, match=r"z/\*\.nii: no file has a name like this"):
        find_volumes("z/*.nii")


def test_what_only_looks_like_dicom_is_named(tmp_path, caplog):
    series = toy.write_dicom(tmp_path / "series")
    (series / "lost.dcm").write_bytes(b"")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.dcm.gz").write_bytes(gzip.compress((series / "slice001.dcm").read_bytes()))
    assert find_volumes(tmp_path) == [str(series)]
    assert f"skipped: {series / 'lost.dcm'}: is no DICOM, whatever its name says" in caplog.text
    assert f"skipped: {tmp_path / 'packed' / 'a.dcm.gz'}: holds DICOM in gzip; unpack it" in caplog.text


def test_derivatives_of_a_bids_data_set_are_no_raw_scans(tmp_path, caplog):
    raw = toy.write_nifti(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    made = toy.write_nifti(tmp_path / "derivatives" / "fmriprep" / "sub-01" / "anat" / "sub-01_desc-preproc_T1w.nii.gz")
    assert find_volumes(tmp_path) == [str(made), str(raw)]
    (tmp_path / "dataset_description.json").write_text("{}")
    assert find_volumes(tmp_path) == [str(raw)]
    assert f"skipped: {tmp_path / 'derivatives'}: not searched with the rest of a BIDS data set; give it by itself" in caplog.text
    assert find_volumes(tmp_path / "derivatives") == [str(made)]
    assert len(find_volumes(tmp_path, "*_T1w.nii.gz")) == 2


def test_sessions_of_a_subject_stay_together(tmp_path):
    volumes = [f"/data/sub-study/sub-{n:02d}/ses-{s}/anat/sub-{n:02d}_ses-{s}_T1w.nii.gz" for n in range(1, 6) for s in (1, 2)]
    parts = [[item["image"] for item in split_subjects(volumes, [3, 1, 1], part)] for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert [volume for part in parts for volume in part] == volumes
    with pytest.raises(InputError, match=r"needs 6 subjects or more, found 5 \(10 volumes\)"):
        split_subjects(volumes, [4, 1, 1], "train")


def test_subjects_by_a_pattern():
    volumes = [f"/d/patient{n}_study{s}.nii" for n in range(3) for s in range(2)]
    assert len(split_subjects(volumes, [1, 1, 1], "test", r"patient\d+")) == 2
    assert len(split_subjects(volumes, [1, 1, 1], "test")) == 1
    with pytest.raises(InputError, match="not a regular expression"):
        split_subjects(volumes, [1, 1, 1], "test", "(")


def test_a_scan_of_few_intensities_is_a_scan(tmp_path):
    path = toy.write_nifti(tmp_path / "a.nii", (toy.head() > 300) * 1000.0)
    assert find_volumes(tmp_path) == [str(path)]
    assert nib.load(path).shape == toy.SHAPE
