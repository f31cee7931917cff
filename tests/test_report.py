"""The HTML report, as a parser and as a browser see it."""

import base64
import datetime
import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from monai.data import MetaTensor
from PIL import Image

from bundle import report
from bundle.errors import reason
from bundle.resampling import upsample
from bundle.results import Results

ROOT = Path(__file__).parents[1]
SHAPE, SPACING = (30, 24, 8), (1.0, 1.5, 3.0)
EVIL = "<img src=x onerror=alert(1)>&'\" $title"
STORED = ("RAS", "LAS", "LPI", "PIR")


class Page(HTMLParser):
    """What a page holds. An element that is not closed, or an image that does not decode, is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.elements = list[str](), list[tuple[str, dict]]()
        self.figures, self.rows, self.warnings, self.text = list[dict](), list[list[str]](), list[str](), ""
        self.script = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open
        self.inputs, self.results, self.residuals = (self.figures[n : n + 3] for n in (0, 3, 6))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "figure":
            self.figures.append({"labels": {}, "caption": ""})
        elif tag == "img" and "figure" in self.open:
            content = attributes["src"].removeprefix("data:image/jpeg;base64,")
            self.figures[-1]["image"] = decoded(content)
        elif tag == "b":
            self.edge = attributes.get("class")
        elif tag == "tr":
            self.rows.append([])
        elif tag == "ul":
            self.list = attributes.get("class")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.script = self.script or data  # the first one holds the slices
        if inside in ("script", "style"):
            return
        self.text += data
        if inside == "b" and "figure" in self.open:
            self.figures[-1]["labels"][self.edge] = data
        elif inside == "figcaption":
            self.figures[-1]["caption"] += data
        elif inside in ("th", "td"):
            self.rows[-1].append(data)
        elif inside == "li" and self.list == "warnings" and data.strip():
            self.warnings.append(data)


def decoded(content):
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    return np.asarray(image.convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reports of a head, of a ramp stored in several ways, of a volume whose name would harm a page, and of two files that have none."""
    folder = tmp_path_factory.mktemp("report")
    toy.write_nifti(folder / "in" / "site" / "head.nii.gz", toy.head(SHAPE), toy.affine(SPACING, (0, 0, 12)))
    ramps = np.meshgrid(*(np.linspace(0, top, n) for top, n in zip((400, 300, 200), (20, 18, 6))), indexing="ij")
    for axcodes in STORED:  # brighter to the right, to the front, and upwards
        toy.write_nifti(folder / "in" / f"{axcodes}.nii.gz", *toy.stored_as(axcodes, 100 + sum(ramps), toy.affine()))
    toy.write_nifti(folder / "in" / f"{EVIL}.nii.gz", toy.head((20, 18, 3)))
    (folder / "in" / f"broken {EVIL}.nii.gz").write_text("no volume")
    toy.write_nifti(folder / "in" / "series.nii.gz", np.stack([toy.head((20, 18, 3))] * 3, -1))
    excepthook = sys.excepthook
    arguments = dict(
        config_file=str(ROOT / "configs" / "inference.json"),
        dataset_dir=str(folder / "in"),
        output_dir=str(folder / "out"),
        checkpoint=str(toy.save_checkpoint(folder / "random.pt")),
        training_ranges=str(ROOT / "models" / "baselines" / "proposed.json"),
        device="$torch.device('cpu')",
        report=True,
        clip=False,
        **toy.TINY_INFERENCE,
    )
    with pytest.raises(Exception) as error:
        monai.bundle.run(**arguments)
    assert reason(error.value).startswith("1 of 7 volumes failed")
    sys.excepthook = excepthook
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "out" / "site" / "head_sr.html")


def canonical(path):
    return nib.as_closest_canonical(nib.load(path)).get_fdata()


