"""The audit finds what training has seen of a test set, and only that."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from llava.data import audit
from llava.data.audit_checks import audit_splits, question_words
from llava.data.audit_text import audit_lines
from llava.data.image_likeness import alike, fingerprint
from llava.data.vqa_items import VqaItem, plain_question, read_vqa_items
from llava.errors import LlavaError
from tests.made_files import made_record, write


def item(key, image, question, answer, kind="OPEN"):
    return VqaItem(key, (image,), question, answer, kind)


def smooth_image(seed: int) -> Image.Image:
    """A smooth random image: no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 160), Image.Resampling.BICUBIC)


TRAIN = [
    item("a", "p1.png", "Where is the lesion?", "left lobe"),
    item("b", "p1.png", "Is the heart enlarged?", "no", "CLOSED"),
    item("c", "p2.png", "Which plane is shown here?", "axial"),
]


def audit_of(test, **options):
    return audit_splits(TRAIN, test, **options)


def test_the_same_question_on_the_same_image():
    found = audit_of(
        [item(1, "p1.png", " where is THE lesion? ", "Left lobe"), item(2, "p1.png", "Where is the lesion", "x")]
    )
    assert found["questions"]["identical"] == 1
    assert found["questions"]["identical_without_punctuation"] == 2
    assert found["questions"]["near_duplicates"] == 2
    assert found["questions"]["near_duplicates_with_same_answer"] == 1


def test_the_same_question_on_another_image_is_no_duplicate():
    found = audit_of([item(1, "p2.png", "Where is the lesion?", "left lobe")])
    assert found["questions"]["identical"] == 0 and found["questions"]["near_duplicates"] == 0
    assert found["answers"]["OPEN"]["same_question"] == 1


@pytest.mark.parametrize(("train", "test"), [("OPEN", "CLOSED"), ("CLOSED", "OPEN"), ("OPEN", "OPEN")])
def test_splits_without_answers_of_a_type_are_said(train, test):
    answer = {"OPEN": "left", "CLOSED": "no"}
    known, asked = (item(1, f"{kind}.png", "Where?", answer[kind], kind) for kind in (train, test))
    text = "\n".join(audit_lines(audit_splits([known], [asked])))
    assert '"None"' not in text
    assert ("none in training" in text) == (train != test) and "answers: none in the test split" in text


def test_half_of_the_words_shared_is_near_enough():
    words = question_words("Where is the big lesion?")
    assert words == ["where", "is", "the", "big", "lesion"]
    exactly_half = item(1, "p2.png", "which plane is", "axial")  # 3 of 5 words
    less = item(2, "p2.png", "which plane do you see", "axial")  # 2 of 8
    found = audit_of([exactly_half, less])
    assert [row["near_duplicate"] for row in found["items"]] == [True, False]
    assert found["items"][0]["jaccard"] == pytest.approx(3 / 5)
    assert found["items"][0]["nearest"] == "c"


def test_of_equally_near_questions_the_first_counts():
    train = [item("x", "p", "left lung", "one"), item("y", "p", "lung left", "two")]
    found = audit_splits(train, [item(1, "p", "left lung", "two")])
    assert found["items"][0]["nearest"] == "x" and not found["items"][0]["same_answer"]


def test_answers_that_training_gives_away():
    test = [item(1, "q.png", "Is it?", "no", "CLOSED"), item(2, "q.png", "Is it not?", "yes", "CLOSED")]
    found = audit_of(test)["answers"]["CLOSED"]
    assert (found["majority_answer"], found["majority"], found["in_training"]) == ("no", 1, 1)
    assert found["test_priors"] == [("no", 1), ("yes", 1)]


def test_clean_subsets_name_the_questions():
    found = audit_of([item(1, "p1.png", "Where is the lesion?", "x"), item(2, "new.png", "Where is the lesion?", "x")])
    assert found["subsets"] == {"unseen image": [2], "no near-duplicate question": [2]}


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("p1.png", "p2.png", "other.png")):
        smooth_image(seed).save(tmp_path / name)
    smooth_image(0).save(tmp_path / "copy.png")
    changed = ImageEnhance.Brightness(smooth_image(1).resize((120, 96))).enhance(1.15)
    changed.save(tmp_path / "nearly.jpg", quality=40)
    return tmp_path


def test_images_under_another_name_and_re_encoded_ones_are_found(folder):
    test = [
        item(1, "copy.png", "Where is the lesion?", "left lobe"),
        item(2, "nearly.jpg", "Which plane is shown here?", "axial"),
        item(3, "other.png", "Where is the lesion?", "left lobe"),
    ]
    found = audit_of(test, train_images=folder, test_images=folder)
    images = found["images"]
    assert images["same_name"] == 0 and images["identical_pixels"] == 1
    assert [(pair["first"], pair["second"]) for pair in images["identical_under_another_name"]] == [
        ("copy.png", "p1.png")
    ]
    assert [(pair["first"], pair["second"]) for pair in images["near_identical"]] == [("nearly.jpg", "p2.png")]
    assert (images["seen"], images["seen_or_nearly"]) == (1, 2)
    # The copy is the same image, so its question stands in training.
    assert [row["identical"] for row in found["items"]] == [True, False, False]


def test_different_images_are_not_alike(folder):
    prints = {name: fingerprint(folder / name) for name in ("p1.png", "p2.png", "other.png")}
    assert [(pair.first, pair.second) for pair in alike(prints, prints)] == [(name, name) for name in prints]


