"""Records of one image behind one copy of it train as they do one by one."""

import json
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.images import open_image
from llava.tokenization import Encoded, encode_conversation
from llava.train.data.collator import Collator
from llava.train.data.dataset import LlavaDataset, PackedDataset, Sample
from llava.train.data.image_source import ImageSource
from llava.train.data.record_store import open_records
from llava.train.data.shared_images import groups_of_one_image, join, joinable, seen_by
from llava.train.step import padded_attention
from llava.train.step.packing import packed_attention
from llava.train.train import train
from tests.tokenization.made_tokenizers import get as tokenizer_of
from tests.train.helpers import flags, losses

IMAGE = [IMAGE_TOKEN_INDEX] * 2


def sample(ids, targets=1, images=("a.png",)):
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    if targets:
        labels[-targets:] = ids[-targets:]
    return Sample(np.array(ids, np.int32), labels, list(images), truncated=False)


def test_what_is_joined_shares_images_and_all_that_comes_before_their_end():
    samples = [
        sample([1, *IMAGE, 5, 6]),
        sample([1, *IMAGE, 7, 8, 9]),
        sample([1, *IMAGE, 5, 6], images=("b.png",)),
        sample([2, *IMAGE, 5, 6]),
        sample([1, 5, 6], images=()),
        sample([1, *IMAGE, 5, 6], targets=2),  # its first token after the image is a target
        sample([1, *IMAGE, 3, 4], targets=0),
    ]
    assert joinable(samples) == [([0, 1, 6], 3), ([2], 3), ([3], 3), ([4], 0), ([5], 0)]


def test_finding_them_keeps_little_of_each_image():
    ids = [1, *[IMAGE_TOKEN_INDEX] * 2000, 5, 6]
    tracemalloc.start()
    try:
        found = joinable(sample(ids, images=(f"{number}.png",)) for number in range(200))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 200 and most < 200 * 2000


def test_a_joined_sample_keeps_each_ones_positions_and_targets():
    ids, labels, positions, lengths = join([sample([1, *IMAGE, 5, 6]), sample([1, *IMAGE, 7, 8, 9], targets=2)], 3)
    assert ids.tolist() == [1, *IMAGE, 5, 6, 7, 8, 9]
    assert labels.tolist() == [-100, -100, -100, -100, 6, -100, 8, 9]
    assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert lengths == [3, 2, 3]
    seen, places = seen_by([lengths, [2]])
    assert seen.tolist() == [3, 5, 6, 2]
    assert places.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]


def test_an_image_is_decoded_once_for_a_batch():
    decoded = []
    records = [{"image": [name, "c.png"]} for name in ("a.png", "b.png", "a.png")]
    dataset = LlavaDataset(
        records, lambda record, features: Encoded([1, *IMAGE * 2, 5, 6], [5] * 7, 2), SimpleNamespace(read=str),
        lambda source: decoded.append(source) or np.full((1, 3, 2, 2), ord(source[0])), count_features=lambda image: 2,
        max_length=100, lazy=True,
    )  # fmt: skip
    items = PackedDataset(dataset, [[0, 1, 2], [2]])[0]
    assert decoded == ["a.png", "c.png", "b.png"]
    assert [item["pixel_values"][:, 0, 0, 0].tolist() for item in items] == [[97, 99], [98, 99], [97, 99]]


def test_an_image_is_checked_once_for_all_its_records(tmp_path):
    checked = []

    def load(path):
        checked.append(path.name)
        return np.asarray(open_image(path))

    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    records = [{"id": name, "image": name} for name in ("a.png", "b.png", "./a.png", "bad.png", "a.png")]
    (tmp_path / "records.json").write_text(json.dumps(records))
    dataset = LlavaDataset(
        open_records(tmp_path / "records.json"), lambda record, features: Encoded([1, *IMAGE, 5, 6], [5] * 5, 1),
        ImageSource(tmp_path), load, count_features=lambda image: 2, max_length=100, lazy=True, skip_unreadable=True,
    )  # fmt: skip
    dataset.drop_unreadable()
    assert checked == ["a.png", "b.png", "bad.png"]
    assert dataset.numbers.tolist() == [0, 1, 2, 4] and list(dataset.report.skipped) == [3]


