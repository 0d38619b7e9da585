"""Expanding, cutting and padding ids."""

import numpy as np
import pytest

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.tokenization import expand_images, pad_batch, truncate


def test_each_image_gets_its_positions():
    ids, labels = expand_images([1, -200, 5, -200], [-100, -100, 5, -100], [3, 2])
    assert ids.tolist() == [1, -200, -200, -200, 5, -200, -200]
    assert labels.tolist() == [-100, -100, -100, -100, 5, -100, -100]
    assert ids.dtype == labels.dtype == np.int64
    ids, labels = expand_images([1, IMAGE_TOKEN_INDEX], None, 2)
    assert (ids.tolist(), labels) == ([1, -200, -200], None)


def test_text_without_images_is_left_as_it_is():
    assert expand_images([1, 2], [1, 2], 5)[0].tolist() == [1, 2]
    assert expand_images([], [], [])[0].tolist() == []


def test_a_wrong_number_of_images_is_an_error():
    with pytest.raises(LlavaError, match="has 1 <image> for 2 images;"):
        expand_images([1, -200], None, [4, 4])


def test_truncate_counts():
    ids, labels = np.arange(5), np.arange(5)
    assert truncate(ids, labels, 3)[2] == 2
    assert truncate(ids, labels, 5)[2] == truncate(ids, labels, None)[2] == 0
    assert truncate(ids, labels, 3)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    batch = pad_batch([([7, 8, 9], [7, 8, 9]), ([5], [5])], pad_token_id=0, side=side)
    rows = {"right": ([5, 0, 0], [5, IGNORE_INDEX, IGNORE_INDEX], [True, False, False])}
    rows["left"] = tuple(row[::-1] for row in rows["right"])
    ids, labels, mask = rows[side]
    assert batch["input_ids"].tolist() == [[7, 8, 9], ids]
    assert batch["labels"].tolist() == [[7, 8, 9], labels]
    assert batch["attention_mask"].tolist() == [[True] * 3, mask]


def test_padding_cuts_first():
    batch = pad_batch([([7, 8, 9], [7, 8, 9]), ([5], [5])], pad_token_id=0, max_length=2)
    assert batch["input_ids"].tolist() == [[7, 8], [5, 0]]
