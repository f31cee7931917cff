"""How the program starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import toy

ROOT = Path(__file__).parents[1]
UNUSED = ("matplotlib.pyplot", "mlflow", "pandas", "sklearn", "onnxruntime", "pydicom.sr.codedict")


@pytest.mark.slow
def test_python_m_bundle_runs_a_config_and_imports_less(tmp_path):
    scan = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
    files = [str(ROOT / "configs" / name) for name in ("inference.json", "networks/bicubic.json")]
    program = f"import runpy, sys; runpy.run_module('bundle', run_name='__main__'); print([n for n in {UNUSED} if sys.modules.get(n)])"
    command = [sys.executable, "-c", program, "run", "--config_file", str(files)]
    command += ["--dataset_dir", str(scan), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "a_sr.nii.gz").exists() and (tmp_path / "out" / "a_sr.png").exists()
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_python_m_bundle_has_monai_s_own_errors(tmp_path):
    command = [sys.executable, "-m", "bundle", "run", "--config_file", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "none.json" in done.stderr
