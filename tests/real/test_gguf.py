"""The exported files in llama.cpp's own library: text, image features, greedy answers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM

from llava.conversation import get_template
from llava.generation import Engine, Request, SamplingParams
from llava.model import build_model_from_llm, load_pretrained_model, save_model
from llava.model.gguf.reader import import_gguf
from llava.model.gguf.writer import export_gguf
from llava.tokenization import encode_prompt
from tests.real.llama_cpp import LlamaCpp, load_or_skip
from tests.tiny import make_clip, make_llava, make_tower

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

QUESTIONS = (
    "What is a lung?", "Name three colours.", "12 + 30 = ?", "Is the heart a muscle?", "What does an X-ray show?",
    "Write a haiku about rain.", "What is the capital of France?", "Say hello in Spanish.", "How many legs has an ant?",
    "What is a fracture?", "Which organ makes insulin?", "Define entropy.", "Who wrote Hamlet?", "Name a mammal.",
    "Spell the word bone.", "What is MRI?", "List two fruits.", "Is water wet?", "What is 7 * 8?", "Explain gravity.",
)  # fmt: skip


def prompt(question: str, tokenizer) -> list[int]:
    conversation = get_template("smollm2")
    conversation.append_message(conversation.roles[0], question)
    return encode_prompt(conversation, tokenizer)


def first_sentence(text: str) -> str:
    return text.partition(".")[0]


@pytest.mark.parametrize(("kind", "greatest", "relative", "same"), [("f32", 2e-3, 1, 20), ("f16", np.inf, 1e-2, 18)])
def test_text(kind, greatest, relative, same, llava, tmp_path):
    load_or_skip()
    loaded = load_pretrained_model(llava, device="cpu")
    theirs = LlamaCpp(export_gguf(llava, tmp_path / "gguf", kind=kind) / f"model-{kind}.gguf")
    ends, decode, equal = {loaded.tokenizer.eos_token_id}, loaded.tokenizer.decode, 0
    for ids in (prompt(question, loaded.tokenizer) for question in QUESTIONS):
        assert theirs.model.tokenize(decode(ids), add_special=True, parse_special=True) == ids
        with torch.inference_mode():
            ours = loaded.model(input_ids=torch.tensor([ids])).logits[0].numpy()
        difference = np.abs(theirs.logits(ids) - ours).max()
        assert difference <= min(greatest, relative * np.abs(ours).max())
        answer = loaded.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        answer = answer[: next((place for place, token in enumerate(answer) if token in ends), None)]
        equal += first_sentence(decode(theirs.greedy(ids, 24, ends))) == first_sentence(decode(answer))
    assert equal >= same


@pytest.mark.parametrize(("kind", "relative", "same"), [("q8_0", 0.06, 14), ("q4_0", 0.12, 8)])
def test_quantized_text(kind, relative, same, llava, tmp_path):
    """llama.cpp multiplies with activations in 8 bits: logits are near those of the file's own weights, read back in
    float32, and answers are sentences.
    """
    load_or_skip()
    tokenizer = load_pretrained_model(llava, device="cpu").tokenizer
    file = export_gguf(llava, tmp_path / "gguf", kind=kind) / f"model-{kind}.gguf"
    ours = AutoModelForCausalLM.from_pretrained(import_gguf(file, tmp_path / "back"), dtype=torch.float32).eval()
    theirs = LlamaCpp(file)
    end, equal, greatest, answers = tokenizer.eos_token_id, 0, 0.0, []
    for question in QUESTIONS:
        ids = prompt(question, tokenizer)
        with torch.inference_mode():
            expected = ours(torch.tensor([ids])).logits[0].numpy()
        greatest = max(greatest, np.abs(theirs.logits(ids) - expected).max() / np.abs(expected).max())
        answer = ours.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        answers.append(tokenizer.decode(theirs.greedy(ids, 24, {end})))
        equal += first_sentence(answers[-1]) == first_sentence(tokenizer.decode(answer, skip_special_tokens=True))
    assert greatest <= relative and equal >= same, (greatest, equal)
    assert np.mean([len(answer.split()) for answer in answers]) >= 6, answers


def images(side: int, count: int) -> list[Image.Image]:
    """Of the model's size, so that nothing has to be resized."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        image = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
        for _ in range(4):
            corners = np.sort(random.integers(0, side, (2, 2)), axis=0).ravel().tolist()
            ImageDraw.Draw(image).ellipse(corners, fill=tuple(random.integers(0, 256, 3).tolist()))
        found.append(image)
    return found


