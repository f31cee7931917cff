"""Measure speed and memory on this machine: one kind of measurement per call, medians of several runs, ratios from the same run.

Without --inference, --whole, --training, --growth or --all, it compares the convolution algorithms. It prints Markdown and adds the figures
to a JSON file, whose other rows it keeps. With --page it also writes all tables of that file into a page (docs/performance.md).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import set_determinism
from nibabel.processing import conform
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bundle.errors import InputError, report_in_one_line
from bundle.files import write_atomically, write_json
from bundle.inferers import AutocastInferer
from bundle.losses import PixelTVLoss
from bundle.networks import MultiScaleResidualNet, prepare
from bundle.precision import in_precision
from bundle.resampling import degrade
from bundle.subjects import find_volumes

CONFIGS = Path(__file__).parents[1] / "configs"
NAIVE = ["--precision", "float32", "--skip_background", "false"]
WHOLE = {  # network -> overlays and options of a whole run
    "bicubic": (["networks/bicubic"], []),
    "fast": (["networks/fast"], []),
    "general": ([], []),
    "general, naive": ([], NAIVE),
    "the paper's": (["networks/proposed"], []),
}
SMALL = dict(side=48, slices=2)
GROWTH = {  # kind -> numbers, and arguments of the runs: of 4 slices of 256 x 256 output pixels, 1 volume, 1 process
    "start": {f"python -m {program}": dict(**SMALL, program=program) for program in ("monai.bundle", "bundle")},
    "small volumes": {n: dict(**SMALL, volumes=n) for n in (1, 20)},
    "slices": {n: dict(slices=n) for n in (4, 8, 16)},
    "side": {n: dict(side=n) for n in (128, 256, 384, 512)},
    "volumes": {n: dict(volumes=n) for n in (1, 2, 4)},
    "processes": {n: dict(volumes=4, processes=n) for n in (1, 2)},
    "slices of 512 x 512, anatomy in 4": {n: dict(slices=n, side=512, filled=4) for n in (4, 64, 256, 1024)},  # for the memory
}
ALL = [  # all tables of the page
    ["--repeats", "3"],
    *(
        ["--inference", f"{{data}}/{volume}", "--slices", "4", "--repeats", "3"]
        for volume in ("brats2018/Brats18_TCIA01_201_1_t1ce.nii.gz", "ds002748/sub-21.nii.gz", "dicom_t1")
    ),
    ["--whole", "head", "--networks", "bicubic", "fast", "general", "general, naive", "--repeats", "3"],
    ["--whole", "{data}/ds002748/sub-21.nii.gz", "--repeats", "1"],
    ["--training", "{data}/ds002748", "--repeats", "3"],
    ["--growth", "--repeats", "3"],
]


def main(words: list[str] | None = None) -> None:
    given = arguments(words)
    if given.all:
        for part in ALL:
            shared = ["--json", str(given.json), *(["--page", str(given.page)] if given.page else [])]
            main([word.format(data=given.all) for word in part] + shared)
        return
    measure = next((f for option, f in MEASUREMENTS.items() if getattr(given, option) not in (None, False)), measure_convolutions)
    kind = measure.__name__.removeprefix("measure_")
    known = json.loads(given.json.read_text()) if given.json.exists() else {}
    result = {"machine": machine(), "repeats": given.repeats, **measure(given)}
    section = {result["volume"]: result} if "volume" in result else result
    if kind == "whole":  # keep the rows of networks that were not measured this time
        before = known.get(kind, {}).get(result["volume"], {})
        if all(before.get(key) == result[key] for key in ("side", "scale")):
            result["rows"] = {**before["rows"], **result["rows"]}
    if kind == "growth":
        kept = [row for row in known.get(kind, {}).get("rows", []) if row["of"] not in {row["of"] for row in result["rows"]}]
        result["rows"] = sorted(result["rows"] + kept, key=lambda row: list(GROWTH).index(row["of"]))
    # keep the results of other volumes; other sections are replaced
    known[kind] = {**known.get(kind, {}), **section} if "volume" in result else section
    write_json(given.json, known)
    print(f"\n{markdown(kind, section)}\n\nfigures in {given.json}")
    if given.page:
        write_page(given.page, known)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--inference", metavar="VOLUME", help="degrade this volume, super-resolve it naively and fast, and compare")
    kind.add_argument(
        "--whole", metavar="VOLUME", help="refine this volume, resampled to voxels of 1 mm, from file to file; 'head' generates one"
    )
    kind.add_argument("--training", metavar="FOLDER", help="training steps on these volumes, with and without loading data")
    kind.add_argument("--growth", nargs="*", metavar="KIND", help=f"time and memory as a function of these, or all: {', '.join(GROWTH)}")
    kind.add_argument("--all", metavar="DATA", help="all measurements of docs/performance.md, with the data sets in this folder")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement (after a warm-up, except --whole, --growth)")
    parser.add_argument("--json", type=Path, default=Path("output/benchmark.json"), help="file to which the figures are added")
    parser.add_argument("--page", type=Path, help="page whose tables are replaced from the JSON file")
    parser.add_argument("--slices", type=int, default=12, help="inference: number of slices, evenly spaced over the volume; 0: all")
    parser.add_argument("--networks", nargs="+", default=list(WHOLE), choices=list(WHOLE), metavar="NAME", help="whole: which networks")
    parser.add_argument("--side", type=int, default=256, help="whole: voxels along each axis")
    parser.add_argument("--scale", type=int, default=2, help="inference, whole: factor")
    parser.add_argument("--checkpoint", help="inference: weights (default: those of configs/inference.json)")
    parser.add_argument("--overlay", nargs="*", default=[], metavar="CONFIG", help="additional configs, such as configs/networks/vdsr.json")
    parser.add_argument("--batch_size", type=int, default=64, help="patches of 31 x 31 in a training step")
    parser.add_argument("--slice", type=int, nargs=2, default=(184, 208), metavar=("X", "Y"), help="convolutions: pixels of the slice")
    parser.add_argument("--features", type=int, default=128, help="convolutions: width of the network")
    given = parser.parse_args(words)
    if unknown := set(given.growth or ()) - set(GROWTH):
        parser.error(f"--growth knows {', '.join(GROWTH)}, not {', '.join(sorted(unknown))}")
    if given.repeats < 1 or given.slices < 0 or given.batch_size < 1:
        parser.error("--repeats and --batch_size must be positive, --slices not negative")
    return given


# ---- the convolution algorithms


def measure_convolutions(given: argparse.Namespace) -> dict:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    rows: dict[str, dict] = {}
    for title, fft, precision in (
        ("direct", False, "float32"),
        ("frequency domain", True, "float32"),
        ("direct, bfloat16", False, "bfloat16"),
    ):
        set_determinism(0)
        network = prepare(MultiScaleResidualNet(features=given.features), device, fft_convolutions=fft)
        step = median_seconds(training_step(network, given.batch_size, device, AutocastInferer(precision)), given.repeats)
        slice_ = median_seconds(inference(in_precision(network, precision), given.slice, device), given.repeats)
        peak, flops = convolution_peak(device, given.repeats, precision), flops_of(given.features, given.slice)
        rows[title] = {
            "patches_per_second": given.batch_size / step, "seconds_per_slice": slice_,
            "peak_gflops": peak / 1e9, "fraction_of_peak": flops / slice_ / peak,
        }  # fmt: skip
    return {"features": given.features, "batch_size": given.batch_size, "slice": list(given.slice), "rows": rows}


def flops_of(features: int, size: tuple[int, int]) -> int:
    """Floating-point operations of the network for one slice, always counted for direct convolutions."""
    with FlopCounterMode(display=False) as counter:
        MultiScaleResidualNet(features).to("meta")(torch.empty(1, 1, *size, device="meta"))
    return counter.get_total_flops()


def training_step(network: nn.Module, batch_size: int, device: torch.device, inferer: Inferer) -> Callable[[], None]:
    x = torch.rand(batch_size, 1, 31, 31, device=device)
    return step_on(network, PixelTVLoss(), torch.optim.Adam(network.parameters(), 1e-6), x, torch.rand_like(x), inferer)


def step_on(
    network: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, inferer: Inferer
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss(inferer(x, network), y).backward()
        optimizer.step()

    return step


def inference(network: Callable[[Tensor], Tensor], size: tuple[int, int], device: torch.device) -> Callable[[], None]:
    x = torch.rand(1, 1, *size, device=device)

    @torch.inference_mode()
    def infer() -> None:
        network(x)

    return infer


# ---- inference of a volume


def measure_inference(given: argparse.Namespace) -> dict:
    volumes = find_volumes(given.inference)
    if len(volumes) > 1:
        raise InputError(f"{given.inference}: one volume expected, found {len(volumes)}")
    ways = {
        "naive": parsed("inference", given, skip_background=False, precision="float32"),
        "fast": parsed("inference", given),
    }
    load, orient, scale = (ways["fast"].get_parsed_content(name) for name in ("load", "orient", "scale_intensity"))
    truth = scale(orient(load({"image": volumes[0]})))["image"].as_tensor()
    depth = truth.shape[-1]
    count = min(given.slices or depth, depth)
    truth = truth[..., [int((n + 0.5) * depth / count) for n in range(count)]].contiguous()
    low = degrade(truth.movedim(-1, 0), given.scale, interpolation=ways["fast"].get_parsed_content("interpolation"))
    image = MetaTensor(low.movedim(0, -1)[None].contiguous(), meta={"factor": [float(given.scale)] * 2})
    infer = {name: inference_of(parser, image, name == "naive") for name, parser in ways.items()}
    results = {name: run() for name, run in infer.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in infer}
    for _ in range(given.repeats):  # in turns, so that other load affects both
        for name, run in infer.items():
            seconds[name].append(seconds_of(run))
    psnr = {name: psnr_of(result[0], truth) for name, result in {"interpolated": image.as_tensor(), **results}.items()}
    times = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "volume": Path(given.inference).name, "shape": list(truth.shape[1:3]), "slices": count, "of": depth, "scale": given.scale,
        "seconds": times, "ratio": times["naive"] / times["fast"], "psnr": psnr, "difference_db": psnr["fast"] - psnr["naive"],
        "largest_difference": float((results["fast"] - results["naive"]).abs().max()),
        "computed_in": ways["fast"].get_parsed_content("computed_in"),
        "network": type(ways["fast"].get_parsed_content("network_def")).__name__, "margin": infer_margin(ways["fast"]),
    }  # fmt: skip


def inference_of(parser: ConfigParser, image: MetaTensor, naive: bool) -> Callable[[], Tensor]:
    """The computation of the evaluator of ``configs/inference.json`` on a batch; ``naive`` uses PyTorch's default memory format."""
    device, network, inferer = (parser.get_parsed_content(key) for key in ("device", "network", "inferer"))
    if parser.get_parsed_content("load_weights"):
        state = torch.load(parser.get_parsed_content("checkpoint"), map_location=device, weights_only=True)
        network.load_state_dict(state)
    if naive:
        network = network.to(memory_format=torch.contiguous_format)
    network.eval()

    @torch.inference_mode()
    def run() -> Tensor:
        return inferer(image.to(device), network).as_subclass(Tensor).cpu()

    return run


