"""Questions answered by an OpenAI-compatible server, images sent along, through the same command."""

import base64
import io
import json

import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.eval import model_vqa
from llava.eval.answers.ablation import QuestionImages
from llava.eval.answers.questions import Question, read_med_questions
from llava.eval.answers.remote import RemoteAnswers
from llava.openai_api import ApiSettings
from llava.records import read_records
from llava.sampling_params import SamplingParams
from tests.openai_server import OpenAIServer


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (20, 10), (250, 0, 0)).save(tmp_path / "red.png")
    lines = [{"question_id": i, "text": f"Question {i}?", "image": "red.png"} for i in range(30)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def ask(data, url, *more):
    flags = ["--api-base", url, "--api-model", "some-model", "--image-folder", str(data)]
    files = ["--question-file", str(data / "q.jsonl"), "--answers-file", str(data / "a.jsonl")]
    model_vqa.main([*flags, *files, *more])
    return read_records(data / "a.jsonl")


def test_every_question_is_answered_once_in_order_whatever_fails(data):
    with OpenAIServer("--faults", "0.3", "--kinds", "429,500,cut") as server:
        rows = ask(data, server.url)
        answered = server.stats()["answered"]
    assert [row["question_id"] for row in rows] == list(range(30))
    assert all(row["text"] and row["model_id"] == "some-model" for row in rows)
    assert len(answered) == 30 and set(answered.values()) == {1}
    manifest = json.loads((data / "a.jsonl.manifest.json").read_text())
    assert manifest["checkpoint"] == "some-model" and manifest["served_by"] == server.url


def test_an_unfinished_run_goes_on_where_it_stopped(data):
    with OpenAIServer("--faults", "0.3", "--kinds", "500", "--faults-per-item", "3") as server:
        with pytest.raises(LlavaError, match="run again to ask for the rest"):
            ask(data, server.url, "--max-retries", "0")
        assert not (data / "a.jsonl").exists()
        rows = ask(data, server.url, "--max-retries", "8")
        assert set(server.stats()["answered"].values()) == {1}
    assert [row["question_id"] for row in rows] == list(range(30))


def test_text_and_images_stand_in_their_order(data):
    question = Question(1, "First\n<image>\nthen\n<image>", ("red.png", "red.png"))
    remote = RemoteAnswers(ApiSettings("m", "k"), QuestionImages(data, [question]), SamplingParams())
    content = remote.job(question).messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url"]
    encoded = content[1]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((0, 0)) == (250, 0, 0)


def test_every_parameter_that_is_asked_for_goes_to_the_server(data):
    question = Question(1, "Which?")
    images = QuestionImages(data, [question])
    plain = RemoteAnswers(ApiSettings("m", "k"), images, SamplingParams(seed=0)).job(question).body("m")
    assert plain.keys() == {"model", "messages", "temperature", "max_tokens", "seed"}, "not every server knows more"
    sampling = SamplingParams(temperature=0.5, top_p=0.9, top_k=5, repetition_penalty=1.2, seed=3, max_new_tokens=8)
    body = RemoteAnswers(ApiSettings("m", "k"), images, sampling).job(question).body("m")
    more = {"temperature": 0.5, "max_tokens": 8, "seed": 3, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2}
    assert body == plain | more


def test_what_needs_a_checkpoint_is_refused(data):
    with pytest.raises(LlavaError, match="--num_beams"):
        ask(data, "http://127.0.0.1:1/v1", "--num_beams", "2")
    with pytest.raises(LlavaError, match="need a checkpoint on this machine"):
        ask(data, "http://127.0.0.1:1/v1", "--yes-no-probabilities")


def test_a_system_turn_and_every_key_of_images_reach_the_request(data):
    spoken = [
        ("system", "Be brief."),
        ("assistant", "Hello."),
        ("user", "<image>\nSame as <image>?"),
        ("assistant", "no"),
    ]
    row = {"id": "a", "images": ["red.png", "red.png"], "messages": [{"role": r, "content": t} for r, t in spoken]}
    (data / "q.json").write_text(json.dumps([row]))
    questions = read_med_questions(data / "q.json")
    images = QuestionImages(data, questions)
    messages = RemoteAnswers(ApiSettings(model="m", api_key="k"), images, SamplingParams()).job(questions[0]).messages
    assert messages[0] == {"role": "system", "content": "Be brief."} and len(messages) == 2
    kinds = [part["type"] for part in messages[1]["content"]]
    assert kinds == ["image_url", "text", "image_url", "text"] and messages[1]["content"][1]["text"] == "Same as"
