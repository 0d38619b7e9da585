"""SmolLM2 and DINOv2 through our own commands: text as transformers gives it, whole, streamed and by the API."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from llava.conversation import get_template
from llava.data.phantoms import Counts, write_phantoms
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model
from llava.tokenization import encode_prompt
from tests.conftest import ROOT
from tests.real.test_gguf import QUESTIONS

pytestmark = pytest.mark.long

MORE = (
    "Schreib einen Satz auf Deutsch über Lungen.",
    "用中文说你好。",
    "Write 👩‍⚕️🩺🫁 1998?",
    "Count: 1998, 1999,",
)
"""Characters of several tokens, and digits."""
NEW = 32


def conversation(question):
    started = get_template("smollm2")
    started.append_message(started.roles[0], question)
    return started


@pytest.fixture(scope="module")
def expected(small_models, llava):
    """{question: transformers' greedy text}, float32, by the language model's own folder and chat template."""
    loaded = load_pretrained_model(llava, device="cpu")
    tokenizer = loaded.tokenizer
    plain = AutoModelForCausalLM.from_pretrained(small_models / "smollm2-135m", dtype=torch.float32).eval()
    texts = {}
    for question in (*QUESTIONS, *MORE):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == encode_prompt(conversation(question), tokenizer)
        found = plain.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
        texts[question] = tokenizer.decode(found, skip_special_tokens=True).strip()
    return loaded, texts


def test_text_whole_and_streamed(expected):
    loaded, texts = expected
    engine = Engine(loaded)
    requests = [Request(conversation(question), (), SamplingParams(max_new_tokens=NEW)) for question in texts]
    assert [answer.text for answer in engine.generate(requests)] == list(texts.values())
    for question, text in texts.items():
        request = Request(conversation(question), (), SamplingParams(max_new_tokens=NEW))
        pieces = list(engine.stream(request))
        assert "".join(pieces).strip() == text and not any("\ufffd" in piece for piece in pieces[:-1])


def test_trained_answered_exported(small_models, tmp_path):
    """The published commands on real weights: 20 steps, answers, a folder for transformers, one for llama.cpp."""
    write_phantoms(tmp_path / "data", 0, Counts(train=20, test=4, conversations=4, vqa=20, text=8), processes=1)
    run = [sys.executable, "-m"]
    train = [*run, "llava.train.train", "--model_name_or_path", str(small_models / "smollm2-135m")]
    train += ["--vision_tower", str(small_models / "dinov2-small"), "--mm_projector_type", "mlp2x_gelu"]
    train += [
        "--mm_vision_select_layer",
        "-1",
        "--image_aspect_ratio",
        "pad",
        "--use_cpu",
        "True",
        "--report_to",
        "none",
    ]
    train += ["--data_path", str(tmp_path / "data" / "vqa_train.json"), "--image_folder"]
    train += [str(tmp_path / "data" / "images"), "--output_dir", str(tmp_path / "model"), "--max_steps", "20"]
    train += [
        "--per_device_train_batch_size",
        "1",
        "--learning_rate",
        "1e-4",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
    ]
    subprocess.run(train, cwd=ROOT, check=True)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["conversation_template"] == "smollm2"  # by the language model's chat template
    answers = [*run, "llava.eval.model_vqa_med", "--model-path", str(tmp_path / "model"), "--max_new_tokens", "8"]
    answers += ["--question-file", str(tmp_path / "data" / "vqa_test.json"), "--image-folder"]
    answers += [str(tmp_path / "data" / "images"), "--answers-file", str(tmp_path / "answers.jsonl")]
    subprocess.run(answers, cwd=ROOT, check=True)
    for command in ("export_hf", "export_gguf"):
        words = [*run, f"llava.model.{command}", "--model-path", str(tmp_path / "model"), "--output"]
        subprocess.run([*words, str(tmp_path / command)], cwd=ROOT, check=True)
    assert same_in_transformers(tmp_path)


def same_in_transformers(folder) -> bool:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    image = Image.new("RGB", (60, 90), (200, 30, 30))
    loaded = load_pretrained_model(folder / "model", device="cpu", dtype="float32")
    asked = get_template("smollm2")
    asked.append_message(asked.roles[0], "<image>\nWhat is shown?")
    ours = Engine(loaded).generate([Request(asked, [image], SamplingParams(max_new_tokens=12))])[0].text
    processor = AutoProcessor.from_pretrained(folder / "export_hf")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "export_hf", dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip() == ours
