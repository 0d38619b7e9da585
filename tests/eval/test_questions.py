"""Questions to answer: what they may be."""

import pytest

from llava.errors import LlavaError
from llava.eval.answers.questions import read_line_questions, read_med_questions
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
