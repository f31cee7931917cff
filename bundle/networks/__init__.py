"""Networks: each maps (N, 1, H, W), a slice interpolated to the high-resolution grid, to the same shape."""

from torch import channels_last, device
from torch.nn import Module

from ..errors import switch
from ..memory import keep_freed_memory
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
from .vdsr import VDSR

__all__ = [
    "DRCN",
    "DRRN",
    "FSRCNN",
    "RCAN",
    "RDN",
    "SRCNN",
    "VDSR",
    "FFTConv2d",
    "MultiScaleResidualNet",
    "OnnxNetwork",
    "PixelShuffleResidualNet",
    "SRDenseNet",
    "SRResNet",
    "prepare",
    "use_fft_convolutions",
]


def prepare(network: Module, device: device, fft_convolutions: bool | str = False) -> Module:
    """``network`` on ``device``, its weights in the memory format that convolutions run faster in; with its convolutions in the frequency
    domain if asked to (see :mod:`.fft_convolution`). On a CPU freed memory is kept for the next layer (:mod:`bundle.memory`).

    Raises:
        InputError: when ``fft_convolutions`` is not a switch.
    """
    in_frequency_domain = switch("fft_convolutions", fft_convolutions)
    if device.type == "cpu":
        keep_freed_memory()
    network = network.to(device, memory_format=channels_last)  # type: ignore[call-overload]
    return use_fft_convolutions(network) if in_frequency_domain else network
