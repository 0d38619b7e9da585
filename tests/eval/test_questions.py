"""Questions to answer: what they may be, their parts, and the images that they are asked with."""

import json

import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.eval.answers.ablation import QuestionImages
from llava.eval.answers.questions import Question, chunk_of, read_line_questions, read_med_questions
from tests.made_files import made_record, write


@pytest.mark.parametrize("key", [["a"], {"a": 1}])
def test_an_id_that_can_be_no_key_is_refused(tmp_path, key):
    kind = type(key).__name__
    with pytest.raises(LlavaError, match=rf"q\.jsonl record 0: the id is a {kind}; give a text or a number"):
        read_line_questions(write(tmp_path / "q.jsonl", [{"question_id": key, "text": "What?"}]))
    with pytest.raises(LlavaError, match=rf"q\.json record 0: the id is a {kind}"):
        read_med_questions(write(tmp_path / "q.json", [made_record(key, None, ("What?", "x"))]))


def test_a_question_that_is_a_list_is_not_asked_as_python_writes_it(tmp_path):
    with pytest.raises(LlavaError, match=r'record 1 \("2"\): the question is a list; give a text'):
        rows = [{"question_id": 1, "text": 4}, {"question_id": 2, "text": ["What?"]}]
        read_line_questions(write(tmp_path / "q.jsonl", rows))


def test_shuffled_images_are_of_other_questions(tmp_path):
    for number in range(12):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    pairs = [Question(n, "Which?", (f"{2 * n}.png", f"{2 * n + 1}.png")) for n in range(6)]
    for seed in range(20):
        shown = QuestionImages(tmp_path, pairs, "shuffle", seed)
        given = [[path.name for path in shown.of(question)] for question in pairs]
        assert len({name for names in given for name in names}) == 12
        assert all(set(names).isdisjoint(question.images) for names, question in zip(given, pairs))
    with pytest.raises(LlavaError, match=r"of 2 there is none for \"[01]\.png\""):
        QuestionImages(tmp_path, pairs[:1], "shuffle")
    with pytest.raises(LlavaError, match="at least two different images; there are 0"):
        QuestionImages(tmp_path, [Question(1, "Which?")], "shuffle")


def test_chunks_cover_everything_once():
    questions = [Question(index, "q") for index in range(10)]
    for chunks in (1, 3, 4, 10, 12):
        parts = [chunk_of(questions, chunks, index) for index in range(chunks)]
        assert [q for part in parts for q in part] == questions
    with pytest.raises(LlavaError, match="--chunk-idx is 3"):
        chunk_of(questions, 3, 3)


def test_tags_and_images_have_to_agree(tmp_path):
    path = tmp_path / "q.json"
    turns = [{"from": "human", "value": "<image>\n<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    path.write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": turns}]))
    with pytest.raises(LlavaError, match=r"record 0 \(\"1\"\): 2 <image> in the question and 1 image;"):
        read_med_questions(path)
