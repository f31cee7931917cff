"""Train and evaluate every network of the comparison, and both ablations, and write the table and the figures.

It runs configs/train.json and configs/evaluate.json with the same data, patches and budget for every network. Start an interrupted run
again to continue it. Several runs can share one output folder with different --networks; each writes the table of all finished networks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from cycler import cycler
from matplotlib import rcParams
from matplotlib.figure import Figure
from monai import bundle
from monai.bundle import ConfigParser
from monai.data import CacheDataset
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from bundle.errors import InputError, report_in_one_line
from bundle.figures import Panel, save_panels
from bundle.files import write_atomically, write_json
from bundle.metrics import psnr, ssim
from bundle.resampling import degrade

CONFIGS = Path(__file__).parents[1] / "configs"
INTERPOLATIONS = {"nearest": "nearest neighbour", "bilinear": "bilinear", "bicubic": "bicubic"}
NETWORKS = {  # overlay in configs/networks -> name in the table; cheap ones first
    "fsrcnn": "FSRCNN",
    "srcnn": "SRCNN",
    "fast": "fast (ours)",
    "srdensenet": "SRDenseNet (reduced)",
    "rcan": "RCAN (reduced)",
    "srresnet": "SRResNet (reduced)",
    "vdsr": "VDSR",
    "drcn": "DRCN (reduced)",
    "rdn": "RDN (reduced)",
    "drrn": "DRRN (reduced)",
    "no_branches_no_tv": "proposed, without branches and TV",
    "no_tv": "proposed, without TV",
    "proposed": "proposed",
}
PAPER = {  # tables 1 to 4: PSNR in dB, SSIM
    "iseg2017": {
        "srcnn": (34.78, 0.8649), "fsrcnn": (35.10, 0.9150), "rcan": (33.56, 0.8906), "rdn": (36.41, 0.9225), "vdsr": (36.67, 0.9250),
        "drrn": (36.75, 0.9249), "proposed": (36.92, 0.9262),
    },
    "alvin": {
        "srcnn": (34.47, 0.9028), "fsrcnn": (35.27, 0.9268), "rcan": (35.06, 0.9311), "rdn": (36.62, 0.9307), "vdsr": (37.74, 0.9568),
        "drrn": (38.11, 0.9594), "no_branches_no_tv": (38.06, 0.9578), "no_tv": (38.34, 0.9605), "proposed": (38.42, 0.9619),
    },
    "brats2015": {
        "srcnn": (34.97, 0.9392), "fsrcnn": (34.99, 0.9454), "rcan": (35.32, 0.9511), "rdn": (35.39, 0.9489), "vdsr": (35.66, 0.9538),
        "drrn": (36.06, 0.9560), "proposed": (36.35, 0.9579),
    },
}  # fmt: skip
METRICS = ("psnr", "ssim", "psnr_foreground", "ssim_foreground")


def main() -> None:
    run = Run(arguments())
    work = [(name, seed, task) for seed in range(run.seeds) for name in run.networks for task in ("train", "evaluate")]
    work = [(name, 0, "evaluate") for name in INTERPOLATIONS] + work
    to_do = [item for item in work if not run.finished(*item)]
    print(f"{len(work) - len(to_do)} of {len(work)} steps are finished already")
    started, done, total = time.monotonic(), 0.0, sum(run.cost(name, task) for name, _, task in to_do)
    for number, (name, seed, task) in enumerate(to_do, 1):
        elapsed = time.monotonic() - started
        left = f", about {minutes(elapsed * (total - done) / done)} left" if done else ""
        print(f"\n[{number}/{len(to_do)}] {task} {name}, seed {seed} ({minutes(elapsed)} so far{left})", flush=True)
        getattr(run, task)(name, seed)
        done += run.cost(name, task)
    run.report()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    known = ", ".join(sorted(path.stem for path in (CONFIGS / "datasets").glob("*.json")))
    parser.add_argument("--dataset", required=True, type=protocol, help=f"protocol: {known}, or the path of your own overlay")
    parser.add_argument("--dataset_dir", required=True, help="folder of the volumes")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of all results; an earlier run there is continued")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME", help="which to train")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--epochs", type=int, help="epochs of the paper (900 patches per volume, batch 64), x 0.1 after each third; 90 by default"
    )
    budget.add_argument("--patches", type=int, help="number of patches, batch 16, x 0.1 after 70 and 90 %% of them: for a CPU")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16: up to twice as fast on some CPUs (docs/training.md)")
    parser.add_argument("--learning_rate", type=float, help="overrides the overlays', for --networks that diverge on these data")
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings of each network, with seeds 0, 1, ...")
    parser.add_argument("--scale", type=int, default=2, help="factor")
    parser.add_argument(
        "--axial_slices", type=int, nargs=2, metavar=("FIRST", "LAST"),
        help="test only these (default: all of the protocol, or its middle one for a trial of fewer than 1000 patches)",
    )  # fmt: skip
    return parser.parse_args()


def protocol(dataset: str) -> Path:
    """Overlay of a data set, by its name or as a file."""
    path = Path(dataset) if dataset.endswith(".json") else CONFIGS / "datasets" / f"{dataset}.json"
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such data set: {path}")
    return path


class Run:
    """A folder of trainings and evaluations: ``<output_dir>/<network>/seed<n>``.

    Raises:
        InputError: if the folder contains results of other settings, which must not be mixed with these.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.dataset, self.dataset_dir, self.output_dir = given.dataset, given.dataset_dir, given.output_dir
        self.networks = [name for name in NETWORKS if name in given.networks]
        self.seeds, self.scale = given.seeds, given.scale
        self.rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
        parser = parsed(*self._configs("proposed"), dataset_dir=self.dataset_dir)
        self.volumes = len(parser.get_parsed_content("train_datalist"))
        first, last = parser.get_parsed_content("axial_slices")
        middle = (first + last) // 2
        trial = given.patches is not None and given.patches < 1000
        self.axial_slices = given.axial_slices or ([middle, middle] if trial else [first, last])
        self.budget = budget_of(given.epochs, given.patches, self.volumes)
        self.precision = "bfloat16" if given.bfloat16 else "float32"
        self.patches = self.budget["max_epochs"] * self.budget["patches_per_volume"] * self.volumes
        settings = {"dataset": self.dataset.stem, "scale": self.scale, "axial_slices": self.axial_slices, **self.budget}
        path = self.output_dir / "settings.json"
        if path.exists() and (earlier := json.loads(path.read_text())) != settings:
            changed = ", ".join(f"{key} {earlier.get(key)}" for key in settings if earlier.get(key) != settings[key])
            raise InputError(f"{self.output_dir} holds a run with other settings ({changed}): choose another --output_dir")
        write_json(path, settings)
        self._datasets: dict[tuple[str, str, str], CacheDataset] = {}

    def finished(self, name: str, seed: int, task: str) -> bool:
        return (self.folder(name, seed) / ("weights.pt" if task == "train" else "evaluation/summary.json")).exists()

    def train(self, name: str, seed: int) -> None:
        """Train, and save the weights in half precision, as they are shipped."""
        folder = self.folder(name, seed)
        settings = {"precision": self.precision, **self.rate, **self.budget}
        rate = parsed(*self._configs(name), **settings).get_parsed_content("learning_rate")
        training = {"precision": self.precision, "learning_rate": rate}
        path = folder / "training.json"
        # a resumed optimizer keeps its old rate
        if path.exists() and (earlier := json.loads(path.read_text())) != training:
            raise InputError(f"{folder} holds a training with {earlier}, not {training}: use the same options, or delete it")
        write_json(path, training)
        self._bundle_run(name, folder, "train", resume=True, seed=seed, **settings)
        weights = torch.load(folder / "models" / "model.pt", map_location="cpu", weights_only=True)
        halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        write_atomically(folder / "weights.pt", lambda path: torch.save(halves, path))

    def evaluate(self, name: str, seed: int) -> None:
        folder = self.folder(name, seed)
        # an interpolation has no weights to load
        weights = {} if name in INTERPOLATIONS else {"checkpoint": str(folder / "weights.pt")}
        self._bundle_run(name, folder / "evaluation", "evaluate", axial_slices=self.axial_slices, **weights)

    def report(self) -> None:
        """Write the table and the figures of everything that is finished, in any run."""
        results = self._results()
        write_json(self.output_dir / "results.json", results)
        write_atomically(self.output_dir / "results.md", lambda path: path.write_text(table(results), encoding="utf-8"))
        self._draw_comparison(results)
        self._draw_curves(results["methods"])
        print(f"\n{table(results)}\nresults and figures in {self.output_dir}")

    def cost(self, name: str, task: str) -> float:
        """Seconds, roughly, on two CPU cores; the remaining time is scaled by what the finished steps took."""
        if name in INTERPOLATIONS:
            return 8  # nearly all of it loads the volumes
        slices = 10 * (self.axial_slices[1] - self.axial_slices[0] + 1)
        pixels = 3 * self.patches * 31**2 if task == "train" else slices * 200**2  # 3: forward, and backward to input and to weights
        return 2 + multiply_adds(self.network(name)) * pixels / 3e11

    def folder(self, name: str, seed: int) -> Path:
        return self.output_dir / name / f"seed{seed}"

    def network(self, name: str) -> torch.nn.Module:
        return parsed(*self._configs(name)).get_parsed_content("network_def")

    def _configs(self, name: str, *between: str) -> list[str]:
        overlays = [CONFIGS / f"{overlay}.json" for overlay in (*between, f"networks/{name}")]
        return [str(path) for path in (CONFIGS / "train.json", self.dataset, *overlays)]

    def _bundle_run(self, name: str, output_dir: Path, task: str, **overrides) -> None:
        configs = self._configs(name, *(["evaluate"] if task == "evaluate" else []))
        shared = {"validate::dataset": self._data(name if name in INTERPOLATIONS else "proposed", task, "validate::dataset", overrides)}
        if task == "train":
            shared["train::dataset"] = self._data("proposed", task, "train::dataset", overrides)
        bundle.run(
            config_file=configs,
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=str(CONFIGS / "logging.conf"),
            dataset_dir=self.dataset_dir,
            output_dir=str(output_dir),
            scale=self.scale,
            **overrides,
            **shared,
        )

    def _data(self, name: str, task: str, id_: str, overrides: dict) -> CacheDataset:
        """A data set of the config, loaded once for all networks, because loading can take longer than a training."""
        key = (name, task, id_)
        if key not in self._datasets:
            configs = self._configs(name, *(["evaluate"] if task == "evaluate" else []))
            slices = {k: v for k, v in overrides.items() if k == "axial_slices"}
            parser = parsed(*configs, dataset_dir=self.dataset_dir, scale=self.scale, **slices)
            parser[f"{id_}::_target_"] = "CacheDataset"  # the training data set has no cache, because its patches hold the volumes
            parser[f"{id_}::cache_rate"] = 1.0
            self._datasets[key] = parser.get_parsed_content(id_)
        return self._datasets[key]

    def _finished_seeds(self, name: str) -> list[int]:
        folders = (self.output_dir / name).glob("seed*/evaluation/summary.json")
        return sorted(int(path.parents[1].name.removeprefix("seed")) for path in folders)

    def _results(self) -> dict:
        """All measurements of each method: means over subjects of means over seeds."""
        truth, given = self._test_slice()
        methods: dict[str, dict] = {}
        for name in [*INTERPOLATIONS, *NETWORKS]:
            seeds = self._finished_seeds(name)
            if not seeds:
                continue
            summaries = [json.loads((self.folder(name, seed) / "evaluation" / "summary.json").read_text()) for seed in seeds]
            subjects = {
                os.path.relpath(volume, self.dataset_dir): {
                    metric: float(np.mean([s["volumes"][volume][metric] for s in summaries])) for metric in METRICS
                }
                for volume in summaries[0]["volumes"]
            }
            method: dict = {"seeds": seeds, "subjects": subjects}
            for metric in METRICS:
                values = [subject[metric] for subject in subjects.values()]
                method[metric] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
                # two trainings of one network can differ more than two networks
                method[metric]["of_each_seed"] = [float(np.mean([v[metric] for v in s["volumes"].values()])) for s in summaries]
            if name in NETWORKS:
                network = self.network(name)
                method["parameters"] = sum(p.numel() for p in network.parameters())
                method["multiply_adds_per_pixel"] = multiply_adds(network)
                method["patches"] = self.patches
                method |= json.loads((self.folder(name, seeds[0]) / "training.json").read_text())
                method["seconds_per_slice"] = self._predict(name, given)[1]
                method["training_curve"] = curve(losses_of(self.folder(name, seeds[0])), self.budget["batch_size"])
            methods[name] = method
        for name, method in methods.items():
            for metric in METRICS:
                if "bicubic" in methods:
                    method[metric]["gain"] = method[metric]["mean"] - methods["bicubic"][metric]["mean"]
                if "proposed" in methods and name != "proposed":
                    pairs = [(method["subjects"][s][metric], methods["proposed"]["subjects"][s][metric]) for s in method["subjects"]]
                    method[metric]["difference_to_proposed"] = paired_difference(pairs)
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        return {
            "dataset": self.dataset.stem, "scale": self.scale, "axial_slices": self.axial_slices, "budget": self.budget,
            "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "slice_for_timing": list(truth.shape[-2:]), "methods": methods,
        }  # fmt: skip

    def _test_slice(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Middle slice of the first test subject and its degraded version, (1, 1, X, Y)."""
        first, last = self.axial_slices
        parser = parsed(
            *self._configs("proposed", "evaluate"), dataset_dir=self.dataset_dir, scale=self.scale, axial_slices=[(first + last) // 2] * 2
        )
        data = parser.get_parsed_content("preprocessing")(parser.get_parsed_content("test_datalist")[0])
        return tuple(data[key].as_tensor().movedim(-1, 0) for key in ("label", "image"))  # type: ignore[return-value]

    def _predict(self, name: str, given: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Result for a slice, and the median of three times in seconds."""
        parser = parsed(*self._configs(name))
        network, device = parser.get_parsed_content("network"), parser.get_parsed_content("device")
        weights = torch.load(self.folder(name, self._finished_seeds(name)[0]) / "weights.pt", map_location=device, weights_only=True)
        network.load_state_dict(weights)
        network.eval()
        seconds = []
        with torch.no_grad():
            for _ in range(4):  # the first one warms up
                started = time.perf_counter()
                result = network(given.to(device)).cpu()
                seconds.append(time.perf_counter() - started)
        return result, statistics.median(seconds[1:])

    def _draw_comparison(self, results: dict) -> None:
        """One test slice for every method, like the paper's figures 3 to 5: the slice, an enlarged part, and the error."""
        truth, given = self._test_slice()
        panels = [Panel("HR", truth[0, 0])]
        for name in results["methods"]:
            known = name in INTERPOLATIONS
            result = degrade(truth, self.scale, interpolation=name) if known else self._predict(name, given)[0]
            title = "LR (nearest neighbour)" if name == "nearest" else {**INTERPOLATIONS, **NETWORKS}[name]
            title = title.replace(", ", ",\n").replace(" (", "\n(")
            title += f"\n{float(psnr(result, truth)):.2f} dB / {float(ssim(result, truth)):.4f}"
            panels.append(Panel(title, result[0, 0], error=(result - truth).abs()[0, 0]))
        save_panels(self.output_dir / "comparison.png", panels, zoom=0.25, columns=6)

    def _draw_curves(self, methods: dict[str, dict]) -> None:
        """Training loss against patches."""
        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        axis.set_prop_cycle(cycler(linestyle=["-", "--"]) * rcParams["axes.prop_cycle"])
        for name, method in methods.items():
            if method.get("training_curve"):
                axis.plot(*zip(*method["training_curve"]), label=NETWORKS[name], linewidth=1)
        if axis.lines:
            axis.set(xlabel="patches", ylabel="training loss, 8-bit levels squared (and TV, if any)", yscale="log")
            for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatter("{x:g}")
            axis.legend(fontsize=8)
            write_atomically(self.output_dir / "training_curves.png", lambda path: figure.savefig(path, dpi=110))


def budget_of(epochs: int | None, patches: int | None, volumes: int) -> dict:
    """Settings of train.json for a budget: the paper's schedule, or a number of patches, rounded up."""
    if patches is None:
        epochs = epochs or 90
        milestones = [math.ceil(epochs / 3), math.ceil(2 * epochs / 3)]
        return {"batch_size": 64, "patches_per_volume": 900, "max_epochs": epochs, "lr_milestones": milestones}
    epochs = min(34, max(3, patches // (16 * volumes)))  # an interrupted training loses at most one epoch
    return {
        "batch_size": 16, "patches_per_volume": math.ceil(patches / (epochs * volumes)), "max_epochs": epochs,
        "lr_milestones": [round(0.7 * epochs), round(0.9 * epochs)], "val_interval": epochs + 1,
    }  # fmt: skip


def parsed(*configs: str, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(list(configs))
    parser.update(overrides)
    return parser


def multiply_adds(network: torch.nn.Module) -> float:
    """Multiply-adds per pixel of a forward pass."""
    x = torch.zeros(1, 1, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(x)
    return counter.get_total_flops() / 2 / x.numel()


def paired_difference(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean difference over subjects with its 95 % confidence interval (Student's t)."""
    differences = np.diff(np.array(pairs))[:, 0] * -1
    mean = float(differences.mean())
    if len(differences) < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(results: dict) -> str:
    """Markdown table of the results, with the paper's values if it has any."""
    paper = PAPER.get(results["dataset"], {})
    header = ["method", "PSNR, dB", "SSIM", "gain, dB", "PSNR minus proposed, dB [95 %]"]
    header += ["patches seen", "parameters", "M multiply-adds / pixel", "s / slice"] + (["paper"] if paper else [])
    lines = [header]
    for name, m in results["methods"].items():
        difference = m["psnr"].get("difference_to_proposed")
        seeds = f", {len(m['seeds'])} seeds" if len(m["seeds"]) > 1 else ""
        line = [
            {**INTERPOLATIONS, **NETWORKS}[name],
            f"{m['psnr']['mean']:.2f} ± {m['psnr']['std']:.2f}",
            f"{m['ssim']['mean']:.4f} ± {m['ssim']['std']:.4f}",
            f"{m['psnr']['gain']:+.2f}" if "gain" in m["psnr"] else "",
            "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**difference) if difference else "",
            f"{m['patches']:,} in {m['precision']}{seeds}" if "parameters" in m else "",
            f"{m['parameters']:,}" if "parameters" in m else "",
            f"{m['multiply_adds_per_pixel'] / 1e6:.3f}" if "parameters" in m else "",
            f"{m['seconds_per_slice']:.3f}" if "parameters" in m else "",
        ]
        lines.append(line + (["{:.2f} / {:.4f}".format(*paper[name]) if name in paper else ""] if paper else []))
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def curve(losses: Iterable[tuple[int, float]], batch_size: int, points: int = 100) -> list[tuple[int, float]]:
    """(patches seen, mean loss since the previous point) at up to ``points`` points of a training."""
    known = np.array(sorted(dict(losses).items())).reshape(-1, 2)  # a step repeated after an interruption counts once
    parts = [part for part in np.array_split(known, points) if len(part)]
    return [(int(part[-1, 0]) * batch_size, float(part[:, 1].mean())) for part in parts]


def losses_of(folder: Path) -> Iterator[tuple[int, float]]:
    """(step, training loss) from TensorBoard's files, including those of an interrupted training."""
    for file in sorted(folder.glob("events.out.tfevents*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if "loss" in events.Tags()["scalars"]:
            yield from ((event.step, event.value) for event in events.Scalars("loss"))


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


if __name__ == "__main__":
    report_in_one_line()
    main()
