"""The HTML report, as a parser and as a browser see it."""

import base64
import datetime
import hashlib
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from PIL import Image

from bundle.resampling import upsample

ROOT = Path(__file__).parents[1]
SHAPE, SPACING = (30, 24, 8), (1.0, 1.5, 3.0)
EVIL = "<img src=x onerror=alert(1)>&'\" $title"
STORED = ("RAS", "LAS", "LPI", "PIR")


class Page(HTMLParser):
    """What a report holds. An element that is not closed, or an image that does not decode, is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.elements = list[str](), list[tuple[str, dict]]()
        self.figures, self.rows, self.warnings, self.text = list[dict](), list[list[str]](), list[str](), ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open
        self.views, self.residuals = self.figures[:3], self.figures[3:]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "figure":
            self.figures.append({"images": [], "labels": {}, "caption": ""})
        elif tag == "img" and "figure" in self.open:
            content = attributes["src"].removeprefix("data:image/png;base64,")
            image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            self.figures[-1]["images"].append(np.asarray(image.convert("RGB")).astype(float))
        elif tag == "b":
            self.edge = attributes["class"]
        elif tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            return
        self.text += data
        if inside == "b":
            self.figures[-1]["labels"][self.edge] = data
        elif inside == "figcaption":
            self.figures[-1]["caption"] += data
        elif inside in ("th", "td"):
            self.rows[-1].append(data)
        elif inside == "li":
            self.warnings.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reports of a head, of a ramp stored in several ways, and of a volume whose name would harm a page."""
    folder = tmp_path_factory.mktemp("report")
    toy.write_nifti(folder / "in" / "site" / "head.nii.gz", toy.head(SHAPE), toy.affine(SPACING, (0, 0, 12)))
    ramps = np.meshgrid(*(np.linspace(0, top, n) for top, n in zip((400, 300, 200), (20, 18, 6))), indexing="ij")
    for axcodes in STORED:  # brighter to the right, to the front, and upwards
        toy.write_nifti(folder / "in" / f"{axcodes}.nii.gz", *toy.stored_as(axcodes, 100 + sum(ramps), toy.affine()))
    toy.write_nifti(folder / "in" / f"{EVIL}.nii.gz", toy.head((20, 18, 3)))
    excepthook = sys.excepthook
    monai.bundle.run(
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
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
        assert not {"href", "srcset", "action"} & attributes.keys()
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_page_shows_the_slices_that_it_names(folder, page):
    given = torch.from_numpy(canonical(folder / "in" / "site" / "head.nii.gz").copy())
    before = upsample(given.movedim(-1, 0), 2).movedim(0, -1).numpy()
    after = canonical(folder / "out" / "site" / "head_sr.nii.gz")
    unit = float(np.percentile(given[given > 0], 99.9))
    largest = float(re.search(r"\+(\S+)", page.text)[1])
    for view, residual, plane, axis in zip(page.views, page.residuals, ("Axial", "Coronal", "Sagittal"), (2, 1, 0)):
        number, count = (int(word) for word in view["caption"].removeprefix(f"{plane}, slice ").split(" of "))
        assert count == before.shape[axis]
        assert abs(number - count / 2) < 0.1 * count + 1
        a, b = (np.flip(v.take(number - 1, axis)).T for v in (before, after))  # the right of the patient on the left, the front on top
        for image, slice_ in zip(view["images"], (a, b)):
            np.testing.assert_allclose(image, np.clip(255 * slice_ / unit, 0, 255)[..., None] + np.zeros(3), atol=2.5)
        colours = matplotlib.colormaps["RdBu_r"](np.clip((b - a) / largest / 2 + 0.5, 0, 1))[..., :3]
        np.testing.assert_allclose(residual["images"][0], 255 * colours, atol=6)  # the scale is printed with three digits


@pytest.mark.parametrize("axcodes", STORED)
def test_letters_are_those_of_the_patient_however_a_volume_is_stored(axcodes, folder):
    page = Page(folder / "out" / f"{axcodes}_sr.html")
    assert [set(figure["labels"].values()) for figure in page.figures] == [set("RLAP"), set("RLSI"), set("APSI")] * 2
    for view in page.views:
        assert view["labels"]["left"] in "RA"  # as radiologists have it
        for image in view["images"]:
            ends = {"left": image[:, 1], "right": image[:, -2], "top": image[1], "bottom": image[-2]}
            of_letter = {letter: ends[edge].mean() for edge, letter in view["labels"].items()}
            for bright, dark in ("RL", "AP", "SI"):
                assert bright not in of_letter or of_letter[bright] > of_letter[dark] + 10


def test_page_says_what_the_result_is(folder, page):
    report = json.loads((folder / "out" / "site" / "head_sr.json").read_text())
    rows = {name: values for name, *values in page.rows}
    assert rows["Voxels, left-right x posterior-anterior x inferior-superior"] == ["30 x 24 x 8", "60 x 48 x 8"]
    assert rows["Spacing, mm"] == ["1 x 1.5 x 3", "0.5 x 0.75 x 3"]
    assert [float(v) for v in rows["Consistency, dB"]] == [report["consistency_db"][name] for name in ("interpolated", "result")]
    assert rows["SHA-256 of the weights"] == [hashlib.sha256((folder / "random.pt").read_bytes()).hexdigest()]
    assert rows["Version of the bundle"] == [json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]]
    age = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(rows["Date"][0])
    assert abs(age) < datetime.timedelta(minutes=30)
    assert page.warnings == report["warnings"] and any(line.startswith("slice distance, in mm, is 3;") for line in page.warnings)
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
        **toy.TINY_INFERENCE,
    )
    page = Page(tmp_path / "flat_sr.html")
    assert page.warnings == ["not compared with the training data: no ranges beside the weights"]
    assert "Grey values: -" in page.text
    assert "tilted" not in page.text
    assert all(image.min() > 240 for residual in page.residuals for image in residual["images"])  # nothing added: white
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
    """``tab(name)``: a report in the browser, which must load nothing else and complain of nothing."""
    requests, complaints = [], []
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))

    def open_(name):
        tab.goto((folder / "out" / name).as_uri())
        return tab

    yield open_
    tab.close()
    assert not complaints
    assert [url for url in requests if not url.startswith("data:")] == requests[:1]


