import sys
from pathlib import Path

import pytest
import torch

from bundle.arguments import check_options, check_output_dir, device, paths
from bundle.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("typed", "value"),
    [("2024_01_15", 20240115), ("1.10", 1.1), ("12,13", (12, 13)), ("None", "data"), ("True", True), ("[2]", [2])],
)
def test_names_like_numbers(typed, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "--dataset_dir", typed, "--output_dir", typed])
    with pytest.raises(InputError, match=r"type --dataset_dir \./"):
        paths(value)
    with pytest.raises(InputError, match=r"type --output_dir \./"):
        check_output_dir(value)
    (tmp_path / typed).mkdir()
    assert paths(value) == [typed]


def test_paths_that_are_texts_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--dataset_dir=a b", "--scale", "2"])
    assert paths("a b") == ["a b"]
    assert paths(["a", "b"]) == ["a", "b"]
    check_output_dir("out")
    with pytest.raises(InputError, match="output_dir must be a path"):
        check_output_dir(7)


def test_devices():
    assert device("cpu") == device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="unknown"):
        device("quantum")
    with pytest.raises(InputError, match=r"cuda:99: not available"):
        device("cuda:99")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--spacing", "0.5", "--network_def::features=4", "--_meta_::version", "2", "--meta_file", "m.json"], None),
        (["--dataset_dir", "x", "--tracking", "mlflow", "--run_name", "first"], None),
        (["--spacng", "0.5"], "there is no option --spacng; similar: --spacing"),
        (["--slice-thicknes=4"], "there is no option --slice_thicknes; similar: --slice_thickness"),
        (["--network_deff::features", "4"], "there is no option --network_deff; similar: --network_def"),
    ],
)
def test_mistyped_options_are_refused(words, error, monkeypatch):
    files = [str(CONFIGS / f"{name}.json") for name in ("inference", "isotropic")]
    for config_file in (["--config_file", str(files)], [f"--config_file={files}"]):
        monkeypatch.setattr(sys, "argv", ["/site/monai/bundle/__main__.py", "run", *config_file, *words])
        if error:
            with pytest.raises(InputError, match=error):
                check_options()
        else:
            check_options()
    monkeypatch.setattr(sys, "argv", ["pytest", "run", "--config_file", str(files), *words])
    check_options()


def test_an_empty_path_is_refused():
    with pytest.raises(InputError, match="dataset_dir is empty"):
        paths("")