def test_an_image_whose_name_is_in_another_unicode_form_is_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ro\u0308.png")
    (tmp_path / "records.json").write_text(json.dumps([{"image": "r\u00f6.png"}]))
    dataset = LlavaDataset(
        open_records(tmp_path / "records.json"), lambda record, features: Encoded([1, *IMAGE, 5, 6], [5] * 5, 1),
        ImageSource(tmp_path), open_image, count_features=lambda image: 2, max_length=100, lazy=True,
    )  # fmt: skip
    with pytest.raises(LlavaError, match="not found; it is there under a name in another Unicode form"):
        dataset[0]


def test_a_batch_has_each_image_once():
    items = [
        {"number": 3, "sample": sample([1, *IMAGE, 5, 6]), "skipped": None, "feature_rows": [0]},
        {"number": 4, "sample": sample([1, 5, 6], images=()), "skipped": None},
        {"number": 9, "sample": sample([1, *IMAGE, 7, 8]), "skipped": None, "feature_rows": [0]},
    ]
    cache = type("Cache", (), {"take": staticmethod(lambda rows: rows)})()
    batch = Collator(pad_id=0, packing=True, share_images=True, pack_length=12, cache=cache)(items)
    assert batch["vision_features"] == [0] and batch["image_positions"].tolist() == [1, 2]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10, 12]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 8, 13, 16, 18]
    assert (batch["max_length_q"], batch["max_length_k"], len(batch["key_places"])) == (3, 5, 18)
    assert (batch["num_tokens"], batch["sample_numbers"]) == (10, [3, 4, 9])


@pytest.mark.parametrize("window", [None, 5, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_branch_attends_as_if_alone(window, dtype):
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 10, 8, generator=random, dtype=dtype)
    key, value = (torch.randn(1, 2, 10, 8, generator=random, dtype=dtype) for _ in range(2))
    seen, places = seen_by([[3, 3, 2], [2]])

    def attend(tokens, borders, **more):
        q, k, v = (tensor[:, :, tokens] for tensor in (query, key, value))
        borders = torch.tensor(borders, dtype=torch.int32)
        return packed_attention(
            None, q, k, v, None, cu_seq_lens_q=borders, max_length_q=6, sliding_window=window, **more
        )[0]

    joined = attend(
        torch.arange(10), [0, 3, 6, 8, 10], key_places=torch.from_numpy(places),
        cu_seq_lens_k=torch.tensor([0, *seen.cumsum()], dtype=torch.int32), max_length_k=6,
    )  # fmt: skip
    for alone in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7], [8, 9]):
        expected = attend(torch.tensor(alone), [0, len(alone)])
        torch.testing.assert_close(joined[:, alone], expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)


_IMAGES = ("a.png", "b.png")
_POSITIONS = 3
_WORDS = st.lists(st.sampled_from(["where", "is", "it", "yes", "no", "\n"]), min_size=1, max_size=4).map(" ".join)


@st.composite
def some_records(draw):
    """Records of few images, so that many share them: with a system text, several images, several rounds."""
    records = []
    for number in range(draw(st.integers(1, 8))):
        turns = [{"from": "system", "value": "Be brief."}] * draw(st.booleans())
        images = []
        for asked in range(draw(st.integers(1, 3))):
            shown = draw(st.lists(st.sampled_from(_IMAGES), max_size=2)) if draw(st.booleans()) or not asked else []
            images += shown
            question = "".join("<image>\n" for _ in shown) + draw(_WORDS)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": draw(_WORDS)}]
        records.append({"id": str(number), "conversations": turns} | ({"image": images} if images else {}))
    return records


