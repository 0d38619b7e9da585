"""The whole road with a real (tiny) model: controller, worker, API, and the tools, as processes."""

import base64
import io
import subprocess
import sys
import threading

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.images import png_data_url
from llava.serve import model_worker
from llava.serve.job import read_job
from llava.serve.protocol import ErrorType, ServeError, split_chunks
from llava.serve.secret import HEADER
from llava.serve.web.parts.attention_view import Shown
from tests.serve.processes import TINY_ENV, Process, wait_until

SECRET = {HEADER: "s3cret"}


def image(color=(200, 30, 30), size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def question(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(tiny_client, text, *images, **more):
    more = {"model": "tiny", "messages": question(text, *images), "max_tokens": 12} | more
    return tiny_client.chat.completions.create(**more)


def stats(worker):
    return httpx.post(worker.url + "/worker_get_status", headers=SECRET, timeout=10).json()["stats"]


def test_a_request_that_comes_after_the_engine_has_stopped_is_told_so(checkpoint):
    from llava.generation import Engine
    from llava.model import load_pretrained_model
    from llava.serve.worker.engine_backend import EngineBackend

    backend = EngineBackend(Engine(load_pretrained_model(checkpoint, device="cpu")))
    backend.close()
    with pytest.raises(ServeError) as refused:
        backend.submit(read_job({"messages": question("What is shown?")}), print)
    assert refused.value.error_type == ErrorType.WORKER_LOST


def test_answers_equal_the_engines_own(tiny_client, checkpoint):
    from llava.conversation import get_template
    from llava.generation import Engine, Request, SamplingParams
    from llava.images import open_uploaded_image
    from llava.model import load_pretrained_model

    loaded = load_pretrained_model(checkpoint, device="cpu")
    conversation = get_template(loaded.model.config.conversation_template)
    conversation.append_message(conversation.roles[0], "<image>\nWhat is shown?")
    request = Request(conversation, [open_uploaded_image(image())], SamplingParams(max_new_tokens=12))
    (expected,) = Engine(loaded).generate([request])
    reply = ask(tiny_client, "What is shown?", image())
    assert reply.choices[0].message.content == expected.text.lstrip()
    assert reply.usage.completion_tokens == len(expected.token_ids)
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    with ask(tiny_client, "What is shown?", image(), stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content for chunk in stream).strip() == expected.text.strip()


def test_many_at_once_equal_one_at_a_time(tiny_client):
    asked = [(f"Is there {number}?", image((number * 20, 0, 0))) for number in range(8)]
    alone = [ask(tiny_client, *each).choices[0].message.content for each in asked]
    together = [None] * len(asked)

    def work(place):
        together[place] = ask(tiny_client, *asked[place]).choices[0].message.content

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_seeds_stops_logprobs_choices(tiny_client):
    hot = {"temperature": 2.0, "seed": 7}
    first, second = (ask(tiny_client, "Hi", **hot).choices[0].message.content for _ in range(2))
    assert first == second
    several = ask(tiny_client, "Hi", n=3, **hot)
    assert several.choices[0].message.content == first
    assert len({choice.message.content for choice in several.choices}) > 1
    reply = ask(tiny_client, "Hi", logprobs=True, top_logprobs=2)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries), "greedy takes the likeliest"
    whole = reply.choices[0].message.content
    letter = whole[len(whole) // 2]
    stopped = ask(tiny_client, "Hi", stop=[letter])
    assert stopped.choices[0].message.content == whole.split(letter)[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_parameters_beyond_openais_reach_the_engine(tiny_client, checkpoint):
    """As vLLM's clients send them; what they do is the engine's own, so the engine is asked too."""
    from llava.conversation import get_template
    from llava.generation import Engine, Request, SamplingParams
    from llava.model import load_pretrained_model

    engine = Engine(load_pretrained_model(checkpoint, device="cpu"))
    hot = {"temperature": 1.5, "seed": 7}
    cases = [{}, {"top_k": 3}, {"repetition_penalty": 1.5}, {"logit_bias": {"300": 30}}, {"stop_token_ids": [300]}]
    texts = []
    for case in cases:
        conversation = get_template(engine.model.config.conversation_template)
        conversation.append_message(conversation.roles[0], "Hi")
        (expected,) = engine.generate([Request(conversation, (), SamplingParams(**hot, **case, max_new_tokens=12))])
        texts.append(ask(tiny_client, "Hi", extra_body=case, **hot).choices[0].message.content)
        assert texts[-1] == expected.text.lstrip(), case
    assert len(set(texts[:4])) == 4
    greedy = ask(tiny_client, "Hi").choices[0].message.content
    assert ask(tiny_client, "Hi", extra_body={"top_k": 1}, **hot).choices[0].message.content == greedy
    with pytest.raises(openai.BadRequestError, match="logit_bias: 99999 is no id"):
        ask(tiny_client, "Hi", logit_bias={"99999": 1})
    with pytest.raises(openai.BadRequestError, match="characters, more than the model's context"):
        ask(tiny_client, "left right " * 200_000)


def test_where_the_model_looked(tiny_serving):
    """The worker's own ids of an answer lead to weights that sum to what they say, in the page's form."""
    worker = tiny_serving[1]
    asked = {"model": "tiny", "messages": question("What is shown?", image(), image((0, 0, 9)))}
    told = {"max_new_tokens": 6, "ignore_eos": True, "return_token_ids": True}

    def post(path, **body):
        return httpx.post(worker.url + path, json=asked | body, headers=SECRET, timeout=60)

    chunks, _ = split_chunks(post("/worker_generate_stream", **told).content)
    token_ids = [token for chunk in chunks for token in chunk["token_ids"]]
    assert len(token_ids) == 6
    shown = Shown.from_reply(post("/worker_attention_map", token_ids=token_ids).json())
    assert "".join(shown.tokens) == chunks[-1]["text"].strip()
    assert [image for image, _, _ in shown.views] == [0, 1]
    sums = sum(weights.sum((1, 2)) for _, _, weights in shown.views)
    np.testing.assert_allclose(sums, shown.shares, atol=2e-3)
    packed = shown.packed()
    for number, (_, _, weights) in enumerate(shown.views):
        view = packed["views"][number]
        assert view["url"].startswith("data:image/png") and view["side"] == weights.shape[1]
        drawn = np.frombuffer(base64.b64decode(view["weights"]), np.uint8).reshape(weights.shape) / 255
        np.testing.assert_allclose(drawn * np.array(packed["brightest"])[:, None, None], weights, atol=2e-3)
    for wrong in ([], "5", [1.5], [True], [10**9]):
        reply = post("/worker_attention_map", token_ids=wrong)
        assert reply.status_code == 400 and "token_ids" in reply.json()["error"]["message"]
    assert httpx.post(worker.url + "/worker_attention_map", json=asked, timeout=10).status_code == 401


@pytest.fixture(scope="module")
def scan():
    """A CT slice as a data: URL, and as the model sees it through the lung's window."""
    pytest.importorskip("pydicom")
    from llava.images import open_image
    from tests.images.test_medical import HOUNSFIELD, dicom

    content = dicom(HOUNSFIELD, WindowCenter=300, WindowWidth=900)
    url = f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
    return url, open_image(content, window="lung"), open_image(content)


def part(url, **options):
    given = {"image_options": options} if options else {}
    return {"type": "image_url", "image_url": {"url": url}, **given}


def test_image_options_reach_the_model(tiny_client, scan):
    """The same answer as for a picture of what is asked for, in each of OpenAI's forms."""
    url, lung, own = scan

    def chat(image):
        content = [image, {"type": "text", "text": "What is shown?"}]
        reply = tiny_client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=12, logprobs=True
        )
        return [token.logprob for token in reply.choices[0].logprobs.content]

    expected = chat(part(png_data_url(lung)))
    assert chat(part(url, preset="lung")) == chat(part(url, window=[-600, 1500])) == expected
    assert chat(part(url)) == chat(part(png_data_url(own))) != expected
    answers = []
    for each in ({"image_url": url, "image_options": {"preset": "lung"}}, {"image_url": png_data_url(lung)}):
        content = [{"type": "input_image", **each}, {"type": "input_text", "text": "What is shown?"}]
        reply = tiny_client.responses.create(
            model="tiny", input=[{"role": "user", "content": content}], max_output_tokens=12
        )
        answers.append(reply.output_text)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widow": [1, 2]}, "messages.0.content.0.image_options: 'widow' is no option of an image"),
        ({"preset": "lung", "window": [1, 2]}, "image_options: window and preset exclude each other"),
        ({"slice": 3}, "slice is given, but the file is a DICOM file"),
        ({"frame": 3}, "frame 3 doesn't exist"),
    ],
)
def test_wrong_image_options_are_refused(tiny_client, scan, options, words):
    content = [part(scan[0], **options), {"type": "text", "text": "What?"}]
    with pytest.raises(openai.BadRequestError, match=words):
        tiny_client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    misplaced = [{"type": "text", "text": "What?", "image_options": {"preset": "lung"}}]
    with pytest.raises(openai.BadRequestError, match="belong to an image, not to a text"):
        tiny_client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": misplaced}])


