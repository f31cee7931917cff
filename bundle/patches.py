"""Training patches of slices with random simulated acquisitions."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import RandBiasField
from scipy import special
from torch import Tensor
from torch.utils.data import Dataset

from .acquisition import ACROSS, WITHIN, Acquisition, Kinds, Sampling, cut_to_acquired, sampled
from .conditions import NEIGHBOURS, conditions, spectral_facts, with_neighbours
from .consistency import SIZE, window_of
from .errors import InputError
from .resampling import check_factor, enlarge
from .transforms import name_of

__all__ = ["AcquiredPatches", "MeasuredSlices", "RandomAcquisition", "RandomContrast", "RandomLesions"]

MIRRORED = [(0, *NEIGHBOURS).index(-offset) for offset in (0, *NEIGHBOURS)]  # a slice and its neighbours, seen from the other side
ALONE = 0.1  # of the slices come without neighbours: they are their own
THICK = 1.4  # times the smallest spacing: planes must not contain a coarser axis


class RandomAcquisition:
    """Draw random acquisitions that resemble those of scanners.

    - In the plane: factor 2 in half of the cases. Half use k-space truncation, with 85 to 100 % of k-space covered (60 to 85 % in one of
      twenty), with or without apodisation; the others use the paper's bicubic, box or Gaussian point spreads.
    - Across thick slices: Gaussian, box and trapezoid profiles, 60 to 124 % of the slice distance wide; the network receives the width in
      half of the cases. Brightness alternates by up to 3 %. One of eight is coarse along the other axis too.
    - Noise: none (7 of 20), up to 40 % of the largest (7), up to the largest (6).
    - A third is stored in whole numbers.
    - A fraction is of the most usual kind: a factor of 2 along both axes of the plane, and full coverage of k-space.

    Args:
        in_plane: the smallest and the largest factor in the plane.
        across: the smallest and the largest distance between thick slices, in pixels.
        thick: fraction of planes across thick slices.
        largest_noise: standard deviation, on the scale of the intensities.
        usual: fraction of the in-plane acquisitions that are of the most usual kind, beside those that are so by chance.

    Raises:
        InputError: if ``in_plane`` or ``across`` are not two ascending numbers of at least 1.
    """

    def __init__(
        self,
        in_plane: Sequence[float] = (1, 4),
        across: Sequence[float] = (1.5, 7),
        thick: float = 0.0,
        largest_noise: float = 0.05,
        usual: float = 0.0,
    ) -> None:
        for factors in (in_plane, across):
            if check_factor(factors)[0] > factors[1]:
                raise InputError(f"factors must be the smallest and the largest, got {factors}")
        self.in_plane, self.across, self.thick, self.usual = check_factor(in_plane), check_factor(across), thick, usual
        self.noise = [0.0, 0.4 * largest_noise, largest_noise]

    def __call__(self, random: np.random.Generator) -> tuple[Acquisition, tuple[float, float], tuple[bool, bool]]:
        """An acquisition of the rows and the columns of a slice, the slice-profile widths that the network receives, and the axes across
        thick slices."""
        none, some, much = self.noise
        noise = float(random.choice([none, random.uniform(none, some), random.uniform(some, much)], p=[0.35, 0.35, 0.3]))
        step = 1 / random.uniform(200, 4000) if random.random() < 1 / 3 else 0.0
        if random.random() < self.thick:
            sampling = self._across(random)
            other = self._within(random) if random.random() < 1 / 8 else Sampling()
            known_width = sampling.width if random.random() < 0.5 else 0.0
            brightness = random.uniform(0, 0.03) if random.random() < 0.3 else 0.0
            return Acquisition((sampling, other), noise, brightness, step), (known_width, 0.0), (True, False)
        if self.usual and random.random() < self.usual:
            both = replace(WITHIN.draw(random), factor=2.0)
            return Acquisition((both, both), noise, 0.0, step), (0.0, 0.0), (False, False)
        first = self._within(random)
        if random.random() < 0.8:
            second = first
        elif random.random() < 0.3:
            second = Sampling()
        else:
            second = Sampling(random.uniform(*self.in_plane), first.profile, first.width, first.coverage, first.window)
        axes = (first, second) if random.random() < 0.5 else (second, first)
        return Acquisition(axes, noise, 0.0, step), (0.0, 0.0), (False, False)

    def _within(self, random: np.random.Generator) -> Sampling:
        low, high = self.in_plane
        factor = 2.0 if low <= 2 <= high and random.random() < 0.5 else random.uniform(low, high)
        kind = replace(WITHIN.draw(random), factor=factor)
        if kind.profile != "kspace" or random.random() < 0.5:
            return kind
        return replace(kind, coverage=random.uniform(0.6, 0.85) if random.random() < 0.1 else random.uniform(0.85, 1))

    def _across(self, random: np.random.Generator) -> Sampling:
        return replace(ACROSS.draw(random), factor=random.uniform(*self.across))


class RandomContrast:
    """Change the contrast of a slice by a smooth random curve, monotone in half of the cases, and its brightness by a bias field
    (:class:`monai.transforms.RandBiasField`).

    Args:
        probability: probability of a curve; other slices keep their contrast.
        bias: probability of a bias field.
    """

    def __init__(self, probability: float = 0.5, bias: float = 0.2) -> None:
        self.probability, self.bias = probability, bias
        self.field = RandBiasField(degree=3, coeff_range=(-0.15, 0.15), prob=1.0)

    def __call__(self, image: Tensor, random: np.random.Generator) -> Tensor:
        """Slices (n, H, W) to the same shape, intensities from 0 to 1 or slightly above; 0 stays 0."""
        if random.random() < self.probability:
            points = np.linspace(0, 1, 7)
            if random.random() < 0.5:
                values = np.concatenate([[0], np.cumsum(random.gamma(1.5, size=6))])
                values /= values[-1]
            else:
                values = np.concatenate([[0], random.uniform(0.05, 1, 6)])
                values /= values.max()
            fine = np.linspace(0, 1, 257)
            curve = np.interp(fine, points, values)
            curve = np.convolve(np.pad(curve, 16, mode="edge"), np.hanning(35)[1:-1] / np.hanning(35).sum(), "valid")
            curve = torch.from_numpy(curve - curve[0]).float()  # the air stays 0
            position = image.clamp(0, 1) * 256
            low = position.floor().long().clamp(max=255)
            image = torch.lerp(curve[low], curve[low + 1], position - low) + (image - 1).clamp(min=0) * curve[-1]
        if random.random() < self.bias:
            self.field.set_random_state(int(random.integers(2**31)))
            image = torch.as_tensor(self.field(image)).as_subclass(Tensor)
        return image


class RandomLesions:
    """Add small bright and dark ellipsoids to the anatomy of a slice and its neighbours, so that the network expects details that healthy
    anatomy lacks, and say where they are, so that their errors can weigh more.

    Args:
        probability: probability of lesions in a slice.
        count: largest number of lesions.
        sizes: smallest and largest diameter, in pixels; small ones are more frequent.
        emphasis: each lesion counts as much as this number of pixels, however small it is.
    """

    def __init__(self, probability: float = 0.5, count: int = 12, sizes: tuple[float, float] = (1.5, 10), emphasis: float = 1000.0) -> None:
        self.probability, self.count, self.sizes, self.emphasis = probability, count, sizes, emphasis

    def __call__(self, image: Tensor, random: np.random.Generator, distance: float = 1.0) -> tuple[Tensor, Tensor]:
        """A slice and its neighbours (5, H, W), ``distance`` pixels apart, to the same shape, not negative, and the weights of the pixels
        of the slice (H, W), which are 1 outside lesions. The slice cuts the ellipsoids through their centres."""
        weights = torch.ones_like(image[0])
        anatomy = (image[0] > 0.2).nonzero()
        if random.random() >= self.probability or not len(anatomy):
            return image, weights
        image = image.clone()
        depth = distance * np.array([0, *NEIGHBOURS])[:, None, None]
        for _ in range(int(random.integers(1, self.count + 1))):
            centre = anatomy[int(random.integers(len(anatomy)))].tolist()
            radius = float(np.exp(random.uniform(*np.log(self.sizes)))) / 2
            stretch, angle, edge = random.uniform(1, 1.6), random.uniform(0, np.pi), random.uniform(0.15, 1.2)
            reach = math.ceil(radius * stretch + 3 * edge) + 1
            box = tuple(slice(max(c - reach, 0), min(c + reach + 1, side)) for c, side in zip(centre, weights.shape))
            rows, columns = (grid - c - random.uniform(-0.5, 0.5) for grid, c in zip(np.mgrid[box], centre))
            along = (rows * np.cos(angle) + columns * np.sin(angle)) / stretch
            across = columns * np.cos(angle) - rows * np.sin(angle)
            far = np.sqrt(along**2 + across**2 + depth**2)
            profile = torch.from_numpy(special.erfc((far - radius) / (edge * math.sqrt(2))) / 2).float()
            contrast = float(random.choice([-1, 1]) * random.uniform(0.1, 0.6)) * float(image[0, *centre])
            part = image[:, *box]
            part += contrast * profile * (part > 0.05)  # the air stays air
            weights[box] += self.emphasis * profile[0] / profile[0].sum().clamp(min=1)
        return image.clamp(min=0), weights


class AcquiredPatches(Dataset):
    """Random patches of slices with random acquisitions. An item holds several patches of one slice, which is acquired as a whole, because
    changes in k-space affect the whole slice. Items are a pure function of (seed, index), like those of
    :class:`bundle.data.PatchDataset`.

    Args:
        volumes: items with ``"image"``, (1, X, Y, Z), intensities scaled to 1. Slices are perpendicular to any axis, if their pixels are
            at most 1.4 times the smallest voxel side. Axes that the scanner interpolated are reduced to the acquired resolution.
        acquisition: draws the acquisitions.
        contrast: changes the contrast before the acquisition; ``None`` keeps it.
        lesions: adds lesions before the acquisition; ``None`` adds none.
        largest_reduction: half of the slices are first reduced by a random factor up to this, which varies the size of the anatomy in
            pixels, and the sharpness and noise of the truth; 1 reduces none.
        size: side of the square patches, in pixels; even.
        patches_per_slice: patches per item.
        slices_per_volume: items per volume and epoch, the same for all volumes.
        min_foreground: fraction of pixels above ``threshold`` that a patch should have; up to ten places are tried.
        threshold: see ``min_foreground``.
        seed: seed of all random choices.
        positions, facts: inputs of the network, see :class:`bundle.inferers.ForegroundInferer`. The compared networks are blind: they
            receive neither.
        interpolation: mode of the interpolation to the finer grid (:func:`bundle.resampling.enlarge`).

    Raises:
        InputError: if a volume has no plane that holds a patch, or the network receives positions without facts.
    """

    def __init__(
        self,
        volumes: Sequence[dict],
        acquisition: RandomAcquisition,
        contrast: RandomContrast | None = None,
        lesions: RandomLesions | None = None,
        largest_reduction: float = 1.0,
        size: int = 48,
        patches_per_slice: int = 8,
        slices_per_volume: int = 100,
        min_foreground: float = 0.25,
        threshold: float = 0.05,
        seed: int = 0,
        positions: bool = True,
        facts: bool = True,
        interpolation: str = "spline",
    ) -> None:
        if positions and not facts:
            raise InputError(
                "random acquisitions cannot train a network with positions but without facts: use configs/general.json, which has both"
            )
        with ThreadPool(min(os.cpu_count() or 1, len(volumes))) as pool:
            self.volumes = pool.map(lambda n: _truth(volumes[n]["image"], size), range(len(volumes)))
        self.acquisition, self.contrast, self.lesions, self.largest_reduction = acquisition, contrast, lesions, largest_reduction
        self.size, self.seed, self.facts, self.interpolation = size, seed, facts, interpolation
        self.patches_per_slice, self.slices_per_volume = patches_per_slice, slices_per_volume
        self.min_foreground, self.threshold = min_foreground, threshold

    def __len__(self) -> int:
        return len(self.volumes) * self.slices_per_volume

    def __getitem__(self, index: int) -> list[dict[str, Tensor]]:
        """``[{"image": (37, size, size), "label": (2, size, size)}, ...]``. The image holds the interpolated slice, the excess of
        zero-filling, the interpolated neighbours, and :func:`bundle.conditions.conditions`; for a blind network the interpolated slice
        alone. The label holds the truth and the weight of each pixel. Noise and spectrum are measured, as in inference."""
        random = np.random.default_rng((self.seed, index))
        truth, weights = self._slices(index % len(self.volumes), random)
        acquisition, widths, across = self.acquisition(random)
        factors = [axis.factor for axis in acquisition.axes]
        scan = acquisition(truth, random)
        if random.random() < ALONE:
            scan = scan[:1].expand_as(scan)
        truth, measured = truth[0], scan[0]
        noise, spectrum = spectral_facts(measured)
        kinds = recognized(*told_apart(acquisition, across), random, max(widths))
        image, *neighbours = enlarge(scan, factors, truth.shape, self.interpolation)
        filled = measured  # what zero_filled_excess() computes from the interpolated slice: faster from the measured one
        for axis, thick in enumerate(across):
            step, size = [1.0, 1.0], list(filled.shape)
            step[axis], size[axis] = factors[axis], truth.shape[axis]
            filled = enlarge(filled, step, size, self.interpolation if thick else "kspace")
        image = torch.stack([image, filled - image, *neighbours])
        patches = []
        for _ in range(self.patches_per_slice):
            for _ in range(10):
                y, x = (int(random.integers(side - self.size + 1)) for side in truth.shape)
                rows, columns = slice(y, y + self.size), slice(x, x + self.size)
                label = truth[rows, columns]
                if float((label > self.threshold).float().mean()) >= self.min_foreground:
                    break
            part = image[: None if self.facts else 1, rows, columns]
            if self.facts:
                part = torch.cat([part, conditions(factors, rows, columns, widths, noise, spectrum, kinds)])
            patches.append({"image": part, "label": torch.stack([label, weights[rows, columns]])})
        return patches

    def _slices(self, volume: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random slice with anatomy and its neighbours, (5, H, W), rotated, mirrored, cropped to its content, reduced, with random
        contrast and lesions; the weights of its pixels, (H, W)."""
        voxels, planes, spacing = self.volumes[volume]
        axis = int(random.choice(planes))
        for _ in range(10):
            n = int(random.integers(voxels.shape[axis]))
            if float((voxels.select(axis, n) > self.threshold).float().mean()) > 0.08:
                break
        image = torch.stack([voxels.select(axis, place).float() for place in with_neighbours(n, voxels.shape[axis])])
        image = image[MIRRORED] if random.integers(2) else image
        image = torch.rot90(image, int(random.integers(4)), (1, 2))
        image = image.flip(2) if random.integers(2) else image
        for side in (1, 2):  # crop empty borders
            occupied = (image[0] > self.threshold).any(2 - side).nonzero().flatten()
            if len(occupied):
                first, last = max(int(occupied[0]) - 8, 0), min(int(occupied[-1]) + 9, image.shape[side])
                first, last = max(min(first, last - self.size), 0), max(last, min(first + self.size, image.shape[side]))
                image = image.narrow(side, first, last - first)
        distance = spacing[axis] / min(spacing[n] for n in range(3) if n != axis)
        largest = min(self.largest_reduction, *(side / self.size for side in image.shape[1:]))
        if largest > 1 and random.random() < 0.5:
            reduction = Sampling(float(random.uniform(1, largest)), str(random.choice(["kspace", "gaussian"])), 0.9)
            image, distance = sampled(image, (reduction, reduction)), distance / reduction.factor
        image = image if self.contrast is None else self.contrast(image, random)
        image, weights = (image, torch.ones_like(image[0])) if self.lesions is None else self.lesions(image, random, distance)
        return (image * float(random.uniform(0.75, 1.1))).contiguous(), weights