def as_seen(batch):
    """Of each part that has targets: the ids that it sees, the images behind them, and its labels; and the parts."""
    ids, labels, positions = (batch[name][0].numpy() for name in ("input_ids", "labels", "position_ids"))
    borders, seen_borders = (batch[name].numpy() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    places = batch["key_places"].numpy() if "key_places" in batch else np.arange(len(ids))
    images = np.full(len(ids), -1)
    images[batch["image_positions"].numpy()] = np.repeat(np.array(batch["vision_features"], int), _POSITIONS)
    found = []
    for own, end, start, stop in zip(borders, borders[1:], seen_borders, seen_borders[1:]):
        seen = places[start:stop]
        assert seen[stop - start - (end - own) :].tolist() == list(range(own, end)), "its own tokens come last"
        assert positions[seen].tolist() == list(range(stop - start))
        learned = np.where(seen >= own, labels[seen], IGNORE_INDEX)
        if (learned != IGNORE_INDEX).any():
            found.append((ids[seen].tobytes(), images[seen].tobytes(), learned.tobytes()))
    return Counter(found)


@pytest.mark.parametrize("template", ["v1", "v0", "mistral_instruct"])
@given(st.data())
def test_whatever_the_records_each_is_seen_and_learned_as_if_alone(template, data):
    tokenizer, longest = tokenizer_of("llama_like"), data.draw(st.sampled_from([20, 40, 60, 1000]))
    dataset = LlavaDataset(
        data.draw(some_records()),
        lambda record, features: encode_conversation(record, template, tokenizer, features_per_image=features),
        ImageSource(None), None, count_features=lambda image: _POSITIONS, max_length=longest, lazy=True,
        feature_row=_IMAGES.index,
    )  # fmt: skip
    cache = type("Cache", (), {"take": staticmethod(lambda rows: rows)})()
    shared, alone = (Collator(0, packing=True, share_images=share, cache=cache) for share in (True, False))
    items = [dataset[index] for index in range(len(dataset))]
    assert as_seen(shared(items)) == as_seen(alone(items))
    groups, lengths = groups_of_one_image(dataset, data.draw(st.integers(2, 4)), seed=0)
    assert sorted(number for group in groups for number in group) == list(range(len(items)))
    for group, length in zip(groups, lengths, strict=True):
        own = [items[number] for number in group]
        batch = shared(own)
        assert batch["num_tokens"] == length and as_seen(batch) == as_seen(alone(own))


def test_what_many_branches_see_gets_a_gradient_summed_in_float32():
    """bfloat16 has 8 bits: 400 times a thousandth, added one by one, would stay near a quarter."""
    places = torch.zeros(401, dtype=torch.int64)
    rows = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    padded_attention.rows(rows, places).backward(torch.full((401, 1, 1), 1e-3, dtype=torch.bfloat16))
    assert rows.grad.item() == pytest.approx(0.401, rel=0.01)


@pytest.mark.parametrize("more", [(), ("--cache_vision_features",), ("--gradient_checkpointing", "True")])
def test_losses_and_steps_are_those_of_records_one_by_one(tmp_path, base, more):
    records = []
    for number in range(10):
        name = f"{number % 3}.png"
        Image.new("RGB", (8, 8), (80 * (number % 3), 40, 90)).save(tmp_path / name)
        question = {"from": "human", "value": "<image>\nWhat is " + "this " * number + "?"}
        answer = {"from": "gpt", "value": "It is " + "red " * (number + 1)}
        records.append({"id": str(number), "image": name, "conversations": [question, answer]})
    data = tmp_path / "train.json"
    data.write_text(json.dumps(records))
    packed = ("--image_folder", str(tmp_path), "--packing", "--max_tokens_per_batch", "4000", "--max_steps", "3")
    packed = (*packed, "--learning_rate", "1e-2", "--logging_steps", "1", *more)
    found, tokens = [], []
    for questions in ("1", "4"):
        train(flags(tmp_path / questions, data, base, *packed, "--questions_per_image", questions))
        found.append(losses(tmp_path / questions))
        tokens.append(json.loads((tmp_path / questions / "training_summary.json").read_text())["tokens_seen"])
    assert found[0][-1] < found[0][0] - 0.01
    assert found[1] == pytest.approx(found[0], abs=2e-5)
    assert tokens[1] < tokens[0]
