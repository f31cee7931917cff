"""Every config, run as a user runs it, on toy volumes with a tiny network."""

import csv
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from monai import bundle
from PIL import Image
from scipy.ndimage import zoom as scipy_zoom
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bundle.checkpoints import Checkpoints
from bundle.errors import InputError, reason
from bundle.resampling import acquire_slices, degrade

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = {"meta_file": str(CONFIGS / "metadata.json"), "logging_file": str(CONFIGS / "logging.conf"), "device": "$torch.device('cpu')"}
SMALL = {
    **toy.TINY_OVERRIDES,
    "precision": "float32",
    "patch_size": 15,
    "patches_per_volume": 8,
    "batch_size": 8,
    "max_epochs": 4,
    "val_interval": 2,
    "lr_milestones": [2, 3],
    "warmup_iterations": 3,
    "split": [2, 2, 1],
}
SMALL_FAST = {key: value for key, value in SMALL.items() if not key.startswith("network_def")} | {
    "network_def::features": 8,
    "network_def::num_blocks": 1,
}


def run(*configs: str, **overrides) -> None:
    """Run the named configs in this process."""
    bundle.run(config_file=[str(CONFIGS / f"{c}.json") for c in configs], **FILES, **overrides)


def command_line(*configs: str, launcher: tuple[str, ...] = ("-m",), **overrides) -> list[str]:
    files = str([str(CONFIGS / f"{c}.json") for c in configs])
    flags = [part for key, value in {**FILES, **overrides}.items() for part in (f"--{key}", str(value))]
    return [sys.executable, *launcher, "monai.bundle", "run", "--config_file", files, *flags]


def run_command(*configs: str, launcher: tuple[str, ...] = ("-m",), status: int = 0, **overrides) -> str:
    """``python -m monai.bundle run`` on the named configs; returns what it printed."""
    command = command_line(*configs, launcher=launcher, **overrides)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    output = result.stdout + result.stderr
    assert result.returncode == status, output[-3000:]
    return output


def two_processes() -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def same_tensors(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    toy.write_subjects(folder, 5)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("trained")
    run("train", dataset_dir=str(data), output_dir=str(folder), **SMALL)
    return folder


def test_training_writes_checkpoints_and_tensorboard(trained):
    last = torch.load(trained / "models" / "last.pt", weights_only=True)
    best = torch.load(trained / "models" / "model.pt", weights_only=True)
    assert last["epoch"] == 4
    assert best.keys() == last["network"].keys()
    assert list(trained.glob("events.out.tfevents*"))
    untrained = toy.MultiScaleResidualNet(**toy.TINY).state_dict()
    assert not torch.equal(best["reconstruct.0.weight"], untrained["reconstruct.0.weight"])


def test_learning_rate_follows_the_milestones(trained):
    last = torch.load(trained / "models" / "last.pt", weights_only=True)
    assert max(group["lr"] for group in last["optimizer"]["param_groups"]) == pytest.approx(1e-5)


def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(data, trained, tmp_path):
    # the first call stops where a killed one would have left its checkpoint
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), **{**SMALL, "max_epochs": 3})
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), resume=True, **SMALL)
    a, b = (torch.load(folder / "models" / "last.pt", weights_only=True) for folder in (trained, tmp_path))
    assert same_tensors(a["network"], b["network"])
    assert a["best"] == b["best"]
    assert (a["epoch"], a["iteration"]) == (b["epoch"], b["iteration"])
    best = [torch.load(folder / "models" / "model.pt", weights_only=True) for folder in (trained, tmp_path)]
    assert same_tensors(*best)


def test_training_starts_from_given_weights(data, trained, tmp_path):
    given, options = str(trained / "models" / "model.pt"), {**SMALL, "max_epochs": 1, "learning_rate": 1e-9}
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), initial_checkpoint=given, **options)
    weights = [torch.load(folder / "models" / "model.pt", weights_only=True) for folder in (trained, tmp_path)]
    assert same_tensors(*weights, tolerance=1e-6)
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(tmp_path / "b"), initial_checkpoint=str(tmp_path / "none.pt"), **options)
    assert reason(error.value) == f"{tmp_path / 'none.pt'}: No such file or directory"


