import contextlib
import csv
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy
import toy_dicom
from monai.data import MetaTensor
from PIL import Image

from bundle.errors import reason
from bundle.inferers import OrthogonalSlices
from bundle.intensity import find_scale
from bundle.resampling import upsample
from bundle.results import Consistencyd, SaveVolumed

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "inference.json")
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """``"random"`` weights, and those of an ``"untrained"`` network, which returns the interpolated volume."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: str(toy.save_checkpoint(folder / f"{name}.pt", random=name == "random")) for name in ("random", "untrained")}


@pytest.fixture
def infer(checkpoints, tmp_path, monkeypatch):
    """``infer(dataset_dir, overrides)``: run ``configs/inference.json`` in this process; returns the output folder."""

    def run(dataset_dir, weights="random", output_dir=None, overlays=(), **overrides):
        output_dir = Path(output_dir or tmp_path / "out")
        given = {"checkpoint": checkpoints[weights], "device": "cpu", "clip": False, **toy.TINY_INFERENCE, **overrides}
        files = [CONFIG, *(str(ROOT / "configs" / f"{overlay}.json") for overlay in overlays)]
        monai.bundle.run(config_file=files, dataset_dir=str(dataset_dir), output_dir=str(output_dir), **given)
        return output_dir

    return run


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def canonical(path):
    return nib.as_closest_canonical(nib.load(path))


def outlying(array):
    """With bright and dark voxels far off the scale of the rest."""
    array = array.copy()
    array[9, 11, 2], array[16, 5, 1], array[15, 15, 0] = 30000, -4000, 12000
    return array


# what is stored how: orientation, size along R, A, S, degrees about x, y, z, arguments of write_nifti
GEOMETRIES = {
    "axial": ("RAS", (20, 22, 4), (0, 0, 0), {}),
    "oblique": ("RAS", (21, 23, 5), (14, -9, 25), {}),
    "radiological": ("LAS", (21, 18, 3), (0, 0, 0), {"dtype": np.int16}),
    "flipped": ("LPI", (20, 23, 4), (5, 10, -7), {"dtype": np.float64}),
    "sagittal": ("PIR", (21, 19, 7), (-8, 3, 12), {}),
    "coronal": ("RSA", (22, 17, 6), (4, 0, -20), {"dtype": np.int32}),
    "int16 with a slope": ("SPL", (23, 20, 5), (3, -11, 6), {"dtype": np.int16, "slope": 2.5, "inter": 10.0}),
}


@pytest.fixture(params=GEOMETRIES)
def stored(request, tmp_path):
    """A volume with outlying voxels, stored in one of the ways of ``GEOMETRIES``."""
    axcodes, shape, degrees, arguments = GEOMETRIES[request.param]
    array, to_world = toy.stored_as(axcodes, outlying(toy.head(shape)), toy.affine((0.9, 1.2, 3.0), degrees, (-80, 95, -60)))
    return toy.write_nifti(tmp_path / "in" / "sub.nii.gz", array, to_world, **arguments)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS"])
def test_only_the_result_is_in_memory_while_it_is_saved(axcodes, infer, tmp_path, monkeypatch):
    scan = toy.write_nifti(tmp_path / "in" / "sub.nii.gz", *toy.stored_as(axcodes, toy.head((30, 34, 9)), toy.affine()))

    def large():
        gc.collect()
        tensors = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.numel() >= 60 * 68 * 9)
        return {item.untyped_storage().data_ptr(): item for item in tensors}

    save, held = SaveVolumed.__call__, []
    before = large()  # other tests may have left some; kept alive, so that no new one gets their place

    def saved(self, data):
        held.append(len(large().keys() - before.keys()))
        return save(self, data)

    monkeypatch.setattr(SaveVolumed, "__call__", saved)
    infer(scan)
    assert held == [1]


class TestGeometryAndIntensity:
    def test_result_stands_where_the_volume_stood_in_its_units(self, infer, stored):
        out = infer(stored, "untrained")
        before, after = nib.load(stored), nib.load(out / "sub_sr.nii.gz")
        axcodes = nib.aff2axcodes(before.affine)
        factors = np.array([1 if code in "SI" else 2 for code in axcodes])
        assert nib.aff2axcodes(after.affine) == axcodes
        assert after.shape == tuple(factors * before.shape)

        index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
        expected = nib.affines.apply_affine(before.affine, (index + 0.5) / factors - 0.5)
        np.testing.assert_allclose(nib.affines.apply_affine(after.affine, index), expected, atol=1e-4)
        np.testing.assert_allclose(after.get_qform(), after.affine, atol=1e-4)
        assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (2, 2)  # as in the input
        assert after.header.get_xyzt_units()[0] == "mm"

        assert after.get_data_dtype() == np.float32
        expected = toy.bicubic(canonical(stored).get_fdata(), 2)  # no clipping
        np.testing.assert_allclose(canonical(out / "sub_sr.nii.gz").get_fdata(), expected, atol=0.02)

    def test_trained_network_changes_the_intensities_only(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "sub.nii.gz", toy.head((20, 22, 4)), toy.affine((1, 1.1, 3), (5, 6, 7)))
        plain, other = (nib.load(infer(path, weights, tmp_path / weights) / "sub_sr.nii.gz") for weights in ("untrained", "random"))
        np.testing.assert_array_equal(other.affine, plain.affine)
        assert np.abs(other.get_fdata() - plain.get_fdata()).max() > 1

    def test_report_is_about_what_is_written(self, infer, tmp_path):
        head = toy.head((20, 22, 4))
        path = toy.write_nifti(tmp_path / "a.nii.gz", head)
        scale, told, measured = find_scale(head).scale, [], []
        for clip in (True, False):
            out = infer(path, output_dir=tmp_path / str(clip), clip=clip)
            told.append(json.loads((out / "a_sr.json").read_text())["consistency_db"]["result"])
            written = MetaTensor(canonical(out / "a_sr.nii.gz").get_fdata()[None] / scale, meta={"factor": [2, 2], "filename_or_obj": "a"})
            sample = Consistencyd(("image", "pred"))({"image": written, "pred": written, "before": head[None] / scale})
            measured.append(sample["consistency"]["result"])
        assert told == pytest.approx(measured, abs=0.02)
        assert abs(told[0] - told[1]) > 0.1

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are text")
    def test_a_file_name_that_is_not_utf8_is_kept(self, infer, tmp_path):
        source, bad = tmp_path / "in", "scan_\udce9"
        toy.write_nifti(source / "ok.nii.gz", toy.head((20, 22, 4))).rename(source / f"{bad}.nii.gz")
        toy.write_nifti(source / "ok.nii.gz", toy.head((20, 22, 4)))
        (source / "damaged_\udce9.nii.gz").write_bytes(b"nothing")
        with pytest.raises(RuntimeError):
            infer(source, report=True)
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {f"{bad}_sr.{ending}" for ending in ("nii.gz", "json", "html", "png")} <= names
        assert {"failed.csv", "index.html", "ok_sr.nii.gz"} <= names

    def test_a_file_that_is_no_result_is_not_overwritten(self, infer, tmp_path):
        for name, seed in (("a", 0), ("a_sr", 1), ("b", 2)):
            toy.write_nifti(tmp_path / "in" / f"{name}.nii.gz", toy.head((20, 22, 4), seed=seed))
        before = (tmp_path / "in" / "a_sr.nii.gz").read_bytes()
        with pytest.raises(RuntimeError) as error:
            infer(tmp_path / "in", output_dir=tmp_path / "in")
        assert "is in the way, and not of this program" in reason(error.value)
        assert (tmp_path / "in" / "a_sr.nii.gz").read_bytes() == before
        assert (tmp_path / "in" / "b_sr.nii.gz").exists()

    def test_storage_order_does_not_matter(self, infer, tmp_path):
        head, to_world = outlying(toy.head((21, 22, 4))), toy.affine((1, 1.1, 3), (5, 6, 7))
        orders = ("RAS", "LAS", "RPS", "RAI", "LPI", "ASR")
        for axcodes in orders:
            toy.write_nifti(tmp_path / "in" / f"{axcodes}.nii.gz", *toy.stored_as(axcodes, head, to_world))
        out = infer(tmp_path / "in")
        one = nib.load(out / "RAS_sr.nii.gz")
        for axcodes in orders[1:]:
            other = nib.load(out / f"{axcodes}_sr.nii.gz")
            array, to_world = toy.stored_as(axcodes, one.get_fdata(), one.affine)
            np.testing.assert_array_equal(other.get_fdata(), array, err_msg=axcodes)
            np.testing.assert_allclose(other.affine, to_world, atol=1e-4, err_msg=axcodes)

    @pytest.mark.parametrize("scale", [1, 2, 3, 4])
    def test_scale_is_that_asked_for(self, scale, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((21, 18, 3)))
        after = nib.load(infer(path, "untrained", scale=scale) / "a_sr.nii.gz")
        assert after.shape == (21 * scale, 18 * scale, 3)
        np.testing.assert_allclose(after.header.get_zooms(), (1 / scale, 1 / scale, 2), rtol=1e-5)
        np.testing.assert_allclose(after.get_fdata(), toy.bicubic(toy.head((21, 18, 3)), scale), atol=0.01)

    @pytest.mark.parametrize("scale", [2.5, [2, 3], [1, 1.5]], ids=str)
    @pytest.mark.parametrize("stored", ["oblique", "sagittal", "int16 with a slope"], indirect=True)
    def test_scale_may_be_any_and_one_for_each_axis(self, scale, infer, stored):
        out = infer(stored, "untrained", scale=scale)
        before, after = canonical(stored), canonical(out / "sub_sr.nii.gz")
        factors = np.array([*np.broadcast_to(scale, 2), 1])
        assert after.shape == tuple(np.floor(factors * before.shape))
        index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
        expected = nib.affines.apply_affine(before.affine, (index + 0.5) / factors - 0.5)
        np.testing.assert_allclose(nib.affines.apply_affine(after.affine, index), expected, atol=1e-4)
        report = json.loads((out / "sub_sr.json").read_text())
        assert report["factor"] == pytest.approx(factors[:2])
        assert report["consistency_db"]["result"] > 25  # of the head: the outlying voxels do not set the scale

    def test_spacing_is_that_asked_for_whatever_the_file_has(self, infer, tmp_path):
        for name, spacing in (("a", (0.9, 1.2, 3)), ("b", (1.5, 0.5, 2))):
            toy.write_nifti(tmp_path / "in" / f"{name}.nii.gz", toy.head((20, 22, 3)), toy.affine(spacing, (5, 6, 7)))
        out = infer(tmp_path / "in", "untrained", spacing=0.6)
        for name, zooms, factor in (("a", (0.6, 0.6, 3), (1.5, 2)), ("b", (0.6, 0.5, 2), (2.5, 1))):
            np.testing.assert_allclose(nib.load(out / f"{name}_sr.nii.gz").header.get_zooms(), zooms, rtol=1e-5)
            report = json.loads((out / f"{name}_sr.json").read_text())
            assert report["factor"] == pytest.approx(factor)
            assert report["statistics"]["spacing_x"] == pytest.approx(zooms[0])
            assert report["settings"]["spacing"] == 0.6

    @pytest.mark.parametrize("axcodes", ["RAS", "LPI", "IPR"])
    def test_axial_slices_are_counted_from_the_inferior_end(self, axcodes, infer, tmp_path):
        head = toy.head((20, 22, 6))
        path = toy.write_nifti(tmp_path / "a.nii.gz", *toy.stored_as(axcodes, head, toy.affine()))
        out = infer(path, "untrained", axial_slices=[2, 4])
        after = canonical(out / "a_sr.nii.gz")
        assert nib.aff2axcodes(nib.load(out / "a_sr.nii.gz").affine) == tuple(axcodes)
        # the intensity scale is that of the whole volume
        np.testing.assert_allclose(after.get_fdata(), toy.bicubic(head[..., 1:4], 2), atol=0.01)
        np.testing.assert_allclose(after.affine[:, 3], toy.affine() @ [-0.25, -0.25, 1, 1], atol=1e-4)

    @pytest.mark.parametrize("factor", [1e-4, 1e6])
    def test_units_do_not_matter(self, factor, infer, tmp_path):
        for name, units in (("a", 1), ("b", factor)):
            toy.write_nifti(tmp_path / "in" / f"{name}.nii.gz", toy.head((20, 22, 3)) * units)
        out = infer(tmp_path / "in")
        one, other = (nib.load(out / f"{name}_sr.nii.gz").get_fdata() for name in "ab")
        np.testing.assert_allclose(other / factor, one, atol=0.01)

    def test_one_slice_is_a_volume(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 1)))
        after = nib.load(infer(path, "untrained") / "a_sr.nii.gz")
        assert after.shape == (40, 44, 1)
        np.testing.assert_allclose(after.get_fdata(), toy.bicubic(toy.head((20, 22, 1)), 2), atol=0.01)


class TestThickSlices:
    # how it is stored, spacing along R, A and S; slices are axial, coronal, sagittal; some are coarse or not square in-plane too
    VOLUMES = {  # noqa: RUF012
        "axial": ("LPS", (1, 1, 4), {}, (1, 1, 1)),
        "coronal": ("RSA", (1, 3.3, 1), {}, (1, 1, 1)),
        "sagittal": ("PIR", (5, 0.9, 1.2), {}, (0.9, 0.9, 0.9)),
        "coarse": ("RAS", (1.6, 1.6, 4), {"spacing": 0.8}, (0.8, 0.8, 0.8)),
        "fine in-plane": ("ASR", (2, 0.5, 0.7), {"spacing": 1}, (1, 0.5, 0.7)),
    }

    @pytest.mark.parametrize("name", VOLUMES)
    def test_voxels_become_as_small_along_every_axis_and_nothing_moves(self, name, infer, tmp_path):
        axcodes, spacing, options, expected = self.VOLUMES[name]
        shape, to_world = (15, 16, 14), toy.affine(spacing, (12, -7, 9))
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)

        def intensity(points):
            return points @ [2.0, -1.0, 1.5] + 500

        linear = intensity(nib.affines.apply_affine(to_world, index))
        path = toy.write_nifti(tmp_path / "a.nii.gz", *toy.stored_as(axcodes, linear, to_world))
        tiny = {"network_def": {"_target_": "bundle.networks.MultiScaleResidualNet", **toy.TINY}, "positions": False}
        out = infer(path, "untrained", overlays=["isotropic"], **tiny, **options)
        assert nib.aff2axcodes(nib.load(out / "a_sr.nii.gz").affine) == tuple(axcodes)
        before, after = canonical(path), canonical(out / "a_sr.nii.gz")
        np.testing.assert_allclose(after.header.get_zooms(), expected, rtol=1e-5)
        factors = np.array(spacing) / expected
        assert after.shape == tuple(np.floor(factors * shape + 0.01))
        index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
        given_index = (index + 0.5) / factors - 0.5
        points = nib.affines.apply_affine(before.affine, given_index)
        np.testing.assert_allclose(nib.affines.apply_affine(after.affine, index), points, atol=1e-4)
        inner = np.all((given_index >= 5) & (given_index <= np.array(shape) - 6), -1)  # a spline feels the borders from afar
        assert inner.any()
        np.testing.assert_allclose(after.get_fdata()[inner], intensity(points)[inner], atol=0.05)
        assert files_below(out) == ["a_sr.json", "a_sr.nii.gz", "a_sr.png"]
        assert json.loads((out / "a_sr.json").read_text())["consistency_db"]["result"] > 25

    def test_a_scale_is_refused_instead_of_ignored(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", to_world=toy.affine((1, 1, 4)))
        tiny = {"network_def": {"_target_": "bundle.networks.MultiScaleResidualNet", **toy.TINY}, "positions": False}
        with pytest.raises(Exception) as error:
            infer(path, overlays=["isotropic"], scale=3, **tiny)
        assert "scale is 3, but isotropic voxels have the size that spacing says" in whole_story(error.value)

    def test_network_sees_the_two_families_of_planes_with_the_thick_axis(self):
        seen = []

        def network(planes):
            seen.append(planes.shape[2:])
            return planes + len(seen) // 5  # 4 planes of the first family, then 5 of the second

        result = OrthogonalSlices(skip_background=False)(torch.zeros(1, 1, 4, 5, 6), network)
        assert seen == [(6, 5)] * 4 + [(6, 4)] * 5  # the slices lie across the rows
        first, second = torch.tensor([0.0, 0, 0, 0]), torch.tensor([1.0, 1, 1, 1, 1])
        torch.testing.assert_close(result[0, 0, ..., 0], (first[:, None] + second) / 2)


class TestWithoutWeights:
    @pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
    def test_interpolation_alone_needs_no_weights(self, mode, tmp_path, monkeypatch):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        files = [CONFIG, str(ROOT / "configs" / "networks" / f"{mode}.json")]
        monai.bundle.run(config_file=files, dataset_dir=str(path), output_dir=str(tmp_path), device="cpu", clip=False)
        expected = upsample(torch.from_numpy(toy.head((20, 22, 3))).movedim(-1, 0), 2, mode).movedim(0, -1)
        np.testing.assert_allclose(nib.load(tmp_path / "a_sr.nii.gz").get_fdata(), expected, atol=0.01)
        found = json.loads((tmp_path / "a_sr.json").read_text())["settings"]
        assert (found["weights"], found["interpolation"], found["network"]) == (None, mode, "Identity")

    def test_weights_that_nothing_loads_are_refused_in_one_line(self, infer, tmp_path):
        """The report would name weights that did not make the result."""
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, **{"handlers::0::_disabled_": True})
        assert "the handler that loads the weights is switched off: use --load_weights false" in whole_story(error.value)

    def test_another_margin_makes_another_result(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        first = times_of_change(infer(path))
        assert times_of_change(infer(path, margin=8)) == first
        second = times_of_change(infer(path, margin=16))
        assert all(second[name] > first[name] for name in first)


class TestFormatsAndNames:
    def test_formats_give_the_same_result(self, infer, tmp_path):
        head, to_world = toy.head((24, 21, 4)), toy.affine((0.9, 1.1, 3), (6, 4, 15))
        toy.write_nifti(tmp_path / "in" / "nifti.nii", head, to_world)
        toy.write_itk(tmp_path / "in" / "meta.mha", head, to_world, np.int16)
        toy.write_itk(tmp_path / "in" / "nearly.nrrd", head, to_world)
        toy.write_dicom(tmp_path / "in" / "1.2.840.113619.2", head, to_world)
        out = infer(tmp_path / "in")
        names = ("nifti", "meta", "nearly", "1.2.840.113619.2")
        assert files_below(out) == sorted(f"{name}_sr.{end}" for name in names for end in ("json", "nii.gz", "png"))
        results = [canonical(out / f"{name}_sr.nii.gz") for name in names]
        for result in results[1:]:
            np.testing.assert_allclose(result.get_fdata(), results[0].get_fdata(), atol=1e-3)
            np.testing.assert_allclose(result.affine, results[0].affine, atol=1e-4)

    def test_dicom_folder_may_be_given_itself(self, infer, tmp_path):
        out = infer(toy.write_dicom(tmp_path / "my series"))
        assert files_below(out) == ["my series_sr.json", "my series_sr.nii.gz", "my series_sr.png"]
        assert nib.load(out / "my series_sr.nii.gz").shape == (80, 72, 6)

    def test_analyze_pair_is_one_volume(self, infer, tmp_path):
        toy.write_analyze(tmp_path / "in" / "a.img", toy.head((20, 22, 3)))
        assert files_below(infer(tmp_path / "in")) == ["a_sr.json", "a_sr.nii.gz", "a_sr.png"]

    def test_folders_are_kept_so_that_equal_names_do_not_collide(self, infer, tmp_path):
        for seed, folder in enumerate(("site A/sub 1", "site A/sub 2", "sité B")):
            toy.write_nifti(tmp_path / "in" / folder / "t1.nii.gz", toy.head((20, 22, 3), seed=seed))
        out = infer(tmp_path / "in", "untrained")
        for seed, folder in enumerate(("site A/sub 1", "site A/sub 2", "sité B")):
            result = nib.load(out / folder / "t1_sr.nii.gz").get_fdata()
            np.testing.assert_allclose(result, toy.bicubic(toy.head((20, 22, 3), seed=seed), 2), atol=0.01)
        assert len(files_below(out)) == 9

    def test_volumes_with_one_result_name_are_refused_and_the_others_done(self, infer, tmp_path):
        """A series and the file converted from it often stand side by side: which one is meant?"""
        toy.write_dicom(tmp_path / "in" / "t1", toy.head((20, 22, 3), seed=1))
        toy.write_nifti(tmp_path / "in" / "t1.nii.gz", toy.head((20, 22, 3), seed=2))
        toy.write_nifti(tmp_path / "in" / "t2.nii.gz", toy.head((20, 22, 3), seed=3))
        with pytest.raises(Exception) as error:
            infer(tmp_path / "in")
        assert "2 of 3 volumes failed" in reason(error.value)
        one, other = tmp_path / "in" / "t1", tmp_path / "in" / "t1.nii.gz"
        assert f"{one}: its result would have the same name as that of {other}" in reason(error.value)
        assert files_below(tmp_path / "out") == ["failed.csv", "t2_sr.json", "t2_sr.nii.gz", "t2_sr.png"]

    def test_picture_opens(self, infer, tmp_path):
        out = infer(toy.write_nifti(tmp_path / "a.nii.gz", toy.head((21, 30, 4)), toy.affine((1, 1.6, 3))))
        with Image.open(out / "a_sr.png") as picture:
            picture.load()
            assert picture.format == "PNG"
            assert np.ptp(np.asarray(picture.convert("L"))) > 100

    def test_result_of_an_earlier_run_is_replaced(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        shape = [nib.load(infer(path, scale=scale) / "a_sr.nii.gz").shape for scale in (2, 3)]
        assert shape == [(40, 44, 3), (60, 66, 3)]

    @pytest.mark.slow
    def test_command_runs_from_any_directory(self, checkpoints, tmp_path):
        toy.write_nifti(tmp_path / "data" / "sub-01.nii.gz", toy.head((20, 22, 3)))
        done = command(tmp_path, checkpoints)
        assert done.returncode == 0, done.stderr
        assert files_below(tmp_path / "output") == ["sub-01_sr.json", "sub-01_sr.nii.gz", "sub-01_sr.png"]


def command(directory, checkpoints, *arguments, configs=(CONFIG,), launcher=("-m",), prefix=()):
    """``python -m monai.bundle run`` in ``directory``, where the default ``data`` and ``output`` are."""
    program = [*prefix, *words(checkpoints, configs, launcher), *arguments]
    return subprocess.run(program, cwd=directory, capture_output=True, text=True, env=ENVIRONMENT)


def words(checkpoints, configs=(CONFIG,), launcher=("-m",)):
    """Of the command."""
    logging = str(ROOT / "configs" / "logging.conf")
    given = {"config_file": str(list(configs)), "checkpoint": checkpoints["random"], "logging_file": logging, **toy.TINY_INFERENCE}
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [sys.executable, *launcher, "monai.bundle", "run", *options]


@contextlib.contextmanager
def as_nobody():
    """Gives a function that lets this process, if it is root's, go on as a user without special rights until the end. It skips the test if
    that user could not read the code either, as below a folder of root's alone."""
    root = os.geteuid() == 0

    def become_nobody():
        if root:
            os.seteuid(65534)
            for path in (CONFIG, torch.__file__):
                if not os.access(path, os.R_OK, effective_ids=True):
                    pytest.skip(f"{path} is closed to other users than root")

    try:
        yield become_nobody
    finally:
        if root:
            os.seteuid(0)


