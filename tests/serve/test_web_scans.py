"""The web page in a real browser with DICOM and NIfTI: slice, window, plane, preview, and what is kept of them."""

import base64
import io
import json
import re
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from PIL import Image

from llava.images import ImageOptions, ImageWithOptions, open_image
from tests.images.test_medical import dicom
from tests.serve.browsing import (
    PATIENCE,
    accept,
    add_files,
    ask,
    choose,
    expect,
    last_answer,
    save,
    screenshot,
    whole_answer,
    worker,
)
from tests.serve.processes import wait_until

pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

SLICES = 40
IDENTIFIERS = {
    "PatientName": "Musterfrau^Erika",
    "PatientID": "PAT-55119",
    "PatientBirthDate": "19340201",
    "InstitutionName": "Klinikum Musterstadt",
    "AccessionNumber": "ACC-90210",
    "ReferringPhysicianName": "Arzt^Anton",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.11",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.22",
}


def body(place: int, side: int = 160, noise: float = 0.0) -> np.ndarray:
    """A slice of a made-up chest in Hounsfield units + 1024: lungs that grow, a spot in slices 25 to 30.

    `noise`: its standard deviation in Hounsfield units.
    """
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    values = np.full((side, side), -1000.0)
    values[(x / 0.85) ** 2 + (y / 0.6) ** 2 < 1] = 40
    size = 0.18 + 0.004 * place
    for side in (-0.4, 0.4):
        values[((x - side) / size) ** 2 + (y / (1.5 * size)) ** 2 < 1] = -850
    values[(x / 0.12) ** 2 + ((y - 0.4) / 0.12) ** 2 < 1] = 700
    if 25 <= place <= 30:
        values[(x + 0.4) ** 2 + (y - 0.1) ** 2 < 0.004] = 60
    values += noise * np.random.default_rng(place).normal(size=values.shape)
    return (values + 1024).clip(0).astype(np.uint16)