def test_training_in_bfloat16_ends_near_that_in_float32(data, trained, tmp_path):
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), **{**SMALL, "precision": "bfloat16"})
    exact, rounded = (torch.load(folder / "models" / "last.pt", weights_only=True) for folder in (trained, tmp_path))
    assert not same_tensors(exact["network"], rounded["network"])
    assert same_tensors(exact["network"], rounded["network"], tolerance=0.002)
    assert rounded["best"] == pytest.approx(exact["best"], abs=0.01)  # dB of the validation subjects


def test_a_new_training_does_not_overwrite_an_old_one(data, trained, tmp_path):
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(trained), **SMALL)
    assert f"{trained / 'models' / 'last.pt'} is the checkpoint of an earlier run" in reason(error.value)
    given = toy.save_checkpoint(tmp_path / "models" / "model.pt")
    before = given.read_bytes()
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(tmp_path), **SMALL)
    assert reason(error.value) == f"{given} holds the weights of another training, which would be lost: choose another folder"
    assert given.read_bytes() == before


def test_the_weights_that_are_validated_are_kept(data, tmp_path):
    """With random acquisitions, these are the moving average."""
    acquired = {"slices_per_volume": 4, "patches_per_slice": 2, "patch_size": 16, "batch_size": 2, "max_epochs": 1, "val_interval": 1}
    options = {"dataset_dir": str(data), "split": [3, 1, 1], "average_decay": 0.9, "learning_rate": 0.01, "warmup_iterations": 1}
    options |= {"network_def::features": 4, "network_def::num_blocks": 1}
    run("train", "general", "random_acquisitions", output_dir=str(tmp_path), **options, **acquired)
    best, last = (torch.load(tmp_path / "models" / f"{name}.pt", weights_only=True) for name in ("model", "last"))
    assert not same_tensors(best, last["network"])
    options |= {"checkpoint": str(tmp_path / "models" / "model.pt"), "test_datalist": "@val_datalist", "acquisition": "unknown"}
    run("train", "general", "evaluate", output_dir=str(tmp_path / "evaluation"), **options)
    found = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["overall"]["psnr"]["mean"]
    assert found == pytest.approx(last["best"][0], abs=1e-3)


@pytest.mark.parametrize(
    ("configs", "line"),
    [
        (("general",), "the general networks learn from random acquisitions: add configs/random_acquisitions.json"),
        (("acquisition_classifier",), "the classifier learns from random acquisitions: add configs/random_acquisitions.json"),
        (("networks/bicubic",), "Identity has no weights to train"),
        (("evaluate", "evaluate_thick_slices"), "configs/evaluate_thick_slices.json needs configs/thick_slices.json, which makes"),
    ],
)
def test_what_an_overlay_needs_is_said(configs, line, data, tmp_path):
    options = {key: value for key, value in SMALL.items() if not key.startswith("network_def") or configs[0] == "evaluate"}
    options["load_weights"] = False
    with pytest.raises((RuntimeError, InputError)) as error:
        run("train", *configs, dataset_dir=str(data), output_dir=str(tmp_path), **options)
    assert reason(error.value).startswith(line)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_name(data, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "last.pt").write_bytes(b"nothing of use")
    output = run_command("train", dataset_dir=str(data), output_dir=str(tmp_path), resume=True, status=1, **SMALL)
    assert output.splitlines()[-1].startswith(f"error: {tmp_path / 'models' / 'last.pt'}: not a checkpoint")
    assert "Traceback" not in output


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(data, tmp_path):
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), **{**SMALL, "max_epochs": 1})
    files = [tmp_path / "models" / name for name in ("last.pt", "model.pt")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(tmp_path), resume="true", **SMALL, **{"loss::peak": 1e30})
    assert reason(error.value).startswith(f"the loss is inf in epoch 2, step 3: training stopped, {files[0]} holds the last epoch before")
    assert [file.read_bytes() for file in files] == before
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), resume=True, **{**SMALL, "max_epochs": 2})


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    network = toy.MultiScaleResidualNet(**toy.TINY)
    optimizer = torch.optim.Adam(network.parameters())
    checkpoints = Checkpoints(str(tmp_path), network, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer))
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=1, iteration=7), scaler=None)
    checkpoints.save(trainer)
    before = [(file, file.read_bytes()) for file in tmp_path.iterdir()]
    trainer.state.epoch = 2
    with torch.no_grad():
        network.extract[0].weight[0, 0, 1, 1] = torch.nan
    with pytest.raises(InputError, match=r"a weight is not finite in epoch 2, step 7: training stopped, .*last\.pt holds the last epoch"):
        checkpoints.save(trainer)
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == before


