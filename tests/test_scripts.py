"""The commands of scripts/, as a user runs them."""

import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy
from PIL import Image
from scipy import stats

from bundle.errors import InputError

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_demo_beats_interpolation_on_the_template(monkeypatch, tmp_path, capsys):
    pytest.importorskip("nilearn", reason="the demo takes its volume from the nilearn package: pip install -e '.[demo]'")
    run(monkeypatch, "demo.py", "--output_dir", str(tmp_path), "--axial_slices", "91", "92")
    scores = dict(re.findall(r"^(cubic B-spline|zero-filled|super-resolved) +([0-9.]+) ", capsys.readouterr().out, re.M))
    assert float(scores["super-resolved"]) > max(float(scores["cubic B-spline"]), float(scores["zero-filled"])) + 0.3
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 900


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """``benchmark(*arguments)``: what ``benchmark.py`` prints, in lines, and its JSON file, with a tiny network in place of the default."""
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps(toy.TINY_INFERENCE))

    def measure(*arguments: str) -> tuple[list[str], dict]:
        run(monkeypatch, "benchmark.py", "--repeats", "1", "--json", str(tmp_path / "b.json"), "--overlay", str(overlay), *arguments)
        return capsys.readouterr().out.splitlines(), json.loads((tmp_path / "b.json").read_text())

    return measure


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


def test_benchmark_prints_a_row_for_each_algorithm(benchmark):
    lines, known = benchmark("--batch_size", "1", "--slice", "33", "40", "--features", "32")
    table = rows(lines)
    assert [row[0] for row in table[1:]] == ["direct", "frequency domain", "direct, bfloat16"]
    direct, frequency, bfloat16 = known["convolutions"]["rows"].values()
    assert all(row["patches_per_second"] > 0 for row in (direct, frequency, bfloat16))
    assert all(row["fraction_of_peak"] > 0 and row["seconds_per_slice"] > 0 for row in (direct, frequency, bfloat16))
    assert "GFLOP/s in bfloat16" in "\n".join(lines)


def test_benchmark_compares_the_fast_way_with_the_naive_one(benchmark, tmp_path):
    array = np.zeros((60, 64, 6), np.float32)
    array[20:40, 22:40] = toy.head((20, 18, 6)) + 100
    scan = toy.write_nifti(tmp_path / "scan.nii.gz", array)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- inference -->\nold\n<!-- end -->\nafter\n")
    checkpoint = str(toy.save_checkpoint(tmp_path / "tiny.pt"))
    _, known = benchmark("--inference", str(scan), "--slices", "3", "--checkpoint", checkpoint, "--page", str(page))
    found = known["inference"]["scan.nii.gz"]
    assert found["slices"] == 3 and found["of"] == 6
    assert found["ratio"] == pytest.approx(found["seconds"]["naive"] / found["seconds"]["fast"])
    assert found["difference_db"] == pytest.approx(found["psnr"]["fast"] - found["psnr"]["naive"])
    assert found["psnr"]["naive"] != found["psnr"]["interpolated"] and found["largest_difference"] > 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert [row[0] for row in rows(text.splitlines())[1:]] == ["scan.nii.gz"]


def test_benchmark_measures_training_with_and_without_its_data(benchmark, tmp_path):
    toy.write_subjects(tmp_path / "data", 3)
    lines, known = benchmark("--training", str(tmp_path / "data"), "--batch_size", "2")
    found = known["training"]
    rates = found["patches_per_second"]
    assert found["pipeline"] == pytest.approx(rates["with data"] / rates["bare"])
    assert 0 < found["fraction_of_peak"] < 1
    assert [row[0] for row in rows(lines)[1:]] == ["step on a batch that is there", "step and data pipeline", "data pipeline alone"]


def test_benchmark_measures_whole_runs(tmp_path):
    module = runpy.run_path(str(SCRIPTS / "benchmark.py"))
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps(toy.TINY_INFERENCE))
    given = SimpleNamespace(overlay=[str(overlay)], checkpoint=str(toy.save_checkpoint(tmp_path / "tiny.pt")))
    seconds, gigabytes, cpu = module["whole_run"](given, slices=2, side=32)
    assert seconds > 0.5 and cpu > 0.5
    assert 0.1 < gigabytes < 2


def test_benchmark_keeps_the_kinds_of_growth_that_it_did_not_measure(benchmark, tmp_path):
    row = {"of": "volumes", "number": 1, "seconds": 1.0, "gigabytes": 1.0, "cpu_seconds": 1.0}
    (tmp_path / "b.json").write_text(json.dumps({"growth": {"rows": [row, {**row, "of": "start", "number": "python"}]}}))
    checkpoint = str(toy.save_checkpoint(tmp_path / "tiny.pt"))
    _, known = benchmark("--growth", "start", "--checkpoint", checkpoint)
    found = [(row["of"], row["number"]) for row in known["growth"]["rows"]]
    assert found == [("start", "python -m monai.bundle"), ("start", "python -m bundle"), ("volumes", 1)]
    with pytest.raises(SystemExit):
        benchmark("--growth", "nothing")


def test_the_page_s_one_command_holds_every_kind_of_measurement():
    module = runpy.run_path(str(SCRIPTS / "benchmark.py"))
    asked = [module["arguments"]([word.format(data="DATA") for word in part]) for part in module["ALL"]]
    kinds = {
        next((kind for kind in module["MEASUREMENTS"] if getattr(given, kind) not in (None, False)), "convolutions") for given in asked
    }
    assert kinds == set(module["TABLES"])