def test_page_needs_nothing_else(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert "src" not in attributes or attributes["src"].startswith("data:image/jpeg;base64,")
        assert not {"href", "srcset", "action"} & attributes.keys()
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def layers(folder):
    """Input, result and residual of the head, as the page turns them: from the patient's right, front and top."""
    given = torch.from_numpy(canonical(folder / "in" / "site" / "head.nii.gz").copy())
    before = upsample(given.movedim(-1, 0), 2).movedim(0, -1).numpy()
    after = canonical(folder / "out" / "site" / "head_sr.nii.gz")
    unit = float(np.percentile(given[given > 0], 99.9))
    return [np.flip(volume) / unit for volume in (before, after, after - before)], unit


def assert_nearly(shown, true, scale):
    """Equal, as far as a JPEG can be."""
    difference = np.abs(shown - true) / scale
    assert difference.mean() < 0.01 and difference.max() < 0.15


def test_middle_slices_are_those_that_the_page_names(folder, page):
    volumes, unit = layers(folder)
    data = json.loads(page.script)
    box = [slice(first, first + side) for first, side in zip(data["first"], data["sides"])]
    largest = float(re.search(r"\+(\S+)\.", page.text)[1]) / unit
    for n, (plane, axis) in enumerate((("Axial", 2), ("Coronal", 1), ("Sagittal", 0))):
        number, count = (int(word) for word in page.results[n]["caption"].removeprefix(f"{plane}, slice ").split(" of "))
        assert count == volumes[0].shape[axis]
        assert abs(number - count / 2) < 0.1 * count + 1
        slices = [v.take(count - number, axis)[tuple(part for other, part in enumerate(box) if other != axis)].T for v in volumes]
        for figure, slice_ in zip((page.inputs[n], page.results[n]), slices):
            assert_nearly(figure["image"].mean(2), np.clip(255 * slice_, 0, 255), 255)
        image = page.residuals[n]["image"]
        small = np.abs(slices[2]) < 0.5 * largest  # orange, black or blue; beyond, the colours become paler
        assert np.corrcoef((image[..., 0] - image[..., 2])[small], slices[2][small])[0, 1] > 0.9


def test_page_holds_every_voxel_of_every_layer(folder, page):
    data = json.loads(page.script)
    box = tuple(slice(first, first + side) for first, side in zip(data["first"], data["sides"]))
    assert [layer["name"] for layer in data["layers"]] == ["Input", "Result", "Residual"]
    assert data["grid"] == data["sides"]
    for layer, volume in zip(data["layers"], layers(folder)[0]):
        low, high = layer["range"]
        shown = np.stack([low + (high - low) * decoded(content)[..., 0].T / 255 for content in layer["slices"]], -1)
        outside = volume.copy()
        outside[box] = 0
        assert np.abs(outside).max() < 0.11  # nothing but air is left out
        assert_nearly(shown, volume[box].clip(low, high), high - low)


@pytest.mark.parametrize("limit", [600_000, 300_000])
def test_large_volume_becomes_coarser_and_the_page_says_so(limit, monkeypatch):
    noise = MetaTensor(torch.rand(1, 120, 100, 80, generator=torch.manual_seed(0)), affine=torch.eye(4))
    monkeypatch.setattr(report, "MAX_BYTES", limit)
    text = report.html_report("noise", [report.Layer("Input", "", noise), report.Layer("Result", "", noise)], 1.0, [], [])
    assert 0.3 * limit < len(text) <= limit
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    finest = 120 / data["grid"][0]
    assert f"pictures have voxels of {1.25 ** round(np.log(finest) / np.log(1.25)):.2g} mm or more" in text
    assert [len(layer["slices"]) for layer in data["layers"]] == [data["grid"][2]] * 2
    for content in data["layers"][0]["slices"]:
        assert decoded(content).shape[:2] == tuple(data["grid"][1::-1])


def test_another_layer_has_its_own_colours(tmp_path):
    ramp = torch.linspace(0, 1, 20).expand(1, 24, 22, 20)
    image = MetaTensor(ramp, affine=torch.eye(4))
    layers = [
        report.Layer("Input", "", image),
        report.Layer("Result", "", image),
        report.Layer("Uncertainty", "Of the result.", image, "positive"),
    ]
    path = tmp_path / "page.html"
    path.write_text(report.html_report("ramp", layers, 100.0, [], []), encoding="utf-8")
    page = Page(path)
    data = json.loads(page.script)
    assert [(layer["name"], layer["kind"]) for layer in data["layers"]][2] == ("Uncertainty", "positive")
    assert data["layers"][2]["window"] == [0, pytest.approx(1, abs=0.01)]
    colours = np.frombuffer(base64.b64decode(data["colours"]["positive"]), np.uint8).reshape(256, 3)
    assert colours[0].max() < 10 and colours[255].min() > 150
    coronal = page.figures[7]["image"]
    assert coronal[1].mean() > coronal[-2].mean() + 100  # more of it above


@pytest.mark.parametrize("axcodes", STORED)
def test_letters_are_those_of_the_patient_however_a_volume_is_stored(axcodes, folder):
    page = Page(folder / "out" / f"{axcodes}_sr.html")
    assert [set(figure["labels"].values()) for figure in page.figures] == [set("RLAP"), set("RLSI"), set("APSI")] * 3
    for view in page.inputs + page.results:
        assert view["labels"]["left"] in "RA"  # as radiologists have it
        image = view["image"]
        ends = {"left": image[:, 1], "right": image[:, -2], "top": image[1], "bottom": image[-2]}
        of_letter = {letter: ends[edge].mean() for edge, letter in view["labels"].items()}
        for bright, dark in ("RL", "AP", "SI"):
            assert bright not in of_letter or of_letter[bright] > of_letter[dark] + 10


def test_page_says_what_the_result_is(folder, page):
    written = json.loads((folder / "out" / "site" / "head_sr.json").read_text())
    rows = {name: values for name, *values in page.rows}
    assert rows["Voxels, left-right x posterior-anterior x inferior-superior"] == ["30 x 24 x 8", "60 x 48 x 8"]
    assert rows["Spacing, mm"] == ["1 x 1.5 x 3", "0.5 x 0.75 x 3"]
    assert [float(v) for v in rows["Consistency, dB"]] == [written["consistency_db"][name] for name in ("interpolated", "result")]
    assert rows["SHA-256 of the weights"] == [hashlib.sha256((folder / "random.pt").read_bytes()).hexdigest()]
    assert rows["Version of the bundle"] == [json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]]
    age = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(rows["Date"][0])
    assert abs(age) < datetime.timedelta(minutes=30)
    assert page.warnings == written["warnings"] and any(line.startswith("slice distance, in mm, is 3;") for line in page.warnings)
    assert "Research use only. Not for diagnosis." in page.text
    assert "Super-resolution of site/head.nii.gz" in page.text
    assert "tilted by 12° against the patient's axes" in page.text