def series(folder: Path, side: int = 160, noise: float = 0.0) -> list[Path]:
    """40 files whose names and numbers say nothing of their places in the body."""
    paths = []
    for place in range(SLICES):
        path = folder / f"IM{place * 7 % SLICES:03d}"  # without suffix, as scanners write them
        tags = IDENTIFIERS | {"InstanceNumber": str(place * 7 % SLICES + 1), "Modality": "CT"}
        tags |= {"ImagePositionPatient": [0, 0, 2.5 * place], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        tags |= {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
        path.write_bytes(dicom(body(place, side, noise), **tags))
        paths.append(path)
    return sorted(paths)


def shown(page, at: int = -1) -> np.ndarray:
    """The pixels, grey, of the last of the large images, or another one."""
    source = page.locator("#viewer img.large").nth(at).get_attribute("src")
    if source.startswith("data:"):
        content = base64.b64decode(source.partition(",")[2])
    else:
        content = page.request.get(urljoin(page.url, source)).body()
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def as_opened(place: int, **options) -> Image.Image:
    content = dicom(body(place), RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    return open_image(ImageWithOptions(content, ImageOptions(**options))).convert("L")


def opened(open_page, model):
    page = open_page(height=1000)
    accept(page, model)
    return page


def upload(page, paths, images=1):
    """Add a scan; what the model sees of it is shown last."""
    add_files(page, paths, images)
    if page.locator("[data-do=compare]").get_attribute("aria-pressed") == "false":
        page.locator("[data-do=compare]").click()
    expect(page.locator("#viewer img.large")).to_have_count(2, timeout=PATIENCE)


def wait_for_view(page, place: int, **options):
    """Of a slice of `series`, beside what the scripted worker makes of it."""
    slice = as_opened(place, **options)
    wait_until(lambda: np.array_equal(shown(page), slice.resize((64, 64))), 60)
    assert np.array_equal(shown(page, 0), slice)


def set_slider(page, name: str, value: float):
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Enter")
    field.blur()


def test_a_ct_series(open_page, controller, web, tmp_path):
    with worker(controller, "scan-model") as process:
        process.wait()
        page = opened(open_page, "scan-model")
        expect(page.locator("#scan")).to_have_count(0)
        upload(page, series(tmp_path))
        expect(page.locator("#box").get_by_role("listitem", name="File thumbnail")).to_have_count(0, timeout=PATIENCE)
        wait_for_view(page, 20)
        expect(page.locator("#viewer")).to_contain_text(
            "window 40/400 (centre/width), the file's own", timeout=PATIENCE
        )
        expect(page.locator("#viewer")).to_contain_text("Beside it: what scan-model sees", timeout=PATIENCE)
        expect(page.locator("#scan-axis")).to_have_count(0)

        set_slider(page, "scan-place", 27)
        wait_for_view(page, 27)
        choose(page, "#scan-preset", "lung")
        wait_for_view(page, 27, preset="lung")
        expect(page.locator("#scan-centre input[type=number]")).to_have_value("-600", timeout=PATIENCE)
        expect(page.locator("#scan-width input[type=number]")).to_have_value("1500", timeout=PATIENCE)
        expect(page.locator("#draft")).to_contain_text("With your next question: 1 image.", timeout=PATIENCE)
        screenshot(page, "web_scan")
        ask(page, "Is there a nodule?")
        expect(last_answer(page)).to_contain_text("nodule?", timeout=PATIENCE)
        expect(page.locator("#chat0 [data-testid=user] img.thumb")).to_have_count(1, timeout=PATIENCE)
        expect(page.locator("#draft")).to_contain_text("is added already", timeout=PATIENCE)
        # The view that was asked about stands there once, as the scan; as an image once another one is chosen.
        expect(page.locator("#viewer [data-image]")).to_have_count(1, timeout=PATIENCE)

        set_slider(page, "scan-width", 1000)
        wait_for_view(page, 27, window=(-600, 1000))
        expect(page.locator("#viewer [data-image]")).to_have_count(2, timeout=PATIENCE)
        page.locator("[data-image='0']").click()
        wait_until(lambda: np.array_equal(shown(page, 0), as_opened(27, preset="lung")), 60)
        expect(page.locator("[data-image='0']")).to_have_attribute("aria-pressed", "true")
        page.locator("[data-image='1']").click()
        wait_for_view(page, 27, window=(-600, 1000))
        expect(page.locator("#scan-preset input")).to_have_value("own values", timeout=PATIENCE)
        page.locator("#scan-add").click()
        expect(page.locator("#draft img.thumb")).to_have_count(1, timeout=PATIENCE)
        set_slider(page, "scan-place", 3)
        wait_for_view(page, 3, window=(-600, 1000))
        ask(page, "And in these two?")
        expect(last_answer(page)).to_contain_text("two?", timeout=PATIENCE)
        ask(page, "Without another image?")
        whole_answer(page, "image?")
        text = save(page)
        page.locator("#vote-good").click()
        wait_until(lambda: any(path.stat().st_size for path in web.votes.glob("*.jsonl")), 60)
        page.locator("#clear").click()
        expect(page.locator("#scan")).to_have_count(0, timeout=PATIENCE)

    first, second, third = json.loads(text)["turns"]
    assert first["image_options"] == [
        {"preset": "lung", "slice": 27, "of": SLICES, "shown": ["window -600/1500 (centre/width), as asked"]}
    ]
    assert first["answers"][0]["text"].startswith("echo:")
    assert [(each["window"], each["slice"]) for each in second["image_options"]] == [
        ([-600, 1000], 27),
        ([-600, 1000], 3),
    ]
    assert len(first["images"]) == 1 and first["images"][0] == second["images"][0] != second["images"][1]
    assert third["images"] == [] and "image_options" not in third
    kept = text + "".join(file.read_text() for file in web.votes.glob("*.jsonl")) + web.log.read_text()
    for name, value in IDENTIFIERS.items():
        assert value not in kept, name
    assert not re.search(r"IM\d{3}", kept)


def test_slices_that_are_passed(open_page, controller, tmp_path):
    """Asked for by their address, and only the last of those that came while one was on its way; a question that is
    sent at once is about that one."""
    with worker(controller, "fast-model") as process:
        process.wait()
        page = opened(open_page, "fast-model")
        add_files(page, series(tmp_path), 1)
        number, image = page.locator("#scan-place input[type=number]"), page.locator("#viewer img.large")
        expect(number).to_have_value("20", timeout=PATIENCE)
        expect(page.locator("#viewer .words")).to_contain_text("40 slices", timeout=PATIENCE)
        page.wait_for_function("document.querySelector('#viewer img.large').complete")  # the next is asked for at once
        places = []
        page.on("request", lambda request: places.extend(re.findall(r"/slice/.*&place=(\d+)$", request.url)))
        page.evaluate("for (let n = 0; n < 10; n += 1) { window.llavaMoveSlice(1); }")
        expect(image).to_have_attribute("src", re.compile("place=30$"), timeout=PATIENCE)
        expect(page.locator("#viewer[data-moving]")).to_have_count(0, timeout=PATIENCE)
        assert np.array_equal(shown(page, 0), as_opened(30))
        assert places[:2] == ["21", "30"] and set(places[2:]) <= {"30"}

        page.locator("#box textarea").fill("Which one is it?")
        page.evaluate("window.llavaMoveSlice(3)")
        page.locator("#box textarea").press("Enter")
        whole_answer(page, "is it?")
        expect(page.locator("#draft")).to_contain_text("is added already", timeout=PATIENCE)
        (turn,) = json.loads(save(page))["turns"]
    assert [each["slice"] for each in turn["image_options"]] == [33]


def test_a_volume_and_a_photograph(open_page, controller, tmp_path):
    values = np.random.default_rng(0).normal(size=(12, 14, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "volume.nii.gz")
    Image.new("RGB", (40, 40), (120, 10, 10)).save(tmp_path / "photo.png")
    with worker(controller, "volume-model") as process:
        process.wait()
        page = opened(open_page, "volume-model")
        page.locator("#box input[type=file]").set_input_files([tmp_path / "photo.png"])
        expect(page.locator("#viewer img.large")).to_have_count(1, timeout=PATIENCE)
        page.locator("#box textarea").fill("typed before the")
        upload(page, [tmp_path / "volume.nii.gz"], 2)
        expect(page.locator("#box textarea")).to_have_value("typed before the")
        expect(page.locator("#viewer")).to_contain_text("axial slice 8 of 16", timeout=PATIENCE)
        page.locator("#scan-axis").get_by_text("sagittal").click()
        expect(page.locator("#viewer")).to_contain_text("sagittal slice 6 of 12", timeout=PATIENCE)
        set_slider(page, "scan-place", 2)
        expect(page.locator("#viewer")).to_contain_text("sagittal slice 2 of 12", timeout=PATIENCE)
        ask(page, "What is it?")
        whole_answer(page, "it?")
        (turn,) = json.loads(save(page))["turns"]
    photo, volume = turn["image_options"]
    assert photo is None and (volume["axis"], volume["slice"], volume["of"]) == (0, 2, 12)


def test_a_broken_file_and_one_taken_back(open_page, controller, tmp_path):
    """A scan that can't be read is said so and leaves the box."""
    (tmp_path / "broken.dcm").write_bytes(dicom(body(1))[:3000])
    (tmp_path / "whole").write_bytes(dicom(body(1), SeriesInstanceUID="1.2"))
    with worker(controller, "some-model") as process:
        process.wait()
        page = opened(open_page, "some-model")
        page.locator("#box input[type=file]").set_input_files([tmp_path / "broken.dcm"])
        expect(page.locator("#refused")).to_contain_text("Refused", timeout=PATIENCE)
        expect(page.locator("#box").get_by_role("listitem", name="File thumbnail")).to_have_count(0, timeout=PATIENCE)
        expect(page.locator("#scan")).to_have_count(0)
        upload(page, [tmp_path / "whole"])
        expect(page.locator("#scan-place")).to_have_count(0)
        expect(page.locator("#refused [role=alert]")).to_have_count(0)
        page.locator("#viewer .remove").click()
        expect(page.locator("#scan")).to_have_count(0, timeout=PATIENCE)
        ask(page, "Is there an image?")
        whole_answer(page, "image?")
        (turn,) = json.loads(save(page))["turns"]
        assert turn["images"] == []
