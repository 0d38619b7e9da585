"""Captions made of question-answer records."""

import argparse
import json
import subprocess
import sys

import pytest
from PIL import Image

from llava.data import convert
from llava.data.conversion import ImageFolder
from llava.data.sources import qa_captions
from llava.data.sources.qa_captions import statement
from llava.errors import LlavaError
from llava.records import read_records, write_json
from tests.made_files import made_record, write


def record(number, image, question, answer):
    turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": image, "conversations": turns}


def test_a_statement_is_one_sentence():
    assert statement("Is the liver enlarged?", "No.") == "is the liver enlarged: no."
    assert statement("Size?", "3.5 cm") == "size: 3 5 cm."


def test_one_caption_a_image_and_a_conversation_a_question(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [record(1, "a.png", "Organ?", "Lung"), record(2, "b.png", "Organ?", "Liver"), record(3, "a.png", "CT?", 1)]
    write_json(tmp_path / "train.json", rows)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llava.data.convert", "qa-captions", "--records", str(tmp_path / "train.json")]
    command += ["--image-folder", str(tmp_path), "--output-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    captions = {row["image"]: row["conversations"][1]["value"] for row in read_records(out / "captions.json")}
    assert captions == {"a.png": "organ: lung. ct: 1.", "b.png": "organ: liver."}
    text = read_records(out / "text.json")
    assert len(text) == 3
    assert text[0]["conversations"][0]["value"] == "organ: lung. ct: 1.\nOrgan?"
    assert all("image" not in row for row in text)
    assert [row["conversations"][0]["value"] for row in read_records(out / "blind.json")] == ["Organ?", "CT?", "Organ?"]


def test_several_questions_of_an_image_in_one_conversation(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    asked = [
        ("a.png", "Organ?", "Lung"),
        ("b.png", "Organ?", "Liver"),
        ("a.png", "CT?", "no"),
        ("a.png", "Side?", "left"),
    ]
    write_json(tmp_path / "train.json", [record(number, *row) for number, row in enumerate(asked)])
    flags = ["qa-captions", "--records", str(tmp_path / "train.json"), "--image-folder", str(tmp_path)]
    convert.main([*flags, "--output-dir", str(tmp_path / "out"), "--turns", "2"])
    found = [(row["image"], [turn["value"] for turn in row["conversations"]])
             for row in read_records(tmp_path / "out" / "joined.json")]  # fmt: skip
    assert found == [
        ("a.png", ["Organ?\n<image>", "Lung", "CT?", "no"]),
        ("a.png", ["Side?\n<image>", "left"]),
        ("b.png", ["Organ?\n<image>", "Liver"]),
    ]
    with pytest.raises(LlavaError, match="--turns is 0"):
        convert.main([*flags, "--output-dir", str(tmp_path / "out"), "--turns", "0"])


def test_only_shared_sentences_and_fields(tmp_path):
    rows = [record(1, "a.png", "Organ?", "Lung"), record(2, "b.png", "Organ?", "Lung"), record(3, "a.png", "CT?", 1)]
    write_json(tmp_path / "train.json", [{**row, "image_organ": "CHEST"} for row in rows])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llava.data.convert", "qa-captions", "--records", str(tmp_path / "train.json")]
    command += ["--output-dir", str(out), "--min-images", "2", "--field", "image_organ"]
    assert subprocess.run(command).returncode == 0
    captions = {row["conversations"][1]["value"] for row in read_records(out / "captions.json")}
    assert captions == {"image organ: chest. organ: lung."}


def test_captions_of_other_keys_go_by_who_speaks(tmp_path):
    turns = [("system", "Be brief."), ("assistant", "Hello."), ("user", "Organ?\n<image>"), ("assistant", "Lung")]
    rows = [{"id": "1", "images": ["a.png"], "messages": [{"role": r, "content": t} for r, t in turns]}]
    write_json(tmp_path / "train.json", rows)
    args = argparse.Namespace(
        records=tmp_path / "train.json", field=[], question="What?", min_images=1, turns=8, kind=[], parts=0
    )
    splits = qa_captions.convert(args, ImageFolder(None)).splits
    assert [row["conversations"][1]["value"] for row in splits["captions"]] == ["organ: lung."]
    write_json(tmp_path / "train.json", [{**rows[0], "images": ["a.png", "b.png"]}])
    with pytest.raises(LlavaError, match=r"record 0 \('1'\): expected the name of one image"):
        qa_captions.convert(args, ImageFolder(None))


def test_kinds_and_parts_stand_for_questions(tmp_path):
    rows = [record(1, "a.png", "Which organ is it?", "Lung"), record(2, "b.png", "CT?", "no")]
    rows = [{**row, "question_type": kind, "answer_type": "OPEN"} for row, kind in zip(rows, ("ORGAN", "MODALITY"))]
    write_json(tmp_path / "train.json", rows)
    flags = ["qa-captions", "--records", str(tmp_path / "train.json"), "--output-dir", str(tmp_path / "out")]
    convert.main([*flags, "--kind", "question_type", "--kind", "answer_type", "--parts", "40"])
    turns = {name: [[turn["value"] for turn in row["conversations"]] for row in read_records(tmp_path / "out" / name)]
             for name in ("kinds.json", "parts.json")}  # fmt: skip
    assert turns["kinds.json"] == [
        ["question type: ORGAN, answer type: OPEN\n<image>", "Lung"],
        ["question type: MODALITY, answer type: OPEN\n<image>", "no"],
    ]
    organ = [asked for asked, answer in turns["parts.json"] if answer == "Lung"]
    whole, *parts = [asked.removesuffix("\n<image>") for asked in organ]
    assert len(turns["parts.json"]) == 80 and whole == "Which organ is it?" and len(parts) == 39
    assert all(words and set(words.split()) <= {"Which", "organ", "is", "it?"} for words in parts)
    assert {len(words.split()) for words in parts} == {1, 2, 3, 4} and len(set(parts)) > 10
    assert [asked for asked, answer in turns["parts.json"] if answer == "no"] == ["CT?\n<image>"] * 40
    write_json(tmp_path / "train.json", [{**record(3, "c.png", "", "no"), "question_type": "X", "answer_type": "OPEN"}])
    with pytest.raises(LlavaError, match=r"'c\.png': a question without words has no parts"):
        convert.main([*flags, "--parts", "1", "--overwrite"])
    for wrong, message in ((["--kind", "plane"], "record 0 .*has no 'plane'"), (["--parts", "-1"], "--parts is -1")):
        with pytest.raises(LlavaError, match=message):
            convert.main([*flags, *wrong, "--overwrite"])


def test_dropped_links_and_captions_are_counted(tmp_path):
    from llava.data.convert import main

    (tmp_path / "captions.txt").write_text("ROCO_1\t a caption\n")
    (tmp_path / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\nROCO_1,PMC1_a.jpg,CC BY\n")
    (tmp_path / "dlinks.txt").write_text(
        "ROCO_1\twget https://x.org/a.tgz\nROCO_2\twget https://x.org/b.tgz\nROCO_3\t-\n"
    )
    main(["roco", "--folder", str(tmp_path), "--output-dir", str(tmp_path / "roco"), "--write-urls"])
    left = json.loads((tmp_path / "roco" / "manifest.json").read_text())["left_out"]
    assert sorted(left.values()) == [1, 1]
    asked = [made_record(str(i), f"{i}.png", (f"Is it {what}?", "no")) for i, what in enumerate("xxy")]
    records = write(tmp_path / "q.json", asked)
    main(["qa-captions", "--records", records, "--output-dir", str(tmp_path / "qa"), "--min-images", "2"])
    assert sum(json.loads((tmp_path / "qa" / "manifest.json").read_text())["left_out"].values()) == 1
