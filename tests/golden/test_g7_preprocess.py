"""Pixel values of the three references: every image, every way of fitting it, both sizes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.images import ImageProcessor, open_image
from llava.images.anyres import best_pinpoint
from tests.conftest import golden_cases

ASPECTS = {"none": "square", "square": "square", "pad": "pad", "pad_low": "pad", "keep": "keep", "anyres": "anyres"}
NEVER_OURS = ("pad_high",)
"""Fault 2: v1.5's padding may be one pixel more than (w-h)//2, at random."""


@pytest.mark.parametrize("case", golden_cases("G7_image_preprocess"))
def test_pixel_values(case: Path):
    table, tolerance = _read(case)
    means = np.load(case / "block_means.npz")
    full = np.load(case / "full_float32.npz") if (case / "full_float32.npz").is_file() else {}
    checked = 0
    for key, expected in table.items():
        if not _is_wanted(table, key):
            continue
        name, _, aspect, size = key.split("|")
        image = Image.open(case.parent / "images" / name).convert("RGB")  # turned and blended by no reference
        ours = _process(image, ASPECTS[aspect], int(size)).reshape(expected["shape"])
        assert ours.dtype == np.float32
        blocks = torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(ours.reshape(-1, *ours.shape[-3:])).double(), 14
        ).numpy()
        np.testing.assert_allclose(blocks.reshape(means[key].shape), means[key], atol=tolerance, rtol=0, err_msg=key)
        found = {"mean": ours.mean(dtype=np.float64), "min": ours.min(), "max": ours.max()}
        found["std"] = ours.std(dtype=np.float64, ddof=1)
        assert found == pytest.approx({name: expected[name] for name in found}, abs=tolerance), key
        if key in full:
            np.testing.assert_allclose(ours, full[key], atol=tolerance, rtol=0, err_msg=key)
        checked += 1
    assert checked
    for size, best in table.get("best_resolution_table", []):
        pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
        assert best_pinpoint(*size, pinpoints) == tuple(best)


@pytest.mark.parametrize("case", golden_cases("G7_image_preprocess"))
def test_where_the_reference_fails_ours_gives_a_image(case: Path):
    """Fault 11 (a strip crashes, 16 bits saturate), and modes that padding can't colour."""
    table, _ = _read(case)
    failed = [key for key, value in table.items() if isinstance(value, dict) and "error" in value]
    names = {key.split("|")[0] for key in table if "|" in key}
    deep = [f"{name}|rgb|square|224" for name in names if _mode(table, name).startswith(("I", "F"))]
    assert failed or deep
    for key in failed + deep:
        name, _, aspect, size = key.split("|")
        path = case.parent / "images" / name
        values = _process(open_image(path), ASPECTS.get(aspect, "pad"), int(size))
        assert np.isfinite(values).all() and values.std() > 0.05, key
        if key in deep:
            raw = np.asarray(Image.open(path), np.float64)
            shown = np.asarray(open_image(path), np.float64)[..., 0]
            assert np.corrcoef(raw.ravel(), shown.ravel())[0, 1] > 0.999
            assert (shown == 255).mean() < 0.5


def _read(case: Path) -> tuple[dict, float]:
    meta = json.loads((case / "meta.json").read_text())
    return json.loads((case / "table.json").read_text()), float(re.search(r"\d(\.\d+)?e-\d+", meta["tolerance"])[0])


def _is_wanted(table: dict, key: str) -> bool:
    value = table[key]
    if not isinstance(value, dict) or "shape" not in value:
        return False
    name, reading, aspect, _ = key.split("|")
    if aspect in NEVER_OURS or _mode(table, name).startswith(("I", "F")):
        return False
    # An image used in its own mode: the padding colour of grey and palette images comes out wrong (fault 11).
    return reading == "rgb" or aspect == "none" or _mode(table, name) in ("RGB", "RGBA")


def _mode(table: dict, name: str) -> str:
    if f"{name}|info" in table:
        return table[f"{name}|info"]["mode"]
    return ""


def _process(image: Image.Image, aspect: str, size: int) -> np.ndarray:
    processor = ImageProcessor.from_config({"size": size, "crop_size": size})
    return np.stack(processor([image], aspect))
