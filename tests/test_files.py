import gzip
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from matplotlib.figure import Figure
from PIL import Image

from bundle.data import InferenceDataset
from bundle.errors import InputError, full_disk, reason
from bundle.figures import Panel, save_panels
from bundle.files import fingerprint, save_nifti, write_atomically, write_json
from bundle.results import Results


class TestResultPath:
    @pytest.mark.parametrize(
        "name",
        ["sub.nii", "sub.nii.gz", "sub.mha", "sub.mhd", "sub.nrrd", "sub.nhdr", "sub.img", "sub.img.gz"],
    )
    def test_extension_is_replaced(self, name):
        assert Results("out", "/in", []).path(f"/in/{name}", "_sr.nii.gz") == Path("out/sub_sr.nii.gz")

    @pytest.mark.parametrize("name", ["sub-01.run-2", "1.2.840", "a b", "Größe 脳"])
    def test_rest_of_the_name_stays(self, name):
        assert Results("out", "/in", []).path(f"/in/{name}.nii.gz", "_sr.png") == Path(f"out/{name}_sr.png")

    @pytest.mark.parametrize("name", ["1.2.840.10008.113619", "series", "T1 3.5mm"])
    def test_dicom_folder_keeps_its_whole_name(self, name, tmp_path):
        (tmp_path / "in" / name).mkdir(parents=True)
        path = Results("out", tmp_path / "in", []).path(tmp_path / "in" / name, "_sr.nii.gz")
        assert path == Path(f"out/{name}_sr.nii.gz")

    @pytest.mark.parametrize(
        ("volume", "expected"),
        [
            ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_desc-sr_T1w.json"),
            ("sub-01_ses-2_acq-x_T2w.nii", "sub-01/ses-2/anat/sub-01_ses-2_acq-x_desc-sr_T2w.json"),
            ("sub-01/fmap/sub-01_desc-preproc_magnitude1.nii.gz", "sub-01/fmap/sub-01_desc-preprocsr_magnitude1.json"),
            ("sub-01_space-MNI_res-2_T1w.nii.gz", "sub-01/anat/sub-01_space-MNI_res-2sr_desc-sr_T1w.json"),
            ("site/t1_mprage.nii.gz", "site/t1_mprage_sr.json"),
        ],
    )
    def test_bids_names_are_those_of_derivatives(self, volume, expected):
        results = Results("out", "/in", [f"/in/{volume}"], bids="true")
        assert results.path(f"/in/{volume}", "_sr.json") == Path("out") / expected

    def test_equal_names_in_several_folders_stay_apart(self):
        volumes = ["/in/a/t1.nii.gz", "/in/b/t1.nii.gz", "/in/b/c/t1.nii.gz"]
        results = [Results("out", "/in", volumes).path(volume, "_sr.nii.gz") for volume in volumes]
        assert results == [Path("out/a/t1_sr.nii.gz"), Path("out/b/t1_sr.nii.gz"), Path("out/b/c/t1_sr.nii.gz")]

    def test_relative_paths_will_do(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        results = Results("out", "./in", ["in/a/t1.nii", "./in/b/t1.nii"])
        assert results.root == str(tmp_path / "in")
        assert results.path("in/a/t1.nii", ".txt") == Path("out/a/t1.txt")
        assert Results("out", "t1.nii", ["t1.nii"]).path("t1.nii", ".txt") == Path("out/t1.txt")

    def test_names_do_not_depend_on_what_else_is_there(self):
        for volumes in (["/in/a/t1.nii"], ["/in/a/t1.nii", "/in/b.nii"]):
            assert Results("out", "/in", volumes).path(volumes[0], "_sr.json") == Path("out/a/t1_sr.json")

    def test_volumes_with_one_result_name_are_found(self):
        volumes = ["/in/a/t1.nii.gz", "/in/a/t1.mha", "/in/b/t1.nii", "/in/c.img"]
        assert Results("out", "/in", volumes).name_clashes == {volumes[0]: volumes[1], volumes[1]: volumes[0]}

    def test_patterns_with_wildcard_folders_share_what_is_before_the_wildcards(self, tmp_path):
        volumes = [str(tmp_path / name) for name in ("1/t1.nii", "2/t1.nii", "1/t2.nii")]
        results = Results("out", [str(tmp_path / "*" / name) for name in ("t1.nii", "t2.nii")], volumes)
        assert [results.path(volume, "") for volume in volumes] == [Path("out/1/t1"), Path("out/2/t1"), Path("out/1/t2")]


class TestForeignFiles:
    """A file that has the name of a result, but is not one, stays as it is."""

    def write(self, folder):
        foreign = {ending: folder / f"a{ending}" for ending in ("_sr.nii.gz", "_sd.nii.gz", "_sr.html", "_sr.json", "_sr.png")}
        for path in (foreign["_sr.nii.gz"], foreign["_sd.nii.gz"]):
            toy.write_nifti(path)
        foreign["_sr.html"].write_text("<title>Minutes</title>")
        foreign["_sr.json"].write_text('{"patient": 1}')
        Figure().savefig(foreign["_sr.png"])
        return foreign

    def test_it_is_in_the_way(self, tmp_path):
        volume = str(toy.write_nifti(tmp_path / "a.nii.gz"))
        results = Results(tmp_path, tmp_path, [volume], report=True)
        assert results.in_the_way(volume) is None
        foreign = self.write(tmp_path)
        for ending in ("_sr.nii.gz", "_sr.json", "_sr.png", "_sr.html"):
            assert results.in_the_way(volume) == foreign[ending]
            foreign[ending].unlink()
        save_panels(tmp_path / "a_sr.png", [Panel("a", torch.rand(20, 20))])
        assert results.in_the_way(volume) is None
        item = InferenceDataset([{"image": volume}], lambda item: item, results)[0]
        assert item == {"image": volume}

    def test_it_is_not_removed(self, tmp_path):
        volume, foreign = str(toy.write_nifti(tmp_path / "a.nii.gz")), self.write(tmp_path)
        results = Results(tmp_path, tmp_path, [volume])
        for ending, path in foreign.items():
            results.remove(volume, ending)
            assert path.exists()
        error = InferenceDataset([{"image": volume}], lambda item: item, results)[0]["error"]
        assert error.startswith(f"{volume}: {foreign['_sr.nii.gz']} is in the way, and not of this program")

    def test_what_was_damaged_is_replaced(self, tmp_path):
        volume = str(toy.write_nifti(tmp_path / "a.nii.gz"))
        for ending in ("_sr.nii.gz", "_sr.json"):
            (tmp_path / f"a{ending}").touch()
        assert Results(tmp_path, tmp_path, [volume]).in_the_way(volume) is None

    def test_pages_of_others_stay(self, tmp_path, caplog):
        volume = str(toy.write_nifti(tmp_path / "in" / "sub-01_T1w.nii.gz"))
        names = ("index.html", "README.md", ".bidsignore")
        for name in names:
            (tmp_path / name).write_text("mine")
        results = Results(tmp_path, tmp_path / "in", [volume], report=True, bids=True)
        results.bids_facts(volume)
        results.write_index()
        assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 3
        assert "index.html is not of this program" in caplog.text
        assert (tmp_path / "dataset_description.json").exists()


class TestAnotherVolume:
    """Two volumes of one name, put into one folder by two runs."""

    def test_its_result_is_neither_replaced_nor_taken_for_done(self, tmp_path):
        first, second = (str(toy.write_nifti(tmp_path / name / "T1.nii.gz")) for name in ("s1", "s2"))
        os.utime(second, ns=(os.stat(first).st_atime_ns, os.stat(first).st_mtime_ns))
        results = Results(tmp_path / "out", first, [first])
        (tmp_path / "out").mkdir()
        toy.write_nifti(tmp_path / "out" / "T1_sr.nii.gz").write_bytes(b"")
        report = {"settings": results.settings, "input": fingerprint(first), "volume": first}
        write_json(results.path(first, "_sr.json"), report)
        assert results.is_done(first) and results.of_another(first) is None
        item = InferenceDataset([{"image": second}], lambda item: item, Results(tmp_path / "out", second, [second]))[0]
        assert item["error"] == f"{second}: {first} has a result of that name: use another --output_dir, or --overwrite true"
        again = Results(tmp_path / "out", second, [second], overwrite=True)
        assert InferenceDataset([{"image": second}], lambda item: item, again)[0] == {"image": second}
        Path(first).rename(second)  # a volume that was moved is the same
        assert Results(tmp_path / "out", second, [second]).is_done(second)


class TestSettings:
    def done(self, tmp_path, before, after):
        """Whether a result that was made with some settings is up to date with others."""
        volume = toy.write_nifti(tmp_path / "in" / "a.nii.gz")
        results = Results(tmp_path, tmp_path / "in", [str(volume)], before)
        for ending in ("_sr.nii.gz", "_sr.json"):
            results.path(volume, ending).touch()
        write_json(results.path(volume, "_sr.json"), {"settings": results.settings, "input": fingerprint(str(volume))})
        return Results(tmp_path, tmp_path / "in", [str(volume)], after).is_done(str(volume))

    @pytest.mark.parametrize(
        ("before", "after"), [((2, 3), [2, 3]), (np.float64(2), 2), (np.int64(2), 2.0), ("false", False), (None, None)]
    )
    def test_equal_settings_are_recognised_whatever_their_type(self, before, after, tmp_path):
        assert self.done(tmp_path, {"scale": before}, {"scale": after})
        assert not self.done(tmp_path, {"scale": before}, {"scale": 3})

    def test_changed_weights_make_another_result_whatever_their_format(self, tmp_path):
        weights = tmp_path / "model.onnx"
        weights.write_bytes(b"one")
        before = Results(tmp_path, tmp_path, [], weights=weights).settings
        assert before == Results(tmp_path, tmp_path, [], weights=weights).settings
        weights.write_bytes(b"two")
        assert before != Results(tmp_path, tmp_path, [], weights=weights).settings

    def test_another_sidecar_makes_another_input(self, tmp_path):
        volume = str(toy.write_nifti(tmp_path / "a.nii.gz"))
        found = [fingerprint(volume)]
        for thickness in (3, 5):
            (tmp_path / "a.json").write_text(f'{{"SliceThickness": {thickness}}}')
            found.append(fingerprint(volume))
        assert found[0] != found[1] != found[2]
        assert fingerprint(volume) == found[2]

    def test_another_setting_makes_another_result(self, tmp_path):
        assert not self.done(tmp_path, {"scale": 2}, {"scale": 2, "margin": 16})


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text")
def test_file_names_that_are_not_utf8_are_kept(tmp_path):
    name = os.fsdecode(b"scan_\xe9")
    write_json(tmp_path / "a.json", {"volume": name})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["volume"] == name


class TestWriteAtomically:
    def test_file_is_written_below_new_folders(self, tmp_path):
        path = tmp_path / "new" / "folder" / "a.txt"
        write_atomically(path, lambda part: part.write_text("all"))
        assert path.read_text() == "all"
        assert list(path.parent.iterdir()) == [path]

    def test_writer_sees_the_extension(self, tmp_path):
        seen = []
        write_atomically(tmp_path / "a.nii.gz", lambda part: (seen.append(part), part.touch()))
        assert seen[0].parent == tmp_path
        assert seen[0].name.endswith(".nii.gz")
        assert seen[0] != tmp_path / "a.nii.gz"

    def test_old_file_stays_until_the_new_one_is_complete(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("old")

        def write(part):
            part.write_text("new")
            assert path.read_text() == "old"

        write_atomically(path, write)
        assert path.read_text() == "new"

    @pytest.mark.parametrize("host", [platform.node(), "another-host"])
    def test_parts_of_running_processes_stay_until_they_are_a_day_old(self, host, tmp_path):
        part = tmp_path / f".part-{host}-{os.getppid()}-a.txt"
        part.write_text("half")
        write_atomically(tmp_path / "a.txt", lambda part: part.write_text("all"))
        assert part.exists()
        os.utime(part, (time.time() - 90_000,) * 2)
        write_atomically(tmp_path / "a.txt", lambda part: part.write_text("all"))
        assert not part.exists()

    @pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
    def test_content_is_on_the_disk_before_the_name_is(self, tmp_path, monkeypatch):
        path, seen = tmp_path / "a.txt", []
        fsync = os.fsync

        def watched(descriptor):
            seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", watched)
        write_atomically(path, lambda part: part.write_text("all"))
        (file, before), (folder, after) = seen
        assert Path(file).name.startswith(".part-") and not before
        assert folder == str(tmp_path) and after

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_full_device_is_no_half_file(self, tmp_path):
        def write(part):
            part.write_text("half")
            with open("/dev/full", "w") as stream:
                stream.write("x" * 100_000)

        with pytest.raises(OSError, match="No space left") as error:
            write_atomically(tmp_path / "a.txt", write)
        assert full_disk(OSError("another")) is None
        assert full_disk(error.value) is error.value
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("old", ["old", None])
    def test_failing_writer_leaves_everything_as_it_was(self, old, error, tmp_path):
        path = tmp_path / "a.txt"
        if old:
            path.write_text(old)

        def write(part):
            part.write_text("half")
            raise error

        with pytest.raises(type(error)):
            write_atomically(path, write)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("a.txt", "old")] if old else [])

    def test_failure_before_anything_is_written_is_the_one_reported(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            write_atomically(tmp_path / "a.txt", lambda part: 1 / 0)


class TestReason:
    def test_input_error_behind_others_is_the_reason(self):
        error = RuntimeError("applying transform\n...")
        error.__cause__ = ValueError("component failed")
        error.__cause__.__context__ = InputError("sub-01.nii: damaged")
        assert reason(error) == "sub-01.nii: damaged"

    def test_wrapper_of_monai_is_not_the_reason(self):
        error = RuntimeError("applying transform <object at 0x7f38b4b31a50>")
        error.__cause__ = OSError("No space left on device")
        assert reason(error) == "OSError: No space left on device"

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (RuntimeError("first line\nsecond"), "RuntimeError: first line"),
            (ValueError(), "ValueError"),
            (KeyError("label"), "KeyError: 'label'"),
            (InputError("plain"), "plain"),
        ],
    )
    def test_other_errors_say_their_kind_and_first_line(self, error, expected):
        assert reason(error) == expected


