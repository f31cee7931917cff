"""The lesion test, on a smooth ball of white matter, where it is known what must come out."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy

SCRIPT = Path(__file__).parents[1] / "scripts" / "lesion_test.py"
SPACING = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def ball(noise=0.0):
    x, y, z = np.meshgrid(*(np.arange(n) - n // 2 for n in (88, 88, 80)), indexing="ij")
    volume = 0.8 / (1 + np.exp(np.sqrt(x**2 + y**2 + z**2) - 38))
    return (volume + noise * np.random.default_rng(0).standard_normal(volume.shape) * (volume > 0.1)).astype(np.float32)


def test_lesion_has_the_volume_and_contrast_of_its_ball(script):
    for size, edge in ((2.0, 0.2), (8.0, 1.0)):
        lesion = script.Lesion((20, 20, 20), size, -0.3, edge, "")
        drawn = lesion.drawn((41, 41, 41), SPACING)
        moment = np.pi * size**3 / 6 + np.pi * size * 2 * edge**2  # of the ball, and of its soft edge
        assert drawn.sum() == pytest.approx(-0.3 * moment, rel=0.05)
        assert drawn[20, 20, 20] == pytest.approx(-0.3, abs=0.06 if size < 3 else 0.001)
        assert abs(drawn[20, 20 + round(size / 2 + 4 * edge) + 1, 20]) < 1e-4


def test_lesions_lie_in_white_matter_far_from_each_other(script):
    volume = ball(0.01)
    white = script.white_matter(volume, SPACING)
    lesions = script.placed(volume, white, SPACING, 3, np.random.default_rng(0))
    assert {lesion.size for lesion in lesions} == set(script.SIZES)
    for n, lesion in enumerate(lesions):
        assert np.linalg.norm(np.subtract(lesion.centre, (44, 44, 40))) + lesion.size / 2 < 40 - 15 + 1
        assert abs(lesion.contrast) == pytest.approx(0.3 * 0.8, rel=0.03)
        for other in lesions[:n]:
            assert np.linalg.norm(np.subtract(lesion.centre, other.centre)) >= 13


@pytest.mark.slow
def test_tables_say_what_interpolation_keeps(script, monkeypatch, tmp_path, capsys):
    scan = toy.write_nifti(tmp_path / "ball.nii.gz", 1000 * ball(0.005), np.eye(4))
    arguments = ["--overlay", "networks/bicubic", "--scans", "k-space", "slices", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lesion_test.py", str(scan), *arguments])
    script.main()
    found = json.loads((tmp_path / "out" / "lesions.json").read_text())
    kept = {
        (row, size, method): np.mean([e[method]["recovery"] for e in found["lesions"] if (e["scan"], e["size_mm"]) == (row, size)])
        for row in ("x2: k-space", "5 mm slices")
        for size in script.SIZES
        for method in script.METHODS
    }
    for (row, size, method), value in kept.items():
        assert 0 < value < 1.05
        if method == "zero-filled" and row == "x2: k-space":  # what is coarse loses nothing in k-space
            assert value > (0.9 if size > 2 else 0.7)
        if row == "5 mm slices":
            assert value < kept["x2: k-space", size, method]
    assert kept["5 mm slices", 2.0, "spline"] < 0.6 < kept["5 mm slices", 8.0, "spline"]
    assert kept["x2: k-space", 3.0, "network"] < kept["x2: k-space", 3.0, "zero-filled"]  # the network is bicubic interpolation here
    table = (tmp_path / "out" / "lesions.md").read_text()
    assert table in capsys.readouterr().out
    lost = next(line for line in table.splitlines() if line.startswith("| 5 mm slices | 2 mm |")).split("|")[7:10]
    entries = [e for e in found["lesions"] if (e["scan"], e["size_mm"]) == ("5 mm slices", 2.0)]
    assert [int(number) for number in lost] == [sum(e[method]["recovery"] < 0.5 for e in entries) for method in script.METHODS]
    assert len(list((tmp_path / "out").glob("lesions_*.png"))) == 2


def test_inventions_are_spots_that_the_truth_has_not(script):
    random = np.random.default_rng(0)
    truth = (0.8 + 0.02 * random.standard_normal((60, 60, 1))).astype(np.float32)
    white = np.zeros(truth.shape, bool)
    white[5:-5, 5:-5] = True
    truth[20:23, 20:23] += 0.2  # in the truth: no invention, whether it stays or goes
    invented, lost = truth.copy(), truth.copy()
    invented[40:43, 40:43] += 0.2
    invented[40:43, 15:18] -= 0.2
    lost[20:23, 20:23] -= 0.2
    test = SimpleNamespace(inventions=[])
    script.LesionTest.note_inventions(
        test, "row", "a.nii.gz", truth, white, SPACING, {"spline": truth, "zero-filled": lost, "network": invented}
    )
    (entry,) = test.inventions
    assert (entry["spline"], entry["zero-filled"], entry["network"]) == (0, 0, 2)
    assert entry["cm2"] == pytest.approx(25)


def test_volume_without_white_matter_is_said(script, monkeypatch, tmp_path):
    scan = toy.write_nifti(tmp_path / "small.nii.gz", toy.head((40, 36, 8)))
    monkeypatch.setattr(sys, "argv", ["lesion_test.py", str(scan), "--overlay", "networks/bicubic", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="no smooth white matter found that holds a lesion"):
        script.main()
