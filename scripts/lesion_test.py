"""Measure how super-resolution changes small lesions. Balls of known size, contrast and sharpness are added to the white matter of
high-resolution volumes. Simulated low-resolution scans of them are restored by a network, by cubic B-splines and by zero-filling.

Writes lesions.json (every lesion), lesions.md (tables) and lesions_*.png (pictures) into the output folder after each volume.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy import ndimage, special
from torch import Tensor
from tqdm.auto import tqdm

import bundle
from bundle.acquisition import Acquisition, Sampling
from bundle.checkpoints import load_weights
from bundle.conditions import MIDDLES, between_neighbours
from bundle.errors import InputError, reason
from bundle.figures import Panel, save_panels
from bundle.files import write_atomically, write_json
from bundle.grid import oriented
from bundle.inferers import ForegroundInferer, OrthogonalSlices
from bundle.resampling import enlarge, interpolate_slices
from bundle.subjects import find_volumes

CONFIGS = Path(bundle.root()) / "configs"
SIZES = (2.0, 3.0, 4.0, 6.0, 8.0)  # mm, diameters
CONTRASTS = {"bright": 0.3, "dark": -0.3}  # relative to the surrounding white matter
EDGES = {"sharp": 0.2, "soft": 1.0}  # mm, standard deviation of the edge
METHODS = ("spline", "zero-filled", "network")
STEP = 1 / 1000  # between stored values, because files store whole numbers
DEEP = 15.0  # mm, least depth of white matter in the head
DISTANCE = 13.0  # mm, least distance between the centres of lesions
HALF = 0.5  # of its contrast: a lesion that keeps less is lost
SPOT, NOT_THERE = 3.0, 2.0  # standard deviations of true white matter: a spot exceeds the first; the truth has none below the second
SMALLEST = 2.0  # mm, diameter of the smallest spot
SURROUNDINGS = 8.0  # mm, standard deviation of the Gaussian mean of a spot's surroundings
SHOWN = 40.0  # mm, side of the pictures


class Scan(NamedTuple):
    """A row of the tables: a simulated low-resolution scan."""

    profile: str
    noise: float
    thick: bool = False


SCANS = {
    "k-space": Scan("kspace", 0),
    "k-space, 2 % noise": Scan("kspace", 0.02),
    "Gaussian": Scan("gaussian", 0),
    "Gaussian, 2 % noise": Scan("gaussian", 0.02),
    "slices": Scan("gaussian", 0, thick=True),
    "slices, 2 % noise": Scan("gaussian", 0.02, thick=True),
}


@dataclass(frozen=True)
class Lesion:
    """A ball in a volume: centre in voxels, diameter and standard deviation of its edge in mm, contrast in intensities."""

    centre: tuple[int, int, int]
    size: float
    contrast: float
    edge: float
    kind: str

    def drawn(self, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
        """Intensities that the lesion adds to a volume: means over each voxel, from 5 points along each axis."""
        added = np.zeros(shape, np.float32)
        reach = [int(np.ceil((self.size / 2 + 4 * self.edge) / s)) + 1 for s in spacing]
        box = tuple(slice(max(c - r, 0), min(c + r + 1, n)) for c, r, n in zip(self.centre, reach, shape))
        fine = [(np.arange(5 * b.start, 5 * b.stop) - 2) / 5 - c for b, c in zip(box, self.centre)]
        squares = [(x * s) ** 2 for x, s in zip(fine, spacing)]
        radius = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2])
        ball = special.erfc((radius - self.size / 2) / (self.edge * np.sqrt(2))) / 2
        sides = [b.stop - b.start for b in box]
        added[box] = self.contrast * ball.reshape(sides[0], 5, sides[1], 5, sides[2], 5).mean((1, 3, 5))
        return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "volumes", nargs="+", help="files, folders or patterns of high-resolution volumes that the network was not trained on"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("output/lesions"), help="folder for the results")
    parser.add_argument(
        "--overlay",
        nargs="*",
        metavar="CONFIG",
        help="configs added to configs/inference.json: names or files (default: isotropic for slices)",
    )
    parser.add_argument("--checkpoint", help="weights (default: those of the overlay)")
    parser.add_argument("--scans", nargs="+", default=list(SCANS), choices=list(SCANS), metavar="SCAN", help="rows of the tables")
    parser.add_argument("--slices", type=int, default=3, help="number of axial slices with lesions in each volume")
    parser.add_argument("--factor", type=float, default=2, help="in-plane factor")
    parser.add_argument("--thickness", type=float, default=5, help="slice thickness in mm; for volumes with slices at most a third of it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lesion positions and the noise")
    given = parser.parse_args()
    try:
        test = LesionTest(given)
        for volume in tqdm(find_volumes(given.volumes), unit="volume"):
            test.measure(volume)
            test.write(given.output_dir)
        if not test.lesions:
            raise InputError(f"{', '.join(given.volumes)}: no smooth white matter found that holds a lesion")
    except InputError as e:
        sys.exit(f"error: {reason(e)}")
    print(test.markdown())


class LesionTest:
    """Add lesions to volumes and measure how each method restores them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        kinds = {SCANS[title].thick for title in given.scans}
        self.configs = {thick: self.read_config(thick) for thick in kinds}
        any_config = next(iter(self.configs.values()))
        self.load, self.scale, self.device = (any_config.get_parsed_content(key) for key in ("load", "scale_intensity", "compute_device"))
        self.networks = {thick: self.read_network(config) for thick, config in self.configs.items()}
        self.lesions: list[dict[str, Any]] = []
        self.inventions: list[dict[str, Any]] = []
        self.pictures: dict[str, dict[float, list[np.ndarray]]] = {}

    def read_config(self, thick: bool) -> ConfigParser:
        names = (["isotropic"] if thick else []) if self.given.overlay is None else self.given.overlay
        overlays = [name if Path(name).exists() else CONFIGS / f"{name}.json" for name in names]
        config = ConfigParser()
        config.read_config([str(CONFIGS / "inference.json"), *map(str, overlays)])
        config.read_meta(str(CONFIGS / "metadata.json"))
        config.update({"checkpoint": self.given.checkpoint} if self.given.checkpoint else {})
        return config

    def read_network(self, config: ConfigParser) -> torch.nn.Module:
        network = config.get_parsed_content("network").eval()
        if config.get_parsed_content("load_weights"):
            load_weights(network, config.get_parsed_content("checkpoint"))
        return network

    def measure(self, volume: str) -> None:
        """Measure one volume with all scans."""
        image = self.scale(self.load({"image": volume}))["image"]
        image = oriented(image, "RAS")
        plain, spacing = image.as_tensor()[0].float(), [float(s) for s in image.pixdim]
        white = white_matter(plain.numpy(), spacing)
        lesions = placed(plain.numpy(), white, spacing, self.given.slices, np.random.default_rng(self.given.seed))
        if not lesions:
            tqdm.write(f"{volume}: no smooth white matter that holds a lesion")
            return
        added = torch.from_numpy(sum(lesion.drawn(plain.shape, spacing) for lesion in lesions))
        planes = sorted({lesion.centre[2] for lesion in lesions})
        for title in self.given.scans:
            scan = SCANS[title]
            if scan.thick:
                factor = round(self.given.thickness / spacing[2], 4)
                if factor < 3:
                    continue
                first, last = (int(place + way * 20 / spacing[2]) for place, way in ((planes[0], -1), (planes[-1], 1)))
                part = slice(max(first, 0), last)
                factors = (1.0, 1.0, factor)
                row = f"{self.given.thickness:g} mm {title}"
            else:
                part = between_neighbours(planes, plain.shape[2])
                factors, row = (self.given.factor, self.given.factor), f"x{self.given.factor:g}: {title}"
            truths = [plain[..., part], (plain + added)[..., part]]
            results = [self.results(truth, scan, factors) for truth in truths]
            if not scan.thick:
                part, truths = planes, [truth[..., MIDDLES] for truth in truths]
                results = [{method: image[..., MIDDLES] for method, image in images.items()} for images in results]
            numbers = list(range(plain.shape[2]))[part] if isinstance(part, slice) else part
            self.note_lesions(row, volume, lesions, added, numbers, spacing, results)
            self.note_inventions(row, volume, truths[0].numpy(), white[..., numbers], spacing, results[0])
            self.draw(row, lesions, numbers, spacing, truths[1], results[1])

    def results(self, truth: Tensor, scan: Scan, factors: Sequence[float]) -> dict[str, np.ndarray]:
        """Result of each method for one scan of (X, Y, Z), on the same grid. The noise is the same in every call."""
        random = np.random.default_rng(self.given.seed)
        if scan.thick:
            axes = (Sampling(), Sampling(), Sampling(factors[2], scan.profile))
            measured = Acquisition(axes, scan.noise, step=STEP)(truth, random)
            spline = interpolate_slices(measured, factors[2], truth.shape[2])
            filled = enlarge(measured.movedim(0, -2), (1, factors[2]), (truth.shape[0], truth.shape[2]), "kspace").movedim(-2, 0)
            interpolated = spline
        else:
            slices = truth.movedim(2, 0).contiguous()
            axis = Sampling(factors[0], scan.profile)
            measured = Acquisition((axis, axis), scan.noise, step=STEP)(slices, random)
            mode = self.configs[False].get_parsed_content("interpolation")
            ways = (enlarge(measured, factors, slices.shape[1:], way) for way in ("spline", "kspace", mode))
            spline, filled, interpolated = (way.movedim(0, -1) for way in ways)
        network = self.applied(interpolated, scan, factors)
        return {"spline": spline.numpy(), "zero-filled": filled.numpy(), "network": network.numpy()}

    def applied(self, volume: Tensor, scan: Scan, factors: Sequence[float]) -> Tensor:
        config, names = self.configs[scan.thick], ("positions", "facts", "interpolation", "recognition")
        options = {name: config.get_parsed_content(name) for name in names}
        inferer: Any = OrthogonalSlices(**options) if scan.thick else ForegroundInferer(roi_size=(-1, -1), spatial_dim=2, **options)
        meta = {"factor": list(factors), **({"slice_width": 1.0} if scan.thick else {})}
        with torch.no_grad():
            result = inferer(MetaTensor(volume[None, None], meta=meta).to(self.device), self.networks[scan.thick])
        return torch.as_tensor(result).as_subclass(Tensor)[0, 0].cpu()

    def note_lesions(
        self,
        row: str,
        volume: str,
        lesions: Sequence[Lesion],
        added: Tensor,
        numbers: Sequence[int],
        spacing: Sequence[float],
        results: Sequence[Mapping[str, np.ndarray]],
    ) -> None:
        """Recovery: change of the result caused by the lesion, divided by that of the truth, where the lesion has at least half of its
        contrast."""
        truth = added[..., numbers].numpy()
        changes = {method: results[1][method] - results[0][method] for method in METHODS}
        for lesion in lesions:
            depth = numbers.index(lesion.centre[2])
            reach = [int(np.ceil((lesion.size / 2 + 6) / s)) for s in spacing[:2]]
            thick = int(np.ceil(lesion.size / 2 / spacing[2])) if row.startswith(f"{self.given.thickness:g} mm") else 0
            box = (
                *(slice(max(c - r, 0), c + r + 1) for c, r in zip(lesion.centre, reach)),
                slice(max(depth - thick, 0), depth + thick + 1),
            )
            own = truth[box] / lesion.contrast
            core = own > 0.5 * own.max()
            outside = ndimage.distance_transform_edt(own[..., own.shape[2] // 2] < 0.01, sampling=spacing[:2])
            ring = (outside > 1) & (outside < 4)
            entry = {"scan": row, "volume": Path(volume).name, "kind": lesion.kind, "size_mm": lesion.size, "centre": list(lesion.centre)}
            for method, change in changes.items():
                change = change[box] / lesion.contrast
                middle = change[..., change.shape[2] // 2]
                entry[method] = {
                    "recovery": round(float(change[core].sum() / own[core].sum()), 4),
                    "halo": round(float(-middle[ring].min()), 4),
                }
            self.lesions.append(entry)

    def note_inventions(
        self,
        row: str,
        volume: str,
        truth: np.ndarray,
        white: np.ndarray,
        spacing: Sequence[float],
        results: Mapping[str, np.ndarray],
    ) -> None:
        """Spots in the result that are not in the truth, in white matter without lesions.

        All images are first averaged over a disc as large as the smallest spot, and compared with their surroundings. A spot is a
        connected region of a slice that differs from them by more than three standard deviations of the true white matter. It is an
        invention if the truth, averaged over the spot, differs by less than two. All methods use the same standard deviation.
        """
        disc = _disc(SMALLEST, spacing)

        def against_surroundings(image: np.ndarray) -> np.ndarray:
            return ndimage.convolve(image, disc) - _local_mean(image, white, SURROUNDINGS, spacing)

        true = against_surroundings(truth)
        deviation = 1.4826 * float(np.median(np.abs(true[white])))  # robust estimate of the standard deviation
        entry: dict[str, Any] = {"scan": row, "volume": Path(volume).name, "cm2": float(white.sum()) * spacing[0] * spacing[1] / 100}
        in_plane = np.zeros((3, 3, 3))
        in_plane[:, 1, 1] = in_plane[1, :, 1] = 1
        for method, result in results.items():
            own, entry[method] = against_surroundings(result), 0
            for sign in (1, -1):
                spots, count = ndimage.label(white & (sign * own > SPOT * deviation), in_plane)
                known = ndimage.mean(sign * true, spots, np.arange(1, count + 1))
                entry[method] += int((np.asarray(known) < NOT_THERE * deviation).sum())
        self.inventions.append({**entry, "deviation": deviation})

    def draw(
        self,
        row: str,
        lesions: Sequence[Lesion],
        numbers: Sequence[int],
        spacing: Sequence[float],
        truth: Tensor,
        results: Mapping[str, np.ndarray],
    ) -> None:
        """Keep the first bright sharp lesion of each size for a picture."""
        pictures = self.pictures.setdefault(row, {})
        for lesion in lesions:
            if lesion.kind != "bright, sharp" or lesion.size in pictures:
                continue
            half = [round(SHOWN / 2 / s) for s in spacing[:2]]
            box = tuple(slice(max(c - h, 0), max(c - h, 0) + 2 * h) for c, h in zip(lesion.centre, half))
            depth = numbers.index(lesion.centre[2])
            pictures[lesion.size] = [volume[(*box, depth)] for volume in (truth.numpy(), *(results[method] for method in METHODS))]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = {key: str(value) for key, value in vars(self.given).items() if key not in ("volumes", "output_dir")}
        write_json(folder / "lesions.json", {"options": options, "lesions": self.lesions, "inventions": self.inventions})
        write_atomically(folder / "lesions.md", lambda path: path.write_text(self.markdown(), encoding="utf-8"))
        for row, sizes in self.pictures.items():
            panels = [
                Panel(f"{size:g} mm: {name}", torch.from_numpy(np.ascontiguousarray(image)), 0.0, 1.1)
                for size in sorted(sizes)
                for name, image in zip(("truth", *METHODS), sizes[size])
                if image.shape == next(iter(sizes.values()))[0].shape
            ]
            if panels:
                name = "".join(letter if letter.isalnum() else "_" for letter in row)
                save_panels(folder / f"lesions_{name}.png", panels, columns=1 + len(METHODS))

    def markdown(self) -> str:
        """Tables: recovery and lost lesions by size, halos, inventions."""
        lines = [
            "| low resolution | size | lesions | contrast kept: spline | zero-filled | network | lost: spline | zero-filled | network |"
        ]
        lines.append("|---" * 9 + "|")
        for row in dict.fromkeys(entry["scan"] for entry in self.lesions):
            for size in SIZES:
                entries = [entry for entry in self.lesions if (entry["scan"], entry["size_mm"]) == (row, size)]
                if entries:
                    kept = {method: [entry[method]["recovery"] for entry in entries] for method in METHODS}
                    cells = [f"{100 * np.mean(kept[method]):.0f} %" for method in METHODS]
                    cells += [str(sum(value < HALF for value in kept[method])) for method in METHODS]
                    lines.append(f"| {row} | {size:g} mm | {len(entries)} | {' | '.join(cells)} |")
        lines += ["", "| low resolution | halo: spline | zero-filled | network | inventions per 100 cm²: spline | zero-filled | network |"]
        lines.append("|---" * 7 + "|")
        for row in dict.fromkeys(entry["scan"] for entry in self.lesions):
            entries = [entry for entry in self.lesions if entry["scan"] == row]
            cells = [f"{100 * np.mean([entry[method]['halo'] for entry in entries]):.0f} %" for method in METHODS]
            found: Counter[str] = Counter()
            for entry in self.inventions:
                if entry["scan"] == row:
                    found.update({key: entry[key] for key in ("cm2", *METHODS)})
            cells += [f"{100 * found[method] / found['cm2']:.1f}" for method in METHODS]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def white_matter(volume: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Voxels of white matter, by intensity alone: the most common value in smooth regions deep in the head, and values near it.

    Args:
        volume: (X, Y, Z), intensities scaled to 1; any contrast.
        spacing: voxel size in mm.
    """
    head = ndimage.binary_fill_holes(ndimage.binary_opening(volume > 0.1, iterations=2))
    deep = ndimage.distance_transform_edt(np.pad(head, 1), sampling=spacing)[1:-1, 1:-1, 1:-1] > DEEP
    side = [max(1, 2 * round(1.5 / s) + 1) for s in spacing]  # about 3 mm
    mean = ndimage.uniform_filter(volume, side)
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(volume**2, side) - mean**2, 0))
    if not deep.any():
        return deep
    smooth = deep & (mean > 0.1) & (deviation < np.quantile(deviation[deep], 0.4))
    counts, borders = np.histogram(mean[smooth], 64, (0, 1.5))
    counts = ndimage.gaussian_filter1d(counts.astype(float), 1)
    common = borders[int(counts.argmax())] + (borders[1] - borders[0]) / 2
    near = deep & (np.abs(mean - common) < 0.12 * common) & (deviation < np.quantile(deviation[deep], 0.6))
    return ndimage.binary_closing(ndimage.binary_opening(near))


def placed(volume: np.ndarray, white: np.ndarray, spacing: Sequence[float], count: int, random: np.random.Generator) -> list[Lesion]:
    """Lesions of all kinds in ``count`` axial slices, the largest first, far from each other and where the white matter is large enough."""
    room = ndimage.distance_transform_edt(white, sampling=spacing)
    area = np.where(white.any((0, 1)), white.sum((0, 1)), 0)
    apart, planes = int(np.ceil(DISTANCE / spacing[2])), list[int]()
    for plane in np.argsort(-area):
        if area[plane] and len(planes) < count and all(abs(plane - other) >= apart for other in planes):
            planes.append(int(plane))
    kinds = [(name, edge) for name in CONTRASTS for edge in EDGES]
    lesions: list[Lesion] = []
    free = np.ones((*white.shape[:2], len(planes)), bool)
    number = 0
    while len(lesions) < len(SIZES) * len(kinds) * 2:
        placed_any = False
        for size in sorted(SIZES, reverse=True):
            name, edge = kinds[number % len(kinds)]
            fits = [np.argwhere((room[..., plane] > size / 2) & free[..., n]) for n, plane in enumerate(planes)]
            choices = [(n, place) for n, places in enumerate(fits) for place in places]
            if not choices:
                continue
            n, (x, y) = choices[random.integers(len(choices))]
            plane = planes[n]
            near = tuple(slice(max(c - 4, 0), c + 5) for c in (x, y))
            level = float(np.median(volume[(*near, plane)][white[(*near, plane)]]))
            lesions.append(Lesion((int(x), int(y), plane), size, CONTRASTS[name] * level, EDGES[edge], f"{name}, {edge}"))
            grid = [(np.arange(side) - c) * s for side, c, s in zip(white.shape, (x, y), spacing)]
            free[..., n] &= np.hypot(grid[0][:, None], grid[1]) > DISTANCE
            placed_any = True
        number += 1
        if not placed_any:
            break
    return lesions


def _disc(diameter: float, spacing: Sequence[float]) -> np.ndarray:
    """Weights (n, m, 1) of the mean over a disc; diameter and spacing in mm."""
    half = [int(diameter / 2 / s) for s in spacing[:2]]
    x, y = (np.arange(-h, h + 1) * s for h, s in zip(half, spacing))
    disc = (np.hypot(x[:, None], y) <= diameter / 2).astype(np.float32)[..., None]
    return disc / disc.sum()


def _local_mean(volume: np.ndarray, mask: np.ndarray, sigma: float, spacing: Sequence[float]) -> np.ndarray:
    """Gaussian means, slice by slice, over the pixels of a mask; sigma and spacing in mm."""
    widths = [sigma / spacing[0], sigma / spacing[1], 0]
    weights = ndimage.gaussian_filter(mask.astype(np.float32), widths)
    return ndimage.gaussian_filter(volume * mask, widths) / np.maximum(weights, 1e-6)


if __name__ == "__main__":
    main()
