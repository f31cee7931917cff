"""The commands of scripts/, as a user runs them."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_demo_beats_bicubic_on_the_template(monkeypatch, tmp_path, capsys):
    pytest.importorskip("nilearn", reason="the demo takes its volume from the nilearn package: pip install -e '.[demo]'")
    run(monkeypatch, "demo.py", "--output_dir", str(tmp_path), "--axial_slices", "91", "92")
    scores = dict(re.findall(r"^(bicubic|super-resolved) +([0-9.]+) ", capsys.readouterr().out, re.M))
    assert float(scores["super-resolved"]) > float(scores["bicubic"]) + 1
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 900


def test_benchmark_prints_a_row_for_each_algorithm(monkeypatch, capsys):
    run(monkeypatch, "benchmark.py", "--repeats", "1", "--batch_size", "1", "--slice", "33", "40", "--features", "32")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["direct", "frequency domain", "ratio"]
    assert all(float(value) > 0 for row in rows[1:] for value in row.split("|")[2:4])
