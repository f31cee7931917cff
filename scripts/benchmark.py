"""Measure the convolution algorithms on this machine: patches per second in training, seconds per slice in inference.

Prints a Markdown table with the machine and the versions, medians of several runs, and ratios from the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from monai.utils import set_determinism

from bundle.losses import PixelTVLoss
from bundle.networks import MultiScaleResidualNet, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement, after one to warm up")
    parser.add_argument("--batch_size", type=int, default=64, help="patches of 31 x 31 in a training step")
    parser.add_argument("--slice", type=int, nargs=2, default=(184, 208), metavar=("X", "Y"), help="size of the slice, in pixels")
    parser.add_argument("--features", type=int, default=128, help="width of the network")
    arguments = parser.parse_args()

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; medians of {arguments.repeats} runs\n")
    print("| convolutions | training, patches/s | inference, s per slice |")
    print("|---|---|---|")
    measured = []
    for title, fft in (("direct", False), ("frequency domain", True)):
        set_determinism(0)
        network = prepare(MultiScaleResidualNet(features=arguments.features), device, fft_convolutions=fft)
        step = median_seconds(training_step(network, arguments.batch_size, device), arguments.repeats)
        slice_ = median_seconds(inference(network, arguments.slice, device), arguments.repeats)
        measured.append((step, slice_))
        print(f"| {title} | {arguments.batch_size / step:.2f} | {slice_:.2f} |", flush=True)
    (a, b), (c, d) = measured
    print(f"| ratio | {a / c:.2f} | {b / d:.2f} |")


def training_step(network: torch.nn.Module, batch_size: int, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.Adam(network.parameters(), 1e-6)
    loss_function = PixelTVLoss()
    x = torch.rand(batch_size, 1, 31, 31, device=device)
    y = torch.rand_like(x)

    def step() -> None:
        optimizer.zero_grad()
        loss_function(network(x), y).backward()
        optimizer.step()

    return step


def inference(network: torch.nn.Module, size: tuple[int, int], device: torch.device) -> Callable[[], None]:
    x = torch.rand(1, 1, *size, device=device)

    @torch.inference_mode()
    def infer() -> None:
        network(x)

    return infer


def median_seconds(function: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
