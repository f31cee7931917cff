"""DICOM in and out: the volumes of a folder, and a result as a derived series."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import itk
import monai.bundle
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
import toy
import toy_dicom
from monai.data import MetaTensor
from nibabel.nicom.dicomwrappers import wrapper_from_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from bundle.acquisition import Sampling, sampled
from bundle.dicom import find_series, is_dicom
from bundle.dicom_series import derived_series, write_folder
from bundle.dicom_volume import load_series, write_file
from bundle.errors import InputError, reason
from bundle.files import fingerprint
from bundle.grid import IsotropicFactorsd
from bundle.loading import LoadVolumed
from bundle.results import Consistencyd
from bundle.subjects import find_volumes

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "dicom_t1"


def load(path):
    return LoadVolumed("image")({"image": str(path)})["image"]


def names_of(folder):
    """What follows the SeriesInstanceUID in the identifiers of the volumes of a folder."""
    uid = pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID
    return sorted(name.removeprefix(uid) for name in find_series(folder))


class TestFinding:
    @pytest.mark.parametrize("name", ["MR.1.2.840.5", "scan.001", "a.dicom", "a.dcm", "IM0001"])
    def test_dicom_is_known_by_its_content(self, name, tmp_path):
        file = next(toy.write_dicom(tmp_path / "series").iterdir()).rename(tmp_path / name)
        assert is_dicom(file)

    def test_other_files_are_no_dicom(self, tmp_path):
        toy.write_nifti(tmp_path / "a.nii")
        for name, content in (("empty", b""), ("text.dcm", b"\x08\0 is how it begins" * 20), ("short.dcm", b"\x08\0")):
            (tmp_path / name).write_bytes(content)
        assert not [p for p in (*tmp_path.iterdir(), tmp_path, tmp_path / "gone") if is_dicom(p)]

    def test_file_without_preamble_is_dicom(self, tmp_path):
        assert all(map(is_dicom, toy_dicom.without_preamble(toy.write_dicom(tmp_path / "series")).iterdir()))

    def test_localizer_is_a_volume_for_each_orientation(self, tmp_path):
        folder = toy_dicom.localizer(tmp_path / "series")
        assert names_of(folder) == ["_axial", "_coronal", "_sagittal"]
        paths = find_volumes(folder)
        assert [Path(path).parent for path in paths] == [folder] * 3
        assert [load(path).shape for path in paths] == [(1, 40, 36, 2)] * 3
        assert [round(load(path).meta["slice_spacing"], 5) for path in paths] == [10] * 3

    def test_localizer_in_one_enhanced_file_too(self, tmp_path):
        folder = toy_dicom.localizer(tmp_path / "series")
        orientations = [pydicom.dcmread(path).ImageOrientationPatient for path in sorted(folder.iterdir())]
        toy.enhance_dicom(folder)
        ds = pydicom.dcmread(folder / "frames.dcm")
        for group, orientation in zip(ds.PerFrameFunctionalGroupsSequence, orientations):
            group.PlaneOrientationSequence = [pydicom.Dataset()]
            group.PlaneOrientationSequence[0].ImageOrientationPatient = orientation
        del ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        ds.save_as(folder / "frames.dcm")
        assert names_of(folder) == ["_axial", "_coronal", "_sagittal"]
        with pytest.raises(InputError, match=r"frames.dcm: holds 3 volumes of different orientation or echo; name one of them: "):
            load(folder / "frames.dcm")

    @pytest.mark.parametrize(("numbered", "names"), [(True, ["_echo1", "_echo2"]), (False, ["_te20", "_te80"])])
    def test_echoes_of_one_series_are_volumes(self, numbered, names, tmp_path):
        folder = toy_dicom.two_echoes(tmp_path / "series", numbered)
        assert names_of(folder) == names
        first, second = (load(path)[0] for path in find_volumes(folder))
        np.testing.assert_array_equal(first, toy.head())
        np.testing.assert_array_equal(second, np.floor(toy.head() / 2))

    def test_a_volume_among_several_is_done_by_its_name(self, tmp_path, infer):
        folder = toy_dicom.two_echoes(tmp_path / "series")
        first, second = find_volumes(folder)
        assert find_volumes(second) == [second]
        assert find_volumes([folder, first]) == [first, second]
        out = infer(second)
        assert [path.name for path in out.glob("*.nii.gz")] == [f"{Path(second).name}_sr.nii.gz"]
        with pytest.raises(InputError, match=r"1\.2\.3: no such file or folder"):
            find_volumes(folder / "1.2.3")

    def test_a_file_of_two_volumes_names_them_as_they_can_be_given(self, tmp_path):
        folder = toy.enhance_dicom(toy.write_dicom(tmp_path / "scout"))
        file = folder / "frames.dcm"
        ds = pydicom.dcmread(file)
        for number, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            frame.PlaneOrientationSequence = [pydicom.Dataset()]
            frame.PlaneOrientationSequence[0].ImageOrientationPatient = list((toy_dicom.AXIAL, toy_dicom.CORONAL)[number % 2])
        ds.save_as(file)
        with pytest.raises(InputError, match=r"holds 2 volumes .*; name one of them: ") as error:
            load(file)
        names = str(error.value).partition("name one of them: ")[2].split(", ")
        assert find_volumes(names) == names == find_volumes(folder)

    def test_an_unknown_character_set_is_said_once(self, tmp_path, caplog):
        def change(ds, number):
            ds.SpecificCharacterSet, ds.PatientName = "NONE SUCH", "Müller"

        load(toy_dicom.series(tmp_path / "series", change))
        assert sum("NONE SUCH" in record.getMessage() for record in caplog.records) <= 1

    def test_echo_time_that_varies_does_not_split_a_series(self, tmp_path):
        def change(ds, number):
            ds.EchoTime, ds.EchoNumbers = 2.1 + number / 1000, number % 2

        folder = toy_dicom.series(tmp_path / "series", change)
        assert find_volumes(folder) == [str(folder)]

    def test_phase_beside_magnitude_is_a_volume_with_a_remark(self, tmp_path):
        folder = toy_dicom.two_echoes(tmp_path / "series")

        def change(ds, number):
            ds.ImageType = ["ORIGINAL", "PRIMARY", "P" if ds.EchoTime == 80 else "M", "ND"]
            ds.EchoTime, ds.EchoNumbers = 20, 1

        toy_dicom.edit(change, folder)
        assert names_of(folder) == ["", "_phase"]
        phase = next(path for path in find_volumes(folder) if path.endswith("_phase"))
        assert "by its header a phase image; the network knows magnitudes" in load(phase).meta["remarks"]

    def test_what_is_no_slice_is_named_in_the_log(self, tmp_path, caplog):
        folder = toy_dicom.add_screenshot(toy.write_dicom(tmp_path / "series"))
        assert find_volumes(tmp_path) == [str(folder)]
        for text in ("screenshot.dcm (Secondary Capture Image Storage: a screenshot", "state.dcm (Grayscale Softcopy", "DICOMDIR ("):
            assert text in caplog.text

    def test_screenshot_is_no_volume(self, tmp_path):
        folder = toy_dicom.add_screenshot(toy.write_dicom(tmp_path / "series"))
        for path in folder.glob("slice*"):
            path.unlink()
        with pytest.raises(InputError, match=r"holds no volume .*; 1 files skipped, the first: .*screenshot\.dcm \(Secondary"):
            find_volumes(folder)
        with pytest.raises(InputError, match=r"screenshot\.dcm: no slice of a scan \(Secondary Capture Image Storage: a screenshot"):
            load(folder / "screenshot.dcm")
        with pytest.raises(InputError, match=r"holds no slices of a scan \(.*screenshot\.dcm"):
            load(folder)

    def test_slices_given_one_by_one_are_one_volume(self, tmp_path, caplog):
        folder = toy.write_dicom(tmp_path / "series")
        first = str(folder / "slice001.dcm")
        assert find_volumes(f"{folder}/*.dcm") == find_volumes([first, str(folder / "slice002.dcm")]) == [first]
        assert find_volumes([str(folder), first]) == [str(folder)]
        caplog.clear()
        find_volumes(f"{folder}/*.dcm")
        assert f"skipped: 5 more slices of the series of {first}" in [record.getMessage() for record in caplog.records]

    def test_series_filed_in_parts_is_not_taken_for_several(self, tmp_path, caplog):
        folder = toy.write_dicom(tmp_path / "all" / "a")
        toy.write_dicom(tmp_path / "all" / "other")
        (tmp_path / "all" / "b").mkdir()
        for file in sorted(folder.iterdir())[1::2]:
            file.rename(tmp_path / "all" / "b" / file.name)
        assert find_volumes(tmp_path / "all") == [str(tmp_path / "all" / "other")]
        assert "hold parts of one series; put them into one folder" in caplog.text

    def test_copied_series_is_done_once(self, tmp_path, caplog):
        t1 = toy.write_dicom(tmp_path / "t1")
        again = shutil.copytree(t1, tmp_path / "t2" / "t1")
        part = shutil.copytree(t1, tmp_path / "a part of t1")
        (part / "slice006.dcm").unlink()
        other = toy.write_dicom(tmp_path / "mixed")
        uid, other_uid = (pydicom.dcmread(folder / "slice001.dcm").SeriesInstanceUID for folder in (t1, other))
        for path in t1.iterdir():
            shutil.copy(path, other / f"t1 {path.name}")
        masked = shutil.copytree(t1, tmp_path / "t1 masked")  # same UIDs, other pixels
        toy_dicom.edit(lambda ds, number: setattr(ds, "PixelData", (ds.pixel_array * (number > 1)).tobytes()), masked)
        assert find_volumes(tmp_path) == sorted(str(path) for path in (t1, other / other_uid, masked))
        for copy in (again, part, other / uid):
            assert f"skipped: {copy}: a copy of slices in {t1}" in caplog.text
        assert find_volumes([str(t1), str(part)]) == [str(part), str(t1)]  # named by the user

    def test_changed_neighbour_changes_the_series_of_a_slice(self, tmp_path):
        folder = toy.write_mixed(tmp_path / "two")
        files = sorted(folder.iterdir())
        one, other = str(files[0]), str(files[-1])
        before = fingerprint(one), fingerprint(other)
        assert (before[0]["files"], before[1]["files"]) == (6, 4)
        assert before[0] == fingerprint(str(folder / pydicom.dcmread(one).SeriesInstanceUID))
        os.utime(files[1], ns=(0, 2**62))
        assert fingerprint(one) != before[0]
        assert fingerprint(other) == before[1]
        assert fingerprint(str(folder))["files"] == 10

    def test_picture_without_a_place_is_passed_over_beside_slices(self, tmp_path, caplog):
        folder = toy.write_dicom(tmp_path / "series")
        ds = pydicom.dcmread(folder / "slice003.dcm")
        del ds.ImagePositionPatient, ds.ImageOrientationPatient
        ds.SOPInstanceUID = "1.2.3"
        ds.save_as(folder / "picture")
        assert find_volumes(folder) == [str(folder)]
        assert "picture (does not say where it lies)" in caplog.text
        np.testing.assert_array_equal(load(folder)[0], toy.head())

    def test_enhanced_files_and_frames_of_several_echoes_are_told_apart(self, tmp_path):
        folder = toy_dicom.two_echoes(tmp_path / "series", numbered=False)
        times = [float(pydicom.dcmread(path).EchoTime) for path in sorted(folder.iterdir())]
        toy.enhance_dicom(folder)
        ds = pydicom.dcmread(folder / "frames.dcm")
        for group, time in zip(ds.PerFrameFunctionalGroupsSequence, times):
            group.MREchoSequence = [pydicom.Dataset()]
            group.MREchoSequence[0].EffectiveEchoTime = time
        del ds.EchoTime
        ds.save_as(folder / "frames.dcm")
        assert names_of(folder) == ["_te20", "_te80"]
        np.testing.assert_array_equal(load(find_volumes(folder)[0])[0], toy.head())


@pytest.mark.parametrize("uid", ["../../evil", "/tmp/evil", "1.2/3.4", "..", "a\\b"])
def test_a_series_uid_is_not_a_path(uid, tmp_path):
    folder = tmp_path / "in"
    toy_dicom.series(folder, lambda ds, n: setattr(ds, "SeriesInstanceUID", uid))
    other = toy_dicom.series(tmp_path / "other")
    for file in sorted(other.iterdir()):
        file.rename(folder / f"other_{file.name}")
    found = find_volumes(folder)
    assert len(found) == 2
    for path in found:
        assert Path(path).parent == folder
        np.testing.assert_array_equal(load(path)[0], toy.head())


@pytest.mark.parametrize("name", ["T1.nii", "T1.img", "T1.nrrd"])
def test_a_folder_may_be_named_like_a_file(name, tmp_path):
    folder = toy_dicom.series(tmp_path / name)
    np.testing.assert_array_equal(load(folder)[0], toy.head())
    assert find_volumes(folder) == [str(folder)]


class TestLoading:
    def test_facts_of_the_header_are_kept(self, tmp_path):
        folder = toy_dicom.series(tmp_path / "series", lambda ds, n: setattr(ds, "SliceThickness", "1.6"))
        image = load(folder)
        assert (image.meta["modality"], image.meta["slice_thickness"]) == ("MR", 1.6)
        assert image.meta["slice_spacing"] == pytest.approx(2)
        assert image.meta["remarks"] == "slices 1.6 mm thick lie 2 mm apart: a gap of 0.4 mm"
        np.testing.assert_allclose(image.affine, toy.affine() @ np.eye(4), atol=1e-5)

    def test_gap_is_known_when_the_result_is_acquired_again(self, tmp_path):
        image = load(toy_dicom.series(tmp_path / "series", lambda ds, n: setattr(ds, "SliceThickness", "1.6")))
        image = IsotropicFactorsd("image", spacing=1)({"image": image})["image"]
        assert image.meta["slice_width"] == pytest.approx(0.8)  # slices 2 mm apart
        truth = torch.rand(1, 12, 10, 24)
        scan = sampled(truth[0], [Sampling(), Sampling(), Sampling(2, "box", 0.8)])
        finer = MetaTensor(truth, meta={**image.meta, "factor": [1, 1, 2.0]})
        found = Consistencyd(["image", "pred"])({"before": scan[None], "image": finer, "pred": finer})
        assert (found["acquisition"], found["consistency"]["result"] > 80) == ("box", True)

    def test_one_file_stands_for_its_series(self, tmp_path):
        folder = toy.write_dicom(tmp_path / "series")
        image = load(folder / "slice003.dcm")
        np.testing.assert_array_equal(image[0], toy.head())
        assert image.meta["remarks"] == "one of 6 slices: the whole series beside it is taken"
        assert image.meta["filename_or_obj"] == str(folder / "slice003.dcm")

    def test_single_slice_has_the_thickness_of_its_header(self, tmp_path):
        folder = toy.write_dicom(tmp_path / "series", toy.head((40, 36, 1)))
        image = load(folder)
        np.testing.assert_allclose(image.pixdim, (1, 1, 2), atol=1e-6)
        assert image.meta["remarks"] == "a single slice, 2 mm thick by its header"

    def test_slices_that_may_be_missing_evenly_are_told(self, tmp_path):
        folder = toy_dicom.series(tmp_path / "series", lambda ds, n: setattr(ds, "SpacingBetweenSlices", "2"))
        for path in sorted(folder.iterdir())[1::2]:
            path.unlink()
        assert load(folder).meta["remarks"] == "slices lie 4 mm apart, 2 mm by the header: some may be missing"

    def test_copies_and_mosaics_and_inversion_are_told(self, tmp_path):
        remarks = [load_series(what(tmp_path / str(n)).path).meta["remarks"] for n, what in enumerate(toy_dicom.ODD_VOLUMES.values())]
        told = dict(zip(toy_dicom.ODD_VOLUMES, remarks))
        assert (
            told["DICOM: every file twice"] == "6 copies of slices are left out (slice001 (1).dcm, slice002 (1).dcm, slice003 (1).dcm, ...)"
        )
        assert told["DICOM: a Siemens mosaic"] == "a Siemens mosaic, unfolded to 6 slices"
        assert told["DICOM: MONOCHROME1"].startswith("MONOCHROME1, the smallest value is white")
        assert told["DICOM: no preamble"] == told["DICOM, enhanced: another slope in each frame"] == ""

    def test_missing_series_is_named(self, tmp_path):
        folder = toy.write_mixed(tmp_path / "mixed")
        with pytest.raises(InputError, match=r"mixed: holds 2 DICOM series; name one of them"):
            load(folder)
        with pytest.raises(InputError, match=r"1\.2\.3: no such file, folder or DICOM series"):
            load(folder / "1.2.3")


@pytest.fixture
def infer(tmp_path):
    weights = toy.save_checkpoint(tmp_path / "weights" / "random.pt")

    def infer(dataset_dir, configs=("inference.json",), **options):
        excepthook = sys.excepthook
        out = tmp_path / "out"
        options = {"checkpoint": str(weights), **toy.TINY_INFERENCE, **options}
        monai.bundle.run(
            config_file=[str(ROOT / "configs" / name) for name in configs],
            dataset_dir=str(dataset_dir),
            output_dir=str(out),
            device="$torch.device('cpu')",
            **options,
        )
        sys.excepthook = excepthook
        return out

    return infer


def agree(folder, nifti, tolerance):
    """Check that a DICOM series, read by this package and by ITK, is the volume of a NIfTI file."""
    expected = nib.as_closest_canonical(nib.load(nifti))
    ours = load_series(folder)
    pixels = itk.imread([str(path) for path in sorted(folder.iterdir())], itk.F, imageio=itk.GDCMImageIO.New())
    direction, spacing = itk.array_from_matrix(pixels.GetDirection()), np.asarray(pixels.GetSpacing())
    itk_affine = np.diag([-1.0, -1, 1, 1]) @ nib.affines.from_matvec(direction * spacing, np.asarray(pixels.GetOrigin()))
    volumes = [(ours[0].numpy(), ours.affine.numpy()), (itk.array_from_image(pixels).T, itk_affine)]
    for array, affine in volumes:
        found = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
        assert found.shape == expected.shape
        corners = np.stack(np.meshgrid(*([0, n - 1] for n in found.shape), indexing="ij"), -1)
        there, right = (nib.affines.apply_affine(v.affine, corners) for v in (found, expected))
        np.testing.assert_allclose(there, right, atol=1e-3)
        np.testing.assert_allclose(found.get_fdata(), expected.get_fdata(), atol=tolerance)
    return ours


class TestDicomOut:
    TO_WORLD = toy.affine((0.9, 1.1, 2.5), (10, -5, 20))

    @pytest.fixture
    def done(self, infer, tmp_path):
        folder = toy.write_dicom(tmp_path / "scan", toy.head(), self.TO_WORLD)
        return folder, infer(folder, dicom="true")

    def test_series_is_the_volume_of_the_nifti(self, done):
        source, out = done
        image = agree(out / "scan_sr_dicom", out / "scan_sr.nii.gz", 0.51)
        assert image.shape == (1, 80, 72, 6)
        before, after = (load_series(folder).meta for folder in (source, out / "scan_sr_dicom"))
        assert before["slice_thickness"] == after["slice_thickness"] == 2.5

    def test_patient_study_and_place_are_kept_and_the_rest_is_new(self, done):
        source, out = done
        before = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
        after = [pydicom.dcmread(path) for path in sorted((out / "scan_sr_dicom").iterdir())]
        for key in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "FrameOfReferenceUID", "Modality"):
            assert {ds[key].value for ds in after} == {before[0][key].value}
        assert len({ds.SOPInstanceUID for ds in after} | {ds.SOPInstanceUID for ds in before}) == 12
        (series,) = {ds.SeriesInstanceUID for ds in after}
        assert series != before[0].SeriesInstanceUID
        assert after[0].ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert after[0].SeriesDescription.startswith("brain_mri_super_resolution ")
        assert after[0].BurnedInAnnotation == "NO"
        assert [ds.SourceImageSequence[0].ReferencedSOPInstanceUID for ds in after] == [ds.SOPInstanceUID for ds in before]
        assert [ds.InstanceNumber for ds in after] == [1, 2, 3, 4, 5, 6]

    def test_private_elements_and_what_is_about_the_source_s_pixels_are_not_copied(self, infer, tmp_path):
        def change(ds, number):
            ds.private_block(0x0029, "SOMEBODY", create=True).add_new(1, "LO", "secret")
            ds.AcquisitionMatrix, ds.PixelBandwidth, ds.PatientAge = [0, 36, 40, 0], 130, "42"
            ds.EchoTime, ds.SeriesNumber = 3.5, 7

        out = infer(toy_dicom.series(tmp_path / "scan", change), dicom=True)
        ds = pydicom.dcmread(out / "scan_sr_dicom" / "0001.dcm")
        assert not [element for element in ds if element.tag.is_private]
        assert not {"AcquisitionMatrix", "PixelBandwidth", "PatientAge"} & set(ds.dir())  # the age wants a unit: not valid
        assert (ds.EchoTime, ds.SeriesNumber) == (3.5, 1007)

    @pytest.mark.parametrize("peak", [1.5, 200, 30000])
    def test_values_agree_whatever_their_range(self, peak, infer, tmp_path):
        step = peak / 1000

        def change(ds, number):
            toy_dicom.set_values(ds, toy.head()[..., number] * step, step, 0)

        out = infer(toy_dicom.series(tmp_path / "scan", change), dicom=True)
        agree(out / "scan_sr_dicom", out / "scan_sr.nii.gz", step)

    def test_same_input_and_settings_give_the_same_uids(self, done, infer):
        def uids():
            return [pydicom.dcmread(path).SOPInstanceUID for path in sorted((out / "scan_sr_dicom").iterdir())]

        source, out = done
        first = uids()
        infer(source, dicom=True, overwrite=True)
        assert uids() == first
        infer(source, dicom=True, scale=1.5)
        assert not set(uids()) & set(first)

    def test_sagittal_and_isotropic(self, infer, tmp_path):
        array, to_world = toy.stored_as("PIR", toy.head((6, 36, 40)), toy.affine((3, 1, 1), (6, 4, 15)))
        toy.write_dicom(tmp_path / "in" / "scan", array, to_world)
        out = infer(tmp_path / "in", dicom=True)
        image = agree(out / "scan_sr_dicom", out / "scan_sr.nii.gz", 0.51)
        assert (round(image.meta["slice_thickness"], 6), image.shape) == (1.5, (1, 72, 40, 12))
        random = str(toy.save_checkpoint(tmp_path / "weights" / "isotropic.pt"))
        out = infer(
            tmp_path / "in",
            ("inference.json", "isotropic.json"),
            dicom=True,
            checkpoint=random,
            positions=False,
            network_def={"_target_": "bundle.networks.MultiScaleResidualNet", **toy.TINY},
        )
        image = agree(out / "scan_sr_dicom", out / "scan_sr.nii.gz", 0.51)
        assert (round(image.meta["slice_thickness"], 6), image.shape) == (1, (1, 36, 40, 18))

    def test_mosaic_and_enhanced_give_a_series_too(self, infer, tmp_path):
        toy_dicom.mosaic(toy.write_dicom(tmp_path / "in" / "mosaic"))
        toy_dicom.enhance(toy.write_dicom(tmp_path / "in" / "enhanced"), [3, 0, 5, 1, 4, 2], toy_dicom.SLOPES)
        out = infer(tmp_path / "in", dicom=True)
        for name in ("mosaic", "enhanced"):
            agree(out / f"{name}_sr_dicom", out / f"{name}_sr.nii.gz", 0.51)
        ds = pydicom.dcmread(out / "enhanced_sr_dicom" / "0001.dcm")
        assert ds.SourceImageSequence[0].ReferencedFrameNumber == 2  # the frame that lies lowest
        assert "MOSAIC" not in pydicom.dcmread(out / "mosaic_sr_dicom" / "0001.dcm").ImageType

    def test_it_is_no_input_where_it_lies_among_scans(self, infer, tmp_path, done):
        source, out = done
        shutil.copytree(out / "scan_sr_dicom", tmp_path / "all" / "scan_sr_dicom")
        shutil.copytree(source, tmp_path / "all" / "scan")
        assert find_volumes(tmp_path / "all") == [str(tmp_path / "all" / "scan")]
        for path in (out / "scan_sr_dicom").iterdir():
            shutil.copy(path, tmp_path / "all" / "scan" / f"result {path.name}")
        (path,) = find_volumes(tmp_path / "all")
        np.testing.assert_array_equal(load(path)[0], toy.head())
        assert find_volumes(out / "scan_sr_dicom") == [str(out / "scan_sr_dicom")]  # it may be given itself

    def test_other_input_is_warned_about(self, infer, tmp_path, capfd):
        out = infer(toy.write_nifti(tmp_path / "in" / "a.nii.gz"), dicom=True)
        assert sorted(path.name for path in out.iterdir()) == ["a_sr.json", "a_sr.nii.gz", "a_sr.png"]
        assert "a.nii.gz: not DICOM, so no DICOM is written" in capfd.readouterr().out
        before = (out / "a_sr.json").stat().st_mtime_ns
        infer(tmp_path / "in" / "a.nii.gz", dicom=True)
        assert (out / "a_sr.json").stat().st_mtime_ns == before  # done, all the same

    def test_it_is_made_where_it_is_missing_and_goes_with_its_result(self, infer, done):
        source, out = done
        before = (out / "scan_sr.nii.gz").stat().st_mtime_ns
        infer(source, dicom=True)
        assert (out / "scan_sr.nii.gz").stat().st_mtime_ns == before
        shutil.rmtree(out / "scan_sr_dicom")
        infer(source, dicom=True)
        assert len(list((out / "scan_sr_dicom").iterdir())) == 6
        infer(source, scale=1.5)
        assert not (out / "scan_sr_dicom").exists()  # it would be another result's

    def test_failed_or_killed_write_leaves_nothing_half_written(self, infer, tmp_path, monkeypatch):
        folder = toy.write_dicom(tmp_path / "scan")
        (tmp_path / "out" / ".part-4711-scan_sr_dicom").mkdir(parents=True)
        infer(folder, dicom=True)
        assert not list((tmp_path / "out").glob(".part*"))
        (tmp_path / "out" / "scan_sr_dicom" / "notes.txt").touch()
        with pytest.raises(Exception) as error:
            infer(folder, dicom=True, overwrite=True)
        assert "scan_sr_dicom: in the way, and not of this program" in reason(error.value)
        assert [path.name for path in (tmp_path / "out" / "scan_sr_dicom").iterdir()] == ["notes.txt"]

    def test_the_folder_of_another_series_is_not_removed(self, tmp_path):
        (tmp_path / ".part-4711-other-scan_sr_dicom").mkdir()
        (tmp_path / ".part-4711-scan_sr_dicom").mkdir()
        write_folder(tmp_path / "scan_sr_dicom", lambda part: (part / "0001.dcm").touch())
        assert sorted(path.name for path in tmp_path.iterdir()) == [".part-4711-other-scan_sr_dicom", "scan_sr_dicom"]

    def test_validator_finds_no_error(self, done, infer, tmp_path):
        if not shutil.which("dciodvfy"):
            pytest.skip("needs dciodvfy (Debian: dicom3tools)")
        toy_dicom.enhance(toy.write_dicom(tmp_path / "in" / "enhanced"), [3, 0, 5, 1, 4, 2], toy_dicom.SLOPES)
        for folder in (done[1] / "scan_sr_dicom", infer(tmp_path / "in", dicom=True) / "enhanced_sr_dicom"):
            for path in folder.iterdir():
                found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
                assert "MRImage" in found
                assert not [line for line in found.splitlines() if line.startswith("Error")], found

    def test_dcm2niix_reads_the_same_grid(self, done):
        _, out = done
        if not shutil.which("dcm2niix"):
            pytest.skip("needs dcm2niix")
        subprocess.run(["dcm2niix", "-o", str(out), "-f", "back", str(out / "scan_sr_dicom")], check=True, capture_output=True)
        one, other = (nib.as_closest_canonical(nib.load(out / name)) for name in ("back.nii", "scan_sr.nii.gz"))
        np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)
        np.testing.assert_allclose(one.get_fdata(), other.get_fdata(), atol=0.51)


@pytest.mark.parametrize("name", ["siemens_dwi_1000", "philips_mprage"])
def test_scanners_files_lie_where_nibabel_has_them(name, tmp_path):
    """A Siemens mosaic with its private header, and enhanced DICOM of a Philips; their pixels were blanked."""
    packed = Path(nib.__file__).parent / "nicom" / "tests" / "data" / f"{name}.dcm.gz"
    if not packed.exists():
        pytest.skip("needs the test data of nibabel")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(gzip.decompress(packed.read_bytes()))
    image = load_series(tmp_path / "in")
    theirs = wrapper_from_file(str(tmp_path / "in" / "a"))
    shape, affine = theirs.image_shape, np.diag([-1, -1, 1, 1]) @ theirs.affine
    one, other = (nib.as_closest_canonical(nib.Nifti1Image(np.zeros(s), a)) for s, a in ((image.shape[1:], image.affine), (shape, affine)))
    assert one.shape == other.shape
    np.testing.assert_allclose(one.affine, other.affine, atol=2e-3)  # nibabel keeps direction cosines as they are rounded
    image.meta["factor"] = [1, 1]
    image += torch.arange(image.shape[1])[:, None, None] / 10
    ds = derived_series(image, {})[-1]
    assert [element for element in ds if element.tag.is_private] == []
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    write_folder(tmp_path / "out", lambda folder: write_file(folder / "a.dcm", ds))
    if shutil.which("dciodvfy"):
        found = subprocess.run(["dciodvfy", str(tmp_path / "out" / "a.dcm")], capture_output=True, text=True).stderr
        assert not [line for line in found.splitlines() if line.startswith("Error")], found


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs {REAL}")
def test_real_series_comes_back_as_dicom(infer):
    out = infer(REAL, dicom=True, axial_slices=[3, 6])
    image = agree(out / "dicom_t1_sr_dicom", out / "dicom_t1_sr.nii.gz", 0.51)
    assert image.shape == (1, 548, 768, 4)
    before = pydicom.dcmread(next(REAL.glob("*.dcm")))
    after = pydicom.dcmread(out / "dicom_t1_sr_dicom" / "0001.dcm")
    for key in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert before[key].value == after[key].value
