"""The nearest-image baseline answers as the most similar image with that question was answered."""

import numpy as np
from PIL import Image

from llava.demo.baselines import answer_by_nearest
from llava.records import read_records, write_json


def _record(name: str, image: str, *turns: tuple[str, str]) -> dict:
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    conversations[0]["value"] = "<image>\n" + conversations[0]["value"]
    return {"id": name, "image": image, "conversations": conversations}


def test_nearest_image_that_was_asked_the_same(tmp_path):
    for name, level in {"dark": 10, "middle": 120, "light": 240, "test": 100}.items():
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
    train = [
        _record("1", "dark.png", ("Which side?", "left"), ("How big?", "small")),
        _record("2", "middle.png", ("How big?", "large")),
        _record("3", "light.png", ("Which side?", "right")),
    ]
    test = [
        _record("a", "test.png", ("How big?", "large")),
        _record("b", "test.png", ("Which side?", "left")),
        _record("c", "test.png", ("Where?", "there")),
    ]
    write_json(tmp_path / "train.json", train)
    write_json(tmp_path / "test.json", test)
    empty = answer_by_nearest(tmp_path / "train.json", tmp_path / "test.json", tmp_path, tmp_path / "answers.jsonl")
    answers = {row["question_id"]: row["text"] for row in read_records(tmp_path / "answers.jsonl")}
    assert answers == {"a": "large", "b": "left", "c": ""} and empty == 1
