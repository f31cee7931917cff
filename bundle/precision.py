"""The number format in which the network computes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

__all__ = ["choose", "in_precision"]

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "bfloat16")
REPLACED = {  # options of earlier versions -> the value of ``precision`` that replaces them
    "bfloat16": {"true": "bfloat16", "false": "float32"},
    "amp": {"true": "auto", "false": "float32"},
}
WORTH = 0.6  # of float32's time: in training, float32 convolutions in the frequency domain take about as long
TRIAL = 0.05  # seconds
TRIAL_SHAPES = ((1, 64, 64, 64), (64, 64, 3, 3))  # image and kernel


def choose(precision: str, device: torch.device, **replaced: Any) -> str:
    """Choose the number format of the convolutions; weights and results stay float32.

    ``auto`` uses bfloat16 on a CPU if a trial shows that it is faster (the CPU's flags do not show that). On a GPU it uses bfloat16 if
    the GPU supports it natively, else float16.

    Args:
        precision: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        device: device of the network.
        replaced: values of the options that ``precision`` replaced, ``None`` if not set.

    Returns:
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        InputError: if ``precision`` has another value, or a replaced option is set.
    """
    for name, value in replaced.items():
        if value is not None:
            raise InputError(f"--{name} is now --precision: use --precision {REPLACED[name].get(str(value).lower(), 'auto')}")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return _fastest_of_cpu() if device.type == "cpu" else "float32"


def in_precision(network: Callable[..., Tensor], precision: str) -> Callable[..., Tensor]:
    """``network`` with its convolutions in ``precision`` (see :func:`choose`); it returns float32."""
    if precision == "float32":
        return network

    def rounded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, getattr(torch, precision)):
            return network(x, *args, **kwargs).float()

    return rounded


@functools.cache
def _fastest_of_cpu() -> str:
    formats = (torch.float32, torch.bfloat16)
    seconds = dict.fromkeys(formats, float("inf"))
    arguments = {dtype: [torch.ones(shape).to(dtype, memory_format=torch.channels_last) for shape in TRIAL_SHAPES] for dtype in formats}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, several threads would mostly measure their waiting for each other
    try:
        started = time.perf_counter()
        while time.perf_counter() < started + TRIAL:  # in turns, so that other load affects both
            for dtype, (image, weight) in arguments.items():
                begun = time.perf_counter()
                F.conv2d(image, weight, padding=1)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    chosen = "bfloat16" if ratio < WORTH else "float32"
    logger.info("computing in %s: in a trial, a convolution in bfloat16 took %.2f of its time in float32", chosen, ratio)
    return chosen
