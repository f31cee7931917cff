"""Nothing that comes from a file (weights, volumes, headers, names) is ever run."""

import ast
import hashlib
import os
import pickle
from pathlib import Path

import monai.bundle
import pytest
import torch
import toy

from bundle.errors import InputError, reason
from bundle.loading import LoadVolumed

ROOT = Path(__file__).parents[1]


class Malicious:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path):
    """A folder that appears when a pickle was run."""
    return tmp_path / "pwned"


def test_the_trap_works(trap):
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["torch", "pickle"])
def test_malicious_weights_are_refused_by_name(write, trap, tmp_path, monkeypatch):
    volume = toy.write_nifti(tmp_path / "a.nii.gz", toy.head((20, 22, 3)))
    write({"extract.0.weight": Malicious(trap)}, tmp_path / "evil.pt")
    with pytest.raises(RuntimeError) as error:
        monai.bundle.run(
            config_file=str(ROOT / "configs" / "inference.json"),
            dataset_dir=str(volume),
            output_dir=str(tmp_path / "out"),
            checkpoint=str(tmp_path / "evil.pt"),
            **toy.TINY_INFERENCE,
        )
    assert (
        reason(error.value)
        == f"{tmp_path / 'evil.pt'}: refused, it does not hold plain tensors: it is damaged, or loading it could run a program"
    )
    assert not trap.exists()
    assert not list((tmp_path / "out").iterdir())


def test_malicious_checkpoint_is_refused_by_name(trap, tmp_path, monkeypatch):
    toy.write_subjects(tmp_path / "data", 3)
    (tmp_path / "models").mkdir()
    torch.save({"network": Malicious(trap)}, tmp_path / "models" / "last.pt")
    with pytest.raises(RuntimeError) as error:
        monai.bundle.run(
            config_file=str(ROOT / "configs" / "train.json"),
            dataset_dir=str(tmp_path / "data"),
            output_dir=str(tmp_path),
            resume=True,
            patch_size=15,
            **toy.TINY_INFERENCE,
        )
    assert f"{tmp_path / 'models' / 'last.pt'}: not a checkpoint of this training; refused" in reason(error.value)
    assert not trap.exists()


@pytest.mark.parametrize("reader", [None, "ITKReader", "NibabelReader"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.mha", "scan.npy", "scan.npz", "scan.pkl", "scan.dcm"])
def test_malicious_volume_is_refused_by_name(name, reader, trap, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(InputError, match=name):
        LoadVolumed("image", reader)({"image": str(tmp_path / name)})
    assert not trap.exists()


@pytest.mark.parametrize("file", [*(ROOT / "bundle").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")], ids=lambda path: path.name)
def test_no_code_runs_what_it_reads(file):
    """No eval, exec, pickle or shell; torch.load for tensors only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "np.load", "joblib.load"), f"{name} in line {node.lineno}"
        assert not name.startswith("pickle."), f"{name} in line {node.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name != "torch.load" or keywords.get("weights_only") == "True", f"line {node.lineno}"
        assert keywords.get("shell", "False") == "False", f"line {node.lineno}"


def test_published_hash_is_that_of_the_weights():
    for line in (ROOT / "models" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        content = (ROOT / "models" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, (
            f"cd models && sha256sum *.pt *.json */*.pt */*.json > SHA256SUMS  # {name} has changed"
        )