def test_a_training_is_resumed_with_its_own_settings_only(data, trained, tmp_path):
    changed = {**SMALL, "learning_rate": 0.5, "lr_milestones": [1]}
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(trained), resume=True, **changed)
    assert reason(error.value) == (
        f"{trained / 'models' / 'last.pt'} was made with learning_rate 0.001, now 0.5; lr_milestones [2, 3], now [1]: "
        "resume it with its own settings, or choose another folder"
    )
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(trained), resume=True, **{**SMALL, "split": [3, 1, 1]})
    assert "was made with split [2, 2, 1], now [3, 1, 1]; training_volumes 2, now 3" in reason(error.value)


@pytest.mark.parametrize("warmup", [0, 2])
def test_training_reaches_its_rate_with_and_without_warm_up(warmup, data, tmp_path):
    options = {**SMALL, "max_epochs": 1, "val_interval": 9, "lr_milestones": [5], "warmup_iterations": warmup}
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), **options)
    last = torch.load(tmp_path / "models" / "last.pt", weights_only=True)
    assert max(group["lr"] for group in last["optimizer"]["param_groups"]) == pytest.approx(1e-3)


def test_slices_without_anatomy_do_not_count(data, tmp_path):
    """They would have an infinite PSNR, or one of 80 dB, and a JSON file has no word for the former."""
    checkpoint = str(toy.save_checkpoint(tmp_path / "tiny.pt"))
    padded = tmp_path / "padded"
    for path in data.iterdir():
        volume = nib.load(path)
        empty = np.zeros((*volume.shape[:2], 5), np.float32)
        toy.write_nifti(padded / path.name, np.concatenate([empty, volume.get_fdata(dtype=np.float32), empty], -1), volume.affine)
    found = []
    for folder in (data, padded):
        out = tmp_path / f"of {folder.name}"
        run("train", "evaluate", dataset_dir=str(folder), output_dir=str(out), checkpoint=checkpoint, **SMALL)
        text = (out / "summary.json").read_text()
        assert "NaN" not in text and "Infinity" not in text
        found.append(json.loads(text)["overall"])
    for metric, value in found[0].items():
        assert found[1][metric] == pytest.approx(value, abs=1e-4), metric


@pytest.mark.slow
def test_two_processes_do_what_one_does(data, tmp_path):
    """They train the same network, and score the same, also with fewer subjects than processes."""
    settings = {**SMALL, "dataset_dir": str(data), "split": [3, 1, 1], "max_epochs": 2}
    run("train", output_dir=str(tmp_path / "one"), **settings)
    run_command("train", "multi_gpu_train", launcher=two_processes(), output_dir=str(tmp_path / "two"), **settings)
    one, two = (torch.load(tmp_path / n / "models" / "last.pt", weights_only=True) for n in ("one", "two"))
    assert same_tensors(one["network"], two["network"], tolerance=1e-5)
    assert two["best"][0] == pytest.approx(one["best"][0], abs=1e-3)
    settings["checkpoint"] = str(tmp_path / "one" / "models" / "model.pt")
    run("train", "evaluate", output_dir=str(tmp_path / "one"), **settings)
    run_command("train", "evaluate", "multi_gpu_evaluate", launcher=two_processes(), output_dir=str(tmp_path / "two"), **settings)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    for metric, value in one["overall"].items():
        assert two["overall"][metric] == pytest.approx(value, abs=1e-5), metric
    rows = [(tmp_path / n / "metrics.csv").read_text().count("\n") for n in ("one", "two")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_batch_normalisation_in_several_cpu_processes_is_refused_in_one_line(data, tmp_path):
    options = {
        "dataset_dir": str(data),
        "output_dir": str(tmp_path),
        "split": [2, 2, 1],
        "network_def::features": 4,
        "network_def::num_blocks": 1,
    }
    output = run_command("train", "networks/srresnet", "multi_gpu_train", launcher=two_processes(), status=1, **options)
    assert "error: SRResNet has batch normalisation, which several processes can share on GPUs only" in output


@pytest.mark.parametrize("files", [("networks/bicubic", "evaluate"), ("evaluate", "networks/bicubic")])
def test_interpolation_alone_is_evaluated_wherever_its_overlay_stands(files, data, tmp_path):
    run("train", *files, dataset_dir=str(data), output_dir=str(tmp_path), split=[2, 2, 1])
    overall = json.loads((tmp_path / "summary.json").read_text())["overall"]
    assert overall["psnr"] == overall["bicubic_psnr"]


def test_resume_false_is_false(data, trained):
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(data), output_dir=str(trained), resume="false", **SMALL)
    assert "is the checkpoint of an earlier run" in reason(error.value)


