"""The MONAI Label app in the real server. Needs the environment of docs/monai_label.md; elsewhere these tests are skipped."""

import hashlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import toy
import toy_dicom

pytest.importorskip("monailabel", reason="docs/monai_label.md says how to install MONAI Label")

import itk
import psutil
import requests
import torch
from fastapi import HTTPException
from monailabel.client import MONAILabelClient

from bundle.dicom_volume import load_series
from bundle.networks import PixelShuffleResidualNet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MODEL = "super_resolution"
OBLIQUE = toy.affine((0.9, 1.2, 3.0), (14, -9, 25), (-80, 95, -60))
# name -> orientation in which the file is stored
STUDIES = {"sagittal": "PIR", "flipped": "LPI", "axial scan": "RAS"}


def write_study(folder: Path, name: str, seed: int = 0) -> Path:
    """An oblique volume of int16 voxels."""
    array, to_world = toy.stored_as(STUDIES.get(name, "RAS"), toy.head((40, 36, 6), seed=seed), OBLIQUE)
    return toy.write_nifti(folder / f"{name}.nii.gz", array, to_world, np.int16)


def copy_bundle(folder: Path) -> Path:
    """A bundle with the tiny network, so that a training changes nothing here."""
    for name in ("bundle", "configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "bin", "lib", "logs", "model"))
    for name in ("train", "inference"):
        path = folder / "configs" / f"{name}.json"
        config = json.loads(path.read_text())
        if name == "train":
            config["network_def"].update(toy.TINY)
            config.update(patch_size=15, patches_per_volume=16, batch_size=8, warmup_iterations=3)
        else:
            config.update(toy.TINY_INFERENCE)
        path.write_text(json.dumps(config))
    toy.save_checkpoint(folder / "models" / "model.pt")
    return folder


class Server:
    """A running server and what it works on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.studies, self.log = folder, folder / "studies", folder / "log.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "client").mkdir()
        self.client = MONAILabelClient(self.url, tmpdir=str(folder / "client"))

    @contextmanager
    def running(self, *command: str, **variables: str) -> Iterator["Server"]:
        (self.folder / "tmp").mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp"), **variables}
        words = [sys.executable, *command, "--studies", str(self.studies), "--port", str(self.port)]
        with self.log.open("w") as log, subprocess.Popen(words, cwd=self.folder, stdout=log, stderr=log, env=environment) as self.process:
            try:
                for _ in range(240):
                    assert self.process.poll() is None, self.log.read_text()[-3000:]
                    try:
                        requests.get(f"{self.url}/info/", timeout=60)
                        break
                    except requests.ConnectionError:
                        time.sleep(0.5)
                yield self
            finally:
                self.process.kill()

    def infer(self, image: str, model: str = MODEL, files: dict | None = None, **parameters) -> requests.Response:
        """``curl -X POST URL/infer/MODEL?image=IMAGE&output=image -F params=PARAMETERS``"""
        query = {"image": image, "output": "image"}
        return requests.post(f"{self.url}/infer/{model}", params=query, data={"params": json.dumps(parameters)}, files=files, timeout=120)

    def volume(self, *arguments, **parameters) -> nib.Nifti1Image:
        """What ``infer`` sends back."""
        response = self.infer(*arguments, **parameters)
        assert response.status_code == 200, response.text
        path = self.folder / "response.nii.gz"
        path.write_bytes(response.content)
        return nib.Nifti1Image.from_bytes(nib.load(path).to_bytes())  # the next response may take the file's place

    def documented(self, part: str) -> str:
        """Run the command of docs/monai_label.md that holds ``part``, on the toy scans; returns what it printed."""
        text = (ROOT / "docs" / "monai_label.md").read_text().replace("\\\n", " ")
        (command,) = {line for line in text.splitlines() if line.startswith("curl ") and part in line}
        for theirs, ours in (("127.0.0.1:8000", f"127.0.0.1:{self.port}"), ("image=scan1", "image=sagittal"), ("[90, 97]", "[2, 3]")):
            command = command.replace(theirs, ours)
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait(self, task: str) -> dict:
        """Status of a background task, when it has ended."""
        for _ in range(600):
            status = requests.get(f"{self.url}/{task}/", timeout=60).json()
            if status["status"] in ("DONE", "ERROR"):
                return status
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-3000:])

    def next_sample(self, **parameters) -> dict:
        return self.client.next_sample(MODEL, parameters)


@contextmanager
def our_server(folder: Path) -> Iterator[Server]:
    bundle = copy_bundle(folder / "copy")
    with Server(folder).running(str(bundle / "scripts" / "label_app" / "main.py")) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    for seed, name in enumerate(STUDIES):
        write_study(folder / "studies", name, seed)
    toy.write_nifti(folder / "studies" / "constant.nii.gz", np.full((20, 22, 3), 7))
    with our_server(folder) as server:
        yield server


def run_bundle(server: Server, output_dir: Path, **overrides) -> None:
    """``python -m monai.bundle run`` on all studies; the constant one fails."""
    given = {"config_file": server.folder / "copy" / "configs" / "inference.json", "dataset_dir": server.studies, "output_dir": output_dir}
    words = [str(word) for key, value in {**given, **overrides}.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "monai.bundle", "run", *words]
    subprocess.run(command, cwd=server.folder / "copy", capture_output=True, check=False, env=environment)


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory) -> dict[str, nib.Nifti1Image]:
    """What the command line writes for each study."""
    folder = tmp_path_factory.mktemp("expected")
    run_bundle(server, folder)
    return {name: nib.load(folder / f"{name}_sr.nii.gz") for name in STUDIES}


def assert_same(volume: nib.Nifti1Image, expected: nib.Nifti1Image) -> None:
    assert volume.get_data_dtype() == np.float32
    np.testing.assert_array_equal(volume.get_fdata(), expected.get_fdata())
    np.testing.assert_array_equal(volume.affine, expected.affine)


class TestInference:
    @pytest.mark.parametrize("name", STUDIES)
    def test_result_is_that_of_the_command_line(self, name, server, expected):
        assert_same(server.volume(name), expected[name])

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_voxel_of_the_refined_grid_is_where_it_belongs(self, name, server):
        before, after = nib.load(server.studies / f"{name}.nii.gz"), server.volume(name)
        factors = np.array([1 if code in "SI" else 2 for code in STUDIES[name]])
        assert after.shape == tuple(factors * before.shape)
        index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
        expected = nib.affines.apply_affine(before.affine, (index + 0.5) / factors - 0.5)
        np.testing.assert_allclose(nib.affines.apply_affine(after.affine, index), expected, atol=1e-4)

    @pytest.mark.parametrize("name", STUDIES)
    def test_viewer_that_asks_for_8_bit_nrrd_gets_float32(self, name, server, expected):
        file, parameters = server.client.infer(MODEL, name, {"result_extension": ".nrrd", "result_dtype": "uint8"})
        assert parameters["label_names"] == {}
        image = itk.imread(file)
        array = itk.array_from_image(image).transpose()
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name].get_fdata().astype(np.float32))
        for index in ((0, 0, 0), (3, 5, 7), (11, 2, 1)):
            point = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose(point, nib.affines.apply_affine(expected[name].affine, index), atol=1e-4)

    def test_a_file_may_be_sent_along(self, server, expected):
        with (server.studies / "sagittal.nii.gz").open("rb") as stream:
            volume = server.volume("", files={"file": ("scan.nii.gz", stream)})
        assert_same(volume, expected["sagittal"])

    def test_dicom_comes_back_as_dicom_where_it_is_asked_for(self, server):
        folder = toy.write_dicom(server.folder / "dicom", to_world=OBLIQUE)
        expected = server.volume(str(folder))
        response = server.infer(str(folder), result_extension=".zip")
        assert response.status_code == 200, response.text
        (server.folder / "response.zip").write_bytes(response.content)
        shutil.unpack_archive(server.folder / "response.zip", server.folder / "series")
        image = load_series(server.folder / "series")
        np.testing.assert_allclose(image.affine, expected.affine, atol=1e-3)
        assert np.abs(image[0].numpy() - expected.get_fdata()).max() < 0.51 * max(1, float(image.max()) / 1000)
        response = server.infer("axial scan", result_extension=".zip")
        assert response.status_code == 422
        assert "result_extension .zip is for DICOM of MR, which this is not" in response.json()["detail"]

    def test_scale_and_slices_are_those_asked_for(self, server):
        assert server.volume("axial scan", scale="3", axial_slices="[2, 3]").shape == (120, 108, 2)
        assert server.volume("axial scan", scale=4, axial_slices=[1, 1]).shape == (160, 144, 1)
        assert server.volume("axial scan", scale="[1, 2.5]", axial_slices=[1, 1]).shape == (40, 90, 1)
        assert server.volume("axial scan", spacing="0.8", axial_slices=[1, 1]).shape == (45, 54, 1)  # voxels of 0.9 x 1.2 mm

    def test_documented_commands_fetch_volumes(self, server, expected):
        server.documented("-o scan1_sr.nii.gz")
        assert_same(nib.load(server.folder / "scan1_sr.nii.gz"), expected["sagittal"])
        shutil.copy(server.studies / "flipped.nii.gz", server.folder / "scan.nii.gz")
        server.documented("-o scan_sr.nii.gz")
        assert_same(nib.load(server.folder / "scan_sr.nii.gz"), expected["flipped"])
        server.documented("-o slab_sr.nii.gz")
        assert sorted(nib.load(server.folder / "slab_sr.nii.gz").shape) == [2, 108, 120]

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"scale": 5}, "scale must be a number from 1 to 4, or two like [2, 3], got 5"),
            ({"scale": "$open('pwned', 'w')"}, "scale must be a number from 1 to 4, or two like [2, 3], got \"$open('pwned', 'w')\""),
            ({"spacing": "[1, '$2']"}, "spacing must be a number from 0.2 to 4, or two like [2, 3], got \"[1, '$2']\""),
            ({"axial_slices": "$open('pwned', 'w')"}, "axial_slices must be like [90, 97], got \"$open('pwned', 'w')\""),
            ({"axial_slices": [3, 9]}, "axial slices 3 to 9 asked for, but the volume has 6"),
            ({"device": "$open('pwned', 'w')"}, "no such device: \"$open('pwned', 'w')\""),
            (
                {"result_extension": "/../../pwned.nii"},
                "result_extension must be one of .nii.gz, .nii, .nrrd, .mha, .zip, got '/../../pwned.nii'",
            ),
        ],
    )
    def test_what_may_not_be_chosen_is_refused_in_one_line(self, parameters, message, server):
        response = server.infer("axial scan", **parameters)
        assert response.status_code == 422
        assert message in response.json()["detail"]
        assert not list(server.folder.rglob("*pwned*"))

    def test_image_that_cannot_be_used_is_named_with_the_reason(self, server):
        assert server.infer("constant").json()["detail"] == f"{server.studies / 'constant.nii.gz'}: every voxel has the value 7"
        unknown = server.infer("none")
        assert (unknown.status_code, unknown.json()["detail"]) == (404, "none: no such image")

    def test_nothing_is_left_behind(self, server):
        server.volume("sagittal")
        server.infer("constant")
        for _ in range(50):  # the server removes a file after it has sent it
            if not (left := list((server.folder / "tmp").glob("*.nii.gz"))):
                break
            time.sleep(0.1)
        assert not left
        assert not (server.folder / "output").exists()


def test_the_answer_passes_the_warnings_on(server):
    response = requests.post(
        f"{server.url}/infer/{MODEL}", params={"image": "sagittal", "output": "json"}, data={"params": "{}"}, timeout=120
    )
    assert response.status_code == 200, response.text
    assert "warnings" in response.json()


def test_a_dicom_answer_has_the_warnings_too_and_no_path_of_the_server(tmp_path):
    folder = toy_dicom.series(tmp_path / "series", lambda ds, n: setattr(ds, "SliceThickness", 1))
    app = runpy.run_path(str(ROOT / "scripts" / "label_app" / "main.py"))
    file, answer = app["SuperResolution"]([], tmp_path / "none.pt")({"image": str(folder), "result_extension": ".zip", "device": "cpu"})
    assert zipfile.ZipFile(file).testzip() is None
    assert "slices 1 mm thick lie 2 mm apart: a gap of 1 mm" in answer["warnings"]
    assert answer.keys() == {"label_names", "scale", "spacing", "axial_slices", "warnings"}


def test_the_uncertainty_map_is_returned_on_request(tmp_path):
    path = toy.write_nifti(tmp_path / "scan.nii.gz", to_world=toy.affine((1, 1, 3)))
    app = runpy.run_path(str(ROOT / "scripts" / "label_app" / "main.py"))
    request = {"image": str(path), "device": "cpu", "uncertainty": True}
    result, deviation = (
        nib.load(app["SuperResolution"]([], tmp_path / "none.pt")(r)[0]) for r in ({**request, "uncertainty": False}, request)
    )
    assert deviation.get_data_dtype() == np.float32
    np.testing.assert_allclose(deviation.affine, result.affine)
    assert 0 < np.asarray(deviation.dataobj).max() < np.asarray(result.dataobj).max()
    for overlays, more, message in (
        ([], {"result_extension": ".zip"}, "an uncertainty map is not DICOM: result_extension .zip and uncertainty cannot be combined"),
        ([], {"uncertainty": "perhaps"}, "uncertainty must be true or false, got 'perhaps'"),
        ([app["CONFIGS"] / "networks" / "fast.json"], {}, "only the general network has one"),
    ):
        with pytest.raises(HTTPException, match=message):
            app["SuperResolution"](overlays, tmp_path / "none.pt")({**request, **more})


def test_a_volume_that_is_passed_over_is_named_with_the_reason(tmp_path):
    path = toy.write_nifti(tmp_path / "scan.nii.gz", to_world=toy.affine((1, 1, 1)))
    app = runpy.run_path(str(ROOT / "scripts" / "label_app" / "main.py"))
    with pytest.raises(HTTPException) as error:
        app["SuperResolution"]([app["CONFIGS"] / "isotropic.json"], tmp_path / "none.pt")({"image": str(path), "device": "cpu"})
    assert error.value.detail == f"skipped: {path}: voxels of 1 x 1 x 1 mm are isotropic already"


@pytest.mark.parametrize(
    ("network", "menu"),
    [
        (None, ["2", "1.5", "2.5", "3", "4"]),
        ("fast", ["2"]),
        ("any_factor", ["2", "1.5", "2.5", "3", "4"]),
        ("isotropic", None),
        ("bicubic", ["2"]),
    ],
)
def test_the_menu_offers_what_the_weights_are_made_for(network, menu, tmp_path):
    app = runpy.run_path(str(ROOT / "scripts" / "label_app" / "main.py"))
    overlays = [
        path for path in (ROOT / "configs" / f"{network}.json", ROOT / "configs" / "networks" / f"{network}.json") if path.is_file()
    ]
    task = app["SuperResolution"](overlays, tmp_path / "fine_tuned.pt")
    assert task.is_valid()
    assert task.config().get("scale") == menu
    assert ("scale" in task.options_of({})) == (menu is not None)


def test_viewers_see_a_model_that_is_no_segmentation(server):
    info = server.client.info()
    assert info["models"][MODEL]["type"] == "others"
    assert info["labels"] == []  # else Slicer would run it as a segmentation as soon as an image is opened
    assert (info["datastore"]["total"], info["datastore"]["completed"]) == (4, 4)  # else Slicer would not train


def test_only_this_machine_can_reach_the_server(server):
    addresses = {c.laddr for c in psutil.Process(server.process.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert addresses == {("127.0.0.1", server.port)}
    answer = requests.get(f"{server.url}/info/", headers={"Origin": "http://other.example"}, timeout=60)
    assert "access-control-allow-origin" not in answer.headers


def test_next_sample_opens_each_result_once_as_a_volume(server, expected):
    opened = {}
    for _ in STUDIES:
        sample = server.next_sample()
        opened[sample["id"]] = nib.load(sample["path"])
    assert opened.keys() == {f"{name}_sr" for name in STUDIES}
    for name in STUDIES:
        assert_same(opened[f"{name}_sr"], expected[name])
    images = server.client.datastore()["objects"]
    assert opened.keys() < images.keys()  # images of the datastore: viewers load them as volumes
    # no result counts as a scan; the scan that failed is told when nothing else is left
    with pytest.raises(Exception) as error:
        server.next_sample()
    assert f"{server.studies / 'constant.nii.gz'}: every voxel has the value 7" in error.value.msg
    assert server.client.info()["datastore"]["total"] == 4
    with pytest.raises(Exception) as error:
        server.next_sample(axial_slices="all")
    assert "axial_slices must be like [90, 97], got 'all'" in error.value.msg
    # other settings, other results
    sample = server.next_sample(scale="3", axial_slices="[2, 3]")
    assert sorted(nib.load(sample["path"]).shape) == [2, 108, 120]


def test_a_site_fine_tunes_on_its_scans(tmp_path):
    """From the first result to one with the new weights."""
    studies = tmp_path / "studies"
    for seed in range(3):
        write_study(studies, f"scan{seed}", seed)
    shutil.copy(studies / "scan2.nii.gz", studies / "scan2_sr.nii.gz")  # a result, made by somebody else
    with our_server(tmp_path) as server:
        published = server.folder / "copy" / "models" / "model.pt"
        fine_tuned = server.folder / "copy" / "scripts" / "label_app" / "model" / "fine_tuned.pt"
        checksum = hashlib.sha256(published.read_bytes()).hexdigest()
        before = server.volume("scan0")

        # every scan is super-resolved in the background: then the results are only opened
        server.documented("/batch/infer")
        assert server.wait("batch/infer")["status"] == "DONE"
        time.sleep(1)  # the server watches its folder
        made = (studies / "scan0_sr.nii.gz").stat().st_mtime_ns
        assert server.next_sample()["id"] == "scan0_sr"
        assert (studies / "scan0_sr.nii.gz").stat().st_mtime_ns == made
        assert nib.load(studies / "scan2_sr.nii.gz").shape == (40, 36, 6)  # that of somebody else is not overwritten
        assert server.next_sample()["id"] == "scan1_sr"
        with pytest.raises(Exception) as error:
            server.next_sample()
        assert f"{studies / 'scan2_sr.nii.gz'} was not made by this server" in error.value.msg

        server.client.train_start(MODEL, {"max_epochs": 1, "val_split": 0.9})
        status = server.wait("train")
        assert status["status"] == "ERROR"
        assert "3 scans: at least one is needed to train on and 3 to validate" in status["details"][-1]

        server.client.train_start(MODEL, {"max_epochs": 1, "learning_rate": 1e-30})
        assert server.wait("train")["status"] == "DONE"
        assert not fine_tuned.exists()  # no better than before

        server.documented("-X POST http://127.0.0.1:8000/train")
        status = server.wait("train")
        assert status["id"] in server.documented("8000/train/ ")
        assert status["status"] == "DONE", status
        assert fine_tuned.exists(), status
        assert hashlib.sha256(published.read_bytes()).hexdigest() == checksum

        after = server.volume("scan0")
        assert np.abs(after.get_fdata() - before.get_fdata()).max() > 0.01
        run_bundle(server, tmp_path / "expected", dataset_dir=studies / "scan0.nii.gz", checkpoint=fine_tuned)
        assert_same(after, nib.load(tmp_path / "expected" / "scan0_sr.nii.gz"))
        assert server.next_sample()["id"] == "scan0_sr"  # made again, with the new weights
        assert_same(nib.load(studies / "scan0_sr.nii.gz"), after)


def test_another_network_is_chosen_at_the_start(tmp_path):
    scan = write_study(tmp_path / "studies", "scan")
    bundle = copy_bundle(tmp_path / "copy")
    torch.manual_seed(0)
    network = PixelShuffleResidualNet()
    torch.nn.init.normal_(network.reconstruct.weight, std=0.01)  # not the identity
    (bundle / "models" / "fast").mkdir()
    torch.save(network.state_dict(), bundle / "models" / "fast" / "model.pt")
    with Server(tmp_path).running(str(bundle / "scripts" / "label_app" / "main.py"), "--conf", "network", "fast") as server:
        configs = "['configs/inference.json','configs/networks/fast.json']"
        run_bundle(server, tmp_path / "expected", config_file=configs, dataset_dir=scan)
        assert_same(server.volume("scan"), nib.load(tmp_path / "expected" / "scan_sr.nii.gz"))


def test_stock_app_returns_the_refined_grid(server, expected, tmp_path):
    """``monaibundle`` takes the bundle for a segmentation and would bring the result back to the grid of the file."""
    pytest.importorskip("torchvision", reason="MONAI Label's own apps need torchvision, shapely, scikit-image and expiring-dict")
    app = tmp_path / "app"
    shutil.copytree(Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle", app)
    copy_bundle(app / "model" / "brain_mri_super_resolution")
    shutil.copytree(server.studies, tmp_path / "studies", ignore=shutil.ignore_patterns("*.json", ".lock", "labels", "*_sr.nii.gz"))
    command = ["-m", "monailabel.main", "start_server", "--app", str(app), "--conf", "models", "brain_mri_super_resolution"]
    command += ["--conf", "sam2", "false", "--host", "127.0.0.1"]
    with Server(tmp_path).running(*command, MONAI_ZOO_SOURCE="local") as stock:
        for name in STUDIES:
            volume = stock.volume(name, model="brain_mri_super_resolution")
            assert volume.shape == expected[name].shape
            assert volume.get_data_dtype() == np.float32
            np.testing.assert_allclose(volume.affine, expected[name].affine, atol=1e-4)
            np.testing.assert_allclose(volume.get_fdata(), expected[name].get_fdata(), atol=0.2)  # of 1000: each rounds in its way
        assert not (tmp_path / "output").exists()
