import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from torch.utils.data import DataLoader, DistributedSampler

from bundle.data import EpochSampler, InferenceDataset, PatchDataset, RandomFactor
from bundle.errors import InputError
from bundle.loading import LoadVolumed
from bundle.resampling import degrade
from bundle.subjects import find_volumes, split_subjects
from bundle.transforms import AxialSlicesd, CropInPlaned

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real volumes in ../shared/data")


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


class TestFindVolumes:
    def test_file_is_one_volume(self, tmp_path):
        file = touch(tmp_path / "any.thing")
        assert find_volumes(file) == [file]

    def test_folder_is_searched_with_its_subfolders_and_sorted(self, tmp_path):
        names = ["b.nii.gz", "a/z.nii", "a/deep/er/y.mha", "x.mhd", "w.nrrd", "v.nhdr", "u.img", "t.img.gz"]
        expected = sorted(touch(tmp_path / name) for name in names)
        for other in ("notes.txt", "u.hdr", "x.raw", "README", "a/table.tsv"):
            touch(tmp_path / other)
        assert find_volumes(tmp_path) == expected

    @pytest.mark.parametrize("name", ["sub 01 (T1).nii.gz", "Größe/脳 été.nii", "a.b.c/d.e.nii.gz", "[x]*?.nii.gz"])
    def test_any_name_will_do(self, name, tmp_path):
        file = touch(tmp_path / name)
        assert find_volumes(tmp_path) == [file]

    def test_folder_may_have_any_name(self, tmp_path):
        file = touch(tmp_path / "my [T1] data, März" / "a.nii")
        assert find_volumes(tmp_path / "my [T1] data, März") == [file]

    @pytest.mark.parametrize("extension", [".dcm", ".IMA", ""])
    def test_dicom_folder_is_one_volume(self, extension, tmp_path):
        folder = toy.write_dicom(tmp_path / "series", extension=extension)
        touch(folder / "LICENSE")
        assert find_volumes(folder) == [str(folder)]
        assert find_volumes(tmp_path) == [str(folder)]

    def test_dicom_folders_stand_beside_files(self, tmp_path):
        expected = [str(toy.write_dicom(tmp_path / f"1.2.840.{n}")) for n in (3, 4)]
        expected.append(touch(tmp_path / "sub.nii.gz"))
        assert find_volumes(tmp_path) == expected

    def test_dicom_index_is_no_slice(self, tmp_path):
        folder = toy.write_dicom(tmp_path / "DICOM" / "S1", extension="")
        (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
        assert find_volumes(tmp_path) == [str(folder)]

    @pytest.mark.parametrize("pattern", ["*_t1ce.nii.gz", ["*_t1ce.nii.gz"], ("*_t1ce.nii*", "*t1ce.nii.gz")])
    def test_pattern_chooses_files(self, pattern, tmp_path):
        file = touch(tmp_path / "case" / "case_t1ce.nii.gz")
        touch(tmp_path / "case" / "case_flair.nii.gz")
        toy.write_dicom(tmp_path / "series")
        assert find_volumes(tmp_path, pattern) == [file]

    def test_several_patterns_add_up(self, tmp_path):
        files = [touch(tmp_path / name) for name in ("a_t1.nii", "b_t2.nii")]
        touch(tmp_path / "c_pd.nii")
        assert find_volumes(tmp_path, ["*_t1.nii", "*_t2.nii"]) == files

    @pytest.mark.parametrize("pattern", [None, "*.nii.gz", ["*.mha", "*.nrrd"]])
    def test_folder_without_volumes_is_named(self, pattern, tmp_path):
        touch(tmp_path / "empty one" / "notes.txt")
        with pytest.raises(InputError, match="empty one: holds no volume"):
            find_volumes(tmp_path / "empty one", pattern)

    def test_missing_path_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"gone/sub-01\.nii: no such file"):
            find_volumes(tmp_path / "gone" / "sub-01.nii")