def infer_margin(parser: ConfigParser) -> int:
    return parser.get_parsed_content("inferer").margin


def psnr_of(result: Tensor, truth: Tensor) -> float:
    """PSNR in dB over all slices together, peak 1."""
    return float(-10 * torch.log10((result - truth).double().square().mean()))


# ---- a volume from file to file


def measure_whole(given: argparse.Namespace) -> dict:
    """Time and peak memory of whole runs of ``configs/inference.json`` on one volume, including the start of Python and its libraries."""
    rows, name = {}, given.whole if given.whole == "head" else Path(given.whole).name
    with tempfile.TemporaryDirectory() as folder:
        volume = Path(folder, "volume.nii.gz")
        (made_up_head(given.side) if given.whole == "head" else conform(nib.load(given.whole), (given.side,) * 3)).to_filename(volume)
        for network in given.networks:
            overlays, options = WHOLE[network]
            files = [str(CONFIGS / f"{overlay}.json") for overlay in ("inference", *overlays)]
            options = ["--scale", str(given.scale), "--overwrite", "true", *options]
            measured = [timed_run(files, str(volume), f"{folder}/out", options) for _ in range(given.repeats)]
            rows[network] = dict(zip(("seconds", "gigabytes", "cpu_seconds"), map(statistics.median, zip(*measured))))
            print(f"{name}, {network}: {rows[network]}", flush=True)
    return {"volume": name, "side": given.side, "scale": given.scale, "rows": rows}


