"""The network as TorchScript and ONNX, by the commands of the model card, in a copy of the bundle."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy

from bundle.conditions import FACTS
from bundle.errors import InputError
from bundle.networks import OnnxNetwork, PixelShuffleResidualNet
from bundle.networks.pixel_shuffle_residual import IMAGES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FACTS_AT = [IMAGES + 2, *range(IMAGES + 5, IMAGES + 6 + FACTS)]  # channels of both factors and of the facts
ODD_AND_EVEN = [(1, 31, 31), (2, 24, 17), (3, 20, 36), (1, 1, 5)]


def commands() -> list[str]:
    """Those of the section on exports, each on one line, without TensorRT's."""
    section = re.split(r"\n##+ ", (ROOT / "docs" / "README.md").read_text().split("### Export\n")[1])[0]
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.S)).replace("\\\n", "")
    return [line for line in blocks.splitlines() if line and "trt" not in line]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Copy of the bundle in which every export command has been run on a small scan."""
    pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
    folder = tmp_path_factory.mktemp("bundle")
    for name in ("bundle", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models" / "fast").mkdir(parents=True)
    for name in ("model.pt", "acquisition.pt", "fast/model.pt"):
        shutil.copy(ROOT / "models" / name, folder / "models" / name)
    toy.write_nifti(folder / "scan.nii.gz", toy.head((13, 10, 2)))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    for command in commands():
        run = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
        assert run.returncode == 0, f"{command}\n{(run.stdout + run.stderr)[-3000:]}"
    return folder


@pytest.fixture(scope="module")
def network() -> PixelShuffleResidualNet:
    network = PixelShuffleResidualNet(positions=True, facts=True, experts=4)
    network.load_state_dict(torch.load(ROOT / "models" / "model.pt", weights_only=True))
    return network.eval()


def test_the_model_card_has_a_command_for_each_step():
    assert [re.search(r"(ckpt_export|onnx_export|inference_torchscript|inference_onnx)", c).group() for c in commands()] == [
        "ckpt_export", "inference_torchscript", "onnx_export", "inference_onnx", "ckpt_export", "onnx_export",
    ]  # fmt: skip


@torch.inference_mode()
def test_exports_equal_the_network_on_odd_and_even_sizes(exported, network):
    torchscript = torch.jit.load(exported / "models" / "model.ts")
    onnx = OnnxNetwork(exported / "models" / "model.onnx")
    for batch, *sides in ODD_AND_EVEN:
        x = torch.rand(batch, network.channels, *sides, generator=torch.Generator().manual_seed(0))
        expected = network(x)
        assert float((expected - x[:, :1]).abs().max()) > 1e-3  # the network does something
        torch.testing.assert_close(torchscript(x), expected, rtol=0, atol=1e-4)
        x[:, FACTS_AT] = x[:1, FACTS_AT]  # ONNX: slices of one scan
        torch.testing.assert_close(onnx(x), network(x), rtol=0, atol=1e-4)


def test_exports_hold_plain_convolutions(exported):
    onnx = pytest.importorskip("onnx")
    nodes = [node.op_type for node in onnx.load(exported / "models" / "model.onnx").graph.node]
    network = PixelShuffleResidualNet(positions=True, facts=True, experts=4)
    assert nodes.count("Conv") == sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())


@pytest.mark.parametrize("way", ["torchscript", "onnx"])
def test_inference_through_an_export_equals_that_through_pytorch(way, exported, tmp_path):
    monai.bundle.run(
        config_file=str(exported / "configs" / "inference.json"), dataset_dir=str(exported / "scan.nii.gz"), output_dir=str(tmp_path),
        checkpoint=str(ROOT / "models" / "model.pt"), device="$torch.device('cpu')", precision="float32",
    )  # fmt: skip
    expected = nib.load(tmp_path / "scan_sr.nii.gz")
    result = nib.load(exported / "RUN" / way / "scan_sr.nii.gz")
    assert np.array_equal(result.affine, expected.affine)
    np.testing.assert_allclose(result.get_fdata(), expected.get_fdata(), atol=1e-4 * 1000)  # intensities reach 1000


@torch.inference_mode()
def test_other_networks_can_be_exported(exported):
    network = PixelShuffleResidualNet().eval()
    network.load_state_dict(torch.load(ROOT / "models" / "fast" / "model.pt", weights_only=True))
    x = torch.rand(2, 1, 9, 14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.jit.load(exported / "fast.ts")(x), network(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(OnnxNetwork(exported / "fast.onnx")(x), network(x), rtol=0, atol=1e-4)


def test_tiles_of_the_tensorrt_overlay_cover_a_slice(tmp_path):
    """An engine needs a GPU; TorchScript takes its place, and tiles of 48 x 48 that of 256 x 256."""
    checkpoint = toy.save_checkpoint(tmp_path / "tiny.pt")
    inference = str(ROOT / "configs" / "inference.json")
    scan = toy.write_nifti(tmp_path / "scan.nii.gz", toy.head((40, 35, 2)))
    common = {"dataset_dir": str(scan), "device": "$torch.device('cpu')"}
    monai.bundle.ckpt_export(config_file=inference, ckpt_file=str(checkpoint), filepath=str(tmp_path / "tiny.ts"), **toy.TINY_INFERENCE)
    monai.bundle.run(config_file=inference, output_dir=str(tmp_path / "whole"), checkpoint=str(checkpoint), **common, **toy.TINY_INFERENCE)
    monai.bundle.run(
        config_file=[inference, str(ROOT / "configs" / "inference_trt.json")], output_dir=str(tmp_path / "tiles"),
        trt_file=str(tmp_path / "tiny.ts"), imports=["$import os", "$import torch"],
        positions=False, facts=False, interpolation="@degradation", **{"inferer::roi_size": [48, 48]}, **common,
    )  # fmt: skip
    whole, tiles = (nib.load(tmp_path / name / "scan_sr.nii.gz").get_fdata() for name in ("whole", "tiles"))
    assert tiles.shape == whole.shape == (80, 70, 2)
    assert np.abs(tiles - whole).max() < 0.02 * whole.max()  # each has seen zeros beyond its edge


def test_the_tensorrt_engine_fits_its_overlay():
    export, overlay = (json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in ("export_trt", "inference_trt"))
    assert export.keys() <= inspect.signature(monai.bundle.trt_export).parameters.keys()
    assert export["input_shape"] == [1, IMAGES + 6 + FACTS, *overlay["inferer::roi_size"]]
    smallest, _, largest = export["dynamic_batchsize"]
    assert smallest == 1
    assert largest >= overlay["inferer::sw_batch_size"]


@pytest.mark.parametrize("content", [None, b"", b"not a network"])
def test_a_file_that_is_no_onnx_network_is_named(content, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        OnnxNetwork(path)
