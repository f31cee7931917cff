"""From file to file through the transforms of configs/inference.json: any affine, orientation, size, type and factor."""

import functools
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import toy
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from nibabel.processing import resample_from_to

CONFIG = Path(__file__).parents[1] / "configs" / "inference.json"
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def transforms(factor):
    """The preprocessing, and what makes a file of the result, without its report, as the config has them."""
    parser = ConfigParser()
    parser.read_config(CONFIG)
    # Keys' kernel reaches two voxels, a spline all of them: what the border does to it is no fault of geometry
    parser.update({"interpolation": "bicubic"})
    parser.update({"scale": factor, "dataset_dir": FOLDER.name, "volumes": [], "output_dir": FOLDER.name, "checkpoint": os.devnull})
    parser["saving::transforms"] = ["@save_volume"]  # without the report
    return [parser.get_parsed_content(name) for name in ("preprocessing", "postprocessing", "saving")]


def refine(path, factor):
    """The file that inference writes with a network that returns its input."""
    before, after, save = transforms(factor)
    sample = before({"image": str(path)})
    save(after({**sample, "pred": sample["image"]}))
    return nib.load(path.with_name(path.name.replace(".nii.gz", "_sr.nii.gz")))


@st.composite
def affines(draw):
    """Any mixture of rotation, anisotropic spacing, shear, flips, permuted axes and shift."""
    spacing, angle, shift = st.floats(0.3, 4), st.floats(-180, 180), st.floats(-200, 200)
    to_world = toy.affine([draw(spacing) for _ in range(3)], [draw(angle) for _ in range(3)], [draw(shift) for _ in range(3)])
    to_world[:3, :3] = to_world[:3, :3] @ (np.eye(3) + np.triu(np.full((3, 3), draw(st.sampled_from([0, 0, 0.1]))), 1))
    to_world[:3, :3] *= [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    to_world[:3, :3] = to_world[:3, draw(st.permutations(range(3)))]
    return to_world


@given(
    to_world=affines(),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]),
    slope=st.sampled_from([None, 0.5, 3.0]),
    factor=st.sampled_from([1, 2, 3, 4, 1.5, 2.5, 3.3, (2, 3), (1.7, 1)]),
    steps=st.tuples(*[st.sampled_from([1, 2, 5])] * 3),
)
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes
def test_every_voxel_lies_where_it_should_and_agrees_with_nibabel(to_world, shape, dtype, slope, factor, steps):
    assume(np.prod(shape) > 1)  # a single voxel is a constant volume
    turns = [toy.affine((1, 1, 1), degrees, (0, 0, 0)) for degrees in np.vstack([np.eye(3), -np.eye(3)])]
    assume(len({nib.aff2axcodes(turn @ to_world) for turn in turns}) == 1)  # at 45 degrees either axis may be called the axial one
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    linear = 1.0 + index @ np.array(steps)  # interpolation keeps what is linear
    slope = slope if np.issubdtype(dtype, np.integer) else None
    path = toy.write_nifti(Path(FOLDER.name) / "a.nii.gz", linear * (slope or 1), to_world, dtype, slope)
    stored, refined = nib.load(path), refine(path, factor)

    assert nib.aff2axcodes(refined.affine) == nib.aff2axcodes(stored.affine)
    before, after = (nib.as_closest_canonical(volume) for volume in (stored, refined))
    factors = np.array([*np.broadcast_to(factor, 2), 1])
    assert after.shape == tuple(np.floor(factors * before.shape))
    index = np.stack(np.meshgrid(*map(np.arange, after.shape), indexing="ij"), -1)
    given_index = (index + 0.5) / factors - 0.5
    expected = nib.affines.apply_affine(before.affine, given_index)
    np.testing.assert_allclose(nib.affines.apply_affine(after.affine, index), expected, atol=1e-4)

    inner = np.all((factors == 1) | ((given_index >= 2) & (given_index <= np.array(before.shape) - 3)), -1)
    as_float = nib.Nifti1Image(before.get_fdata(), before.affine)  # nibabel would round to the type of the input
    resampled = resample_from_to(as_float, after, order=1, mode="nearest").get_fdata()
    np.testing.assert_allclose(after.get_fdata()[inner], resampled[inner], rtol=1e-4)
