"""Check that a volume fits into memory before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from .dicom_volume import grid_of_series
from .errors import InputError, switch
from .headers import Header, file_format, in_mm, length_unit, named_as_nibabel_wants, nrrd_field, read_header
from .memory import in_files
from .recognition import surface_data

__all__ = ["CheckMemoryd", "available_memory"]

# float32 volumes held at once, measured: on the grid of the input, and on the refined grid
GIVEN_COPIES, REFINED_COPIES = 4, 4
UNCERTAINTY_COPIES = 4  # more on the refined grid, measured with the page
FILES = 2  # volumes on the refined grid in temporary files at once
PER_PIXEL = 1024  # bytes of feature maps per pixel of a slice
PER_PAIR = 16  # bytes of interpolation weights per pair of refined voxels on a line


class CheckMemoryd(MapTransform):
    """Refuse a volume that does not fit into free memory. Reads only its header.

    Args:
        keys: file names.
        factors: the transform that sets the factors of the finer grid: :class:`bundle.grid.InPlaneFactorsd` or
            :class:`bundle.grid.IsotropicFactorsd`.
        axial_slices: see :class:`bundle.transforms.AxialSlicesd`.
        uncertainty: whether there will be an uncertainty map.
        report: whether there will be an HTML report. Without both, large results lie in files (:func:`bundle.memory.empty_volume`).

    Raises:
        InputError: if ``report`` is neither true nor false; when called, with the volume, the memory that it needs and what is free.
    """

    def __init__(
        self,
        keys: KeysCollection,
        factors: MapTransform,
        axial_slices: Sequence[int] | None = None,
        uncertainty: bool = False,
        report: bool | str = False,
    ) -> None:
        super().__init__(keys)
        self.factors, self.axial_slices = factors, axial_slices
        self.plain = not (uncertainty or switch("report", report))
        self.refined_copies = REFINED_COPIES + UNCERTAINTY_COPIES * uncertainty

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping:
        for key in self.keys:
            needed, voxels = self._needed(str(data[key]))
            free = available_memory()
            if needed > free:
                raise InputError(
                    f"{data[key]}: {voxels} need about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; "
                    "take some slices (--axial_slices) or a smaller refinement (--scale, --spacing)"
                )
        return data

    def _needed(self, path: str) -> tuple[float, str]:
        """Bytes, and the number of voxels as text. 0 bytes if the header cannot be read or the file holds no volume: loading reports
        that."""
        try:
            if file_format(path) and Path(path).is_file():
                header = read_header(path)
                if surface_data(header.shape, header.intent):
                    return 0, ""
                shape, affine = _to_ras(header.shape, _affine_in_mm(path, header))
            else:
                shape, affine = _to_ras(*grid_of_series(path))
        except Exception:
            return 0, ""
        stub = MetaTensor(torch.zeros(1, 1, 1, 1), affine=torch.as_tensor(affine))
        stub.meta["filename_or_obj"] = path
        (key,) = self.factors.keys
        given_factors = self.factors({key: stub})[key].meta["factor"]
        factors = [*given_factors, 1, 1][:3]
        given = math.prod(shape)
        if self.axial_slices is not None and len(self.axial_slices) == 2:
            shape = (*shape[:2], min(shape[2], self.axial_slices[1] - self.axial_slices[0] + 1))
        refined = [float(n * f) for n, f in zip(shape, factors)]
        pixels = math.prod(sorted(refined)[-2:])
        size = 4 * math.prod(refined)
        in_memory = not self.plain or len(given_factors) > 2 or not in_files(int(size), FILES)
        copies = self.refined_copies if in_memory else 0
        needed = 4 * GIVEN_COPIES * given + copies * size + max(PER_PIXEL * pixels, PER_PAIR * max(refined) ** 2)
        return needed, " x ".join(str(int(n)) for n in refined) + " voxels"


def available_memory() -> int:
    """Bytes available to this process within the machine, its control group and its address-space limit."""
    free = [psutil.virtual_memory().available]
    try:  # a container
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most != "max":
            free.append(int(most) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    try:  # ulimit -v
        limit = psutil.Process().rlimit(psutil.RLIMIT_AS)[0]
        if limit != psutil.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    except (AttributeError, psutil.Error):  # not on Linux
        pass
    return max(0, min(free))


def _affine_in_mm(path: str, header: Header) -> np.ndarray:
    kind = file_format(path)
    if kind == "nifti":
        with named_as_nibabel_wants(path) as name:
            image: Any = nib.load(name)
        return in_mm(header.affine, length_unit(image))[0] if isinstance(image, nib.Nifti1Pair) else header.affine
    units = nrrd_field(path, "space units").split() if kind == "nrrd" else []
    return in_mm(header.affine, units[0])[0] if units else header.affine


def _to_ras(shape: Sequence[int], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of a volume after its axes are put into the order R, A, S."""
    order = nib.orientations.io_orientation(affine)[:, 0].astype(int).tolist()
    axes = [order.index(axis) for axis in range(3)]
    sides = [*shape[:3], 1, 1][:3]
    return tuple(sides[a] for a in axes), np.column_stack([*(affine[:, a] for a in axes), affine[:, 3]])