def made_up_head(side: int) -> nib.Nifti1Image:
    """A textured ellipsoid of 156 x 196 x 230 mm, the size of an adult's head, and a neck, in voxels of 1 mm."""
    x, y, z = np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 3, indexing="ij", sparse=True)
    inside = ((x / 78) ** 2 + (y / 98) ** 2 + (z / 115) ** 2 < 1) | ((x / 60) ** 2 + (y / 65) ** 2 < 1) & (z < 0)
    texture = 0.7 + 0.2 * np.sin(x / 4 + z / 9) * np.sin(y / 5) + 0.02 * np.random.default_rng(0).standard_normal(inside.shape)
    return nib.Nifti1Image((1000 * texture * inside).astype(np.float32), np.eye(4))


# ---- training


def measure_training(given: argparse.Namespace) -> dict:
    parser = parsed("train", given, dataset_dir=given.training, batch_size=given.batch_size, patches_per_volume=4 * given.batch_size)
    keys = ("device", "network", "loss", "optimizer", "train::inferer", "computed_in")
    device, network, loss, optimizer, inferer, computed_in = (parser.get_parsed_content(key) for key in keys)
    network.train()
    loader = parser.get_parsed_content("train::dataloader")

    def batches() -> Iterator[dict]:
        while True:
            yield from loader

    source = batches()
    batch = next(source)  # fills the cache
    x, y = (torch.as_tensor(batch[key]).to(device) for key in ("image", "label"))
    bare = step_on(network, loss, optimizer, x, y, inferer)

    def step_with_data() -> None:
        batch = next(source)
        x, y = (torch.as_tensor(batch[key]).to(device) for key in ("image", "label"))
        step_on(network, loss, optimizer, x, y, inferer)()

    seconds: dict[str, list[float]] = {"bare": [], "with data": [], "data alone": []}
    for measured in range(given.repeats + 1):
        for name, function in (("bare", bare), ("with data", step_with_data), ("data alone", lambda: next(source))):
            duration = seconds_of(function)
            if measured:
                seconds[name].append(duration)
    rates = {name: given.batch_size / statistics.median(s) for name, s in seconds.items()}
    plain = parsed("train", given, dataset_dir=given.training).get_parsed_content("network_def").to("meta")
    with FlopCounterMode(display=False) as counter:  # counted for direct convolutions
        plain(torch.empty(1, 1, *x.shape[-2:], device="meta")).sum().backward()
    flops = counter.get_total_flops()
    peak = convolution_peak(device, given.repeats, computed_in)
    return {
        "batch_size": given.batch_size, "patches_per_second": rates, "pipeline": rates["with data"] / rates["bare"],
        "gflops_per_patch": flops / 1e9, "peak_gflops": peak / 1e9, "fraction_of_peak": rates["bare"] * flops / peak,
        "network": type(plain).__name__, "computed_in": computed_in,
    }  # fmt: skip


