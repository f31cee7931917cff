"""The comparison with other methods, on toy volumes and with a stand-in for ECLARE."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import toy

from bundle.errors import InputError

SCRIPT = Path(__file__).parents[1] / "scripts" / "peers.py"
STAND_IN = """
import sys
from pathlib import Path
import nibabel as nib
import numpy as np

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--gpu-id"] == "-1" and options["--n-patches"] == "7" and options["--relative-slice-profile-type"] == "boxcar"
scan = nib.load(options["--in-fpath"])
factor = round(float(options["--relative-slice-thickness"]))
step = np.diag([1, 1, 1 / factor, 1])
step[2, 3] = (1 / factor - 1) / 2
name = Path(options["--in-fpath"]).name.replace(".nii", "_eclare.nii")
repeated = np.repeat(scan.get_fdata(dtype=np.float32), factor, 2)
nib.Nifti1Image(repeated, scan.affine @ step).to_filename(Path(options["--out-dir"], name))
"""


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def command(folder: Path, code: str) -> str:
    (folder / "stand_in.py").write_text(code)
    path = folder / "run-eclare"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(folder / "stand_in.py"))} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def compared(script, monkeypatch, tmp_path, capsys):
    """``compared(*arguments)``: what is printed, and the content of ``peers.json``, for a volume of 0.8 x 1 x 1 mm stored as LPS."""
    stored = toy.stored_as("LPS", toy.head((60, 44, 42)), toy.affine((0.8, 1.0, 1.0)))
    volume = toy.write_nifti(tmp_path / "head.nii.gz", *stored)

    def run(*arguments: str) -> tuple[str, dict]:
        options = ["--output_dir", str(tmp_path / "out"), "--slab", "24", "--profile", "box", *arguments]
        monkeypatch.setattr(sys, "argv", ["peers.py", str(volume), *options])
        script.main()
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "peers.json").read_text())

    return run


@pytest.mark.slow
def test_every_method_gets_the_same_file_and_a_row(compared, tmp_path):
    printed, found = compared("--eclare", command(tmp_path, STAND_IN), "--patches", "7")
    (row,) = found.values()
    assert list(found) == ["head, 5 mm, box"]
    assert list(row) == ["cubic B-spline", "zero-filling", "network", "ECLARE, 7 patches"]
    assert row["cubic B-spline"]["psnr"] > row["ECLARE, 7 patches"]["psnr"] + 3  # the stand-in repeats the slices
    for values in row.values():
        assert 15 < values["psnr"] < 60
        assert 0.3 < values["ssim"] < 1
        assert values["resampled_by_voxels"] == 0
    assert row["network"]["processor_seconds"] > row["cubic B-spline"]["processor_seconds"]
    assert [line.split("|")[2].strip() for line in printed.splitlines() if line.startswith("| head")] == list(row)
    scan, truth = (nib.load(tmp_path / "out" / "head_box" / f"head_{what}.nii.gz") for what in ("thick", "truth"))
    np.testing.assert_allclose(scan.header.get_zooms(), (1, 1, 5), atol=1e-5)
    np.testing.assert_allclose(truth.header.get_zooms(), (1, 1, 1), atol=1e-5)
    assert truth.shape[0] == 24 and truth.shape[2] == 5 * scan.shape[2]
    means = truth.get_fdata().reshape(*truth.shape[:2], -1, 5).mean(-1)
    np.testing.assert_allclose(scan.get_fdata(), means, atol=1.5)  # box slices: means, stored as whole numbers
    first = nib.affines.apply_affine(truth.affine, [[3, 4, k] for k in range(5)]).mean(0)
    np.testing.assert_allclose(nib.affines.apply_affine(scan.affine, [3, 4, 0]), first, atol=1e-3)
    # rows of other commands stay; without its command ECLARE is skipped
    printed, found = compared("--profile", "gaussian")
    assert printed.startswith("ECLARE is skipped")
    assert list(found) == ["head, 5 mm, box", "head, 5 mm, gaussian"]
    assert found["head, 5 mm, box"] == row


def test_truth_stays_where_it_is_in_space(script):
    """A smooth pattern of the world coordinates keeps its values when the pixels become as large as the slices."""

    def pattern(affine, shape):
        x, y, _ = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
        return 0.5 + 0.2 * np.cos(2 * np.pi * x / 24) * np.cos(2 * np.pi * y / 27)  # periods that divide the field of view

    affine = toy.affine((0.8, 0.9, 1.2))
    volume = pattern(affine, (60, 60, 4))
    cubic, to_world = script.cubic(script.torch.from_numpy(volume).float(), affine)
    np.testing.assert_allclose(np.linalg.norm(to_world[:3, :3], axis=0), 1.2)
    np.testing.assert_allclose(cubic.numpy(), pattern(to_world, cubic.shape), atol=0.01)


def test_grids_that_differ(script):
    shape = (12, 13, 14)
    ramp = np.add.outer(np.add.outer(np.arange(12.0), 2 * np.arange(13.0)), 3 * np.arange(14.0)).astype(np.float32)
    truth = nib.Nifti1Image(ramp, np.eye(4))
    same, moved = script.on_grid_of(truth, truth, Path("a.nii"))
    assert moved == 0 and np.array_equal(same, ramp)
    shifted = nib.Nifti1Image(ramp - 0.5 * 3, nib.affines.from_matvec(np.eye(3), [0, 0, -0.5]))  # the same ramp, half a voxel lower
    found, moved = script.on_grid_of(truth, shifted, Path("a.nii"))
    assert moved == 0.5
    np.testing.assert_allclose(found[2:-2, 2:-2, 4:-4], ramp[2:-2, 2:-2, 4:-4], atol=0.2)
    with pytest.raises(InputError, match=re.escape("a.nii: its field of view differs from that of the truth by 1.50 voxels")):
        script.on_grid_of(truth, nib.Nifti1Image(np.zeros(shape), nib.affines.from_matvec(np.eye(3), [0, 0, -1.5])), Path("a.nii"))


def test_failures_name_the_command(compared, tmp_path):
    with pytest.raises(SystemExit, match=r"error: --eclare .*missing: no such command"):
        compared("--eclare", str(tmp_path / "missing"))


@pytest.mark.slow
def test_a_failed_command_keeps_the_other_rows(compared, tmp_path):
    with pytest.raises(SystemExit, match=r"run-eclare ended with status 3: see .*log\.txt"):
        compared("--eclare", command(tmp_path, "raise SystemExit(3)"))
    (row,) = json.loads((tmp_path / "out" / "peers.json").read_text()).values()
    assert list(row) == ["cubic B-spline", "zero-filling", "network"]
