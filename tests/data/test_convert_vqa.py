"""Converters of the question-answer sets, on rows made here and on the real files."""

import hashlib
import json

import pytest

from llava.data.convert import main
from llava.errors import LlavaError
from llava.records import read_json, read_records

ROWS = [
    {"qid": 7, "image_name": "a.jpg", "image_organ": "HEAD", "question": " How many? ", "question_type": "COUNT",
     "phrase_type": "freeform", "answer": 4, "answer_type": "OPEN"},
    {"qid": 8, "image_name": "b.jpg", "image_organ": "ABD", "question": "Is it normal?", "question_type": "PRES, ATRIB",
     "phrase_type": "para", "answer": "Yes ", "answer_type": "CLOSED "},
]  # fmt: skip


@pytest.fixture
def work(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"x")
    return tmp_path


def put(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def vqa_rad(work, *flags):
    return main(["vqa-rad", "--image-folder", str(work / "images"), "--output-dir", str(work / "out"), *flags])


def test_record_form_and_cleaning(work):
    vqa_rad(work, "--train", put(work / "train.json", ROWS))
    first, second = read_records(work / "out" / "train.json")
    assert first == {
        "id": "7",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "How many?\n<image>"}, {"from": "gpt", "value": "4"}],
        "answer_type": "OPEN",
        "question_type": "COUNT",
        "image_organ": "HEAD",
        "phrase_type": "freeform",
    }
    assert second["answer_type"] == "CLOSED"
    assert second["conversations"][1]["value"] == "Yes"
    assert second["question_type"] == "PRES, ATTRIB"
    manifest = read_json(work / "out" / "manifest.json")
    assert manifest["corrected"]["answer was a number"] == 1
    written = (work / "out" / "train.json").read_bytes()
    assert manifest["splits"]["train"]["sha256"] == hashlib.sha256(written).hexdigest()
    assert read_json(work / "out" / "candidates.json") == {"0": ["4"]}


def test_original_release_is_split_by_phrase_type(work):
    rows = [{**ROWS[0], "phrase_type": kind, "qid": number} for number, kind in
            enumerate(["freeform", "para", "test_freeform", "test_para", "test_para"])]  # fmt: skip
    vqa_rad(work, "--public", put(work / "public.json", rows))
    assert len(read_records(work / "out" / "train.json")) == 2
    assert [row["id"] for row in read_records(work / "out" / "test.json")] == ["2", "3", "4"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_formats_hold_the_same_records(work, suffix):
    train = put(work / "train.json", ROWS)
    vqa_rad(work, "--train", train)
    vqa_rad(work, "--train", train, "--format", suffix)
    assert read_records(work / "out" / f"train.{suffix}") == read_records(work / "out" / "train.json")


def test_missing_pictures_stop_or_are_counted(work):
    rows = [*ROWS, {**ROWS[0], "qid": 9, "image_name": "gone.jpg"}]
    train = put(work / "train.json", rows)
    with pytest.raises(LlavaError, match=r"1 pictures of 1 records .*gone\.jpg.*--missing drop"):
        vqa_rad(work, "--train", train)
    assert not any((work / "out").iterdir()), "something half-written was left"
    vqa_rad(work, "--train", train, "--missing", "drop")
    assert len(read_records(work / "out" / "train.json")) == 2
    assert read_json(work / "out" / "manifest.json")["missing_pictures"]["records"] == 1
    vqa_rad(work, "--train", train, "--missing", "keep")
    assert len(read_records(work / "out" / "train.json")) == 3


def test_empty_answers_are_left_out_and_counted(work):
    vqa_rad(work, "--train", put(work / "train.json", [*ROWS, {**ROWS[0], "qid": 9, "answer": " "}]))
    assert len(read_records(work / "out" / "train.json")) == 2
    assert read_json(work / "out" / "manifest.json")["left_out"] == {"empty answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_type": "MAYBE"}, "record 2: answer_type is 'MAYBE'"),
        ({"qid": 7}, 'the id "7" occurs twice'),
        ({"image_name": "../secret.jpg"}, "outside the image folder"),
        ({"image_name": "/etc/passwd"}, "outside the image folder"),
    ],
)
def test_bad_rows_are_named(work, change, message):
    with pytest.raises(LlavaError, match=message):
        vqa_rad(work, "--train", put(work / "train.json", [*ROWS, {**ROWS[0], "qid": 9, **change}]))
    assert not any((work / "out").iterdir())


def test_real_vqa_rad_is_whole_and_clean(shared_dir, tmp_path):
    source = shared_dir / "vqa_rad"
    main(["vqa-rad", "--train", str(source / "trainset.json"), "--test", str(source / "testset.json"),
          "--image-folder", str(source / "images"), "--output-dir", str(tmp_path)])  # fmt: skip
    train, test = read_records(tmp_path / "train.json"), read_records(tmp_path / "test.json")
    raw = read_json(source / "trainset.json")
    assert (len(train), len(test)) == (len(raw), 451)
    by_id = {str(row["qid"]): row for row in raw}
    for row in train + test:
        answer = row["conversations"][1]["value"]
        assert isinstance(answer, str) and answer == answer.strip() and answer
        assert row["answer_type"] in ("OPEN", "CLOSED")
    for row in train:
        assert row["conversations"][1]["value"] == str(by_id[row["id"]]["answer"]).strip()
    assert sum(isinstance(row["answer"], int) for row in raw) > 0, "the file no longer tests what it should"
