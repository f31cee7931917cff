"""Networks: each maps (N, 1, H, W), a slice interpolated to the high-resolution grid, to the same shape."""

from pathlib import Path

import torch
from ignite.distributed import get_world_size
from torch import channels_last, device
from torch.nn import BatchNorm2d, Module, SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints import load_weights
from ..errors import InputError, switch
from ..memory import keep_freed_memory
from .acquisition_classifier import AcquisitionClassifier
from .drcn import DRCN
from .drrn import DRRN
from .fft_convolution import FFTConv2d, use_fft_convolutions
from .fsrcnn import FSRCNN
from .multi_scale_residual import MultiScaleResidualNet
from .onnx_network import OnnxNetwork
from .pixel_shuffle_residual import PixelShuffleResidualNet
from .rcan import RCAN
from .rdn import RDN
from .srcnn import SRCNN
from .srdensenet import SRDenseNet
from .srresnet import SRResNet
from .uncertainty import WithUncertainty
from .vdsr import VDSR

__all__ = [
    "DRCN",
    "DRRN",
    "FSRCNN",
    "RCAN",
    "RDN",
    "SRCNN",
    "VDSR",
    "AcquisitionClassifier",
    "FFTConv2d",
    "MultiScaleResidualNet",
    "OnnxNetwork",
    "PixelShuffleResidualNet",
    "SRDenseNet",
    "SRResNet",
    "WithUncertainty",
    "load_torchscript",
    "prepare",
    "use_fft_convolutions",
]


def load_torchscript(path: str | Path, device: device) -> Module:
    """A network exported by MONAI's ``ckpt_export``.

    Raises:
        InputError: if the file cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; python -m monai.bundle ckpt_export makes one")
    try:
        return torch.jit.load(path, map_location=device)
    except RuntimeError as e:
        raise InputError(f"{path}: not a TorchScript network ({str(e).strip().splitlines()[0]})") from e


def prepare(
    network: Module, device: device, fft_convolutions: bool | str = False, distributed: bool = False, weights: str | None = None
) -> Module:
    """Move ``network`` to ``device``, with weights in the memory format that is fastest for convolutions.

    On a CPU, freed memory is kept for the next layer (:mod:`bundle.memory`).

    Args:
        network: maps slices to slices.
        device: where to compute.
        fft_convolutions: whether wide convolutions run in the frequency domain (:mod:`.fft_convolution`).
        distributed: whether several processes train the network together, each on a part of every batch.
        weights: file of the initial weights. It is loaded only here, so that it never replaces a checkpoint or the average of federated
            sites.

    Raises:
        InputError: if ``weights`` cannot be loaded, if ``fft_convolutions`` is neither true nor false, or for batch normalisation in
            several processes on CPUs, which cannot share its statistics.
    """
    in_frequency_domain = switch("fft_convolutions", fft_convolutions)
    if weights is not None:
        load_weights(network, weights)
    if device.type == "cpu":
        keep_freed_memory()
    network = network.to(device, memory_format=channels_last)  # type: ignore[call-overload]
    if in_frequency_domain:
        network = use_fft_convolutions(network)
    if not distributed:
        return network
    if any(isinstance(module, BatchNorm2d) for module in network.modules()):
        if device.type == "cpu" and get_world_size() > 1:
            name = type(network).__name__
            raise InputError(f"{name} has batch normalisation, which several processes can share on GPUs only: train it with one process")
        network = SyncBatchNorm.convert_sync_batchnorm(network) if device.type == "cuda" else network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