class MeasuredSlices(Dataset):
    """Measured slices with random acquisitions, for :class:`bundle.networks.AcquisitionClassifier`; a pure function of (seed, index).

    Args:
        patches: its volumes, contrasts, lesions, acquisitions and seed are used, but not its patches.

    Raises:
        InputError: for patches without random acquisitions.
    """

    def __init__(self, patches: AcquiredPatches) -> None:
        if not isinstance(patches, AcquiredPatches):
            raise InputError("the classifier learns from random acquisitions: add configs/random_acquisitions.json")
        self.patches = patches

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``{"image": (3, 96, 96), "label": (2,)}``: a part of the slice, turned so that a refined axis runs along its rows, with maps of
        1 / factor; the index of the kind of sampling of that axis, and the noise."""
        patches = self.patches
        random = np.random.default_rng((patches.seed, index))
        truth = patches._slices(index % len(patches.volumes), random)[0][0]
        refined: list[int] = []
        while not refined:
            acquisition, _, across = patches.acquisition(random)
            refined, kinds = recognised_axes(acquisition, across)
        measured = acquisition(truth, random)
        axis = int(random.choice(refined))
        along, other = acquisition.axes[axis], acquisition.axes[1 - axis]
        measured = measured.T if axis else measured
        part = window_of(measured, *(int(random.integers(max(side - SIZE, 0) + 1)) for side in measured.shape))
        image = torch.stack([part, *(torch.full_like(part, 1 / sampling.factor) for sampling in (along, other))])
        return {"image": image, "label": torch.tensor([kinds.index(along), acquisition.noise])}


def told_apart(acquisition: Acquisition, across: Sequence[bool]) -> tuple[Sampling, Kinds]:
    """The sampling that the network receives, and the kinds among which a classifier would look for it."""
    axes, kinds = recognised_axes(acquisition, across)
    return acquisition.axes[axes[0] if axes else 0], kinds


def recognised_axes(acquisition: Acquisition, across: Sequence[bool]) -> tuple[list[int], Kinds]:
    """The axes whose sampling is recognised, and its kinds: the axis across thick slices, else all refined axes."""
    if any(across):
        return [axis for axis, thick in enumerate(across) if thick], ACROSS
    return [axis for axis, sampling in enumerate(acquisition.axes) if sampling.factor > 1], WITHIN


def recognized(sampling: Sampling, kinds: Kinds, random: np.random.Generator, width: float = 0.0) -> Tensor:
    """Probabilities (12,) of the kinds of a sampling, as a classifier of random skill would know them.

    The classifier observes e = a 1_k + sqrt(a) n, with the kind k, its indicator 1_k and white noise n, so that the probabilities are the
    prior ones times exp(e), up to a constant. It knows nothing (a = 0) in a quarter of the cases and the kind in three eighths; in
    between, a is 1 to 30.

    Args:
        sampling: of the axis.
        kinds: the kinds among which the classifier looks for it.
        random: random generator.
        width: of the slice profile, if the network receives it.
    """
    skill = float(random.choice([0.0, np.exp(random.uniform(0, np.log(30))), 1000.0], p=[0.25, 0.375, 0.375]))
    evidence = np.sqrt(skill) * random.standard_normal(len(kinds))
    evidence[kinds.index(sampling)] += skill
    return (torch.from_numpy(evidence) + kinds.priors(width).log()).softmax(0).float()


def _truth(image: MetaTensor, size: int) -> tuple[Tensor, list[int], list[float]]:
    """A volume as the scanner acquired it, (X, Y, Z) in half precision; the axes perpendicular to planes that hold a patch; its spacing."""
    spacing, sides = [float(s) for s in image.pixdim], image.shape[1:]
    planes = []
    for axis in range(3):
        within = [n for n in range(3) if n != axis]
        a, b = (spacing[n] for n in within)
        if max(a, b) < THICK * min(spacing) and min(sides[n] for n in within) >= size:
            planes.append(axis)
    if not planes:
        text = " x ".join(map(str, sides))
        raise InputError(f"{name_of(image)}: {text} voxels have no plane of {size} x {size} pixels of nearly one size")
    within = [n for n in range(3) if any(plane != n for plane in planes)]
    volume = cut_to_acquired(image.as_tensor()[0], within).half()
    return volume, planes, [s * before / after for s, before, after in zip(spacing, sides, volume.shape)]