class TestFormats:
    TO_WORLD = toy.affine((0.9, 1.1, 2.5), (10, -5, 20))

    @pytest.mark.parametrize(
        ("name", "write"),
        [
            ("a.nii", toy.write_nifti),
            ("a.nii.gz", toy.write_nifti),
            ("a.mha", toy.write_itk),
            ("a.mhd", toy.write_itk),
            ("a.nrrd", toy.write_itk),
            ("a.nhdr", toy.write_itk),
            ("series", toy.write_dicom),
        ],
    )
    def test_formats_hold_the_same_volume(self, name, write, tmp_path):
        write(tmp_path / name, toy.head(), self.TO_WORLD)
        (path,) = find_volumes(tmp_path)
        image = LoadVolumed("image")({"image": path})["image"]
        assert image.dtype == torch.float32
        np.testing.assert_array_equal(image[0], toy.head())
        np.testing.assert_allclose(image.affine, self.TO_WORLD, atol=1e-5)
        assert image.meta["filename_or_obj"] == path

    def test_analyze_holds_the_array_and_the_spacing(self, tmp_path):
        toy.write_analyze(tmp_path / "a.img", toy.head(), self.TO_WORLD)
        (path,) = find_volumes(tmp_path)
        image = LoadVolumed("image")({"image": path})["image"]
        np.testing.assert_array_equal(image[0], toy.head())
        np.testing.assert_allclose(image.pixdim, [0.9, 1.1, 2.5], atol=1e-5)

    def test_dicom_slices_are_sorted_by_position(self, tmp_path):
        folder = toy.write_dicom(tmp_path / "series", toy.head(), self.TO_WORLD)
        for old, new in zip(sorted(folder.iterdir()), "fadceb"):
            old.rename(folder / f"{new}.dcm")
        np.testing.assert_array_equal(LoadVolumed("image")({"image": str(folder)})["image"][0], toy.head())


class TestSplitSubjects:
    VOLUMES = tuple(f"sub-{n:02d}.nii.gz" for n in range(1, 31))

    def parts(self, volumes, split):
        return [[item["image"] for item in split_subjects(volumes, split, part)] for part in ("train", "validation", "test")]

    @pytest.mark.parametrize(
        ("volumes", "split", "numbers"),
        [
            (30, [15, 5, 10], [15, 5, 10]),
            (20, [13, 2, 5], [13, 2, 5]),
            (30, [0.6, 0.2, 0.2], [18, 6, 6]),
            (20, [0.65, 0.1, 0.25], [13, 2, 5]),
            (10, (0.7, 0.1, 0.2), [7, 1, 2]),
            (3, [0.6, 0.2, 0.2], [1, 1, 1]),
            (4, [0.98, 0.01, 0.01], [2, 1, 1]),
            (30, [1, 1, 1], [1, 1, 1]),
        ],
    )
    def test_parts_follow_each_other(self, volumes, split, numbers):
        parts = self.parts(self.VOLUMES[:volumes], split)
        assert [len(part) for part in parts] == numbers
        assert list(itertools.chain(*parts)) == list(self.VOLUMES[: sum(numbers)])

    @pytest.mark.parametrize("volumes", range(3, 30))
    def test_fractions_share_out_all_volumes(self, volumes):
        parts = self.parts(self.VOLUMES[:volumes], [0.6, 0.2, 0.2])
        assert sum(map(len, parts)) == volumes
        assert all(parts)

    def test_order_is_kept(self):
        volumes = self.VOLUMES[::-1]
        assert list(itertools.chain(*self.parts(volumes, [15, 5, 10]))) == list(volumes)

    @pytest.mark.parametrize(
        ("volumes", "split"), [(29, [15, 5, 10]), (2, [0.6, 0.2, 0.2]), (0, [0.6, 0.2, 0.2]), (30, [20, 0, 10]), (2, [1, 1, 1])]
    )
    def test_too_few_volumes_are_refused_with_their_number(self, volumes, split):
        with pytest.raises(InputError, match=f"found {volumes}$"):
            split_subjects(self.VOLUMES[:volumes], split, "train")

    @pytest.mark.parametrize(("split", "part"), [([0.5, 0.5], "train"), ([1, 2, 3], "training"), ([-1, 2, 3], "test")])
    def test_impossible_arguments_are_refused(self, split, part):
        with pytest.raises(ValueError, match="must be"):
            split_subjects(self.VOLUMES, split, part)


class TestInferenceDataset:
    def test_failure_is_given_out_beside_the_others(self):
        def transform(item):
            if item["image"] == "bad":
                raise RuntimeError("wrapped\nin lines") from InputError("bad: damaged")
            return {"done": item["image"]}

        dataset = InferenceDataset([{"image": name} for name in ("a", "bad", "b")], transform)
        assert list(map(dataset.__getitem__, range(len(dataset)))) == [
            {"done": "a"},
            {"image": "bad", "error": "bad: damaged"},
            {"done": "b"},
        ]