@pytest.mark.skipif("KILL_TESTS" not in os.environ, reason="kills a training 20 times, which takes minutes: KILL_TESTS=1 runs it")
def test_training_killed_at_random_moments_ends_with_the_weights_of_an_uninterrupted_one(data, tmp_path):
    settings = {**SMALL, "max_epochs": 60, "dataset_dir": str(data)}
    started = time.monotonic()
    run("train", output_dir=str(tmp_path / "whole"), **settings)
    epoch = (time.monotonic() - started) / settings["max_epochs"]
    command = command_line("train", output_dir=str(tmp_path / "killed"), resume="true", **settings)
    random = np.random.default_rng()
    epochs = []  # that were complete when it was killed
    while True:
        log = tmp_path / f"{len(epochs)}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None and "Engine run" not in log.read_text():
            time.sleep(0.01)
        if len(epochs) == 20:
            break
        time.sleep(random.uniform(0, 3 * epoch))
        assert process.poll() is None, log.read_text()[-2000:]
        process.kill()
        process.wait()
        last = tmp_path / "killed" / "models" / "last.pt"
        epochs.append(torch.load(last, weights_only=True)["epoch"] if last.exists() else 0)
    assert process.wait() == 0, log.read_text()[-2000:]
    print(f"epochs complete at each kill: {epochs}")
    for name in ("last.pt", "model.pt"):
        one, other = (torch.load(tmp_path / folder / "models" / name, weights_only=True) for folder in ("whole", "killed"))
        assert same_tensors(*((one["network"], other["network"]) if name == "last.pt" else (one, other)))
    assert sorted(path.name for path in (tmp_path / "killed" / "models").iterdir()) == ["last.pt", "model.pt"]


