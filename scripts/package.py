"""Build the bundle's entry of the MONAI Model Zoo, as a folder and as a zip, and verify it.

The zip is unpacked into a temporary folder with the layout of the zoo, and verified by a process that has the installed packages but not
this repository. If it fails, nothing is written to the output folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "brain_mri_super_resolution"
FOLDERS = ("bundle", "configs", "docs", "models")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "*.part", "*.ts", "*.onnx")
MAX_BYTES = 25_000_000  # of a file in the zoo
PACKAGES = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}  # beside required_packages_version
OWN_SCHEMA = ROOT / "tests" / "metadata_schema.json"
FRONT_MATTER = """---
license: apache-2.0
library_name: monai
pipeline_tag: image-to-image
tags:
- monai
- medical
- mri
- brain
- super-resolution
---

"""
UNIT_TEST = ROOT / "tests" / "zoo" / f"test_{NAME}.py"


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # in order with what the verification prints
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("dist"), help="folder of the entry, the zip and the zoo's unit test")
    parser.add_argument("--schema", type=Path, help="schema of the metadata (default: the official one; ours where it cannot be reached)")
    parser.add_argument("--any_versions", action="store_true", help="verify with other packages than configs/metadata.json names")
    arguments = parser.parse_args()
    meta = json.loads((ROOT / "configs" / "metadata.json").read_text())
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            built = build(work / "built" / NAME)
            check_versions(meta, arguments.any_versions)
            archive = pack(built, work / f"{NAME}_v{meta['version']}.zip")
            verify(archive, work / "zoo", read_schema(meta, arguments.schema))
            publish(built, archive, arguments.output_dir)
    except (RuntimeError, metadata.PackageNotFoundError) as e:
        sys.exit(f"error: {e}")


def build(folder: Path) -> Path:
    """Copy the parts of the bundle that belong in the zoo."""
    folder.mkdir(parents=True)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "README.md").write_text(hub_readme(), encoding="utf-8")
    for file in contents(folder):
        if file.stat().st_size >= MAX_BYTES:
            size = f"{file.stat().st_size / 1e6:.1f} MB"
            raise RuntimeError(f"{file.relative_to(folder)}: {size}, and the zoo takes files below {MAX_BYTES / 1e6:.0f} MB")
    return folder


def hub_readme() -> str:
    """The model card with front matter for the Hugging Face hub, and links relative to the folder above ``docs``."""
    card = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    card = re.sub(r"\]\((?!https?:|#|\.\./)", "](docs/", card).replace("](../", "](")
    return FRONT_MATTER + card


def check_versions(meta: dict, any_versions: bool) -> None:
    """The metadata must name the installed packages, because the tests ran with those."""
    pinned = {**meta["required_packages_version"], **{name: meta[key] for name, key in PACKAGES.items()}}
    installed = {name: metadata.version(name).split("+")[0] for name in pinned}  # torch adds "+cpu"
    other = [f"{name} {installed[name]} (metadata: {pinned[name]})" for name in pinned if installed[name] != pinned[name]]
    if other and not any_versions:
        raise RuntimeError(f"configs/metadata.json does not name the installed versions: {', '.join(other)}")
    print(f"packages: {'other versions than in the metadata: ' + ', '.join(other) if other else 'the versions in the metadata'}")


def pack(folder: Path, archive: Path) -> Path:
    """Zip a folder; the same files always give the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
        for file in contents(folder):
            info = zipfile.ZipInfo(file.relative_to(folder.parent).as_posix())  # dated 1980
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            stream.writestr(info, file.read_bytes())
    return archive


def read_schema(meta: dict, path: Path | None) -> bytes:
    """The schema at ``path``, or the official one, or ours if that cannot be reached."""
    if path is None:
        try:
            with urllib.request.urlopen(meta["schema"], timeout=10) as stream:
                print(f"schema: {meta['schema']}")
                return stream.read()
        except OSError as e:
            path = OWN_SCHEMA
            print(f"schema: the official one cannot be reached ({e})")
    print(f"schema: {path}")
    return path.read_bytes()


def verify(archive: Path, zoo: Path, schema: bytes) -> None:
    """Unpack as in the zoo and run ``verify_package.py`` and the unit test there."""
    with zipfile.ZipFile(archive) as stream:
        stream.extractall(zoo / "models")
    (zoo / "ci").mkdir()
    for file in (UNIT_TEST, Path(__file__).with_name("verify_package.py")):
        shutil.copy(file, zoo / "ci")
    (zoo / "schema.json").write_bytes(schema)
    # -S: without the links that an editable installation of the repository leaves among the packages
    packages = os.pathsep.join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    environment = {**os.environ, "PYTHONPATH": packages}
    python = [sys.executable, "-S"]
    if subprocess.run([*python, "ci/verify_package.py", f"models/{NAME}"], cwd=zoo, env=environment).returncode:
        raise RuntimeError("the verification failed")
    command = [*python, "-m", "unittest", f"ci/{UNIT_TEST.name}"]
    test = subprocess.run(command, cwd=zoo, env=environment, capture_output=True, text=True)
    if test.returncode:
        raise RuntimeError(f"the unit test failed\n{test.stderr}")
    print(f"unit test: {test.stderr.strip().splitlines()[-3]}")


def publish(folder: Path, archive: Path, output_dir: Path) -> None:
    """Put entry, zip and unit test into the output folder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output_dir / NAME, ignore_errors=True)
    shutil.copytree(folder, output_dir / NAME)
    shutil.copy(archive, output_dir)
    shutil.copy(UNIT_TEST, output_dir)
    print(f"\n{output_dir / NAME}: goes to models/ of the zoo")
    print(f"{output_dir / UNIT_TEST.name}: goes to ci/unit_tests/ of the zoo")
    print(f"{output_dir / archive.name}: sha1 {hashlib.sha1(archive.read_bytes()).hexdigest()}")


def contents(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
