import sys

import pytest
import torch

from bundle.arguments import check_output_dir, device, paths
from bundle.errors import InputError


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
