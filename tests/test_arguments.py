import sys
from pathlib import Path

import pytest
import torch

from bundle.arguments import check_options, check_output_dir, check_processes, device, paths, share
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
    with pytest.raises(InputError, match="output_dir is empty"):
        check_output_dir("")


def test_of_an_option_that_is_repeated_the_last_one_counts(monkeypatch, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "argv", ["run", "--dataset_dir", str(tmp_path / "a"), "--scale", "2", f"--dataset_dir={tmp_path / 'b'}"])
    assert paths(str(tmp_path / "b")) == [str(tmp_path / "b")]


def test_a_path_may_contain_a_hash(monkeypatch, tmp_path):
    """Fire takes what follows for a comment, and MONAI makes two colons of it."""
    file = tmp_path / "study#3" / "T1.nii.gz"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(sys, "argv", ["run", "--dataset_dir", "study#3/*.nii.gz"])
    assert paths("study") == ["study#3/*.nii.gz"]
    monkeypatch.setattr(sys, "argv", ["run", "--dataset_dir", f"['{file}', 'b.nii']"])
    assert paths([str(file).replace("#", "::"), "b.nii"]) == [str(file), "b.nii"]
    monkeypatch.setattr(sys, "argv", ["python"])
    assert paths(str(file).replace("#", "::")) == [str(file)]
    for typed, value in (("out#5", "out"), (str(tmp_path / "a#b"), str(tmp_path / "a::b"))):
        monkeypatch.setattr(sys, "argv", ["run", "--output_dir", typed])
        with pytest.raises(InputError, match=f"output_dir {typed}: MONAI cannot write to a path with '#'"):
            check_output_dir(value)


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("--batch_size=0", "batch_size must be a whole number from 1, got '0'"),
        ("--patch_size=15.5", "patch_size must be a whole number from 1, got '15.5'"),
        ("--max_epochs=many", "max_epochs must be a whole number from 1, got 'many'"),
        ("--warmup_iterations=-5", "warmup_iterations must be a whole number from 0, got '-5'"),
        ("--learning_rate=-0.001", "learning_rate must be a number above 0, got '-0.001'"),
        ("--learning_rate=nan", "learning_rate must be a number above 0, got 'nan'"),
        ("--usual_fraction=2", "usual_fraction must be a number from 0 to 1, got '2'"),
        ("--lr_milestones=[a]", r"lr_milestones must be a list of numbers from 1, got '\[a\]'"),
        ("--evaluated_factors=2", "evaluated_factors must be a list of numbers from 1, got '2'"),
        ("--positions=false", "positions must be True or False, got 'false'"),
        ("--load_weights=no", "load_weights must be true or false, got 'no'"),
        ("--learning_rate=1e-4", None),
        ("--largest_gradient=None", None),
        ("--largest_noise=@x", None),
        ("--lr_milestones=[]", None),
        ("--load_weights=false", None),
    ],
)
def test_numbers_out_of_range_are_refused(word, error, monkeypatch):
    files = [str(CONFIGS / f"{name}.json") for name in ("train", "general", "random_acquisitions", "evaluate_acquisitions")]
    monkeypatch.setattr(sys, "argv", ["/site/monai/bundle/__main__.py", "run", "--config_file", str(files), word])
    if error:
        with pytest.raises(InputError, match=f"^{error}$"):
            check_options()
    else:
        check_options()


def test_a_batch_is_shared_among_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="start with torchrun"):
        check_processes()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    check_processes()
    assert share(8) == 4
    with pytest.raises(InputError, match="batch_size 3 cannot be divided among 2 processes"):
        share(3)
