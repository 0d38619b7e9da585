import numpy as np
import torch

from llava.constants import IGNORE_INDEX
from llava.tokenization import expand_images
from llava.train.data.collator import Collator
from llava.train.data.dataset import Sample, fitting


def item(number, ids, targets, images=(), skipped=None):
    ids = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[-targets:] = ids[-targets:]
    found = {"number": number, "sample": Sample(ids, labels, list(images), truncated=False), "skipped": skipped}
    if images:
        found["pixel_values"] = np.full((len(images), 3, 2, 2), number, np.float32)
    return found


def test_padding_is_masked_and_no_target():
    batch = Collator(pad_id=0)([item(4, [1, 5, 6], 1, ["a"]), item(9, [1, 7], 1)])
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 7, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6], [-100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert (batch["sample_numbers"], batch["num_tokens"]) == ([4, 9], 5)


def test_a_batch_of_one_length_needs_no_mask():
    assert "attention_mask" not in Collator(pad_id=0)([item(0, [1, 2], 1), item(1, [1, 3], 1)])


def test_images_come_in_reading_order():
    batch = Collator(pad_id=0)([item(1, [1, 2], 1, ["a", "b"]), item(2, [1, 2], 1), item(3, [1, 2], 1, ["c"])])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 1, 3]


def test_packed_batches_carry_borders_and_fresh_positions():
    batch = Collator(pad_id=0, packing=True)([item(0, [1, 5, 6], 3), item(1, [1, 7], 1)])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, 7]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 3


def test_left_out_samples_leave_a_batch_that_can_run():
    batch = Collator(pad_id=0)([item(0, [1, 2], 1, ["a"], skipped="gone")])
    assert batch["report"].skipped == {0: "gone"}
    assert batch["num_tokens"] == 0
    assert (batch["labels"] == IGNORE_INDEX).all()


def test_cutting_never_splits_a_image():
    ids, _ = expand_images(np.array([1, -200, 5, -200, 6]), None, [3, 2])
    for length, kept, images in [(7, 7, 2), (6, 5, 1), (5, 5, 1), (4, 4, 1), (3, 1, 0), (1, 1, 0)]:
        assert fitting(ids, [3, 2], length) == (kept, images), length
    assert fitting(np.arange(9), [], 4) == (4, 0)
