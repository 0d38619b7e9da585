"""Clients of others against the real stack: each asks for text, images and streams, and gets what our own client gets.

They are installed apart from the environment (`make clients`), since their pins clash with ours.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.data.phantoms.build import Counts, write_phantoms
from llava.data.vqa_items import read_vqa_items
from llava.eval.metrics import CLOSED
from llava.records import read_records, write_records
from tests.documented_commands import ROOT

pytestmark = pytest.mark.long

PLACE = Path(os.environ.get("LLAVA_CLIENTS", Path(sys.prefix) / "clients"))
SCRIPTS = Path(__file__).parent / "scripts"
PYTHON = PLACE / "bin" / "python"


def data_url():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def needs(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} isn't installed at {PLACE}; make clients installs it")


def run_client(*words, env=None, **options) -> str:
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=500, env=os.environ | (env or {}), **options
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def run_script(tiny_serving, *words, **options) -> dict:
    return json.loads(run_client(*words, f"{tiny_serving[2].url}/v1", data_url(), **options).splitlines()[-1])


@pytest.fixture(scope="module")
def expected(tiny_serving):
    """What this environment's client gets."""
    return run_script(tiny_serving, sys.executable, SCRIPTS / "openai_client.py")


COMMON = ("text", "image", "images", "stream", "usage", "several", "stopped", "logprobs")


def assert_same(found: dict, expected: dict) -> None:
    for name in COMMON:
        assert found[name] == expected[name], name
    assert found["several"] == found["again"] and found["stream"] == found["image"]
    assert len(found["text"]) > len(found["stopped"]) and found["logprobs"] == found["usage"] == 8
    assert "frequency_penalty: not supported here" in found["refused"]


def test_the_client_of_this_environment(expected):
    assert_same(expected, expected)
    assert int(expected["version"].split(".")[0]) >= 2


def test_the_client_of_the_major_version_before(tiny_serving, expected):
    needs(PLACE / "openai-1")
    found = run_script(tiny_serving, PYTHON, SCRIPTS / "openai_client.py", env={"PYTHONPATH": str(PLACE / "openai-1")})
    assert found["version"].startswith("1.")
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["litellm", "langchain", "instructor"])
def test_clients_that_take_all_of_it(tiny_serving, expected, name):
    needs(PYTHON)
    found = run_script(tiny_serving, PYTHON, SCRIPTS / f"{name}_client.py")
    assert_same(found, expected)
    assert all(found.get("structured", {}).values())
    assert name == "litellm" or len(found["structured"]) == 2


def test_javascript(tiny_serving, expected):
    needs(PLACE / "node_modules" / "openai")
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    shutil.copy(SCRIPTS / "openai_client.mjs", PLACE)
    assert_same(run_script(tiny_serving, node, PLACE / "openai_client.mjs"), expected)


def test_pydantic_ai(tiny_serving, expected):
    """It keeps the first of several choices; all else it has a setting for."""
    needs(PYTHON)
    found = run_script(tiny_serving, PYTHON, SCRIPTS / "pydantic_ai_client.py")
    for name in ("text", "image", "images", "stream", "stopped"):
        assert found[name].strip() == expected[name].strip(), name
    assert found["several"] == found["again"]
    assert found["several"].strip() == expected["several"][0].strip()
    assert found["usage"] == found["logprobs"] == 8
    assert "frequency_penalty: not supported here" in found["refused"]
    assert found["structured"] == {"NativeOutput": True, "ToolOutput": True}


def test_the_llm_command_line(tiny_serving, expected, tmp_path):
    needs(PLACE / "bin" / "llm")
    models = f"- model_id: tiny\n  model_name: tiny\n  api_base: {tiny_serving[2].url}/v1\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models + "  vision: true\n")
    (tmp_path / "keys.json").write_text('{"none": "none"}')
    (tmp_path / "image.png").write_bytes(base64.b64decode(data_url().partition(",")[2]))

    def ask(*words, **options) -> str:
        given = [word for name, value in ({"max_tokens": 8} | options).items() for word in ("-o", name, value)]
        words = [PLACE / "bin" / "llm", "-m", "tiny", "What is shown?", *given, *words]
        return run_client(*words, env={"LLM_USER_PATH": str(tmp_path)}).strip()

    image = ("-a", tmp_path / "image.png")
    assert ask(temperature=0) == ask("--no-stream", temperature=0) == expected["text"].strip()
    assert ask(*image, temperature=0) == ask(*image, "--no-stream", temperature=0)
    assert ask(*image, *image, temperature=0)
    assert ask(temperature=1, seed=7) == expected["several"][0].strip()
    assert ask(temperature=0, stop=expected["text"].strip()[2]) == expected["stopped"].strip()