def times_of_change(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in files_below(folder)}


class TestStartedAgain:
    @pytest.fixture
    def two(self, tmp_path):
        for seed, name in enumerate("ab"):
            toy.write_nifti(tmp_path / "in" / f"{name}.nii.gz", toy.head((20, 22, 3), seed=seed))
        return tmp_path / "in"

    def test_only_what_is_missing_is_done(self, infer, two):
        before = times_of_change(infer(two))
        (two.parent / "out" / "b_sr.nii.gz").unlink()
        after = times_of_change(infer(two))
        assert after.keys() == before.keys()
        assert {name[0] for name in after if after[name] != before[name]} == {"b"}

    def test_overwrite_does_all_again(self, infer, two):
        times = [times_of_change(infer(two, overwrite=value)) for value in (False, "true", True, "false")]
        first, second, third, last = times
        assert all(first[name] < second[name] < third[name] for name in first)
        assert last == third

    def test_impossible_overwrite_is_refused(self, infer, two):
        with pytest.raises(Exception) as error:
            infer(two, overwrite="perhaps")
        assert reason(error.value) == "overwrite must be true or false, got 'perhaps'"

    def test_other_weights_or_another_input_make_another_result(self, infer, two):
        first = times_of_change(infer(two))
        toy.write_nifti(two / "a.nii.gz", toy.head((20, 22, 3), seed=7))
        second = times_of_change(infer(two))
        assert {name[0] for name in first if first[name] != second[name]} == {"a"}
        third = times_of_change(infer(two, "untrained"))
        assert all(third[name] > second[name] for name in second)

    def test_an_old_report_does_not_describe_a_new_volume(self, infer, two, monkeypatch):
        """If a run ends between the volume and its report, the next run computes the volume again."""
        out = infer(two)
        first = times_of_change(out)
        with monkeypatch.context() as patched:
            patched.setattr("bundle.results.SaveReportd.__call__", lambda self, data: 1 / 0)
            with pytest.raises(Exception) as error:
                infer(two, scale=3)
        assert reason(error.value).startswith("2 of 2 volumes failed")
        assert not [name for name in files_below(out) if name.endswith(".json")]
        again = times_of_change(infer(two))
        assert all(again[name] > first[name] for name in first)

    def test_a_list_of_failures_of_others_stays(self, infer, two):
        out = two.parent / "out"
        out.mkdir()
        (out / "failed.csv").write_text("mine")
        infer(two)
        (two / "c.nii.gz").write_bytes(b"damaged")
        with pytest.raises(Exception) as error:
            infer(two)
        assert f"1 of 3 volumes failed, listed in the log, because {out / 'failed.csv'} is not of this program" in reason(error.value)
        assert (out / "failed.csv").read_text() == "mine"

    def test_report_is_made_where_it_is_missing_and_goes_with_its_result(self, infer, two):
        first = times_of_change(infer(two))
        second = times_of_change(infer(two, report=True))
        assert second.keys() - first.keys() == {"a_sr.html", "b_sr.html", "index.html"}
        (two.parent / "out" / "b_sr.html").unlink()
        third = times_of_change(infer(two, report="true"))
        assert {name for name in second if second[name] != third[name] and name[0] != "b"} == {"index.html"}
        fourth = times_of_change(infer(two))
        assert {name for name in third if third[name] != fourth.get(name)} == {"index.html"}
        fifth = times_of_change(infer(two, "untrained"))
        assert fifth.keys() - first.keys() == {"index.html"}  # the pages would show another result
        assert "a_sr.html" not in (two.parent / "out" / "index.html").read_text()

    def test_impossible_report_is_refused(self, infer, two):
        with pytest.raises(Exception) as error:
            infer(two, report="perhaps")
        assert reason(error.value) == "report must be true or false, got 'perhaps'"

    def test_damaged_report_counts_as_missing(self, infer, tmp_path):
        damaged = {"a": "", "b": "[]", "c": "{", "d": '{"settings": 1}'}
        for name in (*damaged, "whole"):
            toy.write_nifti(tmp_path / "in" / f"{name}.nii.gz", toy.head((20, 22, 3)))
        out = infer(tmp_path / "in")
        before = times_of_change(out)
        for name, report in damaged.items():
            (out / f"{name}_sr.json").write_text(report)
        after = times_of_change(infer(tmp_path / "in"))
        assert {name for name in before if after[name] != before[name]} == {name for name in before if not name.startswith("whole")}

    @pytest.mark.parametrize("output_dir", ["in/out", "in"])
    def test_results_in_the_input_folder_are_no_input(self, output_dir, infer, two):
        infer(two, output_dir=two.parent / output_dir)
        # a killed run may leave a result without its report
        (two.parent / output_dir / "a_sr.json").unlink()
        toy.write_nifti(two / "c_sr.nii.gz", toy.head((20, 22, 3)))  # a name alone does not make a result
        infer(two, output_dir=two.parent / output_dir)
        results = [name for name in files_below(two.parent / output_dir) if name.endswith(".json")]
        assert results == ["a_sr.json", "b_sr.json", "c_sr_sr.json"]

    @pytest.mark.slow
    def test_killed_run_goes_on_with_the_rest(self, infer, checkpoints, tmp_path):
        for number in range(4):
            toy.write_nifti(tmp_path / "data" / f"{number}.nii.gz", toy.head((60, 60, 20), seed=number))
        first = tmp_path / "output" / "0_sr.json"
        with subprocess.Popen(words(checkpoints), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            while not first.exists() and process.poll() is None:
                time.sleep(0.005)
            process.kill()
        before = times_of_change(tmp_path / "output")
        done = {name[0] for name in before if name.endswith(".json")}
        assert process.returncode == -signal.SIGKILL and "0" in done and "3" not in done
        after = times_of_change(infer(tmp_path / "data", output_dir=tmp_path / "output", clip=True))
        assert list(after) == [f"{number}_sr.{ending}" for number in range(4) for ending in ("json", "nii.gz", "png")]
        assert all(after[name] == before[name] for name in before if name[0] in done)

    def test_traces_of_a_killed_run_vanish(self, infer, two):
        out = two.parent / "out"
        out.mkdir()
        with subprocess.Popen([sys.executable, "-c", ""]) as gone:
            gone.wait()
        for name in ("a_sr.nii.gz", "b_sr.png"):
            (out / f".part-{platform.node()}-{gone.pid}-{name}").write_bytes(b"half")
        infer(two)
        assert not [name for name in files_below(out) if "part" in name]


class TestFoldersAsPeopleHaveThem:
    def test_datalad_bids_data_set(self, infer, tmp_path):
        data, objects = tmp_path / "bids", Path(".git") / "annex" / "objects"
        for number in (1, 2, 3):
            scan = data / f"sub-{number:02d}" / "anat" / f"sub-{number:02d}_T1w.nii.gz"
            scan.parent.mkdir(parents=True)
            key = data / objects / f"{number:02d}" / f"MD5E-s{number}.nii.gz" / f"MD5E-s{number}.nii.gz"
            scan.symlink_to(os.path.relpath(key, scan.parent))
            if number < 3:  # what was not fetched is a broken link
                toy.write_nifti(key, toy.head((20, 22, 3), seed=number), toy.affine((1, 1, 5)))
        (data / "dataset_description.json").write_text('{"Name": "toy", "BIDSVersion": "1.10.0"}')
        (data / "T1w.json").write_text('{"Modality": "MR", "SliceThickness": 4, "EchoTime": 0.003, "FlipAngle": NaN}')
        out = data / "derivatives" / "brain_mri_super_resolution"
        for _ in range(2):  # the results are no input of a second run
            with pytest.raises(RuntimeError) as error:
                infer(data, output_dir=out, bids=True)
            assert "1 of 3 volumes failed" in reason(error.value) and "sub-03_T1w.nii.gz: a link to " in reason(error.value)
        names = [f"sub-{n:02d}/anat/sub-{n:02d}_desc-sr_T1w.{ending}" for n in (1, 2) for ending in ("json", "nii.gz", "png")]
        assert files_below(out) == [".bidsignore", "README.md", "dataset_description.json", "failed.csv", *names]
        description = json.loads((out / "dataset_description.json").read_text())
        assert (description["DatasetType"], description["GeneratedBy"][0]["Name"]) == ("derivative", "brain_mri_super_resolution")
        assert (out / description["DatasetLinks"]["raw"]).samefile(data)
        facts = json.loads((out / names[0]).read_text())
        assert (facts["Sources"], facts["SkullStripped"]) == (["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"], False)
        assert facts["EchoTime"] == 0.003 and "FlipAngle" not in facts

    def test_bids_validator_finds_no_error(self, infer, tmp_path):
        command = shutil.which("bids-validator-deno") or shutil.which("bids-validator")
        if not command:
            pytest.skip("needs the BIDS validator (pip install bids-validator-deno)")
        data = tmp_path / "bids"
        names = (
            *(
                "sub-01/anat/sub-01_T1w.nii.gz",
                "sub-02/ses-1/anat/sub-02_ses-1_acq-hi_run-1_T2w.nii",
                "sub-01/anat/sub-01_inv-1_MP2RAGE.nii.gz",
            ),
            *(
                "sub-01/anat/sub-01_echo-1_part-mag_MEGRE.nii.gz",
                "sub-01/perf/sub-01_m0scan.nii.gz",
                "sub-01/fmap/sub-01_dir-AP_epi.nii.gz",
            ),
            *("sub-01/anat/sub-01_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz", "sub-01/anat/t1_without_a_bids_name.nii.gz"),
        )
        for number, name in enumerate(names):
            toy.write_nifti(data / name, toy.head((20, 22, 3), seed=number), toy.affine((1, 1, 5)))
        (data / "epi.json").write_text('{"TotalReadoutTime": 0.05, "PhaseEncodingDirection": "j-"}')
        (data / "dataset_description.json").write_text('{"Name": "toy", "BIDSVersion": "1.10.0"}')
        out = infer(data, bids=True, report=True)
        assert len(list(out.rglob("*.nii.gz"))) == len(names)
        found = subprocess.run([command, "--format", "json", str(out)], capture_output=True, text=True).stdout
        issues = json.loads(found)["issues"]["issues"]
        assert {issue["code"] for issue in issues} <= {"TOO_FEW_AUTHORS", "SIDECAR_KEY_RECOMMENDED"}, issues

    def test_archive_of_dicom(self, infer, tmp_path, capsys):
        study = tmp_path / "pacs" / "PAT00001" / "STU00001"
        toy_dicom.rename(toy.write_dicom(study / "SER00001", to_world=toy.affine((1, 1, 2))), lambda ds, n: f"IMG{n:05d}")
        toy_dicom.add_screenshot(toy.write_dicom(study / "SER00002", toy.head((20, 22, 3), seed=1)))
        toy_dicom.localizer(study / "SER00003")
        toy.write_mixed(tmp_path / "pacs" / "PAT00002")
        shutil.copytree(study / "SER00001", tmp_path / "pacs" / "copy of SER00001")
        out = infer(tmp_path / "pacs", "untrained")
        results = [name.removesuffix("_sr.nii.gz") for name in files_below(out) if name.endswith("_sr.nii.gz")]
        folders = [str(Path(name).parent) if "1.2." in name else name for name in results]
        stu = "PAT00001/STU00001"
        assert sorted(folders) == sorted([f"{stu}/SER00001", f"{stu}/SER00002", *[f"{stu}/SER00003"] * 3, *["PAT00002"] * 2])
        log = capsys.readouterr().out
        assert "screenshot.dcm (Secondary Capture Image Storage: a screenshot or a scanned page)" in log
        assert f"copy of SER00001: a copy of slices in {study / 'SER00001'}" in log


@pytest.mark.parametrize(("volumes", "bad"), [(3, 2), (1, 0)])
@pytest.mark.slow
def test_processes_share_a_folder(volumes, bad, checkpoints, tmp_path):
    for number in range(volumes):
        toy.write_nifti(tmp_path / "data" / f"sub-{number}.nii.gz", toy.head((20, 22, 3), seed=number))
    for number in range(bad):
        (tmp_path / "data" / f"bad-{number}.nii.gz").touch()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    configs = (CONFIG, str(ROOT / "configs" / "multi_gpu_inference.json"))
    done = command(tmp_path, checkpoints, configs=configs, launcher=launcher)
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == (bad == 0), text
    for number in range(volumes):
        assert text.count(f"data/sub-{number}.nii.gz: after a simulated acquisition") == 1, text
        assert nib.load(tmp_path / "output" / f"sub-{number}_sr.nii.gz").shape == (40, 44, 3)
    assert f"{volumes} of {volumes + bad} volumes done, results in output" in text
    if bad:
        assert text.count("error: 2 of 5 volumes failed") == 1
        with (tmp_path / "output" / "failed.csv").open() as stream:
            assert [row["volume"] for row in csv.DictReader(stream)] == ["data/bad-0.nii.gz", "data/bad-1.nii.gz"]


class TestBadInput:
    def failures(self, out):
        with (out / "failed.csv").open(newline="", encoding="utf-8") as stream:
            head, *rows = csv.reader(stream)
        assert head == ["volume", "reason"]
        return rows

    def test_every_bad_volume_is_listed(self, infer, tmp_path):
        names = []
        for number, what in enumerate(("no bytes", "NaN", "text")):
            (tmp_path / "in" / str(number)).mkdir(parents=True)
            names.append(str(toy.BAD_VOLUMES[what](tmp_path / "in" / str(number))))
        toy.write_nifti(tmp_path / "in" / "1" / "good.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(tmp_path / "in")
        assert "3 of 4 volumes failed" in reason(error.value)
        assert [volume for volume, _ in self.failures(tmp_path / "out")] == names
        assert (tmp_path / "out" / "1" / "good_sr.nii.gz").exists()

    def test_result_that_cannot_be_written_is_one_failure(self, infer, tmp_path):
        for name in ("a", "b"):
            toy.write_nifti(tmp_path / "in" / f"{name}.nii.gz", toy.head((20, 22, 3)))
        (tmp_path / "out" / "a_sr.nii.gz" / "in the way").mkdir(parents=True)
        with pytest.raises(Exception) as error:
            infer(tmp_path / "in")
        assert "1 of 2 volumes failed" in reason(error.value)
        ((volume, why),) = self.failures(tmp_path / "out")
        assert volume == str(tmp_path / "in" / "a.nii.gz")
        assert why.startswith(volume)
        assert "directory" in why.lower()  # the cause, not the wrapper of MONAI
        assert "b_sr.nii.gz" in files_below(tmp_path / "out")
        assert not [name for name in files_below(tmp_path / "out") if ".part" in name]

    def test_later_run_without_failures_leaves_no_list_of_failures(self, infer, tmp_path):
        (tmp_path / "in").mkdir()
        bad = toy.BAD_VOLUMES["no bytes"](tmp_path / "in")
        with pytest.raises(Exception) as error:
            infer(tmp_path / "in")
        assert "1 of 1 volumes failed" in reason(error.value)
        toy.write_nifti(bad, toy.head((20, 22, 3)))
        assert files_below(infer(tmp_path / "in")) == ["bad_sr.json", "bad_sr.nii.gz", "bad_sr.png"]

    def test_missing_path_is_named(self, infer, tmp_path):
        with pytest.raises(Exception) as error:
            infer(tmp_path / "gone")
        assert reason(error.value) == f"{tmp_path / 'gone'}: no such file or folder"

    def test_folder_without_volumes_is_named(self, infer, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(Exception) as error:
            infer(tmp_path / "empty")
        assert reason(error.value).startswith(f"{tmp_path / 'empty'}: holds no volume")

    def test_slices_that_do_not_exist_are_refused_by_name(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, axial_slices=[2, 9])
        assert f"{path}: axial slices 2 to 9 asked for, but the volume has 3" in reason(error.value)

    @pytest.mark.parametrize("axial_slices", [[0, 2], [3, 1], [1]])
    def test_impossible_slices_are_refused(self, axial_slices, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, axial_slices=axial_slices)
        assert f"axial_slices must be [first, last], whole numbers with 1 <= first <= last, got {axial_slices}" in whole_story(error.value)

    @pytest.mark.parametrize("scale", [0, 0.5, -1, "two", [2, 2, 2]])
    def test_impossible_scale_is_refused(self, scale, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, scale=scale)
        assert f"factor must be a number of at least 1, or two of them, got {scale!r}" in whole_story(error.value)
        assert not (tmp_path / "out" / "a_sr.nii.gz").exists()

    def test_spacing_that_is_coarser_than_the_file_s_is_refused_by_name(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, spacing=1.5)
        assert f"{path}: spacing 1.5 x 1.5 mm asked for, but voxels are 1 x 1 mm already" in reason(error.value)

    def test_missing_checkpoint_is_named(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, checkpoint=str(tmp_path / "none.pt"))
        assert str(tmp_path / "none.pt") in whole_story(error.value)
        assert not (tmp_path / "out" / "a_sr.nii.gz").exists()

    def test_checkpoint_of_another_network_is_refused_by_name(self, infer, checkpoints, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        with pytest.raises(Exception) as error:
            infer(path, network_def={**toy.TINY_INFERENCE["network_def"], "num_modules": 2})
        assert reason(error.value).startswith(f"{checkpoints['random']}: weights of another network (Missing key(s)")
        assert not (tmp_path / "out" / "a_sr.nii.gz").exists()

    def test_damaged_checkpoint_is_refused_by_name(self, infer, checkpoints, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
        half = Path(checkpoints["random"]).read_bytes()[:2000]
        (tmp_path / "half.pt").write_bytes(half)
        with pytest.raises(Exception) as error:
            infer(path, checkpoint=str(tmp_path / "half.pt"))
        assert reason(error.value).startswith(f"{tmp_path / 'half.pt'}: ")

    def test_missing_rights_are_named(self, infer, checkpoints):
        with tempfile.TemporaryDirectory() as folder, as_nobody() as become_nobody:  # pytest's own folder is closed to others
            folder = Path(folder)
            folder.chmod(0o755)
            for name in ("a", "closed"):
                toy.write_nifti(folder / "in" / f"{name}.nii.gz", toy.head((20, 22, 3)))
            (folder / "in" / "closed.nii.gz").chmod(0)
            weights = shutil.copy(checkpoints["random"], folder)
            for name, mode in (("read-only", 0o555), ("open", 0o777)):
                (folder / name).mkdir()
                (folder / name).chmod(mode)
            become_nobody()
            with pytest.raises(Exception) as error:
                infer(folder / "in", output_dir=folder / "read-only", checkpoint=weights)
            assert reason(error.value) == f"{folder / 'read-only'}: cannot be written to (Permission denied)"
            with pytest.raises(Exception) as error:
                infer(folder / "in", output_dir=folder / "open", checkpoint=weights)
            ((volume, why),) = self.failures(folder / "open")
            assert volume == str(folder / "in" / "closed.nii.gz")
            assert why.startswith(f"{volume}: ") and "ermission" in why
            assert (folder / "open" / "a_sr.nii.gz").exists()

    @pytest.mark.slow
    def test_full_disk_stops_with_one_line_and_leaves_nothing_half_written(self, checkpoints, tmp_path):
        own_disk = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
        mount = 'mount -t tmpfs -o size=160k tmpfs "$0"'
        (tmp_path / "output").mkdir()
        if not shutil.which("unshare") or subprocess.run([*own_disk, mount, str(tmp_path / "output")]).returncode:
            pytest.skip("needs the right to mount a small disk (unshare)")
        for number in range(3):
            toy.write_nifti(tmp_path / "data" / f"{number}.nii.gz", np.random.default_rng(0).random((40, 40, 3)))
        prefix = (*own_disk, mount + ' && { "$@"; code=$?; ls -A "$0"; exit $code; }', str(tmp_path / "output"))
        done = command(tmp_path, checkpoints, prefix=prefix)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert re.fullmatch(r"error: output: No space left on device at data/\d\.nii\.gz; run again for the remaining volumes", last), last
        left = {line for line in done.stdout.splitlines() if "_sr." in line or "part" in line}
        assert not [name for name in left if "part" in name]
        assert {name for name in left if name.endswith(".json")} < {"0_sr.json", "1_sr.json", "2_sr.json"}

    def test_output_folder_below_a_file_is_named(self, infer, tmp_path):
        path = toy.write_nifti(tmp_path / "in" / "a.nii.gz", toy.head((20, 22, 3)))
        (tmp_path / "file").touch()
        with pytest.raises(Exception) as error:
            infer(path, output_dir=tmp_path / "file" / "out")
        assert str(tmp_path / "file") in whole_story(error.value)

    @pytest.mark.slow
    def test_command_ends_with_one_line(self, checkpoints, tmp_path):
        done = command(tmp_path, checkpoints, "--dataset_dir", "gone")
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1] == "error: gone: no such file or folder"
        assert "Traceback" not in done.stderr


def whole_story(error):
    """Messages of an error and of all those behind it."""
    story = []
    while error is not None:
        story.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(story)
