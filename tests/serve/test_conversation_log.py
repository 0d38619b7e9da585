"""--conversation-log of the API: what is kept, what never is, and that no answer waits for it or fails with it."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llava.records import iter_records
from llava.serve.conversation_log import HEADER
from tests.serve.processes import Process, wait_until

KEY = "key-of-the-ward"
ENV = {"LLAVA_SERVE_SECRET": "s3cret", "LLAVA_API_KEYS": KEY}
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def controller():
    with Process("llava.serve.controller", env=ENV) as process:
        process.wait()
        with Process("tests.serve.scripted_worker", "--controller", process.url, env=ENV) as worker:
            worker.wait()
            yield process


def start_api(controller, *words, **more):
    words = ["--controller", controller.url, *words]
    api = Process("llava.serve.openai_api_server", *words, env=ENV, **more).wait()
    wait_until(lambda: ask_for(api, "/ready").status_code == 200, 60)
    return api


def ask_for(api, path):
    return httpx.get(api.url + path, headers=HEADERS, timeout=60)


def ask(api, text, image=None, **more):
    content = [{"type": "text", "text": text}]
    if image is not None:
        shown = {"image_options": {"preset": "lung"}}
        content.insert(0, {"type": "image_url", "image_url": {"url": image}, **shown})
    body = {"model": "scripted", "messages": [{"role": "user", "content": content}], **more}
    return httpx.post(api.url + "/v1/chat/completions", json=body, headers=HEADERS, timeout=60)


def records_in(folder):
    return [record for path in sorted(folder.glob("*.jsonl")) for record in iter_records(path)]


def test_what_is_kept(controller, tmp_path):
    folder = tmp_path / "log"
    words = ["--conversation-log", str(folder), "--conversation-log-days", "9"]
    with start_api(controller, *words, log=tmp_path / "stderr") as api:
        description = ask_for(api, "/openapi.json").json()["info"]["description"]
        assert "kept on this server for 9 days" in description and HEADER in description
        refused = httpx.get(api.url + "/v1/models")
        assert refused.status_code == 401 and refused.headers[HEADER] == "kept for 9 days"

        image = b"content of an image"
        url = "data:image/png;base64,Y29udGVudCBvZiBhbiBpbWFnZQ=="
        whole = ask(api, "is it é?", url, n=2)
        assert whole.headers[HEADER] == "kept for 9 days"
        assert [choice["message"]["content"] for choice in whole.json()["choices"]] == ["echo: <image> is it é? "] * 2
        stream = ask(api, "streamed", stream=True)
        assert stream.text.rstrip().endswith("[DONE]") and stream.headers[HEADER]
        assert ask(api, "now oom").status_code == 507
        # What the worker refuses is kept as far as it is a question.
        assert ask(api, "x", "data:image/png,nothing").status_code == 200
        strange = {"model": "scripted", "messages": [{"role": "user", "content": [{"type": "text"}]}]}
        assert httpx.post(api.url + "/v1/chat/completions", json=strange, headers=HEADERS).status_code == 400
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "scripted", "messages": [{"role": "user", "content": "please hold"}]}
            httpx.post(api.url + "/v1/chat/completions", json=body, headers=HEADERS, timeout=1.0)
        wait_until(lambda: len(lines_in(folder)) == 7, 60)
        records = records_in(folder)
        (path,) = folder.glob("*.jsonl")
        assert path.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
        assert api.stop() in (0, -15)

    assert [record["end"] for record in records] == [
        "stop",
        "stop",
        "stop",
        "out_of_memory",
        "stop",
        "bad_request",
        "cancelled",
    ]
    assert all(set(record) == {"time", "request_id", "model", "messages", "answer", "end"} for record in records)
    assert {records[0]["request_id"], records[1]["request_id"]} == {whole.headers["x-request-id"]}
    picture, question = records[0]["messages"][0]["content"]
    assert picture == {
        "type": "image_url",
        "image_url": {"url": "sha256:" + hashlib.sha256(image).hexdigest()},
        "image_options": {"preset": "lung"},
    }
    assert question == {"type": "text", "text": "is it é?"} and records[0]["answer"] == "echo: <image> is it é? "
    assert records[4]["messages"][0]["content"][0]["image_url"] == {"url": "unreadable"}
    for private in (KEY, "127.0.0.1", "Y29udGVudC", "content of an image"):
        assert private not in path.read_text()
    assert "streamed" not in (tmp_path / "stderr").read_text()


def test_the_answer_to_a_ready_prompt_is_kept_without_it(controller, tmp_path):
    folder = tmp_path / "log"
    with start_api(controller, "--conversation-log", str(folder)) as api:
        body = {"model": "scripted", "prompt": "How many?"}
        reply = httpx.post(api.url + "/v1/completions", json=body, headers=HEADERS, timeout=60)
        wait_until(lambda: lines_in(folder), 60)
    (record,) = records_in(folder)
    assert record["prompt"] == "How many?" and record["answer"] == reply.json()["choices"][0]["text"].lstrip()
    assert record["answer"] and not record["answer"].startswith("How many?")


def test_nothing_is_kept_or_said_unless_asked_for(controller, tmp_path):
    with start_api(controller, log=tmp_path / "stderr") as api:
        reply = ask(api, "what is shown?")
        assert reply.status_code == 200 and HEADER not in reply.headers
        assert "description" not in ask_for(api, "/openapi.json").json()["info"]
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


def test_the_description_says_it_without_a_folder_being_made(tmp_path):
    words = ["--openapi", "--conversation-log", str(tmp_path / "log"), "--conversation-log-days", "3"]
    done = subprocess.run([sys.executable, "-m", "llava.serve.openai_api_server", *words], capture_output=True)
    assert "for 3 days" in json.loads(done.stdout)["info"]["description"]
    assert not (tmp_path / "log").exists()


def test_a_full_disk_stops_no_answer(controller, disk, tmp_path):
    folder = disk("-t", "tmpfs", "-o", "size=64k,mode=700")
    with start_api(controller, "--conversation-log", str(folder), log=tmp_path / "stderr") as api:
        (folder / "filler").write_bytes(bytes(56_000))
        for number in range(3):
            said = ask(api, f"question {number} {'x' * 20_000}").json()["choices"][0]["message"]["content"]
            assert said.startswith(f"echo: question {number}")
        wait_until(lambda: "a record is lost, 3 since the start" in (tmp_path / "stderr").read_text(), 60)
        assert "No space left" in (tmp_path / "stderr").read_text()
        (folder / "filler").unlink()
        assert ask(api, "small").status_code == 200
        wait_until(lambda: lines_in(folder), 60)
    assert [record["messages"][0]["content"][0]["text"] for record in records_in(folder)] == ["small"]


def test_two_servers_write_to_one_folder_and_one_is_killed(controller, tmp_path):
    folder, long = tmp_path / "log", "x" * 100_000

    def ask_many(api, name):
        answered = []
        for number in range(20):
            try:
                if ask(api, f"{name}-{number} {long}", max_tokens=1).status_code == 200:
                    answered.append(f"{name}-{number}")
            except httpx.TransportError:
                break
        return answered

    words = ["--conversation-log", str(folder)]
    with start_api(controller, *words) as kept, start_api(controller, *words) as killed:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(ask_many, kept, "kept")
            broken = pool.submit(ask_many, killed, "killed")
            wait_until(lambda: len(lines_in(folder)) > 4, 60)
            killed.kill()
        wait_until(lambda: len(lines_in(folder)) >= 20, 60)
        assert kept.stop() in (0, -15)
    first_words = [record["messages"][0]["content"][0]["text"].split()[0] for record in records_in(folder)]
    assert len(first_words) == len(set(first_words))
    assert set(whole.result()) <= set(first_words) and len(whole.result()) == 20
    # What the killed one had answered is there, but for what its thread was about to write.
    assert len(set(broken.result()) - set(first_words)) <= 1


def lines_in(folder):
    """Whole lines of files that are being written."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [line for line in lines if line.endswith(b"\n")]