def test_curl(tiny_serving, expected):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is shown?"}], "max_tokens": 8}
    url = f"{tiny_serving[2].url}/v1/chat/completions"
    words = [curl, "-sS", url, "-H", "content-type: application/json", "-d"]
    whole = json.loads(run_client(*words, json.dumps(body)))
    assert whole["choices"][0]["message"]["content"] == expected["text"]
    streamed = run_client(*words, json.dumps(body | {"stream": True})).split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in streamed if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == expected["text"]
    assert "data: [DONE]" in streamed
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    text = body["messages"][0]["content"]

    def asked(images=0, **more) -> list[dict]:
        content = [*[picture] * images, {"type": "text", "text": text}]
        message = {"messages": [{"role": "user", "content": content}]}
        return json.loads(run_client(*words, json.dumps(body | message | more)))["choices"]

    assert [asked(n)[0]["message"]["content"] for n in (1, 2)] == [expected["image"], expected["images"]]
    drawn = asked(n=2, temperature=1, seed=7)
    assert [choice["message"]["content"] for choice in drawn] == expected["several"]
    assert asked(stop=[expected["text"].strip()[2]])[0]["message"]["content"] == expected["stopped"]
    assert len(asked(logprobs=True, top_logprobs=2)[0]["logprobs"]["content"]) == 8


def test_inspect_ai_counts_as_run_eval_does(tiny_serving, tmp_path):
    """200 closed questions of the built-in set: its accuracy is the strict accuracy of the same answers."""
    inspect = PLACE / "inspect" / "bin" / "inspect"
    needs(inspect)
    write_phantoms(tmp_path / "data", 0, Counts(train=4, test=120, conversations=1, vqa=1, text=4), size=48)
    questions = tmp_path / "data" / "vqa_test.json"

    def inspected(name: str, *more) -> dict:
        words = [inspect, "eval", "docs/inspect_task.py", "--model", "openai/tiny"]
        words += ["--model-base-url", f"{tiny_serving[2].url}/v1", "--max-tokens", "6", "--max-connections", "8"]
        words += ["-T", f"questions={questions}", "-T", f"images={tmp_path / 'data' / 'images'}"]
        words += ["--log-dir", tmp_path / name, "--log-format", "json", "--display", "plain"]
        run_client(*words, *more, env={"OPENAI_API_KEY": "none", "PYTHONPATH": str(ROOT)}, cwd=ROOT)
        (log,) = (tmp_path / name).glob("*.json")
        return json.loads(log.read_text())

    hot = ["--limit", "2", "--temperature", "1", "--seed", "7", "--num-choices", "2"]
    hot += ["--logprobs", "--top-logprobs", "2"]
    first, second = (inspected(name, *hot)["samples"] for name in ("first", "second"))
    assert choices_of(first) == choices_of(second) and len(choices_of(first)[0]) == 2
    assert len(first[0]["output"]["choices"][0]["logprobs"]["content"]) == 6
    letter = choices_of(first)[0][0].strip()[1]
    stopped = inspected("stopped", *hot, "--stop-seqs", letter)["samples"]
    assert letter not in choices_of(stopped)[0][0]

    told = inspected("all")
    accuracy = told["results"]["scores"][0]["metrics"]["accuracy"]["value"]
    said = {str(sample["id"]): sample["scores"]["strict"]["answer"] for sample in told["samples"]}
    assert len(said) == 200

    asked = [record for record in read_records(questions) if str(record["id"]) in said]
    write_records(tmp_path / "asked.json", asked)
    items = read_vqa_items(tmp_path / "asked.json")
    assert {item.answer_type for item in items} == {CLOSED}
    answers = [{"question_id": item.id, "prompt": item.question, "text": said[str(item.id)]} for item in items]
    write_records(tmp_path / "answers.jsonl", answers)
    words = [sys.executable, "-m", "llava.eval.run_eval", "--gt", tmp_path / "asked.json"]
    run_client(*words, "--pred", tmp_path / "answers.jsonl", "--output", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert strict_accuracy(scores) == pytest.approx(100 * accuracy, abs=1e-6)


def choices_of(samples: list[dict]) -> list[list[str]]:
    """The texts of each sample in inspect's log."""
    return [[choice["message"]["content"] for choice in sample["output"]["choices"]] for sample in samples]


def strict_accuracy(scores: dict) -> float:
    """`closed accuracy` of the *strict* set, in percent."""
    found = scores["strict"]["closed accuracy"]
    return found["value"] if isinstance(found, dict) else found