def test_a_grey_image_has_a_fingerprint(tmp_path):
    Image.new("L", (50, 40), 128).save(tmp_path / "grey.png")
    mark = fingerprint(tmp_path / "grey.png")
    assert np.isfinite(mark.thumbnail).all()
    Image.new("L", (50, 40), 129).save(tmp_path / "other.png")
    (pair,) = alike({"test": mark}, {"train": mark, "other": fingerprint(tmp_path / "other.png")})
    assert pair.identical and pair.second == "train"


def test_a_missing_image_is_an_error(folder):
    with pytest.raises(LlavaError, match=r"test image not found: .*gone\.png"):
        audit_of([item(1, "gone.png", "q", "a")], train_images=folder, test_images=folder)


def test_real_vqa_rad_is_as_seen_as_it_is_known_to_be(shared_dir, tmp_path, capsys):
    folder = shared_dir / "vqa_rad"
    output = tmp_path / "audit.json"
    audit.main(
        ["--train", str(folder / "trainset.json"), "--test", str(folder / "testset.json"), "--output", str(output)]
    )
    found = json.loads(output.read_text())
    assert (found["images"]["same_name"], found["images"]["test_images"]) == (203, 203)
    questions = found["questions"]
    assert (questions["identical"], questions["identical_without_punctuation"]) == (14, 16)
    assert (questions["near_duplicates"], questions["near_duplicates_with_same_answer"]) == (131, 115)
    assert "131 have a near duplicate" in capsys.readouterr().out


def test_a_image_wise_split_of_vqa_rad_is_clean(shared_dir):
    """Moving whole images to the test side leaves nothing seen."""
    items = read_vqa_items(shared_dir / "vqa_rad" / "trainset.json")
    held_out = set(sorted({entry.image for entry in items})[::5])
    test = [entry for entry in items if entry.image in held_out]
    train = [entry for entry in items if entry.image not in held_out]
    found = audit_splits(train, test)
    assert found["images"]["same_name"] == found["questions"]["near_duplicates"] == 0
    assert len(found["subsets"]["unseen image"]) == len(test) > 100


def test_images_under_every_key_and_in_the_record_are_known(tmp_path):
    """`image`, `images` and embedded files: a test question counts as seen whichever of its images training has."""
    picture = io.BytesIO()
    smooth_image(3).save(picture, "PNG")
    smooth_image(3).save(tmp_path / "same.png")
    smooth_image(4).save(tmp_path / "new.png")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()

    def row(key, **images):
        turns = [{"from": "user", "value": "<image>\nIs it blue?"}, {"from": "assistant", "value": "no"}]
        return {"id": key, "conversations": turns, **images}

    (tmp_path / "train.json").write_text(json.dumps([row(1, image="same.png")]))
    tests = [
        row(1, images=["same.png"]),
        row(2, images=["new.png", "same.png"]),
        row(3, image=url),
        row(4, image="new.png"),
    ]
    (tmp_path / "test.json").write_text(json.dumps(tests))
    train, test = (read_vqa_items(tmp_path / f"{name}.json") for name in ("train", "test"))
    found = audit_splits(train, test, tmp_path, tmp_path)
    assert [entry["image_seen"] for entry in found["items"]] == [True, True, True, False]
    assert found["test"]["images"] == 3 and found["images"]["same_name"] == 1 and found["images"]["seen"] == 2
    by_name = audit_splits(train, test)
    assert [entry["image_seen"] for entry in by_name["items"]] == [True, True, False, False]


def test_training_images_may_lie_elsewhere_and_near_is_as_near_as_asked(tmp_path):
    def records(name, image, question):
        turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": "left"}]
        record = {"id": name, "image": image, "conversations": turns, "answer_type": "OPEN"}
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
        return str(tmp_path / f"{name}.json")

    for name, seed in (("old", 0), ("new", 0)):
        (tmp_path / name).mkdir()
        smooth_image(seed).save(tmp_path / name / f"{name}.png")
    words = ["--train", records("train", "old.png", "Where is the small lesion?")]
    words += ["--test", records("test", "new.png", "Where is the lesion?")]
    words += ["--image-folder", str(tmp_path / "new"), "--output", str(tmp_path / "audit.json")]
    with pytest.raises(LlavaError, match=r"not found: .*old\.png"):
        audit.main(words)
    for jaccard, near in (("0.8", 1), ("0.9", 0)):
        audit.main([*words, "--train-image-folder", str(tmp_path / "old"), "--jaccard", jaccard, "--overwrite"])
        found = json.loads((tmp_path / "audit.json").read_text())
        assert found["images"]["identical_pixels"] == 1
        assert found["questions"]["near_duplicates"] == near, "4 of 5 words"


def test_the_audit_reads_later_turns_of_training(tmp_path):
    from llava.data.audit import main

    train = made_record("t", "a.png", ("What is seen?", "lung"), ("Is there a mass in the liver?", "no"))
    test = made_record("q", "a.png", ("Is there a mass in the liver?", "no"))
    files = [write(tmp_path / f"{name}.json", [one]) for name, one in (("train", train), ("test", test))]
    main(["--train", files[0], "--test", files[1], "--output", str(tmp_path / "audit.json")])
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["questions"]["identical"] == 1
    assert audit["subsets"]["no near-duplicate question"] == []
    assert audit["train"]["questions"] == 2 and audit["train_on_test_images"] == ["t"]


@pytest.mark.timeout(100)
def test_a_question_with_a_million_blanks_is_read_in_a_moment():
    blanks = " \n" * 1_000_000
    assert plain_question(f"What{blanks}is it?{blanks}<image>{blanks}") == f"What{blanks}is it?"
    assert plain_question("What is \n<image>\n it?") == "What is it?"