def see(engine: Engine, loaded, theirs: LlamaCpp, projector: Path, image: Image.Image, count: int):
    """(our features, theirs, our greedy ids, theirs)."""
    file = io.BytesIO()
    image.save(file, "PNG")
    conversation = get_template("smollm2")
    conversation.append_message(conversation.roles[0], "<image>\nWhat is shown?")
    answer = engine.generate([Request(conversation, [image], SamplingParams(max_new_tokens=count))])[0]
    conversation.append_message(conversation.roles[1], None)
    end = loaded.tokenizer.eos_token_id
    seen, ids = theirs.see(projector, conversation.get_prompt(), file.getvalue(), count, {end})
    pixels = torch.from_numpy(np.asarray(loaded.image_processor([image])))
    with torch.inference_mode():
        ours = loaded.model.encode_images(pixels)[0].numpy()
    return ours, seen, [token for token in answer.token_ids if token != end], ids


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


SIGLIP_PROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}}
CASES = {
    "dinov2": (None, {"mm_vision_select_layer": -1, "mm_projector_type": "mlp2x_gelu"}),
    "siglip": ("siglip_vision_model", {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}),
    "siglip linear": ("siglip_vision_model", {"mm_vision_select_layer": -2, "mm_projector_type": "linear"}),
    "clip": ("clip", {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}),
}


@pytest.fixture(scope="module", params=CASES)
def seeing(request, llava, small_models, tmp_path_factory):
    """(the case's name, checkpoint): SmolLM2 with the tower of the case, of random weights where it isn't DINOv2."""
    kind, fields = CASES[request.param]
    if kind is None:
        return request.param, llava
    folder = tmp_path_factory.mktemp("tower")
    sizes = {"image_size": 224, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    tower = make_clip(folder / "tower", **sizes) if kind == "clip" else make_tower(
        folder / "tower", kind, SIGLIP_PROCESSOR, **sizes)  # fmt: skip
    torch.manual_seed(0)
    tokenizer, model, processor, _ = build_model_from_llm(
        small_models / "smollm2-135m", tower, device="cpu", conversation_template="smollm2", **fields
    )
    save_model(folder / "llava", model, tokenizer, processor)
    return request.param, folder / "llava"


def test_images(seeing, tmp_path):
    """Features per patch, and greedy answers, of ten images."""
    load_or_skip()
    name, folder = seeing
    loaded = load_pretrained_model(folder, device="cpu")
    engine = Engine(loaded)
    output = export_gguf(folder, tmp_path / "gguf", kind="f32")
    theirs = LlamaCpp(output / "model-f32.gguf")
    same = 0
    for image in images(loaded.model.get_vision_tower().image_size, 10):
        ours, seen, answer, ids = see(engine, loaded, theirs, output / "mmproj-f32.gguf", image, 8)
        found = cosines(ours, seen).min()
        assert found >= 0.999, (name, found)
        same += answer == ids
    assert same >= 9


def test_tiny_models_of_both_kinds_of_vocabulary(tmp_path):
    """A vocabulary with blanks as marks (LLaMA's) and a byte-level one: ids and logits, in CI's size."""
    load_or_skip()
    for kind in ("llama", "mistral"):
        folder = make_llava(tmp_path / kind, kind)
        loaded = load_pretrained_model(folder, device="cpu")
        theirs = LlamaCpp(export_gguf(folder, tmp_path / f"{kind}_gguf", kind="f32") / "model-f32.gguf", 256)
        for text in ("USER: Is there a fracture? ASSISTANT:", "  two blanks\nand é 日本"):
            ids = loaded.tokenizer(text).input_ids
            assert theirs.model.tokenize(text, add_special=True, parse_special=True) == ids
            with torch.inference_mode():
                ours = loaded.model(input_ids=torch.tensor([ids])).logits[0].numpy()
            assert np.abs(theirs.logits(ids) - ours).max() < 1e-3
