"""The entry of the model zoo: what is in it, what is checked, what is refused."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NAME = "brain_mri_super_resolution"
VERSION = json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]


def package(root: Path, output_dir: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``python scripts/package.py`` of the repository at ``root``, without the network."""
    schema = str(ROOT / "tests" / "metadata_schema.json")
    command = [sys.executable, "scripts/package.py", "--output_dir", str(output_dir), "--schema", schema, *arguments]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> tuple[Path, str]:
    """Output folder, and what was printed."""
    folder = tmp_path_factory.mktemp("dist")
    run = package(ROOT, folder, "--any_versions")
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run.stdout


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_package_prints_what_it_verified(packaged):
    _, output = packaged
    checks = ["files", "metadata", "properties", "properties", "properties", "network", "inference", "unit test"]
    lines = [line.split(":")[0] for line in output.splitlines()]
    assert [line for line in lines if line in checks] == checks
    assert "network: 3,441,992 parameters" in output
    assert "proposed: 7,362,068 parameters" in output


def test_the_zip_holds_the_folder(packaged, tmp_path):
    folder, _ = packaged
    with zipfile.ZipFile(folder / f"{NAME}_v{VERSION}.zip") as archive:
        archive.extractall(tmp_path)
    assert files_below(tmp_path) == {f"{NAME}/{name}": content for name, content in files_below(folder / NAME).items()}


def test_the_entry_holds_what_the_zoo_wants_and_nothing_else(packaged):
    files = files_below(packaged[0] / NAME)
    assert {name.split("/")[0] for name in files} == {"LICENSE", "README.md", "bundle", "configs", "docs", "models"}
    assert {"configs/metadata.json", "configs/train.json", "docs/README.md", "docs/data_license.txt", "models/model.pt"} <= files.keys()
    assert {name for name in files if name.endswith(".pt")} == {str(p.relative_to(ROOT)) for p in (ROOT / "models").rglob("*.pt")}
    assert not [name for name in files if re.search(r"__pycache__|\.pyc$|test_|/\.|\.onnx$|\.ts$", name)]
    assert max(len(content) for content in files.values()) < 25e6


@pytest.fixture
def copy(tmp_path) -> Path:
    """Copy of the repository, to be damaged."""
    ignore = shutil.ignore_patterns("__pycache__", "*.ts", "*.onnx")
    for name in ("bundle", "configs", "docs", "models", "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "repository" / name, ignore=ignore)
    shutil.copy(ROOT / "LICENSE", tmp_path / "repository")
    return tmp_path / "repository"


def change_metadata(root: Path, **values) -> None:
    path = root / "configs" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_verification_does_not_see_the_repository_and_what_fails_is_not_published(copy, tmp_path):
    (copy / "beside.py").write_text("")
    init = copy / "bundle" / "networks" / "__init__.py"
    init.write_text(init.read_text() + "\nimport beside\n")
    run = package(copy, tmp_path / "dist", "--any_versions", PYTHONPATH=str(copy))
    assert run.returncode == 1
    assert "No module named 'beside'" in run.stdout + run.stderr
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "models" / "large.pt").write_bytes(bytes(26_000_000)), r"error: models/large\.pt: 26\.0 MB, .* below 25 MB"),
        (lambda root: change_metadata(root, monai_version="1.0.0"), r"error: .*monai .* \(metadata: 1\.0\.0\)"),
    ],
)  # fmt: skip
def test_the_script_refuses(damage, message, copy, tmp_path, monkeypatch):
    damage(copy)
    monkeypatch.setattr(sys, "argv", ["package.py", "--output_dir", str(tmp_path / "dist")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(copy / "scripts" / "package.py"), run_name="__main__")
    assert re.match(message, str(exit.value))
    assert not (tmp_path / "dist").exists()


def test_an_installation_that_is_not_editable_takes_configs_and_weights_along():
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    copied = {path for patterns in files.values() for pattern in patterns for path in ROOT.glob(pattern)}
    needed = {path for name in ("configs", "models") for path in (ROOT / name).rglob("*.*") if path.suffix in (".json", ".conf", ".pt")}
    assert needed <= copied
    for folder, patterns in files.items():
        below = Path(folder).relative_to("share/brain_mri_super_resolution")
        assert {path.parent for pattern in patterns for path in ROOT.glob(pattern)} == {ROOT / below}


def test_the_readme_for_the_hub_has_front_matter_and_links_that_exist():
    readme = runpy.run_path(str(ROOT / "scripts" / "package.py"))["hub_readme"]()
    _, front, body = readme.split("---\n", 2)
    assert "license: apache-2.0\n" in front and "library_name: monai\n" in front
    links = {link.split("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", body)}
    assert links and not [link for link in links if not (ROOT / link).exists()]