def numbered(shape=(40, 36, 6), start=1, name="sub-03.nii"):
    """A pair whose label numbers its voxels, and whose image is the label plus a half."""
    label = torch.arange(start, start + np.prod(shape), dtype=torch.float32).view(1, *shape)
    return {"image": label + 0.5, "label": MetaTensor(label, meta={"filename_or_obj": name})}


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "label"))


class TestRandomFactor:
    def pair(self, shape=(70, 80, 2)):
        label = torch.from_numpy(toy.head(shape))[None] / 1000
        return {"image": label, "label": label}

    def test_patch_is_that_of_the_degraded_slice(self):
        """With one factor in the range and the patch as large as the slice, the input is the slice degraded by it."""
        pair = self.pair((40, 40, 1))
        item = PatchDataset([pair], size=40, augment=False, degradation=RandomFactor([2.5, 2.5]))[0]
        torch.testing.assert_close(item["image"], degrade(pair["label"][..., 0], 2.5))
        torch.testing.assert_close(item["label"], pair["label"][..., 0])

    def test_borders_of_a_patch_are_not_borders_of_the_image(self):
        """A linear slice stays itself but near its own borders, wherever the patch lies."""
        ramp = (torch.arange(90.0) / 90)[:, None].expand(90, 90)[None, ..., None]
        dataset = PatchDataset([{"image": ramp, "label": ramp}], size=9, augment=False, degradation=RandomFactor([2, 2]))
        for item in (dataset[index] for index in range(30)):
            if float(item["label"].min()) > 0.2 and float(item["label"].max()) < 0.8:
                torch.testing.assert_close(item["image"], item["label"], atol=1e-5, rtol=0)

    def test_factors_vary_and_are_a_function_of_seed_and_index(self):
        degradation = RandomFactor([1.5, 4])
        first, second = (PatchDataset([self.pair()], size=9, seed=3, degradation=degradation) for _ in range(2))
        for index in (0, 5, 1000):
            torch.testing.assert_close(first[index], second[index], atol=0, rtol=0)
        drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bundle.data.degrade", lambda image, factor, *rest: drawn.append(factor) or image)
            for index in range(200):
                first[index]
        drawn = np.array(drawn)
        assert drawn.min() >= 1.5 and drawn.max() <= 4 and np.ptp(drawn) > 2
        assert 0.3 < (drawn[:, 0] == drawn[:, 1]).mean() < 0.7

    def test_every_second_patch_has_a_common_factor(self):
        degradation, image = RandomFactor([1.5, 4], common=[2, 3]), torch.rand(30, 30)
        drawn = [degradation(image, np.random.default_rng(seed))[1] for seed in range(300)]
        assert 0.4 < sum(factors in ((2.0, 2.0), (3.0, 3.0)) for factors in drawn) / 300 < 0.6
        assert {(2.0, 2.0), (3.0, 3.0)} < set(drawn) and sum(rows != columns for rows, columns in drawn) > 40

    def test_phases_fit_the_patch_wherever_it_lies_and_however_it_is_turned(self):
        """Interpolated by the nearest neighbour, two pixels differ where the place between measured pixels jumps back."""
        label = torch.rand((1, 50, 60, 2), generator=torch.Generator().manual_seed(0))
        degradation = RandomFactor([1.7, 4], interpolation="nearest")
        dataset = PatchDataset([{"image": label, "label": label}], size=20, degradation=degradation, positions=True)
        for image in (dataset[index]["image"] for index in range(40)):
            for axis in (0, 1):
                cosine, sine, _ = image[1 + 3 * axis : 4 + 3 * axis]
                torch.testing.assert_close(image[0].diff(dim=axis) != 0, torch.atan2(sine, cosine).diff(dim=axis) < 0)

    @pytest.mark.parametrize("factors", [[4, 1.5], [0.5, 2], [2], "any", None])
    def test_impossible_factors_are_refused(self, factors):
        with pytest.raises(InputError, match="factor"):
            RandomFactor(factors)


