"""Large volumes lie in temporary files: the results are the same, and memory is given back."""

import gc
import itertools
import os
import shutil
import sys
import time
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
import toy
from monai.data import MetaTensor
from monai.transforms import Orientation

from bundle import memory, preflight
from bundle.grid import InPlaneFactorsd, IsotropicFactorsd, Orientd, oriented
from bundle.memory import empty_volume
from bundle.preflight import CheckMemoryd
from bundle.results import SaveVolumed

CONFIG = str(Path(__file__).parents[1] / "configs" / "inference.json")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="volumes lie in memory on other systems")


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(memory, "IN_MEMORY", 1000)


def files():
    gc.collect()
    return len(memory.mapped)


@linux
def test_a_large_volume_lies_in_a_file_as_long_as_it_exists(small_limit):
    before = files()
    volume = empty_volume((5, 1, 10, 9))
    assert files() == before + 1
    part = volume.movedim(0, -1)[:, 2:4]
    volume[:] = torch.arange(450.0).view(5, 1, 10, 9)
    del volume
    assert files() == before + 1
    assert part[0, 0, 0].tolist() == [18, 108, 198, 288, 378]
    del part
    assert files() == before
    assert empty_volume((5, 1, 10, 5)).shape == (5, 1, 10, 5)
    assert files() == before


@linux
def test_its_memory_is_given_back(monkeypatch):
    size = 1 << 27
    monkeypatch.setattr(memory, "IN_MEMORY", size - 1)
    volume = empty_volume((size >> 2,))
    resident = psutil.Process().memory_info().rss
    volume.fill_(1.0)
    deadline = time.monotonic() + 20
    while psutil.Process().memory_info().rss > resident + size // 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert float(volume.sum()) == size >> 2  # nothing is lost


@linux
def test_without_room_on_the_disk_it_lies_in_memory(small_limit, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = files()
    monkeypatch.setattr(os, "posix_fallocate", full)
    volume = empty_volume((1000,))
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    other = empty_volume((1000,))
    volume[:], other[:] = 3, 4
    assert files() == before


@linux
@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "ASL"])
def test_results_do_not_depend_on_where_volumes_lie(axcodes, tmp_path, monkeypatch):
    array, to_world = toy.stored_as(axcodes, toy.head((40, 46, 18)), toy.affine((0.9, 1.2, 3.0), (5, 6, 7)))
    path = toy.write_nifti(tmp_path / "a.nii.gz", array, to_world)
    in_files = []

    def result(limit):
        monkeypatch.setattr(memory, "IN_MEMORY", limit)
        output_dir = str(tmp_path / str(limit))
        monai.bundle.run(config_file=CONFIG, dataset_dir=str(path), output_dir=output_dir, device="cpu", denoise=0.5, uncertainty=True)
        return [nib.load(f"{output_dir}/a_{kind}.nii.gz") for kind in ("sr", "sd")]

    save = SaveVolumed.__call__
    monkeypatch.setattr(SaveVolumed, "__call__", lambda self, data: in_files.append(files()) or save(self, data))
    for one, other in zip(result(1 << 28), result(1000), strict=True):
        np.testing.assert_array_equal(one.affine, other.affine)
        np.testing.assert_array_equal(one.get_fdata(), other.get_fdata())
    assert in_files == [0, 1]  # while it is saved, the result is the only one
    assert files() == 0


@pytest.mark.parametrize("in_file", [False, pytest.param(True, marks=linux)])
def test_orientation_is_that_of_monai(in_file, monkeypatch):
    if in_file:
        monkeypatch.setattr(memory, "IN_MEMORY", 0)
    orders = ["".join(axes) for pairs in itertools.product("RL", "AP", "SI") for axes in itertools.permutations(pairs)]
    image = MetaTensor(torch.rand(1, 4, 5, 6), affine=torch.as_tensor(toy.affine((1, 2, 3), (10, -20, 30), (4, 5, 6))), meta={"a": 1})
    for axcodes in orders:
        expected, found = Orientation(axcodes=axcodes, labels=None)(image), oriented(image, axcodes)
        assert torch.equal(expected.as_tensor(), found.as_tensor())
        torch.testing.assert_close(expected.affine, found.affine)
        assert found.meta["a"] == 1
        turn = Orientd("image", axcodes=axcodes, labels=None)
        back = turn.inverse(turn({"image": image}))["image"]
        assert torch.equal(back.as_tensor(), image.as_tensor())
        torch.testing.assert_close(back.affine, image.affine)
        assert not back.applied_operations


@linux
def test_the_estimate_knows_which_results_lie_in_files(tmp_path, monkeypatch):
    path = str(toy.write_nifti(tmp_path / "a.nii", toy.head((40, 40, 10)), toy.affine((1, 1, 4))))

    def grows(factors, **options):
        """Whether the result needs memory beyond that of the input."""
        check = CheckMemoryd("image", factors, **options)
        given = 4 * preflight.GIVEN_COPIES * 40 * 40 * 10
        return check._needed(path)[0] > given

    monkeypatch.setattr(preflight, "PER_PIXEL", 0)
    monkeypatch.setattr(preflight, "PER_PAIR", 0)
    in_plane = InPlaneFactorsd("image", 2)
    assert grows(in_plane)  # small ones lie in memory
    monkeypatch.setattr(memory, "IN_MEMORY", 1000)
    assert not grows(in_plane)
    assert grows(in_plane, report=True)
    assert grows(in_plane, uncertainty=True)
    assert grows(IsotropicFactorsd("image"))
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: full)
    assert grows(in_plane)
