"""Every bad or odd input that was tried, in one run over one folder, and what docs/reliability.md says about it.

``WRITE_DOCS=1 pytest tests/test_reliability.py`` writes the table of the document.
"""

import csv
import json
import os
import re
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import toy
import toy_dicom

from bundle.errors import reason
from bundle.recognition import looks_like
from bundle.results import Results

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
BAD_VOLUMES = toy.BAD_VOLUMES | toy_dicom.BAD_VOLUMES
ODD_VOLUMES = toy.ODD_VOLUMES | toy_dicom.ODD_VOLUMES
SEVERAL_SERIES = "DICOM: several series in one folder"


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """One run over all of them with an untrained network, which returns the interpolated volume: folder, volumes and failures."""
    folder = tmp_path_factory.mktemp("tried")
    bad, odd = {}, {}
    for number, (what, write) in enumerate(BAD_VOLUMES.items()):
        (folder / "in" / f"bad{number:02d}").mkdir(parents=True)
        bad[what] = str(write(folder / "in" / f"bad{number:02d}"))
    for number, (what, write) in enumerate(ODD_VOLUMES.items()):
        (folder / "in" / f"odd{number:02d}").mkdir(parents=True)
        odd[what] = write(folder / "in" / f"odd{number:02d}")
    for number, write in enumerate(toy.NO_SCANS.values()):
        (folder / "in" / f"none{number:02d}").mkdir(parents=True)
        write(folder / "in" / f"none{number:02d}")
    toy.write_mixed(folder / "in" / "mixed")
    excepthook = sys.excepthook
    with pytest.raises(RuntimeError) as error:
        monai.bundle.run(
            config_file=str(ROOT / "configs" / "inference.json"),
            dataset_dir=str(folder / "in"),
            output_dir=str(folder / "out"),
            checkpoint=str(toy.save_checkpoint(folder / "untrained.pt", random=False)),
            device="cpu",
            clip=False,
            **toy.TINY_INFERENCE,
        )
    sys.excepthook = excepthook
    with (folder / "out" / "failed.csv").open(newline="", encoding="utf-8") as stream:
        failures = {row["volume"]: row["reason"] for row in csv.DictReader(stream)}
    return folder, bad, odd, failures, reason(error.value)


def result(folder, volume):
    return Results(folder / "out", folder / "in", []).path(volume, "_sr.nii.gz")


@pytest.mark.parametrize("what", BAD_VOLUMES)
def test_bad_volume_is_refused_by_name_in_one_line(what, tried):
    folder, bad, _, failures, _ = tried
    line = failures[bad[what]]
    assert line.startswith(f"{bad[what]}: ")
    assert len(line) > len(bad[what]) + 12
    assert "\n" not in line
    assert not result(folder, bad[what]).exists()


@pytest.mark.parametrize("what", ODD_VOLUMES)
def test_odd_volume_gives_the_right_result(what, tried):
    folder, _, odd, failures, _ = tried
    path, array, to_world = odd[what]
    assert failures.get(str(path)) is None
    after = nib.as_closest_canonical(nib.load(result(folder, path)))
    np.testing.assert_allclose(after.get_fdata(), toy.bicubic(array, 2), rtol=1e-5, atol=1e-5 * np.abs(array).max())
    index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
    expected = nib.affines.apply_affine(to_world, (index + 0.5) / [2, 2, 1] - [0.5, 0.5, 0.5])
    np.testing.assert_allclose(nib.affines.apply_affine(after.affine, index), expected, atol=1e-4)


def test_only_the_bad_ones_fail(tried):
    folder, bad, odd, failures, message = tried
    assert failures.keys() == set(bad.values())
    assert message.startswith(f"{len(bad)} of {len(bad) + len(odd) + 2} volumes failed, listed in {folder / 'out' / 'failed.csv'}")