def convolution_peak(device: torch.device, repeats: int, precision: str = "float32") -> float:
    """Floating-point operations per second of the fastest direct convolution: 128 channels, batch 16 of 62 x 62, kernels 3 to 7."""
    x = torch.rand(16, 128, 62, 62, device=device)
    best = 0.0
    for kernel in (3, 5, 7):
        convolution = nn.Conv2d(128, 128, kernel, padding=kernel // 2, device=device)
        rounded = in_precision(convolution, precision)
        with torch.inference_mode():
            duration = median_seconds(lambda c=rounded: c(x), repeats)
        best = max(best, 2 * x.numel() * 128 * kernel**2 / duration)
    return best


# ---- growth


def measure_growth(given: argparse.Namespace) -> dict:
    """Time and peak memory of whole runs of ``configs/inference.json``, including the start of Python and its libraries."""
    rows = []
    for kind in given.growth or GROWTH:
        for n, options in GROWTH[kind].items():
            measured = [whole_run(given, **options) for _ in range(given.repeats)]
            seconds, gigabytes, cpu = map(statistics.median, zip(*measured))
            rows.append({"of": kind, "number": n, "seconds": seconds, "gigabytes": gigabytes, "cpu_seconds": cpu})
            print(f"{kind} {n}: {seconds:.1f} s, {cpu:.1f} CPU s, {gigabytes:.2f} GB", flush=True)
    return {"rows": rows}


def whole_run(
    given: argparse.Namespace,
    slices: int = 4,
    side: int = 256,
    volumes: int = 1,
    processes: int = 1,
    filled: int | None = None,
    program: str = "monai.bundle",
) -> tuple[float, float, float]:
    """Elapsed seconds, peak memory of the largest process in GB (10^9 bytes), and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for n in range(volumes):
            nib.Nifti1Image(head(side // 2, slices, filled or slices), np.eye(4)).to_filename(Path(folder, f"{n}.nii"))
        configs = ["inference", *(["multi_gpu_inference"] if processes > 1 else [])]
        files = [str(CONFIGS / f"{name}.json") for name in configs] + given.overlay
        options = ["--checkpoint", given.checkpoint] if given.checkpoint else []
        return timed_run(files, folder, f"{folder}/out", options, processes, program)


def timed_run(
    files: list[str], volumes: str, output_dir: str, options: list[str], processes: int = 1, program: str = "monai.bundle"
) -> tuple[float, float, float]:
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, program, "run", "--config_file", str(files), "--dataset_dir", volumes]
    command += ["--output_dir", output_dir, *options]
    threads = str(max(1, torch.get_num_threads() // processes))
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads})
        peaks, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                peaks.append(peak_memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)  # includes child processes that it waited for
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
    return seconds, max(peaks) / 1e9, usage.ru_utime + usage.ru_stime


def peak_memory(pid: int) -> int:
    """Peak memory so far, in bytes, of the largest among a process and its children. What ``wait4`` reports is no substitute: it includes
    the peak of the parent."""
    peak = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(OSError, psutil.Error):
                status = Path(f"/proc/{one.pid}/status")  # without it, the present memory instead of the peak
                found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
                peak = max(peak, int(found[1]) * 1024 if found else one.memory_info().rss)
    return peak


def head(side: int, slices: int, filled: int) -> np.ndarray:
    """Textured ellipse that covers half of each slice; slices after the first ``filled`` are zero."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (side, side, slices)), indexing="ij")
    texture = 0.7 + 0.2 * np.sin(20 * x + z) * np.sin(17 * y) + 0.02 * np.random.default_rng(0).standard_normal(x.shape)
    array = 1000 * texture * ((x / 0.75) ** 2 + (y / 0.85) ** 2 < 1)
    array[..., filled:] = 0
    return array.astype(np.float32)


# ---- shared


def parsed(name: str, given: argparse.Namespace, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json"), *given.overlay])
    parser.read_meta(str(CONFIGS / "metadata.json"))
    checkpoint = {"checkpoint": given.checkpoint} if given.checkpoint and name == "inference" else {}
    quiet = {"inferer::progress": False} if name == "inference" else {}
    parser.update({**checkpoint, **quiet, **overrides})
    return parser


def machine() -> str:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
        name = f"{found.group(1) if found else platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, MONAI {monai.__version__}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}"


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    return statistics.median([seconds_of(function) for _ in range(repeats + 1)][1:])


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- printed output and the page


def markdown(kind: str, section: dict) -> str:
    lines = list(TABLES[kind](section))
    return "\n".join(lines)


PEAKS = {"direct": "float32", "direct, bfloat16": "bfloat16"}


def convolutions_table(section: dict) -> Iterator[str]:
    yield "| convolutions | training, patches/s | times direct | inference, s per slice | times direct | fraction of the peak |"
    yield "|---|---|---|---|---|---|"
    direct = section["rows"]["direct"]
    for title, row in section["rows"].items():
        patches, seconds = row["patches_per_second"], row["seconds_per_slice"]
        ratios = f"{patches / direct['patches_per_second']:.2f}", f"{direct['seconds_per_slice'] / seconds:.2f}"
        yield f"| {title} | {patches:.2f} | {ratios[0]} | {seconds:.2f} | {ratios[1]} | {row['fraction_of_peak']:.2f} |"
    peaks = (f"{section['rows'][name]['peak_gflops']:.0f} GFLOP/s in {of}" for name, of in PEAKS.items())
    yield f"\nThe peak is that of the best single convolution: {', '.join(peaks)}; operations are counted for direct convolutions."
    sizes = f"width {section['features']}, batch {section['batch_size']}, slices of {section['slice'][0]} x {section['slice'][1]}"
    yield f"\n{sizes}, float32 where nothing else is said; {footer(section)}"


def inference_table(sections: dict) -> Iterator[str]:
    yield "| volume | slices | naive, s | fast, s | ratio | PSNR interpolated, dB | naive, dB | fast, dB | difference, dB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for s in sections.values():
        slices = f"{s['slices']} of {s['of']}, {s['shape'][0]} x {s['shape'][1]}"
        times = f"{s['seconds']['naive']:.2f} | {s['seconds']['fast']:.2f} | {s['ratio']:.2f}"
        decibels = " | ".join(f"{s['psnr'][way]:.3f}" for way in ("interpolated", "naive", "fast"))
        yield f"| {s['volume']} | {slices} | {times} | {decibels} | {s['difference_db']:+.4f} |"
    footers = {f"{s['network']}, factor {s['scale']}, margin {s['margin']}; {footer(s)}" for s in sections.values()}
    yield "\n" + "\n".join(sorted(footers))


def whole_table(sections: dict) -> Iterator[str]:
    yield "| volume | network | seconds | CPU seconds | peak memory, GB |\n|---|---|---|---|---|"
    for s in sections.values():
        for network in (name for name in WHOLE if name in s["rows"]):
            row = s["rows"][network]
            yield f"| {s['volume']} | {network} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['gigabytes']:.2f} |"
    for s in sections.values():
        yield f"\n{s['volume']}: {s['side']} voxels along each axis, factor {s['scale']}; {footer(s)}"


def training_table(s: dict) -> Iterator[str]:
    rates = s["patches_per_second"]
    yield "| | patches/s |\n|---|---|"
    yield f"| step on a batch that is there | {rates['bare']:.2f} |"
    yield f"| step and data pipeline | {rates['with data']:.2f} |"
    yield f"| data pipeline alone | {rates['data alone']:.0f} |"
    yield f"\nThe pipeline leaves {100 * s['pipeline']:.1f} % of the bare step's speed. The step does"
    yield f"{s['gflops_per_patch']:.1f} GFLOP per patch, counted for direct convolutions:"
    yield f"{100 * s['fraction_of_peak']:.0f} % of the peak that this machine reached in a convolution,"
    yield f"{s['peak_gflops']:.0f} GFLOP/s in {s['computed_in']}."
    yield f"\n{s['network']}, batch {s['batch_size']}; {footer(s)}"


def growth_table(section: dict) -> Iterator[str]:
    yield "| of | number | seconds | CPU seconds | peak memory, GB |\n|---|---|---|---|---|"
    for row in section["rows"]:
        yield f"| {row['of']} | {row['number']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['gigabytes']:.2f} |"
    yield "\n4 slices of 256 x 256 output pixels, 1 volume, 1 process where nothing else is said; memory of the largest process;"
    yield footer(section)


def footer(section: dict) -> str:
    repeats = section["repeats"]
    return f"{section['machine']}; {'one run each' if repeats == 1 else f'medians of {repeats} runs'}."


def draw_growth(section: dict, path: Path) -> None:
    kinds = [kind for kind in dict.fromkeys(row["of"] for row in section["rows"]) if kind != "start"]
    figure = Figure(figsize=(3 * len(kinds), 5), layout="constrained")
    for column, kind in enumerate(kinds):
        rows = [row for row in section["rows"] if row["of"] == kind]
        for line, (key, label) in enumerate((("seconds", "seconds"), ("gigabytes", "peak memory, GB"))):
            axes = figure.add_subplot(2, len(kinds), line * len(kinds) + column + 1)
            numbers, values = [row["number"] for row in rows], [row[key] for row in rows]
            axes.plot(numbers, values, "o-")
            axes.set(xlabel=kind, xticks=numbers, ylim=(0, 1.1 * max(values)), ylabel=label if column == 0 else None)
    write_atomically(path, figure.savefig)


def write_page(page: Path, known: dict) -> None:
    """Write every table of ``known`` between its marks in the page, and the plot into its ``figures`` folder."""
    text = page.read_text(encoding="utf-8")
    for kind, section in known.items():
        begin = f"<!-- {kind} -->"
        if begin not in text:
            raise InputError(f"{page}: no {begin} ... <!-- end --> to write the table into")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{markdown(kind, section)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    write_atomically(page, lambda path: path.write_text(text, encoding="utf-8"))
    if "growth" in known:
        draw_growth(known["growth"], page.parent / "figures" / "growth.png")


MEASUREMENTS = {"inference": measure_inference, "whole": measure_whole, "training": measure_training, "growth": measure_growth}
TABLES = {
    "convolutions": convolutions_table,
    "inference": inference_table,
    "whole": whole_table,
    "training": training_table,
    "growth": growth_table,
}


if __name__ == "__main__":
    report_in_one_line()
    main()
