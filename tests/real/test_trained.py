"""SmolLM2 and DINOv2 through the published commands: trained, answering, exported, served; by others as by us."""

import base64
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.conversation import get_template
from llava.data.phantoms import Counts, write_phantoms
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model
from llava.records import read_json
from tests.conftest import ROOT
from tests.model import test_hf_layout_files as by_transformers
from tests.real.llama_cpp import LlamaCpp, load_or_skip
from tests.tiny_serving import serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

QUESTION = "What does the picture show?"
NEW = 12


def run(*words):
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def trained(small_models, tmp_path_factory):
    """A folder: `data` of phantoms, `model` after 20 steps, `hf` and `gguf` exported from it."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    write_phantoms(data, 0, Counts(train=20, test=4, conversations=4, vqa=20, text=8), processes=1)
    run(
        "llava.train.train", "--model_name_or_path", small_models / "smollm2-135m", "--mm_projector_type", "mlp2x_gelu",
        "--vision_tower", small_models / "dinov2-small", "--mm_vision_select_layer", -1, "--image_aspect_ratio", "pad",
        "--data_path", data / "vqa_train.json", "--image_folder", data / "images", "--output_dir", folder / "model",
        "--max_steps", 20, "--per_device_train_batch_size", 1, "--learning_rate", 1e-4, "--save_strategy", "no",
        "--report_to", "none", "--use_cpu", True,
    )  # fmt: skip
    run("llava.model.export_hf", "--model-path", folder / "model", "--output", folder / "hf")
    run("llava.model.export_gguf", "--model-path", folder / "model", "--output", folder / "gguf", "--type", "f32")
    return folder


@pytest.fixture(scope="module")
def expected(trained) -> list[tuple[Image.Image, str]]:
    """Images, one of them not square, and our greedy answers in float32."""
    pictures = sorted((trained / "data" / "images").glob("*test*"))[:2]
    images = [Image.new("RGB", (60, 90), (200, 30, 30)), *(Image.open(path).convert("RGB") for path in pictures)]
    engine = Engine(load_pretrained_model(trained / "model", device="cpu", dtype="float32"))
    requests = []
    for image in images:
        asked = get_template("smollm2")
        asked.append_message(asked.roles[0], f"<image>\n{QUESTION}")
        requests.append(Request(asked, [image], SamplingParams(max_new_tokens=NEW)))
    return [(image, answer.text) for image, answer in zip(images, engine.generate(requests), strict=True)]


def test_answers_of_the_command(trained):
    # By the language model's chat template.
    assert read_json(trained / "model" / "config.json")["conversation_template"] == "smollm2"
    data = trained / "data"
    run(
        "llava.eval.model_vqa_med", "--model-path", trained / "model", "--question-file", data / "vqa_test.json",
        "--image-folder", data / "images", "--answers-file", trained / "answers.jsonl", "--max_new_tokens", 8,
    )  # fmt: skip
    answers = [json.loads(line) for line in (trained / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(read_json(data / "vqa_test.json")) and all(answer["text"] for answer in answers)


def test_transformers_own_class(trained, expected):
    processor = AutoProcessor.from_pretrained(trained / "hf")
    model = LlavaForConditionalGeneration.from_pretrained(trained / "hf", dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for image, answer in expected:
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert processor.decode(ids, skip_special_tokens=True).strip() == answer


def test_transformers_serve(trained, expected, tmp_path):
    with by_transformers.serving(trained / "hf", tmp_path / "serve.log") as url:
        for image, answer in expected:
            assert by_transformers.chat(url, trained / "hf", image).strip() == answer


def test_our_api(trained, expected):
    with serving(trained / "model", "trained") as client:
        for image, answer in expected:
            assert ask(client, "trained", image) == answer


def ask(client, model, image) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"}},
        {"type": "text", "text": QUESTION},
    ]
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=NEW, temperature=0)
    return reply.choices[0].message.content.strip()


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_llama_cpp(trained):
    """An image of the tower's size, which nobody resizes."""
    load_or_skip()
    loaded = load_pretrained_model(trained / "model", device="cpu", dtype="float32")
    theirs = LlamaCpp(trained / "gguf" / "model-f32.gguf")
    side = loaded.model.get_vision_tower().image_size
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    asked = get_template("smollm2")
    asked.append_message(asked.roles[0], f"<image>\n{QUESTION}")
    answer = Engine(loaded).generate([Request(asked, [image], SamplingParams(max_new_tokens=NEW))])[0]
    asked.append_message(asked.roles[1], None)
    end = loaded.tokenizer.eos_token_id
    projector = trained / "gguf" / "mmproj-f32.gguf"
    _, ids = theirs.see(projector, asked.get_prompt(), png(image), NEW, {end})
    assert ids == [token for token in answer.token_ids if token != end]


def test_babydoctor_in_small(small_models, tmp_path):
    """Projector, LoRA, QLoRA, merged, in 4 bits: few steps of scripts/babydoctor_small.sh, then served."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path / "babydoctor"
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    settings = {"MODELS": str(small_models), "OUT": str(folder), "STEPS": "2", "IMAGES": "12", "TEST": "1"} | {
        "PATH": path
    }
    subprocess.run(["sh", "scripts/babydoctor_small.sh"], cwd=ROOT, env=os.environ | settings, check=True)
    assert read_json(folder / "3-4bit" / "config.json")["quantization_config"]["load_in_4bit"]
    sizes = [sum(path.stat().st_size for path in (folder / name).glob("*.safetensors")) for name in ("3", "3-4bit")]
    assert sizes[1] < sizes[0]
    with serving(folder / "3-4bit", "babydoctor") as client:
        assert ask(client, "babydoctor", Image.new("RGB", (96, 96), (90, 90, 90)))