def test_the_images_as_the_model_sees_them(tiny_serving, checkpoint, scan):
    """What the page's preview shows is what the tower's processor makes."""
    from llava.images import ImageProcessor
    from llava.records import read_json

    url, lung, _ = scan
    content = [part(url, preset="lung"), {"type": "text", "text": "?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    reply = httpx.post(tiny_serving[1].url + "/worker_seen_images", json=body, headers=SECRET, timeout=60)
    (seen,) = reply.json()["images"]
    processor = ImageProcessor.from_pretrained(checkpoint)
    ratio = read_json(checkpoint / "config.json").get("image_aspect_ratio")
    expected = processor.restore(np.asarray(processor([lung], ratio)[0]))
    found = Image.open(io.BytesIO(base64.b64decode(seen.partition(",")[2]))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_old_clients_get_prompt_and_answer(tiny_serving):
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    body = {"model": "tiny", "prompt": prompt, "images": [image()], "temperature": 0.2, "stop": "</s>"}
    for server in tiny_serving[:2]:
        reply = httpx.post(
            server.url + "/worker_generate_stream", json=body | {"max_new_tokens": 5}, headers=SECRET, timeout=60
        )
        chunks, _ = split_chunks(reply.content)
        assert all(chunk["text"].startswith(prompt) and chunk["error_code"] == 0 for chunk in chunks)
        assert chunks[-1]["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize(
    ("kind", "status", "words", "ask_for"),
    [
        ("context_too_long", 400, "context", lambda: question("word " * 2000)),
        ("bad_image", 400, "base64", lambda: question("x", "!!!")),
        ("bad_image", 400, "not an image", lambda: question("x", base64.b64encode(b"<html>" * 9).decode())),
        ("bad_image", 400, "beyond what is allowed", lambda: question("x", image(size=(30_000, 2)))),
    ],
)
def test_failures_of_the_model_have_their_words(tiny_client, kind, status, words, ask_for):
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        tiny_client.chat.completions.create(model="tiny", messages=ask_for())
    assert (caught.value.status_code, caught.value.type) == (status, kind)
    assert "/" not in caught.value.body["message"].replace("data:image/png", ""), "no path of the server"


def test_health_answers_and_leaving_frees_the_slot(tiny_serving, tiny_client):
    worker = tiny_serving[1]
    stream = ask(tiny_client, "Long", stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert httpx.get(worker.url + "/health", timeout=5).status_code == 200
    stream.close()
    wait_until(lambda: stats(worker)["running"] == 0, 10)


def test_a_full_queue_says_so(checkpoint):
    words = ["--model-path", str(checkpoint), "--model-name", "tiny", "--no-register", "--device", "cpu"]
    limits = ["--max-queue", "1", "--limit-model-concurrency", "1"]
    with Process("llava.serve.model_worker", *words, *limits, env=TINY_ENV) as worker:
        worker.wait(seconds=500)
        body = {"model": "tiny", "prompt": "Hi", "max_new_tokens": 450, "ignore_eos": True, "stream": False}
        outcomes = []

        def work():
            reply = httpx.post(worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=120)
            outcomes.append(split_chunks(reply.content)[0][-1].get("error_type", "answered"))

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(outcomes) == {"answered", "queue_full"}
        assert worker.stop() in (0, -15)


@pytest.mark.parametrize("flag", ["--load-4bit", "--load-8bit"])
def test_a_quantized_worker_answers(checkpoint, flag):
    pytest.importorskip("bitsandbytes")
    words = ["--model-path", str(checkpoint), "--model-name", "tiny", "--no-register", "--device", "cpu", flag]
    with Process("llava.serve.model_worker", *words, env=TINY_ENV) as worker:
        worker.wait(seconds=500)
        body = {"model": "tiny", "messages": question("What?", image()), "max_new_tokens": 5, "ignore_eos": True}
        reply = httpx.post(worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=60)
        assert split_chunks(reply.content)[0][-1]["usage"]["completion_tokens"] == 5


def test_the_tools(tiny_serving, tmp_path):
    controller, worker, _ = tiny_serving

    def tool(name, *words):
        command = [sys.executable, "-m", f"llava.serve.{name}", "--controller-address", controller.url, *words]
        return subprocess.run(command, capture_output=True, text=True, env={**_environment(), **TINY_ENV})

    said = tool("test_message", "--model-name", "tiny", "--message", "Hi", "--max-new-tokens", "4")
    assert (said.returncode, said.stderr) == (0, "")
    direct = tool("test_message", "--worker-address", worker.url, "--message", "Hi", "--max-new-tokens", "4")
    assert direct.stdout == said.stdout
    missing = tool("test_message", "--model-name", "none")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "no_worker" in missing.stderr
    assert tool("register_worker", "--worker-name", worker.url).returncode == 0
    refused = tool("register_worker", "--worker-name", "http://127.0.0.1:1")
    assert refused.returncode == 2
    assert "doesn't tell its status" in refused.stderr


def _environment():
    import os

    return dict(os.environ)


def test_flags_of_the_older_scripts(checkpoint, caplog):
    caplog.set_level("INFO")
    with pytest.raises(LlavaError, match="give --model-path"):
        model_worker.main(["--multi-modal", "--open-to-everyone"])
    assert "--multi-modal is ignored" in caplog.text
    words = ["--model-path", str(checkpoint), "--device", "cpu"]
    for more, aspect_ratio, spread in ([], None, False), (["--keep-aspect-ratio", "--num-gpus", "2"], "keep", True):
        caplog.clear()
        backend, card = model_worker._load(model_worker.build_parser().parse_args([*words, *more]))
        try:
            assert card.context.endswith(" tokens") and card.trained_on is None
            assert backend.engine.model.config.image_aspect_ratio == aspect_ratio
            assert ("spread over" in caplog.text) is spread
        finally:
            backend.close()