def test_benchmark_refines_a_volume_from_file_to_file(benchmark, tmp_path):
    scan = toy.write_nifti(tmp_path / "scan.nii.gz", toy.head((30, 32, 20)), np.diag([1.1, 1, 1.5, 1]))
    lines, known = benchmark("--whole", str(scan), "--networks", "bicubic", "--side", "24")
    found = known["whole"]["scan.nii.gz"]["rows"]
    assert [row[:2] for row in rows(lines)[1:]] == [["scan.nii.gz", "bicubic"]]
    assert found["bicubic"]["seconds"] > 0.5 and 0.1 < found["bicubic"]["gigabytes"] < 2


def test_benchmark_keeps_the_rows_of_networks_that_it_did_not_measure(benchmark, tmp_path):
    scan = toy.write_nifti(tmp_path / "scan.nii.gz", toy.head((30, 32, 20)), np.diag([1.1, 1, 1.5, 1]))
    arguments = ("--whole", str(scan), "--side", "24", "--networks")
    benchmark(*arguments, "fast")
    _, known = benchmark(*arguments, "bicubic")
    assert set(known["whole"]["scan.nii.gz"]["rows"]) == {"fast", "bicubic"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> list[str]:
    """The command that compares two networks on five toy subjects by a protocol of their own; killed after its first training."""
    folder = tmp_path_factory.mktemp("study")
    for n in range(1, 6):
        toy.write_nifti(folder / "data" / f"sub-{n}.nii.gz", toy.head(seed=n))
    (folder / "toy.json").write_text(json.dumps({"axial_slices": [1, 4], "split": [2, 1, 2], "val_interval": 3}))
    arguments = ["--dataset", str(folder / "toy.json"), "--dataset_dir", str(folder / "data"), "--output_dir", str(folder / "RUN")]
    arguments += ["--networks", "fsrcnn", "srcnn", "--axial_slices", "2", "3", "--learning_rate", "0.0007", "--patches", "96"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "reproduce.py"), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (folder / "RUN" / "fsrcnn" / "seed0" / "weights.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return arguments


def test_a_killed_comparison_does_only_what_is_missing(comparison, monkeypatch, capsys):
    output_dir = Path(comparison[5])
    run(monkeypatch, "reproduce.py", *comparison)
    printed = capsys.readouterr().out
    assert int(re.match(r"(\d+) of 7 steps are finished already", printed)[1]) >= 4  # three interpolations and a training
    assert "train fsrcnn" not in printed
    assert "train srcnn, seed 0" in printed

    # what it wrote
    results = json.loads((output_dir / "results.json").read_text())
    assert list(results["methods"]) == ["nearest", "bilinear", "bicubic", "fsrcnn", "srcnn"]
    assert (output_dir / "results.md").read_text() in printed
    curve = results["methods"]["srcnn"]["training_curve"]
    assert [patches for patches, _ in curve] == [16, 32, 48, 64, 80, 96] and all(loss > 0 for _, loss in curve)
    for method in results["methods"].values():
        assert list(method["subjects"]) == ["sub-4.nii.gz", "sub-5.nii.gz"]
        psnr = [subject["psnr"] for subject in method["subjects"].values()]
        assert len(psnr) == 2
        assert f"{np.mean(psnr):.2f} ± {np.std(psnr, ddof=1):.2f}" in printed
        assert method["psnr"]["of_each_seed"] == [pytest.approx(np.mean(psnr))]
        assert method["psnr"]["gain"] == pytest.approx(method["psnr"]["mean"] - results["methods"]["bicubic"]["psnr"]["mean"])
    srcnn = results["methods"]["srcnn"]
    assert (srcnn["parameters"], srcnn["patches"], srcnn["precision"], srcnn["learning_rate"]) == (57_281, 96, "float32", 0.0007)
    assert "| 96 in float32 | 57,281 |" in printed
    for picture in ("comparison.png", "training_curves.png"):
        with Image.open(output_dir / picture) as image:
            assert image.width > 500

    # and once more
    before = {path: path.stat().st_mtime_ns for path in output_dir.glob("*/seed0/**/*.*")}
    run(monkeypatch, "reproduce.py", *comparison)
    assert "7 of 7 steps are finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output_dir.glob("*/seed0/**/*.*")} == before


def test_a_comparison_with_other_settings_is_not_mixed_in(comparison, monkeypatch):
    with pytest.raises(InputError, match=r"holds a run with other settings \(.*choose another --output_dir"):
        run(monkeypatch, "reproduce.py", *comparison[:-1], "200")


def test_a_training_is_not_continued_at_another_rate(comparison, monkeypatch, tmp_path):
    shutil.copytree(comparison[5], tmp_path / "RUN", ignore=shutil.ignore_patterns("weights.pt"))  # as if killed while it trained
    with pytest.raises(InputError, match=r"fsrcnn.seed0 holds a training with .*0\.0007.*, not .*0\.001"):
        run(
            monkeypatch,
            "reproduce.py",
            *[{comparison[5]: str(tmp_path / "RUN"), "0.0007": "0.001"}.get(given, given) for given in comparison],
        )


def test_paired_differences_have_the_interval_of_a_t_test():
    paired_difference = runpy.run_path(str(SCRIPTS / "reproduce.py"))["paired_difference"]
    ours, theirs = np.array([30.1, 31.5, 29.2, 33.3]), np.array([30.4, 31.9, 29.1, 33.9])
    result = paired_difference(list(zip(ours, theirs)))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (result["low"], result["mean"], result["high"]) == pytest.approx((interval.low, (ours - theirs).mean(), interval.high))