class TestReportInOneLine:
    def run(self, body):
        program = "from bundle.errors import InputError, report_in_one_line\nreport_in_one_line()\n" + body
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)

    @pytest.mark.parametrize(
        "body",
        [
            "raise InputError('a.nii: damaged')",
            "try:\n    raise InputError('a.nii: damaged')\nexcept ValueError as e:\n    raise RuntimeError('applying') from e",
            "try:\n    raise InputError('a.nii: damaged')\nexcept ValueError:\n    raise RuntimeError('while handling')",
            "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise InputError('a.nii: damaged') from e",
        ],
        ids=["plain", "cause", "context", "with a cause of its own"],
    )
    def test_input_error_is_one_line(self, body):
        done = self.run(body)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: a.nii: damaged\n")

    def test_other_errors_keep_their_traceback(self):
        done = self.run("1 / 0")
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith("ZeroDivisionError: division by zero\n")

    def test_program_without_error_says_nothing(self):
        done = self.run("")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestSavePanels:
    @pytest.mark.parametrize("zoom", [0, 0.25])
    @pytest.mark.parametrize("shape", [(40, 36), (33, 71), (5, 4), (3, 2)])
    def test_picture_opens(self, shape, zoom, tmp_path):
        slice_ = torch.from_numpy(toy.head((*shape, 1))[..., 0]) / 1000
        path = tmp_path / "new" / "a.png"
        save_panels(path, [Panel("one", slice_), Panel("two", slice_, vmax=0.5, colours="magma")], aspect=1.3, zoom=zoom)
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert np.ptp(np.asarray(picture.convert("L"))) > 100
        assert [p.name for p in path.parent.iterdir()] == ["a.png"]

    def test_each_panel_takes_a_column(self, tmp_path):
        panel = Panel("a", torch.zeros(20, 20))
        widths = []
        for number in (1, 3):
            save_panels(tmp_path / "a.png", [panel] * number)
            widths.append(Image.open(tmp_path / "a.png").width)
        assert widths[1] == pytest.approx(3 * widths[0], abs=3)

    @pytest.mark.parametrize("value", [0.0, -1.0, 5.0])
    def test_flat_slice_is_no_obstacle(self, value, tmp_path):
        save_panels(tmp_path / "a.png", [Panel("flat", torch.full((20, 15), value))], zoom=0.25)
        assert Image.open(tmp_path / "a.png").size[0] > 100

    def test_tensor_of_a_network_is_no_obstacle(self, tmp_path):
        output = torch.rand(20, 15, dtype=torch.float64, requires_grad=True)
        save_panels(tmp_path / "a.png", [Panel("output", output * 1)], zoom=0.25)
        assert (tmp_path / "a.png").stat().st_size > 1000

    @pytest.mark.parametrize(("axcodes", "flips"), [(("R", "A"), []), (("L", "A"), [0]), (("R", "P"), [1]), (("L", "P"), [0, 1])])
    def test_anterior_is_up_and_the_patient_s_right_is_on_the_left(self, axcodes, flips, tmp_path):
        slice_ = torch.zeros(20, 20)
        slice_[15:, 12:] = 1
        save_panels(tmp_path / "a.png", [Panel("", slice_.flip(flips))], axcodes=axcodes)
        picture = np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(float)
        rows, columns = (np.flatnonzero((picture < 10).any(axis)) for axis in (1, 0))  # the black of the panel
        inside = picture[rows[0] : rows[-1], columns[0] : columns[-1]] > 200
        middle = [n // 2 for n in inside.shape]
        halves = [(slice(n), slice(n, None)) for n in middle]
        upper_left, upper_right, lower_left, lower_right = (inside[a, b].mean() for a in halves[0] for b in halves[1])
        assert upper_left > 0.2 > max(upper_right, lower_left, lower_right)


@pytest.mark.parametrize("fast", [True, False])
def test_a_volume_is_written_whether_isal_is_there_or_not(fast, tmp_path, monkeypatch):
    if fast:
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal.igzip", None)  # not importable
    image = nib.Nifti1Image(toy.head(), toy.affine())
    image.header["descrip"] = "kept"
    for name in ("a.nii.gz", "b.nii.gz"):
        save_nifti(image, tmp_path / name)
    with gzip.open(tmp_path / "a.nii.gz") as stream:  # to the end: the checksum is right
        assert len(stream.read()) == 352 + toy.head().nbytes
    found = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found.get_fdata(dtype=np.float32), toy.head())
    assert np.array_equal(found.affine, image.affine) and found.header["descrip"] == b"kept"
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