def test_names_stay_text(folder):
    page = Page(folder / "out" / f"{EVIL}_sr.html")
    assert f"Super-resolution of {EVIL}.nii.gz" in page.text
    assert not [a for _, a in page.elements if "onerror" in a]


def test_missing_ranges_are_said(tmp_path, monkeypatch):
    monai.bundle.run(
        config_file=str(ROOT / "configs" / "inference.json"),
        dataset_dir=str(toy.write_nifti(tmp_path / "flat.nii.gz", -1 - toy.head((20, 18, 3)))),  # no foreground either
        output_dir=str(tmp_path),
        checkpoint=str(toy.save_checkpoint(tmp_path / "untrained.pt", random=False)),
        report=True,
        clip=False,
        **toy.TINY_INFERENCE,
    )
    page = Page(tmp_path / "flat_sr.html")
    assert page.warnings[0].startswith("many values lie far below that of the air")
    assert page.warnings[1:] == ["not compared with the training data: no ranges beside the weights"]
    assert "Grey values: -" in page.text
    assert "tilted" not in page.text
    assert all(residual["image"].max() < 15 for residual in page.residuals)  # nothing added: black
    assert sorted(path.name for path in tmp_path.iterdir() if "_sr" in path.name) == [
        f"flat_sr.{ending}" for ending in ("html", "json", "nii.gz", "png")
    ]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        installed = [playwright.chromium.executable_path, *map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))]
        path = next((path for path in installed if path and Path(path).exists()), None)
        if path is None:
            pytest.skip("needs a browser: playwright install --only-shell chromium")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, folder):
    """``tab(name, **options of the context)``: a page in the browser, which must load nothing else and complain of nothing."""
    requests, complaints, contexts = [], [], []

    def open_(name, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options}))
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.goto((folder / "out" / name).as_uri())
        if name.endswith("_sr.html") and options.get("java_script_enabled", True):
            tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert not complaints
    assert [url for url in requests if not url.startswith("data:")] == requests[:1] or "index.html" in requests[0]


