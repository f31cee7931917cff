"""Overlays in any order give the same workflow, or one line that says why they do not go together."""

import itertools
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from bundle.errors import InputError, check_overlays
from bundle.patches import AcquiredPatches, RandomAcquisition

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORKS = [f"networks/{path.stem}" for path in sorted((CONFIGS / "networks").glob("*.json"))]
DATASETS = [f"datasets/{path.stem}" for path in sorted((CONFIGS / "datasets").glob("*.json"))]
OF_TRAINING = [
    *NETWORKS, *DATASETS, "general", "any_factor", "thick_slices", "random_acquisitions", "uncertainty", "acquisition_classifier",
    "evaluate",
    "evaluate_thick_slices", "evaluate_acquisitions", "measure_ranges", "multi_gpu_train", "multi_gpu_evaluate",
]  # fmt: skip
OF_INFERENCE = [
    *NETWORKS, "general", "any_factor", "isotropic", "inference_onnx", "inference_trt", "inference_torchscript", "multi_gpu_inference",
]  # fmt: skip
REFUSED_LATER = {frozenset(("any_factor", "random_acquisitions"))}


def merged(base, *overlays):
    """The config that a run would use, and the line that refuses it, if any."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in (base, *overlays)])
    try:
        check_overlays(
            networks=parser.get("network_overlays"), datasets=parser.get("dataset_overlays", {}), parts=parser.get("part_overlays", {}),
            workflows=parser.get("workflow_overlays", {}),
        )  # fmt: skip
    except InputError as e:
        return str(e)
    return {**parser.config, "imports": set(parser["imports"])}


def test_every_overlay_is_looked_at():
    standing_alone = {"train", "inference", "metadata", "export_onnx", "export_trt"}
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.json")}
    assert found == standing_alone | set(OF_TRAINING) | set(OF_INFERENCE)


@pytest.mark.parametrize(("base", "overlays"), [("train", OF_TRAINING), ("inference", OF_INFERENCE)])
@pytest.mark.slow
def test_the_order_of_two_overlays_does_not_matter(base, overlays):
    for pair in itertools.combinations(overlays, 2):
        if frozenset(pair) not in REFUSED_LATER:
            assert merged(base, *pair) == merged(base, *pair[::-1]), pair


def test_random_acquisitions_refuse_a_network_with_positions_alone():
    for order in (("any_factor", "random_acquisitions"), ("random_acquisitions", "any_factor")):
        config = merged("train", *order)
        assert [config["train"]["patches"][key] for key in ("positions", "facts")] == ["@positions", "@facts"]
        assert (config["positions"], config["facts"]) == (True, False)
    with pytest.raises(InputError, match=r"use configs/general\.json"):
        AcquiredPatches([], RandomAcquisition(), positions=True, facts=False)


@pytest.mark.parametrize(
    ("base", "pair", "what"),
    [
        ("inference", ("isotropic", "networks/fast"), "networks"),
        ("inference", ("any_factor", "networks/fast"), "networks"),
        ("inference", ("inference_onnx", "isotropic"), "networks"),
        ("train", ("any_factor", "thick_slices"), "networks"),
        ("train", ("uncertainty", "acquisition_classifier"), "parts"),
        ("train", ("datasets/alvin", "datasets/ds002748"), "datasets"),
        ("train", ("evaluate", "evaluate_acquisitions"), "workflows"),
        ("train", ("evaluate", "measure_ranges"), "workflows"),
        ("train", ("evaluate_acquisitions", "measure_ranges"), "workflows"),
    ],
)
def test_two_networks_or_data_sets_are_refused_in_one_line(base, pair, what):
    names = " and ".join(sorted(Path(name).stem.replace("inference_", "") for name in pair))
    for order in (pair, pair[::-1]):
        assert merged(base, *order) == f"{names} are overlays for different {what}: use only one of them"


@pytest.mark.parametrize("overlay", [*NETWORKS, *DATASETS])
def test_overlays_of_a_kind_say_so(overlay):
    config = merged("train", overlay)
    kind = "network_overlays" if overlay in NETWORKS else "dataset_overlays"
    assert config[kind] == {Path(overlay).stem: True}


@pytest.mark.parametrize("overlay", ["inference_onnx", "inference_trt", "inference_torchscript"])
def test_results_name_the_file_that_is_loaded(overlay):
    config = merged("inference", overlay)
    assert config["load_weights"] is False
    assert config["weights"] in ("@onnx_file", "@trt_file", "@torchscript_file")


def test_overlays_address_nothing_by_its_number():
    for path in CONFIGS.rglob("*.json"):
        assert not [key for key in ConfigParser.load_config_file(path) if any(part.isdigit() for part in key.split("::"))], path