def test_every_series_of_a_folder_is_done(tried):
    folder, *_ = tried
    volumes = [nib.as_closest_canonical(nib.load(path)) for path in (folder / "out" / "mixed").glob("*.nii.gz")]
    one, other = sorted(volumes, key=lambda volume: volume.shape)
    np.testing.assert_allclose(one.get_fdata(), toy.bicubic(toy.head((30, 28, 4), seed=1), 2), atol=0.01)
    np.testing.assert_allclose(other.get_fdata(), toy.bicubic(toy.head(), 2), atol=0.01)


def test_nothing_is_left_half_written(tried):
    folder, *_ = tried
    assert not list((folder / "out").rglob(".*"))
    assert not list(folder.rglob("pwned")) + list(Path.cwd().glob("pwned"))


def test_forms_of_the_header_are_both_refined(tried):
    folder, _, odd, *_ = tried
    before, after = (nib.load(p) for p in (odd["sform and qform disagree"].path, result(folder, odd["sform and qform disagree"].path)))
    index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
    for form in ("get_sform", "get_qform"):
        expected = nib.affines.apply_affine(getattr(before, form)(), (index + 0.5) / [2, 2, 1] - [0.5, 0.5, 0.5])
        np.testing.assert_allclose(nib.affines.apply_affine(getattr(after, form)(), index), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("what", "remark"),
    [
        ("sform and qform disagree", "sform and qform differ by up to 7 mm: the sform is used, and both are kept"),
        ("pixdim agrees with the qform only", "pixdim says 3 x 3 x 3 mm, the affine 1 x 1 x 2 mm: the affine is used"),
        ("no affine (sform and qform unknown)", "the header says nothing about orientation"),
    ],
)
def test_doubtful_header_is_said_in_the_report(what, remark, tried):
    folder, _, odd, *_ = tried
    report = result(folder, odd[what].path).with_name(result(folder, odd[what].path).name.replace(".nii.gz", ".json"))
    assert any(line.startswith(remark) for line in json.loads(report.read_text(encoding="utf-8"))["warnings"])


def no_scan(folder, what):
    (path,) = (folder / "in" / f"none{list(toy.NO_SCANS).index(what):02d}").iterdir()
    return path


@pytest.mark.parametrize("what", toy.NO_SCANS)
def test_what_is_no_scan_is_passed_over(what, tried):
    folder, _, _, failures, _ = tried
    path = no_scan(folder, what)
    assert str(path) not in failures
    assert not result(folder, path).exists()
    assert looks_like(path)


def table(tried) -> str:
    folder, bad, odd, failures, _ = tried
    lines = ["| input | outcome |", "|---|---|"]
    lines += [f"| {what} | right result |" for what in odd]
    lines += [f"| {SEVERAL_SERIES} | right result for each |"]
    lines += [f"| {what} | in a folder: skipped as {looks_like(no_scan(folder, what))} |" for what in toy.NO_SCANS]
    for what, path in bad.items():
        why = failures[path].removeprefix(f"{path}: ")
        # what a reader says in brackets changes with its version
        why = re.sub(r"(cannot be read[^(]*) \(.*\)$", r"\1 (…)", why)
        why = re.sub(r"memory, \S+ GiB are free", "memory, … GiB are free", why)
        lines.append(f"| {what} | refused: {why} |")
    return "\n".join(lines) + "\n"


def test_document_says_what_was_found(tried):
    start, end = "<!-- table -->\n", "<!-- end -->\n"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(start)
    found, _, after = rest.partition(end)
    if os.environ.get("WRITE_DOCS"):
        DOCUMENT.write_text(before + start + table(tried) + end + after, encoding="utf-8")
    else:
        assert found == table(tried)


def test_tests_that_the_document_names_exist():
    for file, name in re.findall(r"`tests/(\w+\.py)::(\w+)`", DOCUMENT.read_text(encoding="utf-8")):
        assert re.search(rf"(def|class) {name}\b", (ROOT / "tests" / file).read_text(encoding="utf-8")), f"{file}::{name}"
