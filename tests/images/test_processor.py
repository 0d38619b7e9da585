"""Pixel values: equal to transformers' own CLIP processor, and sound where that one fails."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.images.anyres import best_pinpoint, default_pinpoints, read_pinpoints
from llava.records import read_json, write_json


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(640, 480), (480, 641), (100, 37), (224, 224), (30, 300), (1, 1), (225, 224)])
@pytest.mark.parametrize("edge", [224, 336, 27])
def test_equal_to_transformers(size, edge):
    reference = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    ours = ImageProcessor.from_config({"size": edge, "crop_size": edge})
    image = noise(*size)
    expected = reference(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours([image]), expected, atol=1e-6, rtol=0)


def test_padding_is_centred_and_of_the_mean_colour():
    processor = ImageProcessor.from_config({"size": 8, "crop_size": 8})
    white = processor([Image.new("RGB", (8, 3), "white")], "pad")[0]
    mean = [int(value * 255) for value in processor.image_mean]
    rows = processor([Image.new("RGB", (8, 8), tuple(mean))])[0][:, :, 0]
    is_padding = (np.abs(white[:, :, 0] - rows) < 1e-5).all(0)
    assert is_padding.tolist() == [True, True, False, False, False, True, True, True]  # (8 - 3) // 2 above


def test_strip_is_as_its_middle():
    """What overflows the memory of the reference: 1000 × 1 resized to 224000 × 224."""
    image = noise(1000, 1)
    values = ImageProcessor()([image, image.rotate(90, expand=True)])
    assert values.shape == (2, 3, 224, 224)
    assert np.isfinite(values).all()
    # The crop shows one pixel's width; its last column lies at the centre of pixel 500.
    processor = ImageProcessor()
    expected = (np.asarray(image)[0, 500] / 255 - processor.image_mean) / processor.image_std
    assert np.abs(values[0, :, :, -1] - expected[:, None]).max() < 0.05
    assert ImageProcessor()([image], "keep")[0].shape == (3, 1, 1000)


def test_very_long_images_agree_with_the_whole_resize():
    """The part that is cut out of a very long image is that of the resized whole, to one grey level."""
    image = noise(1400, 20)
    processor = ImageProcessor.from_config({"size": 28, "crop_size": 28})
    whole = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    ours, expected = processor([image])[0], whole(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - expected).max() < 1.01 / 255 / min(processor.image_std)


def test_batches_equal_singles_and_keep_their_order():
    processor = ImageProcessor.from_config({"size": 28, "crop_size": 28})
    images = [noise(40 + index, 60 - index, index) for index in range(5)]
    for aspect in (None, "pad"):
        batch = processor(images, aspect)
        assert batch.shape == (5, 3, 28, 28) and batch.dtype == np.float32
        for index, image in enumerate(images):
            np.testing.assert_array_equal(batch[index], processor(image, aspect)[0])
    assert processor([]).shape == (0, 3, 28, 28)


def test_anyres_tiles_put_together_are_the_image():
    processor = ImageProcessor.from_config({"size": 28, "crop_size": 28})
    image = noise(56, 56)
    (tiles,) = processor([image], "anyres")
    assert tiles.shape == (5, 3, 28, 28)
    rows = [np.concatenate([tiles[1 + 2 * row], tiles[2 + 2 * row]], axis=2) for row in (0, 1)]
    whole = ImageProcessor.from_config({"size": 56, "crop_size": 56})([image])[0]
    np.testing.assert_allclose(np.concatenate(rows, axis=1), whole, atol=1e-6)


def test_pinpoints():
    assert read_pinpoints("[(336, 672), (672, 336)]") == read_pinpoints([[336, 672], [672, 336]])
    assert best_pinpoint(100, 1000, default_pinpoints(336)) == (336, 1008)
    for wrong in ("[(336,", "x", [[0, 336]], [], [336]):
        with pytest.raises(LlavaError, match="image_grid_pinpoints"):
            read_pinpoints(wrong)


def test_pinpoints_are_of_few_tiles():
    processor = ImageProcessor.from_config({"size": 28, "crop_size": 28})
    for pair in ([10**6, 10**6], [28 * 65, 28], [int("9" * 400)] * 2, [float("inf"), 28]):
        with pytest.raises(LlavaError, match="image_grid_pinpoints"):
            processor([noise(56, 56)], "anyres", [[28, 56], pair])
    with pytest.raises(LlavaError, match="65 pairs"):
        read_pinpoints([[28, 28]] * 65)
    llava_1_6 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    one_vision = [[384 * columns, 384 * rows] for columns in range(1, 7) for rows in range(1, 7)]
    assert len(read_pinpoints(llava_1_6, 336)) == 5 and len(read_pinpoints(one_vision, 384)) == 36


@pytest.mark.parametrize("settings", [{"size": 28, "crop_size": 10**5}, {"size": {"shortest_edge": 10**5}}])
def test_sides_have_an_end(settings):
    with pytest.raises(LlavaError, match="at most 4096"):
        ImageProcessor.from_config(settings)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 224, "crop_size": 224},
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        {"size": {"height": 30, "width": 40}, "crop_size": [30, 40], "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ],
)
def test_round_trip_and_transformers_reads_it(config, tmp_path):
    processor = ImageProcessor.from_pretrained(config)
    processor.save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == processor
    assert ImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json") == processor
    image = noise(50, 60)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(processor([image]), theirs, atol=1e-6)


OTHERS = {
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("variant", ["", "Fast"])
def test_other_kinds_are_read_and_written_with_their_own_means(kind, variant, tmp_path):
    """A file that leaves out what equals the kind's defaults, as the hub's do, and a whole one."""
    image = noise(300, 250)
    write_json(tmp_path / "preprocessor_config.json", {"image_processor_type": kind + variant})
    processor = ImageProcessor.from_pretrained(tmp_path)
    expected = OTHERS[kind]()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(processor([image]), expected, atol=1e-6)
    sizes = {"size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    if kind == "BitImageProcessor":
        sizes |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": 2}
    processor = ImageProcessor.from_pretrained({"image_processor_type": kind} | sizes)
    processor.save_pretrained(tmp_path)
    assert read_json(tmp_path / "preprocessor_config.json")["image_processor_type"] == kind
    assert ImageProcessor.from_pretrained(tmp_path) == processor
    theirs = OTHERS[kind].from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"]
    assert theirs.shape == (1, 3, 28, 28)
    np.testing.assert_allclose(processor([image]), theirs, atol=1e-6)


def test_kinds_without_known_defaults(tmp_path):
    whole = {"size": 28, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    assert ImageProcessor.from_pretrained({"image_processor_type": "OtherImageProcessor"} | whole).kind.startswith("O")
    with pytest.raises(LlavaError, match="image_mean, image_std, resample of OtherImageProcessor must be given"):
        ImageProcessor.from_pretrained({"image_processor_type": "OtherImageProcessor", "size": 28})
    with pytest.raises(LlavaError, match="do_flip_channel_order of OtherImageProcessor isn't supported"):
        ImageProcessor.from_pretrained(
            {"image_processor_type": "OtherImageProcessor", "do_flip_channel_order": True} | whole
        )


def test_wrong_settings(tmp_path):
    with pytest.raises(LlavaError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_pretrained(tmp_path)
    for wrong in ({"size": "big"}, {"size": {"edge": 3}}, {"size": 0}, {"image_mean": [0.5]}, {"image_std": [0, 1, 1]}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(LlavaError, match=r"preprocessor_config\.json"):
            ImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(LlavaError, match="stretch"):
        ImageProcessor()([noise(4, 4)], "stretch")


@pytest.mark.parametrize(
    "settings", [{"resample": 99}, {"resample": "x"}, {"rescale_factor": "x"}, {"image_mean": [float("nan")] * 3}]
)
def test_settings_that_no_image_could_be_made_with_are_refused_at_once(settings):
    with pytest.raises(LlavaError, match=r"one of size, crop_size, resample, .* can't be read"):
        ImageProcessor.from_pretrained(settings)


def test_images_of_other_sides_than_the_towers_are_refused():
    """They went on into the tower, or ended in an error of numpy's where they differed."""
    processor = ImageProcessor.from_pretrained({"do_center_crop": False, "size": {"shortest_edge": 30}})
    assert processor(noise(60, 40), "pad").shape == (1, 3, 30, 30)
    with pytest.raises(LlavaError, match="leaves an image at 45 × 30 pixels, not 30 × 30"):
        processor([noise(40, 40), noise(60, 40)])
