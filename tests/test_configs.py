"""What the configs say, and that they agree with each other, with MONAI and with the package."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import torch
import toy
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.transforms import Invertd

from bundle.errors import reason
from bundle.intensity import ClipToInputRanged

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_metadata_follow_the_schema():
    schema = json.loads((Path(__file__).parent / "metadata_schema.json").read_text())
    jsonschema.validate(config("metadata"), schema)


@pytest.mark.parametrize(("key", "value"), [("version", 1), ("changelog", {}), ("name", ""), ("network_data_format", {"inputs": {}})])
def test_the_schema_refuses(key, value):
    schema = json.loads((Path(__file__).parent / "metadata_schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config("metadata"), key: value}, schema)


def test_version_is_one_and_in_the_changelog():
    meta = config("metadata")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert meta["version"] == project["version"]
    assert meta["version"] in meta["changelog"]


def test_metrics_in_the_metadata_are_the_documented_ones():
    performance = (ROOT / "docs" / "README.md").read_text().split("## Performance")[1].split("\n## ")[0]
    metrics = {}
    for name, prefix in (("default network", ""), ("the paper's network", "papers_network_")):
        (row,) = [line for line in performance.splitlines() if line.startswith(f"| {name} |")]
        metrics |= dict(zip((f"{prefix}mean_psnr", f"{prefix}mean_ssim"), (float(cell.split()[0]) for cell in row.split("|")[2:4])))
    assert config("metadata")["eval_metrics"] == metrics


def test_required_packages_are_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", requirement).group() for requirement in project["dependencies"]}
    assert set(config("metadata")["required_packages_version"]) == names - {"torch", "monai"}
    assert config("metadata")["monai_version"] == metadata.version("monai")


def test_training_and_inference_agree():
    train, inference = config("train"), config("inference")
    for key in ("device", "bundle_root", "reader", "scale", "degradation", "load", "select_slices"):
        assert train[key] == inference[key], key
    assert train["orient"] == {**inference["orient"], "_target_": "Orientationd"}  # which has nothing to invert in training
    general = config("general")
    for key in ("network_def", "positions", "facts", "interpolation", "checkpoint"):
        assert general[key] == inference[key], key
    assert inference["network"].items() <= train["network"].items()
    # training clips what inference must not
    assert train["scale_intensity"] == {**inference["scale_intensity"], "clip": True}
    for key in ("roi_size", "spatial_dim"):
        assert train["validate"]["inferer"][key] == inference["inferer"][key]


@pytest.mark.parametrize(
    "files", [["train", "networks/no_tv", "evaluate"], ["train", "evaluate", "networks/no_tv"], ["inference", "networks/no_tv"]]
)
def test_an_overlay_brings_its_weights_wherever_it_stands(files):
    parser = ConfigParser()
    parser.read_config([CONFIGS / f"{name}.json" for name in files])
    assert Path(parser.get_parsed_content("checkpoint")) == CONFIGS.parent / "models" / "baselines" / "no_tv.pt"


def test_ranges_are_measured_on_what_inference_compares():
    inference, measured = config("inference"), config("measure_ranges")
    transforms = measured["measured"]["transform"]["transforms"]
    compared = inference["preprocessing"]["transforms"].index("@compare")
    assert transforms == [t for t in inference["preprocessing"]["transforms"][:compared] if t not in ("@check_memory", "@factors")]
    trained = {**config("train"), "scale_intensity": {**config("train")["scale_intensity"], "clip": measured["scale_intensity::clip"]}}
    assert trained["load"] == inference["load"]
    assert trained["scale_intensity"] == {**inference["scale_intensity"], "clip": False}


def test_the_paper_s_settings_are_the_defaults():
    train = config("train")
    expected = {"patch_size": 31, "batch_size": 64, "max_epochs": 90, "learning_rate": 1e-3, "lr_milestones": [30, 60], "tv_weight": 0.1}
    assert {key: train[key] for key in expected} == expected
    assert train["weight_decay"] == 1e-4
    assert train["optimizer"]["betas"][0] == 0.9


@pytest.mark.parametrize(
    ("protocol", "axial_slices", "crop_size", "split"),
    [
        ("iseg2017", [131, 160], None, [9, 2, 4]),
        ("alvin", [131, 160], None, [9, 2, 4]),
        ("brats2015", [65, 99], [155, 177], [13, 2, 5]),
        ("brats2018", [65, 99], [155, 177], [13, 2, 5]),
        ("ds002748", [91, 120], [184, 208], [15, 5, 10]),
    ],
)
def test_protocols(protocol, axial_slices, crop_size, split):
    values = config(f"datasets/{protocol}")
    assert (values["axial_slices"], values.get("crop_size"), values["split"]) == (axial_slices, crop_size, split)
    assert {key.split("::")[0] for key in values} <= config("train").keys()  # an overlay only sets what train.json has


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    toy.write_subjects(folder, 3)
    return str(folder)


@pytest.mark.parametrize(("files", "kind"), [(["train"], "train"), (["train", "evaluate"], "train"), (["inference"], "infer")])
def test_workflow_has_the_properties_of_a_bundle(files, kind, data):
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / f"{f}.json") for f in files],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        workflow_type=kind,
        dataset_dir=data,
        patch_size=15,
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("file", "inferer"), [("train", "train::inferer"), ("inference", "inferer")])
def test_the_network_computes_in_the_precision_of_the_command_line(file, inferer, precision, data, tmp_path):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / f"{file}.json"))
    parser.update({"dataset_dir": data, "output_dir": str(tmp_path), "precision": precision, "positions": False, "facts": False})
    seen = []
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    parser.get_parsed_content(inferer)(torch.ones(1, 1, 8, 8, *([1] * (file == "inference"))), network)
    assert seen == [getattr(torch, precision)]


@pytest.mark.parametrize(
    ("file", "given", "instead"),
    [("train", {"bfloat16": True}, "bfloat16"), ("train", {"amp": "false"}, "float32"), ("inference", {"amp": "true"}, "auto")],
)
def test_options_that_precision_replaced_say_so(file, given, instead):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / f"{file}.json"))
    parser.update(given)
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("computed_in")
    (name,) = given
    assert reason(error.value) == f"--{name} is now --precision: use --precision {instead}"


def test_servers_need_no_data_folder_for_postprocessing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default dataset_dir does not exist
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    inversion, clip = parser.get_parsed_content("postprocessing").transforms
    assert (type(inversion), type(clip)) == (Invertd, ClipToInputRanged)
    assert not list(tmp_path.iterdir())


def test_network_maps_what_the_metadata_say():
    verify_net_in_out(
        net_id="network_def", meta_file=str(CONFIGS / "metadata.json"), config_file=str(CONFIGS / "inference.json"), device="cpu"
    )


@pytest.mark.parametrize("overlays", [("inference",), ("inference", "isotropic"), ("inference", "networks/proposed"), ("train",)])
def test_shipped_weights_fit_their_network(overlays):
    parser = ConfigParser()
    parser.read_config([CONFIGS / f"{name}.json" for name in overlays])
    path = Path(parser.get_parsed_content("checkpoint"))
    assert path.stat().st_size < 25e6
    state = torch.load(path, weights_only=True)
    parser.get_parsed_content("network_def").load_state_dict(state)
    assert all(torch.isfinite(v).all() for v in state.values())