class TestPatchDataset:
    def test_patch_is_a_function_of_seed_and_index(self):
        volumes = [toy_pair(seed) for seed in range(3)]
        first, second = (PatchDataset(volumes, size=9, patches_per_volume=7, seed=5) for _ in range(2))
        order = [*range(60)][::-1]
        later = {index: second[index] for index in order}
        assert all(equal(first[index], later[index]) for index in range(60))

    def test_global_random_state_is_neither_used_nor_changed(self):
        dataset = PatchDataset([numbered()], size=9)
        torch.manual_seed(0)
        before, torch_state, numpy_state = dataset[3], torch.get_rng_state(), np.random.get_state()[1].copy()
        torch.testing.assert_close(dataset[3], before)
        assert torch.equal(torch.get_rng_state(), torch_state)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)

    def test_workers_give_the_same_patches(self):
        dataset = PatchDataset([numbered(), numbered(start=50000)], size=9, patches_per_volume=4)
        loaders = (DataLoader(dataset, batch_size=3, sampler=EpochSampler(dataset), num_workers=n) for n in (0, 2))
        for one, two in zip(*loaders, strict=True):
            assert equal(one, two)

    @pytest.mark.parametrize("augment", [True, False])
    def test_patches_are_cut_from_the_volume(self, augment):
        volumes = [numbered((12, 15, 4)), numbered((14, 11, 3), start=5000)]
        dataset = PatchDataset(volumes, size=5, augment=augment)
        orientations = set()
        for index in range(200):
            patch = dataset[index]["label"]
            assert patch.shape == (1, 5, 5)
            volume = volumes[int(patch.min() >= 5000)]["label"].as_tensor()[0]
            x, y, z = (int(n) for n in (volume == patch.min()).nonzero()[0])  # numbers rise along x and y
            window = volume[x : x + 5, y : y + 5, z]
            turned = [(n, flip, torch.rot90(window.flip(1) if flip else window, n)) for n in range(4) for flip in (False, True)]
            matches = [(n, flip) for n, flip, candidate in turned if torch.equal(candidate, patch[0])]
            assert len(matches) == 1
            orientations.add(matches[0])
        assert len(orientations) == (8 if augment else 1)
        assert augment or orientations == {(0, False)}

    def test_every_place_can_be_drawn(self):
        dataset = PatchDataset([numbered((6, 7, 3))], size=5, augment=False)
        assert len({float(dataset[index]["label"].min()) for index in range(300)}) == 2 * 3 * 3

    def test_image_and_label_stay_registered(self):
        dataset = PatchDataset([numbered(), numbered(start=50000)], size=31)
        for index in range(40):
            assert torch.equal(dataset[index]["image"], dataset[index]["label"] + 0.5)

    def test_volumes_give_the_same_number_of_patches(self):
        dataset = PatchDataset([numbered(), numbered(start=50000), numbered(start=100000)], size=9, patches_per_volume=10)
        assert len(dataset) == 30
        owners = [int(dataset[index]["label"].min() // 50000) for index in range(30)]
        assert [owners.count(n) for n in range(3)] == [10, 10, 10]

    def test_epochs_differ(self):
        dataset = PatchDataset([numbered()], size=9, patches_per_volume=20)
        assert not any(equal(dataset[index], dataset[index + 20]) for index in range(20))

    def test_seeds_differ(self):
        one, two = (PatchDataset([numbered()], size=9, seed=seed) for seed in (0, 1))
        assert not all(equal(one[index], two[index]) for index in range(5))

    def test_patches_hold_enough_foreground(self):
        label = torch.zeros(1, 40, 36, 6)
        label[:, 5:25, 5:25] = 1
        pair = {"image": label, "label": label}
        fractions = [float(PatchDataset([pair], size=9, min_foreground=0.5)[index]["label"].mean()) for index in range(60)]
        assert min(fractions) >= 0.5
        anywhere = [float(PatchDataset([pair], size=9, min_foreground=0)[index]["label"].mean()) for index in range(60)]
        assert min(anywhere) < 0.5

    def test_threshold_decides_what_is_foreground(self):
        label = torch.full((1, 20, 20, 2), 0.1)
        label[:, :, 10:] = 0.3
        dataset = PatchDataset([{"image": label, "label": label}], size=5, threshold=0.2, min_foreground=0.9)
        assert min(float((dataset[index]["label"] > 0.2).float().mean()) for index in range(30)) >= 0.9

    def test_volume_without_foreground_still_gives_patches(self):
        empty = torch.zeros(1, 20, 20, 2)
        assert PatchDataset([{"image": empty, "label": empty}], size=9)[0]["label"].shape == (1, 9, 9)

    @pytest.mark.parametrize("shape", [(31, 30, 5), (30, 31, 5)])
    def test_volume_smaller_than_a_patch_is_named(self, shape):
        with pytest.raises(InputError, match=rf"sub-03\.nii.*{shape[0]} x {shape[1]}.*31 x 31"):
            PatchDataset([numbered(), numbered(shape)])

    def test_volume_of_the_size_of_a_patch_will_do(self):
        assert PatchDataset([numbered((31, 31, 1))])[0]["image"].shape == (1, 31, 31)


def toy_pair(seed):
    label = torch.from_numpy(toy.head(seed=seed))[None] / 1000
    return {"image": label * 0.9, "label": label}


class TestEpochSampler:
    def ranks(self, dataset, monkeypatch, number):
        """The samplers of a distributed run of ``number`` processes."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: number)
        for rank in range(number):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            yield EpochSampler(dataset)

    def test_epochs_follow_each_other(self):
        sampler = EpochSampler(range(7))
        indices = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            assert len(sampler) == len(list(sampler)) == 7
            indices += sampler
        assert indices == list(range(28))

    @pytest.mark.parametrize(("length", "processes"), [(8, 2), (12, 3), (6, 1)])
    def test_processes_share_the_indices_of_one(self, length, processes, monkeypatch):
        alone = EpochSampler(range(length))
        samplers = list(self.ranks(range(length), monkeypatch, processes))
        for epoch in (0, 1, 5):
            for sampler in (alone, *samplers):
                sampler.set_epoch(epoch)
            parts = [list(sampler) for sampler in samplers]
            assert sorted(itertools.chain(*parts)) == list(alone)
            assert [len(part) for part in parts] == [len(sampler) for sampler in samplers] == [length // processes] * processes

    @pytest.mark.parametrize("length", [7, 8, 9])
    def test_step_of_all_processes_takes_the_indices_of_one_process(self, length, monkeypatch):
        parts = [list(sampler) for sampler in self.ranks(range(length), monkeypatch, 2)]
        assert len(parts[0]) == len(parts[1])
        assert list(itertools.chain(*zip(*parts))) == list(range(length - length % 2))

    def test_engines_of_monai_recognise_it(self):
        assert isinstance(EpochSampler(range(3)), DistributedSampler)


def real_cases():
    for folder, axial_slices, size in (("brats2018", (65, 99), (155, 177)), ("ds002748", (91, 120), (184, 208))):
        volumes = sorted((DATA / folder).glob("*.nii.gz"))
        for volume in volumes[:: max(1, len(volumes) // 4)][:4]:
            yield pytest.param(volume, axial_slices, size, id=volume.stem)


@needs_data
class TestRealVolumes:
    """Four volumes of each set: the windows of ``configs/datasets`` cut no brain."""

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "axial_slices", "size"), real_cases())
    def test_crop_cuts_no_brain_that_fits(self, name, axial_slices, size):
        whole = nib.as_closest_canonical(nib.load(name))
        slices = np.asarray(whole.dataobj)[..., axial_slices[0] - 1 : axial_slices[1]]
        occupied = [np.flatnonzero(slices.any((1 - axis, 2))) for axis in range(2)]
        preprocessing = Compose(
            [
                LoadVolumed("image"),
                Orientationd("image", axcodes="RAS", labels=None),
                AxialSlicesd("image", axial_slices),
                CropInPlaned("image", size),
            ]
        )
        cropped = preprocessing({"image": str(name)})["image"]
        assert list(cropped.shape) == [1, *size, axial_slices[1] - axial_slices[0] + 1]
        if all(np.ptp(used) < window for used, window in zip(occupied, size)):
            assert np.count_nonzero(cropped) == np.count_nonzero(slices)
        start = np.linalg.solve(whole.affine, cropped.affine.numpy())[:3, 3].round().astype(int)
        assert start[2] == axial_slices[0] - 1
        window = tuple(slice(a, a + side) for a, side in zip(start, size))
        np.testing.assert_array_equal(cropped[0], slices[window])

    def test_subjects_suffice_for_the_protocols(self):
        for folder, split in (("brats2018", [13, 2, 5]), ("ds002748", [15, 5, 10])):
            volumes = find_volumes(DATA / folder, "*.nii.gz")
            assert sum(len(split_subjects(volumes, split, part)) for part in ("train", "validation", "test")) == len(volumes)

    def test_dicom_series_is_one_volume(self):
        (folder,) = find_volumes(DATA / "dicom_t1")
        image = LoadVolumed("image")({"image": folder})["image"]
        assert image.shape == (1, 274, 384, 48)
        np.testing.assert_allclose(image.pixdim, 0.7, atol=0.05)
