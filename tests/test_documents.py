"""Links of the pages, and every workflow of README.md and docs/: each command as written there, on toy volumes with small settings."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import monai.bundle
import pytest
import toy
from fire.parser import DefaultParseValue

ROOT = Path(__file__).parents[1]
ELSEWHERE = (
    "torchrun",
    "_export",
    "inference_torchscript",
    "inference_onnx",
    "inference_trt",
    '--tv_weight 0"',
)  # test_workflows, test_export
PAGES = ["README.md", "docs/README.md", "docs/factors_and_slices.md", "docs/fast_network.md", "docs/results.md", "docs/training.md"]
SMALL = {"split": [2, 1, 2], "crop_size": [40, 36], "device": "$torch.device('cpu')"}
SHORT = {"patch_size": 16, "patches_per_volume": 2, "batch_size": 2, "max_epochs": 1, "lr_milestones": [1], "val_interval": 1}


def commands(page: str) -> list[dict]:
    """Arguments of each ``python -m monai.bundle run`` of a page, in their order; of a loop, those of its first round."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S)).replace("\\\n", " ")
    found = []
    for line in blocks.splitlines():
        if "-m monai.bundle run" in line and not any(word in line for word in ELSEWHERE):
            words = shlex.split(line.split("monai.bundle run")[1].replace("$scale", "1.5"), comments=True)
            found.append({key.removeprefix("--"): DefaultParseValue(value) for key, value in zip(words[::2], words[1::2])})
    return found


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_to_a_file_and_a_heading(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for n in range(1, 6):
        for volume in (f"DATA/ds002748/sub-{n}.nii.gz", f"BRATS/sub-{n}_t1ce.nii.gz", f"SCANS/sub-{n}.nii.gz"):
            toy.write_nifti(tmp_path / volume, toy.head((40, 36, 20), seed=n))
    of_reproduce = tmp_path / "RUN" / "brats" / "drrn" / "seed0" / "weights.pt"
    of_reproduce.parent.mkdir(parents=True)
    of_reproduce.symlink_to(ROOT / "models" / "baselines" / "drrn.pt")
    toy.write_nifti(tmp_path / "scan.nii.gz")
    toy.write_nifti(tmp_path / "thick.nii.gz", to_world=toy.affine((1, 1, 4)))
    arguments = commands(page)
    assert arguments
    for given in arguments:
        configs, small = str(given["config_file"]), {}
        if "configs/train.json" in configs:
            small = SMALL if "evaluate" in configs or "measure_ranges" in configs else {**SMALL, **SHORT}
            if "thick_slices" not in configs:  # whose protocol is whole volumes
                small = {**small, "axial_slices": [2, 3]}
            if "random_acquisitions" in configs:
                small = {**small, "slices_per_volume": 2}
        monai.bundle.run(logging_file=False, meta_file=str(ROOT / "configs" / "metadata.json"), **{**given, **small})
        assert any((tmp_path / given["output_dir"]).rglob("*.*")), given


@pytest.mark.slow
def test_the_page_tells_the_error_inside_the_brain_from_that_at_its_edge(tmp_path):
    for n in range(1, 6):
        toy.write_nifti(tmp_path / f"sub-{n}_t1ce.nii.gz", toy.head((40, 36, 20), seed=n))
    settings = {**SMALL, "axial_slices": [8, 12]}
    program = re.search(r"<<'EOF'\n(.*?)\nEOF", (ROOT / "docs" / "results.md").read_text(), re.S)[1]
    program = program.replace('config["dataset_dir"] = dataset_dir', f"config.update({settings | {'dataset_dir': str(tmp_path)}})")
    weights = [f"{name}={ROOT}/models/baselines/{name}.pt" for name in ("srcnn", "fsrcnn")]
    run = subprocess.run([sys.executable, "-c", program, "brats2018", "", *weights], cwd=ROOT, capture_output=True, text=True, check=True)
    srcnn, fsrcnn = ([float(number) for number in re.findall(r"[ (]([-+.0-9]+)(?= dB| to|\))", line)] for line in run.stdout.splitlines())

    configs = [str(ROOT / "configs" / f"{name}.json") for name in ("train", "datasets/brats2018", "evaluate", "networks/fsrcnn")]
    evaluation = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "evaluation"), "logging_file": False}
    monai.bundle.run(config_file=configs, meta_file=str(ROOT / "configs" / "metadata.json"), **settings, **evaluation)
    found = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["overall"]["psnr"]["mean"]
    whole, lowest, highest, inside, _, _, edge, _, _ = fsrcnn
    assert whole == pytest.approx(found, abs=0.006)
    assert lowest - 0.011 <= whole - srcnn[0] <= highest + 0.011
    assert set(srcnn[1:3]) == {0}
    assert edge < whole < inside