def picture(element):
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(float)


def captions(page):
    settled(page)
    return page.locator("#views figcaption").all_inner_texts()


def settled(page):
    """Wait until what was asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


class TestInABrowser:
    NAME = "site/head_sr.html"

    def views(self, page):
        return page.locator("#views .view").all()

    def test_planes_have_one_scale(self, tab):
        page = tab(self.NAME)
        boxes = [view.bounding_box() for view in self.views(page)]
        sides = page.evaluate("JSON.parse(document.getElementById('data').textContent).sides")
        x, y, z = (n * s for n, s in zip(sides, (0.5, 0.75, 3.0)))
        scale = boxes[0]["width"] / x
        assert scale > 3
        for box, (width, height) in zip(boxes, [(x, y), (x, z), (y, z)]):
            assert (box["width"], box["height"]) == pytest.approx((scale * width, scale * height), abs=1)
        assert boxes[0]["height"] < 900

    def test_wheel_scrolls_one_plane_from_end_to_end(self, tab):
        page = tab(self.NAME)
        first, second, third = captions(page)
        self.views(page)[0].hover()
        before, scrolled = picture(self.views(page)[0]), page.evaluate("scrollY")
        axial = page.locator("#views figcaption").first
        expect = pytest.importorskip("playwright.sync_api").expect  # which waits
        page.mouse.wheel(0, 100)
        expect(axial).to_have_text(f"Axial, slice {int(first.split()[2]) - 1} of 8")  # downwards in the patient
        assert captions(page)[1:] == [second, third]
        assert np.abs(picture(self.views(page)[0]) - before).max() > 5
        for _ in range(9):
            page.mouse.wheel(0, 100)
        expect(axial).to_have_text("Axial, slice 1 of 8")
        for _ in range(9):
            page.mouse.wheel(0, -100)
        expect(axial).to_have_text("Axial, slice 8 of 8")
        assert page.evaluate("scrollY") == scrolled

    def test_keys_move_the_crosshair_and_the_slice(self, tab):
        page = tab(self.NAME)
        axial, coronal, sagittal = (int(text.split()[2]) for text in captions(page))
        self.views(page)[0].focus()
        for key in ("PageUp", "ArrowLeft", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
        assert [int(text.split()[2]) for text in captions(page)] == [axial + 1, coronal - 2, sagittal + 1]

    def test_slider_has_a_slice_for_each_step(self, tab):
        page = tab(self.NAME)
        slider = page.get_by_role("slider", name="Coronal slice")
        slider.focus()
        page.keyboard.press("Home")
        first = int(captions(page)[1].split()[2])
        page.keyboard.press("ArrowRight")
        assert captions(page)[1] == f"Coronal, slice {first + 1} of 48"
        assert slider.get_attribute("aria-valuetext") == f"slice {first + 1} of 48"

    def test_click_sets_the_crosshair_in_all_planes_and_says_where(self, tab, folder):
        page = tab(self.NAME)
        page.get_by_role("radio", name="Result").check(force=True)
        view = self.views(page)[0]
        box = view.bounding_box()
        view.click(position={"x": 0.25 * box["width"], "y": 0.75 * box["height"]})
        axial, coronal, sagittal = (int(text.split()[2]) for text in captions(page))
        data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
        expected = [data["counts"][n] - data["first"][n] - part * data["sides"][n] for n, part in enumerate((0.25, 0.75))]
        assert [sagittal, coronal] == pytest.approx(expected, abs=1)
        result = nib.as_closest_canonical(nib.load(folder / "out" / "site" / "head_sr.nii.gz"))
        index = [sagittal - 1, coronal - 1, axial - 1]
        place = result.affine @ [*index, 1]
        text = page.locator("#where").inner_text()
        for letters, mm in zip(("RL", "AP", "SI"), place):
            assert f"{letters[int(mm < 0)]} {abs(mm):.1f}" in text
        shown = float(re.search(r"result (\S+),", text)[1])
        assert shown == pytest.approx(result.get_fdata()[tuple(index)], abs=0.04 * result.get_fdata().max())
        line = page.locator("#views i.column").first
        assert line.bounding_box()["x"] == pytest.approx(box["x"] + 0.25 * box["width"], abs=box["width"] / 30)

    def test_window_and_level_change_the_grey_values(self, tab):
        page = tab(self.NAME)
        page.get_by_role("radio", name="Input").check(force=True)
        settled(page)
        view, shown = self.views(page)[0], page.locator("#width-value")
        before, width = picture(view), shown.inner_text()
        page.get_by_role("slider", name="Window").fill("300")
        settled(page)
        assert float(shown.inner_text()) < 0.5 * float(width)
        narrow = picture(view)
        assert np.abs(narrow - before).mean() > 10
        page.get_by_role("button", name="Reset").click()
        settled(page)
        page.mouse.move(1, 1)
        np.testing.assert_array_equal(picture(view), before)
        box = view.bounding_box()
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.down(button="right")
        page.mouse.move(box["x"] + 50, box["y"] + 110)  # downwards: the level rises, so all becomes darker
        page.mouse.up(button="right")
        settled(page)
        assert picture(view).mean() < before.mean() - 5

    def test_compare_has_the_result_on_the_left_of_the_line(self, tab):
        page = tab(self.NAME)
        page.get_by_role("checkbox", name="Crosshair").uncheck()
        view, images = self.views(page)[0], {}
        for name in ("Input", "Result", "Compare"):
            page.get_by_role("radio", name=name).check(force=True)
            settled(page)
            images[name] = picture(view)
        middle = images["Input"].shape[1] // 2
        height = slice(0, int(0.8 * len(images["Input"])))  # the handle of the line is below
        np.testing.assert_array_equal(images["Compare"][height, 25 : middle - 25], images["Result"][height, 25 : middle - 25])
        np.testing.assert_array_equal(images["Compare"][height, middle + 25 : -25], images["Input"][height, middle + 25 : -25])
        assert np.abs(images["Input"] - images["Result"]).max() > 5
        box = view.bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
        page.mouse.up()
        settled(page)
        assert page.get_by_role("slider", name="Compare at").get_attribute("aria-valuetext") == "25 % result"

    def test_digits_choose_what_is_shown(self, tab):
        page = tab(self.NAME)
        page.keyboard.press("4")
        settled(page)
        assert page.get_by_role("radio", name="Residual").is_checked()
        assert self.views(page)[0].get_attribute("aria-label").endswith("of 8, Residual")
        assert page.locator("#level").is_disabled()  # 0 stays black
        assert page.locator("#low").inner_text() == "-" + page.locator("#high").inner_text()

    def test_swipe_scrolls_and_tap_sets_the_crosshair(self, tab):
        page = tab(self.NAME, viewport={"width": 390, "height": 844}, has_touch=True)
        view = self.views(page)[1]
        view.scroll_into_view_if_needed()
        before = captions(page)
        box = view.bounding_box()
        x, y = box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"]
        page.touchscreen.tap(x, y)
        assert captions(page)[2] != before[2]
        touch = page.context.new_cdp_session(page)
        for kind, at in (("touchStart", x), ("touchMove", x + 20), ("touchMove", x + 60), ("touchEnd", None)):
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [] if at is None else [{"x": at, "y": y}]})
        assert captions(page)[1] != before[1]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

    def test_without_javascript_the_middle_slices_stay(self, tab):
        page = tab(self.NAME, java_script_enabled=False)
        assert page.locator("#static img").count() == 9
        assert all(image.bounding_box()["width"] > 100 for image in page.locator("#static img").all())
        assert not page.locator("#viewer").is_visible()

    def test_name_does_no_harm(self, tab):
        assert tab(f"{EVIL}_sr.html").locator("h1").inner_text() == f"Super-resolution of {EVIL}.nii.gz"

    def test_index_shows_its_pictures_and_leads_to_the_reports(self, tab):
        page = tab("index.html")
        images = page.locator(".cards img")
        assert images.count() == 6
        for image in images.all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
        page.get_by_role("link", name=EVIL).click()
        assert page.locator("h1").inner_text() == f"Super-resolution of {EVIL}.nii.gz"


class Firefox:
    """Firefox without a window, through its own protocol (Marionette): Playwright drives only a build of its own."""

    def __init__(self, binary, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (profile / "user.js").write_text(f'user_pref("marionette.port", {port});')
        self.process = subprocess.Popen(
            [binary, "--headless", "--marionette", "--no-remote", "--profile", str(profile)], stderr=subprocess.DEVNULL
        )
        self.socket = self.until(lambda: self.connect(port))
        self.stream = self.socket.makefile("rb")
        self.answer()
        self.do("NewSession", capabilities={})

    @staticmethod
    def connect(port):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            return None

    @staticmethod
    def until(found):
        for _ in range(600):
            if result := found():
                return result
            time.sleep(0.2)
        raise TimeoutError

    def answer(self):
        size = b""
        while (letter := self.stream.read(1)) != b":":
            size += letter
        return json.loads(self.stream.read(int(size)))

    def do(self, command, **parameters):
        message = json.dumps([0, 1, f"WebDriver:{command}", parameters]).encode()
        self.socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self.answer()
        assert error is None, error
        return result

    def run(self, script):
        return self.do("ExecuteScript", script=script, args=[])["value"]


@pytest.fixture
def firefox(tmp_path):
    binary = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
    if binary is None:
        pytest.skip("needs Firefox")
    firefox = Firefox(binary, tmp_path)
    yield firefox
    firefox.process.terminate()
    firefox.process.wait(60)


@pytest.mark.slow
def test_firefox_shows_all_slices(firefox, folder):
    firefox.do("Navigate", url=(folder / "out" / "site" / "head_sr.html").as_uri())
    firefox.until(lambda: firefox.run("return document.documentElement.dataset.ready"))
    texts = "return [...document.querySelectorAll('#views figcaption')].map(caption => caption.textContent)"
    pixels = "const c = document.querySelector('#views canvas'); return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    assert firefox.run("return document.getElementById('state').textContent") == ""
    before, shown = firefox.run(texts), firefox.run(pixels)
    x, y = firefox.run(
        "const view = document.querySelector('#views .view'); view.scrollIntoView({block: 'center'});"
        "const box = view.getBoundingClientRect(); return [Math.round(box.x + 20), Math.round(box.y + 20)]"
    )
    turn = {"type": "scroll", "x": x, "y": y, "deltaX": 0, "deltaY": 120, "origin": "viewport"}
    firefox.do("PerformActions", actions=[{"type": "wheel", "id": "wheel", "actions": [turn]}])
    after = firefox.until(lambda: firefox.run(texts) != before and firefox.run(texts))
    assert [int(text.split()[2]) for text in after] == [int(text.split()[2]) - (n == 0) for n, text in enumerate(before)]
    assert firefox.run(pixels) != shown
    key = [{"type": kind, "value": "4"} for kind in ("keyDown", "keyUp")]
    firefox.do("PerformActions", actions=[{"type": "key", "id": "keys", "actions": key}])
    firefox.until(lambda: firefox.run("return document.querySelector('#views .view').getAttribute('aria-label')").endswith("Residual"))


def test_index_lists_results_failures_and_what_was_passed_over(folder):
    page = Page(folder / "out" / "index.html")
    assert "6 done, " in page.text and "1 failed; 1 skipped" in page.text
    links = [unquote(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert len(links) == 6 and {"site/head_sr.html", f"{EVIL}_sr.html"} < set(links)
    assert all((folder / "out" / link).is_file() for link in links)
    assert any(line.startswith("slice distance, in mm, is 3;") for line in page.warnings)
    assert f"broken {EVIL}.nii.gz" in page.text and "cannot be read as a volume" in page.text
    assert "series.nii.gz: a series of 3 volumes" in page.text
    assert not [a for _, a in page.elements if "onerror" in a]


def test_index_of_someone_else_stays(tmp_path):
    index = tmp_path / "index.html"
    index.write_text("my own page")
    volumes = [str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")]
    for pages in (False, True):
        Results(tmp_path, str(tmp_path), volumes, report=pages).write_index()
        assert index.read_text() == "my own page"
    index.unlink()
    Results(tmp_path, str(tmp_path), volumes, report=True).write_index([(volumes[0], f"{volumes[0]}: too <small>")])
    assert "<b>a.nii.gz</b> too &lt;small&gt;" in index.read_text()
    Results(tmp_path, str(tmp_path), volumes).write_index()
    assert "small" not in index.read_text()
