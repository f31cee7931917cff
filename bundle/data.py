"""Data sets: volumes for inference, and training patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from .conditions import positions
from .errors import InputError, passed_over, reason
from .resampling import check_factor, degrade
from .results import Results
from .transforms import name_of

__all__ = ["EpochSampler", "InferenceDataset", "PatchDataset", "RandomFactor"]


class InferenceDataset(Dataset):
    """Volumes of an inference run.

    If loading fails, the item is returned with its error, so that the run continues. Volumes with up-to-date results are not loaded.

    Args:
        data: items ``{"image": file name}``.
        transform: preprocessing.
        results: results of the run; ``None`` loads every volume.
    """

    def __init__(self, data: Sequence[dict[str, str]], transform: Callable, results: Results | None = None) -> None:
        self.data, self.transform, self.results = data, transform, results

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        """The transformed item, ``{"image": file name, "error": one line}``, the same with ``"passed_over"``, or
        ``{"image": file name, "done": True}``."""
        item = self.data[index]
        volume = item["image"]
        try:
            if self.results is not None:
                if volume in self.results.name_clashes:
                    other = self.results.name_clashes[volume]
                    raise InputError(f"{volume}: its result would have the same name as that of {other}; rename one of them")
                blocked = self.results.in_the_way(volume)
                if blocked is not None:
                    raise InputError(f"{volume}: {blocked} is in the way, and not of this program: move it, or use another --output_dir")
                earlier = self.results.of_another(volume)
                if earlier is not None:
                    raise InputError(f"{volume}: {earlier} has a result of that name: use another --output_dir, or --overwrite true")
                if self.results.is_done(volume):
                    return {**item, "done": True}
            return self.transform(item)
        except Exception as e:  # a damaged file can fail anywhere in a reader
            if passed_over(e):
                return {**item, "passed_over": reason(e)}
            return {**item, "error": reason(e)}


class PatchDataset(Dataset):
    """Random patches of axial slices, each a pure function of (seed, index). A resumed run, or one with several processes, sees the same
    patches.

    Args:
        volumes: items with ``"image"`` and ``"label"``, each (1, X, Y, Z).
        size: side of the square patches, in pixels; the paper's 31 by default.
        patches_per_volume: patches per volume and epoch.
        min_foreground: fraction of the target's pixels that should exceed ``threshold``; up to ten places are tried.
        threshold: intensity above which a pixel is foreground.
        augment: whether to flip and rotate by multiples of 90 degrees.
        seed: seed of the patches.
        degradation: makes each input patch from its target (:class:`RandomFactor`); ``None`` uses the
            ``"image"`` of the volumes.
        positions: whether ``"image"`` also has the positions (:func:`bundle.conditions.positions`) of a ``degradation``: (7, size, size).
        facts: whether the network receives facts about the scan, which these patches do not have.

    Raises:
        InputError: if ``facts`` is set, or a volume is smaller than a patch.
    """

    def __init__(
        self,
        volumes: Sequence[dict],
        size: int = 31,
        patches_per_volume: int = 900,
        min_foreground: float = 0.25,
        threshold: float = 0.05,
        augment: bool = True,
        seed: int = 0,
        degradation: RandomFactor | None = None,
        positions: bool = False,
        facts: bool = False,
    ) -> None:
        if facts:
            raise InputError("the general networks learn from random acquisitions: add configs/random_acquisitions.json")
        self.pairs = []
        for volume in volumes:
            pair = [torch.as_tensor(volume[key])[0] for key in (("image", "label") if degradation is None else ("label",))]
            sides = pair[0].shape[:2]
            if min(sides) < size:
                pixels = " x ".join(map(str, sides))
                raise InputError(f"{name_of(volume['label'])}: slices of {pixels} pixels are smaller than a patch of {size} x {size}")
            # slices first: a patch is then a small window of contiguous rows
            self.pairs.append(torch.stack(pair).as_subclass(torch.Tensor).permute(3, 0, 1, 2).contiguous())
        self.size, self.patches_per_volume, self.seed = size, patches_per_volume, seed
        self.min_foreground, self.threshold, self.augment = min_foreground, threshold, augment
        self.degradation, self.positions = degradation, positions

    def __len__(self) -> int:
        return len(self.pairs) * self.patches_per_volume

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``{"image": (1, size, size), "label": (1, size, size)}``; any index from 0 upwards; epoch e starts at e x len."""
        random = np.random.default_rng((self.seed, index))
        pair = self.pairs[index % len(self.pairs)]
        for _ in range(10):
            z, x, y = (int(random.integers(n)) for n in (len(pair), pair.shape[2] - self.size + 1, pair.shape[3] - self.size + 1))
            patch = pair[z, :, x : x + self.size, y : y + self.size]
            if float((patch[-1] > self.threshold).float().mean()) >= self.min_foreground:
                break
        turns, mirror = (int(random.integers(4)), bool(random.integers(2))) if self.augment else (0, False)
        if self.degradation is not None:
            return self._degraded(pair[z], x, y, turns, mirror, random)
        patch = _turned(patch, turns, mirror)
        return {"image": patch[:1].contiguous(), "label": patch[1:].contiguous()}

    def _degraded(
        self, target: torch.Tensor, x: int, y: int, turns: int, mirror: bool, random: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Degrade a patch together with its surroundings, so that it has no borders that the slice does not have."""
        margin = self.degradation.margin  # type: ignore[union-attr]
        left, low = max(0, x - margin), max(0, y - margin)
        window = target[:, left : x + self.size + margin, low : y + self.size + margin]
        row, column = x - left, y - low
        for _ in range(turns):
            row, column, window = window.shape[2] - self.size - column, row, _turned(window, 1)
        if mirror:
            column, window = window.shape[2] - self.size - column, _turned(window, 0, mirror)
        rows, columns = slice(row, row + self.size), slice(column, column + self.size)
        image, factors = self.degradation(window[0], random)  # type: ignore[misc]
        image = image[None, rows, columns]
        if self.positions:
            image = torch.cat([image, positions(factors, rows, columns)])
        return {"image": image.contiguous(), "label": window[:, rows, columns].contiguous()}


class RandomFactor:
    """Degradation of a patch by random factors: in half of the cases the same for both axes, otherwise one for each.

    Args:
        factors: smallest and largest factor.
        common: the factors that users need most; every second patch has one of them, for both axes.
        mode, interpolation: see :func:`bundle.resampling.degrade`.

    Raises:
        InputError: if ``factors`` are not two ascending numbers of at least 1.
    """

    def __init__(
        self, factors: Sequence[float], common: Sequence[float] = (), mode: str = "bicubic", interpolation: str | None = None
    ) -> None:
        self.factors, self.common, self.mode, self.interpolation = _ascending(factors), tuple(common), mode, interpolation
        self.margin = math.ceil(5 * self.factors[1])  # Keys' kernel reaches 2 low-resolution pixels, on the way down and on the way up

    def __call__(self, image: torch.Tensor, random: np.random.Generator) -> tuple[torch.Tensor, tuple[float, float]]:
        """Degraded image, (H, W) to the same shape, and its factors."""
        rows, columns = random.uniform(*self.factors, 2).tolist()
        factors = (rows, rows if random.integers(2) else columns)
        if self.common and random.integers(2):
            factors = (float(random.choice(self.common)),) * 2
        return degrade(image, factors, self.mode, self.interpolation), factors


def _turned(patch: torch.Tensor, turns: int, mirror: bool = False) -> torch.Tensor:
    patch = torch.rot90(patch, turns, (1, 2))
    return patch.flip(2) if mirror else patch


def _ascending(factors: Sequence[float]) -> tuple[float, float]:
    low, high = check_factor(factors)
    if low > high:
        raise InputError(f"factors must be the smallest and the largest, got {factors}")
    return low, high


class EpochSampler(DistributedSampler):
    """Indices that continue from epoch to epoch, divided among the processes of a distributed run. MONAI's engines set the epoch.

    Args:
        dataset: a :class:`PatchDataset`.
    """

    def __init__(self, dataset: Dataset) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(dataset, None if distributed else 1, None if distributed else 0, drop_last=True)

    def __iter__(self):
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return iter(range(start + self.rank, start + self.total_size, self.num_replicas))
