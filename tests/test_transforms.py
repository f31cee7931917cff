import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation
from nibabel.processing import resample_from_to
from PIL import Image

from bundle.errors import InputError
from bundle.grid import InPlaneFactorsd, Upsampled
from bundle.intensity import ScaleIntensityByPercentiled
from bundle.loading import LoadVolumed
from bundle.resampling import degrade
from bundle.transforms import AxialSlicesd, CropInPlaned, Degraded


def volume(array, to_world=None, name="sub-07.nii.gz"):
    to_world = toy.affine() if to_world is None else to_world
    array = np.array(array, dtype=np.float32, order="C")
    return MetaTensor(torch.from_numpy(array)[None], affine=torch.as_tensor(to_world), meta={"filename_or_obj": name})


def apply(transform, array, to_world=None):
    return transform({"image": volume(array, to_world)})["image"]


def world(to_world, index):
    return np.asarray(index, dtype=float) @ np.asarray(to_world)[:3, :3].T + np.asarray(to_world)[:3, 3]


def all_indices(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)


@st.composite
def affines(draw):
    """Any mixture of rotation, anisotropic spacing, flips, permuted axes and shift."""
    number = st.floats(0.3, 4)
    angle = st.floats(-180, 180)
    shift = st.floats(-200, 200)
    to_world = toy.affine([draw(number) for _ in range(3)], [draw(angle) for _ in range(3)], [draw(shift) for _ in range(3)])
    to_world[:3, :3] *= [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    to_world[:3, :3] = to_world[:3, draw(st.permutations(range(3)))]
    return to_world


sizes = st.tuples(st.integers(7, 12), st.integers(7, 12), st.integers(1, 3))
factors = st.sampled_from([2, 3, 4, 1.5, 2.71828, (1, 2), (3, 1.25)])


def pair(factor):
    return np.broadcast_to(np.array(factor, dtype=float), 2)


def upsample_in_plane(key, factor=2, spacing=None):
    return Compose([InPlaneFactorsd(key, factor, spacing), Upsampled(key)])


class TestUpsampleInPlane:
    @given(to_world=affines(), shape=sizes, factor=factors)
    @settings(max_examples=40, deadline=None)
    def test_refined_voxels_lie_where_they_should(self, to_world, shape, factor):
        refined = apply(upsample_in_plane("image", factor), np.ones(shape), to_world)
        assert refined.shape == (1, *(int(f * n) for f, n in zip(pair(factor), shape)), shape[2])
        index = all_indices(refined.shape[1:])
        given_index = index.astype(float)
        given_index[..., :2] = (given_index[..., :2] + 0.5) / pair(factor) - 0.5
        np.testing.assert_allclose(world(refined.affine, index), world(to_world, given_index), atol=1e-4)

    @given(to_world=affines(), shape=sizes, factor=st.sampled_from([2, 3, 4]))
    @settings(max_examples=20, deadline=None)
    def test_corners_of_the_field_of_view_stay(self, to_world, shape, factor):
        refined = apply(upsample_in_plane("image", factor), np.ones(shape), to_world)
        corners = all_indices((2, 2, 2))
        before = world(to_world, corners * np.array(shape) - 0.5)
        after = world(refined.affine, corners * np.array(refined.shape[1:]) - 0.5)
        np.testing.assert_allclose(after, before, atol=1e-4)

    @given(to_world=affines(), shape=sizes, factor=factors)
    @settings(max_examples=40, deadline=None)
    def test_linear_function_of_the_world_stays_itself(self, to_world, shape, factor):
        def intensity(points):
            return points @ [0.7, -0.4, 0.9] + 5

        refined = apply(upsample_in_plane("image", factor), intensity(world(to_world, all_indices(shape))), to_world)
        expected = intensity(world(refined.affine, all_indices(refined.shape[1:])))
        inner = tuple(slice(border, -border) for border in np.ceil(2 * pair(factor) + 1).astype(int))
        np.testing.assert_allclose(refined.numpy()[0][inner], expected[inner], atol=2e-3)

    def test_grid_of_the_file_is_forgotten(self, tmp_path):
        """MONAI Label and others put a result back on the grid that these name, whatever its own is."""
        path = toy.write_nifti(tmp_path / "a.nii.gz", to_world=toy.affine(degrees=(14, -9, 25)))
        loaded = LoadVolumed("image")({"image": str(path)})
        assert {"spatial_shape", "original_affine"} <= loaded["image"].meta.keys()
        assert not {"spatial_shape", "original_affine"} & upsample_in_plane("image")(loaded)["image"].meta.keys()

    @pytest.mark.parametrize("factor", [2, 3, 4, 1.5, 2.5])
    def test_agrees_with_nibabel_on_a_smooth_volume(self, factor):
        to_world = toy.affine((1.2, 0.8, 3), (20, 10, -15))
        x, y, z = all_indices((31, 36, 4)).transpose(3, 0, 1, 2)
        smooth = 100 + 30 * np.sin(x / 4) * np.cos(y / 5) + 5 * z
        refined = apply(upsample_in_plane("image", factor), smooth, to_world)
        resampled = resample_from_to(nib.Nifti1Image(smooth, to_world), (refined.shape[1:], refined.affine.numpy()), order=3)
        border = int(3 * factor + 1)
        inner = (slice(border, -border), slice(border, -border), slice(1, -1))
        np.testing.assert_allclose(refined.numpy()[0][inner], resampled.get_fdata()[inner], atol=0.2)  # a spline, not Keys' kernel

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_slices_equal_the_bicubic_of_pillow(self, factor):
        head = toy.head((17, 22, 3))
        refined = apply(upsample_in_plane("image", factor), head).numpy()[0]
        for k in range(3):
            expected = np.asarray(Image.fromarray(head[..., k]).resize((22 * factor, 17 * factor), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(refined[..., k], expected, atol=0.01)

    def test_factor_one_changes_nothing(self):
        refined = apply(upsample_in_plane("image", 1), toy.head())
        np.testing.assert_allclose(refined.numpy()[0], toy.head(), atol=1e-3)
        np.testing.assert_array_equal(refined.affine, toy.affine())

    def test_given_volume_is_left_alone(self):
        given_volume = volume(toy.head())
        upsample_in_plane("image", 2)({"image": given_volume})
        assert given_volume.shape[1:] == toy.SHAPE
        np.testing.assert_array_equal(given_volume.affine, toy.affine())

    @pytest.mark.parametrize("factor", [0, -2, 0.5, "2", True])
    def test_impossible_factor_is_refused(self, factor):
        with pytest.raises(ValueError, match=str(factor)):
            apply(upsample_in_plane("image", factor), toy.head())

    @given(spacing=st.tuples(st.floats(0.5, 4), st.floats(0.5, 4)), wanted=st.floats(0.2, 0.49))
    @settings(max_examples=20, deadline=None)
    def test_voxels_have_the_size_asked_for(self, spacing, wanted):
        to_world = toy.affine((*spacing, 3), (20, 10, -15)).astype(np.float32)  # as NIfTI keeps it
        refined = apply(upsample_in_plane("image", spacing=wanted), np.ones((7, 8, 2)), to_world)
        np.testing.assert_allclose(refined.pixdim, (wanted, wanted, 3), rtol=1e-5)
        np.testing.assert_allclose(refined.meta["factor"], np.array(spacing) / wanted, rtol=1e-5)
        np.testing.assert_allclose(
            world(refined.affine, [-0.5, -0.5, 0]), world(to_world, [-0.5, -0.5, 0]), atol=1e-4
        )  # the corner of the field of view stays

    def test_axis_that_is_fine_enough_stays(self):
        refined = apply(upsample_in_plane("image", spacing=(0.5, 0.5)), np.ones((7, 8, 2)), toy.affine((0.4, 1, 2)))
        np.testing.assert_allclose(refined.pixdim, (0.4, 0.5, 2))
        assert refined.shape == (1, 7, 16, 2)

    def test_volume_that_is_finer_than_asked_for_is_refused(self):
        with pytest.raises(InputError, match=r"sub-07.nii.gz: spacing 0.5 x 0.5 mm asked for, but voxels are 0.4 x 0.3 mm already"):
            apply(InPlaneFactorsd("image", spacing=0.5), np.ones((7, 8, 2)), toy.affine((0.4, 0.3, 2)))

    @pytest.mark.parametrize("spacing", [0, -1, "fine", True, [1], [1, 0], [1, 1, 1], float("nan")])
    def test_impossible_spacing_is_refused(self, spacing):
        with pytest.raises(InputError, match="spacing must be a positive number in mm, or two of them, got"):
            upsample_in_plane("image", spacing=spacing)


class TestAxialSlices:
    def numbered(self, axcodes="RAS"):
        """Every slice holds its number, counted from 1 at the inferior end."""
        return toy.stored_as(axcodes, np.broadcast_to(np.arange(1.0, 10), (6, 5, 9)), toy.affine((1, 2, 3), (5, 10, 15)))

    @pytest.mark.parametrize("axcodes", ["RAS", "LPS", "RAI", "LPI", "SAR", "PIR", "AIL"])
    def test_slices_are_counted_from_the_inferior_end(self, axcodes):
        array, to_world = self.numbered(axcodes)
        ras = Orientation(axcodes="RAS", labels=None)(volume(array, to_world))
        kept = AxialSlicesd("image", [3, 5])({"image": ras})["image"]
        assert kept.shape == (1, 6, 5, 3)
        assert kept[0, 0, 0].tolist() == [3, 4, 5]
        whole = toy.affine((1, 2, 3), (5, 10, 15))
        np.testing.assert_allclose(kept.affine, whole @ nib.affines.from_matvec(np.eye(3), [0, 0, 2]), atol=1e-4)

    @pytest.mark.parametrize("axial_slices", [[1, 1], [9, 9], [1, 9], (2, 8)])
    def test_both_ends_are_included(self, axial_slices):
        first, last = axial_slices
        kept = apply(AxialSlicesd("image", axial_slices), *self.numbered())
        assert kept[0, 0, 0].tolist() == list(range(first, last + 1))

    def test_none_keeps_all(self):
        assert apply(AxialSlicesd("image"), *self.numbered()).shape == (1, 6, 5, 9)

    def test_too_few_slices_name_file_range_and_number(self):
        with pytest.raises(InputError, match=r"sub-07\.nii\.gz.* 8 to 10 .* 9$"):
            apply(AxialSlicesd("image", [8, 10]), *self.numbered())

    @pytest.mark.parametrize("axial_slices", [[0, 3], [5, 4], [1], [1, 2, 3], [-3, -1]])
    def test_impossible_range_is_refused(self, axial_slices):
        with pytest.raises(ValueError, match="axial_slices must be"):
            AxialSlicesd("image", axial_slices)


@st.composite
def boxes(draw):
    """Shape, window, and a box of foreground inside the shape: first and last index along X and Y."""
    shape = [draw(st.integers(4, 14)) for _ in range(2)]
    window = [draw(st.integers(1, side)) for side in shape]
    box = [sorted(draw(st.integers(0, side - 1)) for _ in range(2)) for side in shape]
    return shape, window, box


class TestCropInPlane:
    @given(case=boxes())
    @settings(max_examples=150, deadline=None)
    def test_window_is_centred_on_the_foreground_and_clamped_at_the_border(self, case):
        shape, window, box = case
        array = np.zeros((*shape, 3))
        # the box shows only in the union of the slices
        array[box[0][0], box[1][0], 0] = array[box[0][1], box[1][1], 2] = 1
        cropped = apply(CropInPlaned("image", window), array)
        assert list(cropped.shape) == [1, *window, 3]
        start = np.linalg.solve(toy.affine(), cropped.affine.numpy())[:3, 3]
        np.testing.assert_allclose(start, start.round(), atol=1e-6)
        np.testing.assert_array_equal(cropped.numpy()[0], array[tuple(slice(int(a), int(a) + w) for a, w in zip(start.round(), window))])
        for a, w, side, (first, last) in zip(start, window, shape, box):
            centred = (first + last + 1 - w) / 2
            assert abs(a - np.clip(centred, 0, side - w)) <= 0.5
            if last - first < w:
                assert a <= first and last < a + w

    def test_no_foreground_is_cut_that_fits(self):
        array = np.pad(toy.head(), ((30, 2), (0, 17), (0, 0)))
        used = array.nonzero()
        size = [int(np.ptp(used[axis])) + 1 for axis in range(2)]
        assert np.count_nonzero(apply(CropInPlaned("image", size), array)) == np.count_nonzero(array)

    def test_volume_without_foreground_is_cropped_at_its_centre(self):
        array = -np.arange(11.0 * 9).reshape(11, 9, 1)
        np.testing.assert_array_equal(apply(CropInPlaned("image", [5, 3]), array)[0], array[3:8, 3:6])

    def test_world_coordinates_stay(self):
        to_world = toy.affine((1, 2, 3), (30, -20, 10))
        points = world(to_world, all_indices((20, 18, 2)))
        array = np.zeros((20, 18, 2))
        array[12:17, 3:6] = points[12:17, 3:6, :, 0] + 1000
        cropped = apply(CropInPlaned("image", [9, 7]), array, to_world)
        x = world(cropped.affine, all_indices(cropped.shape[1:]))[..., 0] + 1000
        inside = cropped.numpy()[0] > 0
        assert inside.sum() == 5 * 3 * 2
        np.testing.assert_allclose(cropped.numpy()[0][inside], x[inside], atol=1e-3)

    def test_none_keeps_all(self):
        assert apply(CropInPlaned("image"), toy.head()).shape[1:] == toy.SHAPE

    @pytest.mark.parametrize("size", [[41, 10], [10, 37], [100, 100]])
    def test_window_larger_than_the_volume_names_the_file(self, size):
        with pytest.raises(InputError, match=r"sub-07\.nii\.gz.*40 x 36.*" + str(size[0])):
            apply(CropInPlaned("image", size), toy.head())

    @pytest.mark.parametrize("size", [[10], [0, 10], [-1, 5], [1, 2, 3]])
    def test_impossible_size_is_refused(self, size):
        with pytest.raises(ValueError, match="size must be"):
            CropInPlaned("image", size)


class TestScaleIntensity:
    @pytest.mark.parametrize(
        "array",
        [toy.head(), toy.head() - 300, -toy.head(), toy.head() * 1e-4, toy.head() * 1e6, np.where(toy.head() > 700, 32767, toy.head())],
        ids=["head", "negative background", "negative", "small", "large", "outliers"],
    )
    def test_inverse_restores_the_input(self, array):
        transform = ScaleIntensityByPercentiled("image")
        restored = transform.inverse(transform({"image": volume(array)}))["image"]
        np.testing.assert_allclose(restored.numpy()[0], array, rtol=6e-7)
        assert not restored.applied_operations

    def test_one_outlier_does_not_set_the_scale(self):
        array = toy.head()
        plain = apply(ScaleIntensityByPercentiled("image"), array)
        array[20, 18, 3] = 1e6
        with_outlier = apply(ScaleIntensityByPercentiled("image"), array)
        assert with_outlier[0, 20, 18, 3] > 1000
        with_outlier[0, 20, 18, 3] = plain[0, 20, 18, 3]
        np.testing.assert_allclose(with_outlier, plain, rtol=0.02)

    def test_background_does_not_count(self):
        padded = np.pad(toy.head(), ((0, 400), (0, 0), (0, 0)))
        np.testing.assert_array_equal(
            apply(ScaleIntensityByPercentiled("image"), padded)[:, :40], apply(ScaleIntensityByPercentiled("image"), toy.head())
        )

    def test_percentile_becomes_one(self):
        values = np.arange(1001.0).reshape(7, 11, 13)
        assert apply(ScaleIntensityByPercentiled("image", 100), values).max() == 1
        assert float((apply(ScaleIntensityByPercentiled("image", 50), values) > 1).float().sum()) == 500

    def test_clip_keeps_to_the_unit_interval(self):
        scaled = apply(ScaleIntensityByPercentiled("image", 99, clip=True), toy.head() - 100)
        assert (scaled.min(), scaled.max()) == (0, 1)

    @pytest.mark.parametrize("percentile", [0, -1, 100.1])
    def test_impossible_percentile_is_refused(self, percentile):
        with pytest.raises(ValueError, match=str(percentile)):
            ScaleIntensityByPercentiled("image", percentile)


class TestDegraded:
    @pytest.mark.parametrize("mode", ["bicubic", "kspace"])
    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_each_axial_slice_is_degraded_by_itself(self, factor, mode):
        head = toy.head((25, 22, 4))
        pair = Degraded("image", factor=factor, mode=mode)({"image": volume(head)})
        for k in range(4):
            expected = degrade(torch.from_numpy(head[..., k].copy()), factor, mode)
            np.testing.assert_allclose(pair["image"][0, ..., k], expected, atol=2e-3)
        assert not np.allclose(pair["image"][0], head, atol=5)

    def test_target_is_the_volume_itself(self):
        pair = Degraded("image")({"image": volume(toy.head())})
        np.testing.assert_array_equal(pair["label"][0], toy.head())

    def test_affine_and_name_stay(self):
        pair = Degraded("image", target_key="truth", factor=3)({"image": volume(toy.head((25, 23, 4)))})
        for image in pair.values():
            np.testing.assert_array_equal(image.affine, toy.affine())
            assert image.meta["filename_or_obj"] == "sub-07.nii.gz"
            assert image.shape == (1, 25, 23, 4)


class TestLoadVolume:
    @pytest.mark.parametrize("what", toy.BAD_VOLUMES)
    def test_unusable_file_is_refused_by_name_in_one_line(self, what, tmp_path):
        path = toy.BAD_VOLUMES[what](tmp_path)
        with pytest.raises(InputError) as error:
            LoadVolumed("image")({"image": str(path)})
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) > len(f"{path}: ") + 10

    def test_missing_file_is_refused_by_name(self, tmp_path):
        with pytest.raises(InputError, match=r"gone\.nii"):
            LoadVolumed("image")({"image": str(tmp_path / "gone.nii")})

    def test_trailing_axis_of_one_is_no_obstacle(self, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head()[..., None])
        np.testing.assert_array_equal(LoadVolumed("image")({"image": str(path)})["image"][0], toy.head())

    def test_slope_and_intercept_apply(self, tmp_path):
        path = toy.write_nifti(tmp_path / "a.nii.gz", toy.head(), dtype=np.int16, slope=0.5, inter=-100)
        np.testing.assert_array_equal(LoadVolumed("image")({"image": str(path)})["image"][0], toy.head())

    def test_axes_and_affine_are_as_stored(self, tmp_path):
        array, to_world = toy.stored_as("PIR", toy.head(), toy.affine((1, 1, 2), (5, 8, 11)))
        image = LoadVolumed("image")({"image": str(toy.write_nifti(tmp_path / "a.nii", array, to_world))})["image"]
        np.testing.assert_array_equal(image[0], array)
        np.testing.assert_allclose(image.affine, to_world, atol=1e-5)
