"""Two simulated sites train one network through MONAI's federated-learning client, on subjects that never meet."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import pytest
import torch
import toy
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ROUNDS, EPOCHS = 2, 2  # epochs of one round
SMALL = {
    **toy.TINY_OVERRIDES,
    "device": "$torch.device('cpu')",
    "split": [2, 1, 1],
    "patch_size": 15,
    "patches_per_volume": 64,
    "batch_size": 8,
    "warmup_iterations": 5,
    "learning_rate": 0.003,
    "tv_weight": 0,
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> list[MonaiAlgo]:
    """Clients, each with four subjects of its own: two to train on, one to validate on, one to test on."""
    clients = []
    for site in ("site-1", "site-2"):
        folder = tmp_path_factory.mktemp(site)
        for n in range(1, 5):
            toy.write_nifti(folder / "data" / f"sub-{n:02d}.nii.gz", toy.head(seed=10 * int(site[-1]) + n))
        settings = {**SMALL, "dataset_dir": str(folder / "data"), "output_dir": str(folder / "out")}
        client = MonaiAlgo(
            bundle_root=str(ROOT),
            local_epochs=EPOCHS,
            send_weight_diff=False,
            train_kwargs=dict(settings),
            eval_kwargs=dict(settings),
            best_model_filepath=str(folder / "out" / "models" / "model.pt"),
        )
        client.initialize({ExtraItems.CLIENT_NAME: site})
        clients.append(client)
    return clients


def scores(sites: list[MonaiAlgo], weights: dict) -> list[float]:
    """PSNR of the test subjects of every site, in dB."""
    return [site.evaluate(ExchangeObject(weights=weights)).metrics["psnr"] for site in sites]


def average(models: list[dict]) -> dict:
    """The mean of every parameter: federated averaging of sites with equally many subjects."""
    return {key: torch.stack([model[key] for model in models]).mean(0) for key in models[0]}


@pytest.fixture(scope="module")
def federation(sites) -> dict:
    """What came of two rounds: global weights and scores before each round and after the last, local weights of each round."""
    weights = toy.MultiScaleResidualNet(**toy.TINY).state_dict()
    history: dict = {"weights": [weights], "scores": [scores(sites, weights)], "local": []}
    for _ in range(ROUNDS):
        for site in sites:
            site.train(ExchangeObject(weights=history["weights"][-1]))
        history["local"].append([site.get_weights().weights for site in sites])
        history["weights"].append(average(history["local"][-1]))
        history["scores"].append(scores(sites, history["weights"][-1]))
    return history


def test_the_average_of_the_sites_beats_where_they_started(federation):
    # an untrained network returns the interpolated image
    for before, after in zip(federation["scores"][0], federation["scores"][-1]):
        assert after > before + 0.3


def test_sites_learn_from_their_own_subjects_in_every_round(federation):
    for one, two in federation["local"]:
        assert any(not torch.equal(one[key], two[key]) for key in one)


def test_a_round_goes_on_where_the_last_one_ended(sites, federation):
    for site in sites:
        last = torch.load(Path(site.train_workflow.parser["output_dir"]) / "models" / "last.pt", weights_only=True)
        assert last["epoch"] == ROUNDS * EPOCHS
        assert last["lr_scheduler"]["_schedulers"][1]["last_epoch"] == last["iteration"]  # the schedule does not start anew


def test_weight_differences_lead_to_the_same_weights(sites, federation):
    site, weights = sites[0], federation["weights"][-1]
    site.train(ExchangeObject(weights=weights))
    full = site.get_weights().weights
    site.send_weight_diff = True
    difference = site.get_weights().weights
    assert all(torch.allclose(weights[key] + difference[key], full[key], atol=1e-6) for key in full)


def test_the_best_network_of_a_site_can_be_asked_for(sites, federation):
    best = sites[1].get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert best.keys() == federation["weights"][0].keys()
    assert all(torch.isfinite(value).all() for value in best.values())


def test_initial_weights_do_not_replace_the_average_of_a_round(tmp_path):
    toy.write_subjects(tmp_path / "data", 4)
    initial = str(toy.save_checkpoint(tmp_path / "initial.pt"))
    still = {**SMALL, "patches_per_volume": 8, "learning_rate": 1e-12, "initial_checkpoint": initial}
    settings = {**still, "dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    client = MonaiAlgo(bundle_root=str(ROOT), local_epochs=1, send_weight_diff=False, train_kwargs=settings, eval_kwargs=dict(settings))
    client.initialize({ExtraItems.CLIENT_NAME: "site"})
    start = client.get_weights().weights
    assert all(torch.equal(start[key], value) for key, value in torch.load(initial, weights_only=True).items())
    for seed in (1, 2):
        average = torch.load(toy.save_checkpoint(tmp_path / "average.pt", seed=seed), weights_only=True)
        client.train(ExchangeObject(weights=average))
        found = client.get_weights().weights
        assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in average.items())


def test_the_documented_scripts_run_under_nvidia_flare(tmp_path):
    pytest.importorskip("nvflare", reason="pip install -e '.[federated]'")
    client, job = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "federated_learning.md").read_text(), re.S)
    assert job.count('"args": {}') == 1
    (tmp_path / "client.py").write_text(client)
    (tmp_path / "job.py").write_text(job.replace('"args": {}', f'"args": {toy.TINY}'))
    for site in ("site-1", "site-2"):
        toy.write_subjects(tmp_path / site, 3)
        settings = {
            **SMALL,
            "split": [1, 1, 1],
            "patches_per_volume": 8,
            "dataset_dir": str(tmp_path / site),
            "output_dir": str(tmp_path / "out" / site),
        }
        (tmp_path / f"{site}.json").write_text(json.dumps(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    (checkpoint,) = tmp_path.rglob("best_FL_global_model.pt")
    monai.bundle.run(
        config_file=str(ROOT / "configs" / "inference.json"), dataset_dir=str(tmp_path / "site-1" / "sub-03.nii.gz"),
        output_dir=str(tmp_path), checkpoint=str(checkpoint), **toy.TINY_INFERENCE,
    )  # fmt: skip
    assert nib.load(tmp_path / "sub-03_sr.nii.gz").shape == (2 * toy.SHAPE[0], 2 * toy.SHAPE[1], toy.SHAPE[2])