def picture(element):
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(float)


class TestInABrowser:
    def test_planes_have_one_scale(self, tab):
        boxes = [view.bounding_box() for view in tab("site/head_sr.html").locator(".view").all()]
        x, y, z = (n * s for n, s in zip(SHAPE, SPACING))
        scale = boxes[0]["width"] / x
        assert scale > 3
        for box, (width, height) in zip(boxes, [(x, y), (x, z), (y, z)] * 2):
            assert (box["width"], box["height"]) == pytest.approx((scale * width, scale * height), abs=1)
        assert boxes[0]["height"] < 900

    def test_slider_goes_from_the_input_to_the_result(self, tab):
        page = tab("site/head_sr.html")
        slider, view = page.get_by_role("slider"), page.locator(".pair .view").first
        assert slider.input_value() == "50"
        page.keyboard.press("Tab")
        assert slider.evaluate("element => element === document.activeElement")
        half = picture(view)
        page.keyboard.press("Home")
        start = picture(view)
        page.keyboard.press("End")
        end = picture(view)
        middle = half.shape[1] // 2
        np.testing.assert_array_equal(half[:, 5 : middle - 5], end[:, 5 : middle - 5])
        np.testing.assert_array_equal(half[:, middle + 5 : -5], start[:, middle + 5 : -5])
        assert np.abs(end - start).max() > 5
        page.keyboard.press("ArrowLeft")
        assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == ("99", "99 % result")

    def test_line_follows_the_mouse(self, tab):
        page = tab("site/head_sr.html")
        box = page.locator(".pair .view").nth(2).bounding_box()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 20)
        assert page.get_by_role("slider").input_value() == "50"
        page.mouse.down()
        assert page.get_by_role("slider").input_value() == "80"
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 10)
        assert page.get_by_role("slider").input_value() == "25"

    def test_name_does_no_harm(self, tab):
        assert tab(f"{EVIL}_sr.html").locator("h1").inner_text() == f"Super-resolution of {EVIL}.nii.gz"