@pytest.fixture(scope="module")
def evaluated(data, trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    checkpoint = trained / "models" / "last.pt"  # a training checkpoint is not what evaluation expects
    torch.save(torch.load(checkpoint, weights_only=True)["network"], folder / "model.pt")
    run("train", "evaluate", dataset_dir=str(data), output_dir=str(folder), checkpoint=str(folder / "model.pt"), **SMALL)
    return folder


def test_evaluation_scores_every_slice_of_the_test_subjects(evaluated, data):
    with (evaluated / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(Path(r["volume"]).name, int(r["slice"])) for r in rows] == [("sub-05.nii.gz", n) for n in range(1, toy.SHAPE[2] + 1)]
    volume = toy.head(seed=5)
    truth = np.clip(volume / np.percentile(volume[volume > 0], 99.9), 0, 1)
    for row in rows:
        hr = torch.from_numpy(truth[..., int(row["slice"]) - 1])
        lr = degrade(hr, 2).numpy()
        expected = peak_signal_noise_ratio(hr.numpy(), lr, data_range=1)
        assert float(row["bicubic_psnr"]) == pytest.approx(expected, abs=1e-3)


def test_evaluation_sums_up_per_volume_and_overall(evaluated):
    summary = json.loads((evaluated / "summary.json").read_text())
    with (evaluated / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    (volume,) = summary["volumes"].values()
    for metric in ("psnr", "ssim", "psnr_foreground", "ssim_foreground", "bicubic_psnr", "bicubic_ssim"):
        mean = np.nanmean([float(r[metric]) for r in rows])
        assert volume[metric] == pytest.approx(mean)
        assert summary["overall"][metric]["mean"] == pytest.approx(mean)


def test_evaluation_draws_a_picture(evaluated):
    with Image.open(evaluated / "comparison.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("L")).std() > 20


@pytest.mark.slow
def test_two_processes_measure_what_one_does(data, evaluated, tmp_path):
    # three test volumes among two processes: none may count twice
    settings = {**SMALL, "dataset_dir": str(data), "checkpoint": str(evaluated / "model.pt"), "split": [1, 1, 3]}
    run("train", "evaluate", output_dir=str(tmp_path / "one"), **settings)
    run_command("train", "evaluate", "multi_gpu_evaluate", launcher=two_processes(), output_dir=str(tmp_path / "two"), **settings)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert len(one["volumes"]) == 3
    assert one["volumes"].keys() == two["volumes"].keys()
    for metric, value in one["overall"].items():
        assert two["overall"][metric] == pytest.approx(value, abs=1e-5), metric


@pytest.mark.parametrize(
    ("protocol", "shape", "slices", "names"),
    [
        ("brats2015", (180, 190, 99), 35, [f"HGG/pat{n}/VSD.Brain.XX.O.MR_T1c.{n}.mha" for n in range(3)]),
        ("iseg2017", (40, 44, 160), 30, [f"subject-{n}-T1.img" for n in range(3)]),
        ("alvin", (40, 44, 160), 30, [f"adult {n}.nii.gz" for n in range(3)]),
        ("ds002748", (190, 210, 120), 30, [f"sub-{n:02d}.nii.gz" for n in range(3)]),
    ],
)
@pytest.mark.slow
def test_each_protocol_reads_its_format_and_slices(protocol, shape, slices, names, tmp_path):
    for n, name in enumerate(names):
        writer = {".mha": toy.write_itk, ".img": toy.write_analyze}.get(Path(name).suffix, toy.write_nifti)
        writer(tmp_path / "data" / name, toy.head(shape, seed=n))
    checkpoint = toy.save_checkpoint(tmp_path / "tiny.pt")
    first, last = json.loads((CONFIGS / "datasets" / f"{protocol}.json").read_text())["axial_slices"]
    assert last - first + 1 == slices
    # all but two slices are skipped to keep the test short; the range itself is part of the protocol
    run(
        "train", f"datasets/{protocol}", "evaluate", dataset_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "out"),
        checkpoint=str(checkpoint), axial_slices=[last - 1, last], **{**SMALL, "split": [1, 1, 1]},
    )  # fmt: skip
    with (tmp_path / "out" / "metrics.csv").open() as stream:
        assert [int(r["slice"]) for r in csv.DictReader(stream)] == [last - 1, last]


def test_a_volume_with_too_few_slices_is_named(tmp_path):
    toy.write_subjects(tmp_path / "data", 3)
    with pytest.raises(RuntimeError) as error:
        run("train", "datasets/alvin", dataset_dir=str(tmp_path / "data"), output_dir=str(tmp_path), **{**SMALL, "split": [1, 1, 1]})
    assert reason(error.value) == (
        f"{tmp_path / 'data' / 'sub-01.nii.gz'}: axial slices 131 to 160 asked for, but the volume has {toy.SHAPE[2]}"
    )


def test_a_volume_smaller_than_a_patch_is_named(tmp_path):
    toy.write_subjects(tmp_path / "data", 3)
    with pytest.raises(RuntimeError) as error:
        run("train", dataset_dir=str(tmp_path / "data"), output_dir=str(tmp_path), **{**SMALL, "patch_size": 39, "split": [1, 1, 1]})
    assert "sub-01.nii.gz: slices of 40 x 36 pixels are smaller than a patch of 39 x 39" in reason(error.value)


@pytest.mark.slow
def test_training_is_tracked_by_mlflow(data, tmp_path):
    run("train", dataset_dir=str(data), output_dir=str(tmp_path), tracking="mlflow", **{**SMALL, "max_epochs": 2})
    with sqlite3.connect(tmp_path / "mlruns.db") as database:
        keys = {key for (key,) in database.execute("SELECT DISTINCT key FROM metrics")}
    assert {"train_loss", "psnr", "ssim"} <= keys


def test_a_network_for_any_factor_is_trained_and_evaluated_at_one(data, tmp_path):
    run("train", "any_factor", dataset_dir=str(data), output_dir=str(tmp_path), **{**SMALL_FAST, "max_epochs": 1})
    weights = str(tmp_path / "models" / "model.pt")
    for scale in (1.5, [2, 3]):
        out = tmp_path / str(scale)
        run("train", "any_factor", "evaluate", dataset_dir=str(data), output_dir=str(out), checkpoint=weights, scale=scale, **SMALL_FAST)
        summary = json.loads((out / "summary.json").read_text())
        truth = nib.load(data / "sub-05.nii.gz").get_fdata(dtype=np.float32)
        truth = torch.from_numpy(np.clip(truth / np.percentile(truth[truth > 0], 99.9), 0, 1)).movedim(-1, 0)
        values = [peak_signal_noise_ratio(t.numpy(), degrade(t, scale).numpy(), data_range=1) for t in truth]
        assert summary["overall"]["bicubic_psnr"]["mean"] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.slow
def test_thick_slices_are_trained_on_and_evaluated(tmp_path):
    toy.write_subjects(tmp_path / "data", 5, (24, 22, 26))  # slices of 2 mm
    options = {**SMALL_FAST, "dataset_dir": str(tmp_path / "data"), "max_epochs": 1, "thickness": 6}
    acquired = {"slices_per_volume": 4, "patches_per_slice": 2, "warmup_iterations": 1}
    run("train", "thick_slices", "random_acquisitions", output_dir=str(tmp_path), **{**options, **acquired})
    out, weights = tmp_path / "evaluation", str(tmp_path / "models" / "model.pt")
    files = ("train", "thick_slices", "evaluate", "evaluate_thick_slices")
    run(*files, output_dir=str(out), checkpoint=weights, thicknesses=[4, 5], slice_profile="box", slice_gap=0.2, **options)
    report = json.loads((out / "thick_slices.json").read_text())
    assert (report["profile"], report["gap"]) == ("box", 0.2)
    (volume,) = report["4 mm"]["volumes"]
    truth = nib.load(volume).get_fdata(dtype=np.float32)
    truth = torch.from_numpy(np.clip(truth / np.percentile(truth[truth > 0], 99.9), 0, 1))
    thick = acquire_slices(truth, 2, "box", 0.2)
    cubic = scipy_zoom(thick.numpy(), (1, 1, 2), order=3, mode="nearest", grid_mode=True)
    values = report["4 mm"]["volumes"][volume]
    assert values["cubic B-spline psnr"] == pytest.approx(peak_signal_noise_ratio(truth.numpy(), cubic, data_range=1), abs=1e-3)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    assert values["cubic B-spline ssim"] == pytest.approx(structural_similarity(truth.numpy(), cubic, **window), abs=1e-5)
    table = (out / "thick_slices.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 4 mm", "| 5 mm"]
    assert {f"{t}mm_{p}.png" for t in (4, 5) for p in ("axial", "coronal", "sagittal")} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("configs", [("random_acquisitions", "multi_gpu_train"), ("multi_gpu_train", "random_acquisitions")])
def test_two_processes_keep_the_average_of_one_network(configs, data, tmp_path):
    small = {"slices_per_volume": 4, "patches_per_slice": 2, "patch_size": 16, "batch_size": 2, "max_epochs": 1, "device": "cpu"}
    small |= {"split": [3, 1, 1], "network_def::features": 4, "network_def::num_blocks": 1}
    run_command("train", "general", *configs, launcher=two_processes(), dataset_dir=data, output_dir=tmp_path, **small)
    best, last = (torch.load(tmp_path / "models" / f"{name}.pt", weights_only=True) for name in ("model", "last"))
    assert best.keys() == last["network"].keys()
    assert int(last["average"]["n_averaged"]) == 6  # steps
    assert not same_tensors(best, last["network"])
