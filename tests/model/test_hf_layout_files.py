"""Export to transformers' LLaVA layout and import from it: tensors, logits, prompts, and a served answer."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, get_template
from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.convert.chat_template import chat_template
from llava.model.convert.hf_reader import import_hf
from llava.model.convert.hf_writer import export_hf
from llava.model.weights.files import WeightFiles
from llava.records import read_json, write_json
from llava.tokenization import ImageTokens, expand_images, tokenize_prompt
from tests.tiny import make_llava

VARIANTS = {
    "mistral_pad": ("mistral", {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}),
    "vicuna_mlp": ("llama", {"mm_projector_type": "mlp2x_gelu", "conversation_template": "vicuna_v1"}),
    "linear_llama_2": ("llama", {"mm_projector_type": "linear", "conversation_template": "llava_llama_2"}),
    "v1_patches": (
        "llama",
        {
            "mm_projector_type": "linear",
            "mm_image_token_scheme": "patch",
            "mm_use_im_start_end": True,
            "conversation_template": "simple",
        },
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A native folder and its export."""
    kind, fields = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    native = make_llava(folder, kind, **fields)
    return native, export_hf(native, folder / "hf")


def sample_image(width=90, height=40) -> Image.Image:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([across * 2, down * 5, (across + down) % 256], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def ask(loaded, question="What does the picture show?") -> list[int]:
    """Ids of a question about one image, not expanded."""
    conversation = get_template(loaded.model.config.conversation_template)
    conversation.append_message(conversation.roles[0], conversation.place_images(f"<image>\n{question}"))
    conversation.append_message(conversation.roles[1], None)
    image_tokens = ImageTokens.from_config(loaded.model.config, loaded.tokenizer)
    return tokenize_prompt(conversation.get_prompt(), loaded.tokenizer, image_tokens)


def native_inputs(loaded, image) -> tuple[torch.Tensor, torch.Tensor]:
    ids, _ = expand_images(ask(loaded), None, [loaded.model.num_patches])
    pixels = loaded.image_processor(image, loaded.model.config.image_aspect_ratio)
    return torch.tensor(np.asarray(ids))[None], torch.from_numpy(pixels)


def test_round_trip_keeps_every_tensor(exported, tmp_path):
    native, hf = exported
    back = import_hf(hf, tmp_path / "back")
    before, after = WeightFiles.of_folder(native), WeightFiles.of_folder(back)
    assert set(before) == set(after)
    for name in before:
        assert before.dtype(name) == after.dtype(name), name
        assert torch.equal(before.read(name), after.read(name)), name
    first, second = load_pretrained_model(native, device="cpu"), load_pretrained_model(back, device="cpu")
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.image_processor == second.image_processor
    assert ask(first) == ask(second)
    ours = ("mm_", "image_aspect", "conversation", "hidden", "vocab", "num_", "rope", "model_type")
    configs = [loaded.model.config.to_dict() for loaded in (first, second)]
    for name, value in configs[0].items():
        if name.startswith(ours) and name != "mm_vision_config":
            assert configs[1][name] == value, name


def test_vocabulary_is_padded_and_new_rows_cannot_win(exported):
    native, hf = exported
    before, after = WeightFiles.of_folder(native), WeightFiles.of_folder(hf)
    rows = before.shape("lm_head.weight")[0]
    head = after.read("language_model.lm_head.weight")
    assert head.shape[0] % 64 == 0 and head.shape[0] >= rows + 2
    scores = torch.randn(200, head.shape[1], generator=torch.Generator().manual_seed(3)) @ head.T
    assert (scores.argmax(dim=1) < rows).all()
    config = read_json(hf / "config.json")
    assert config["text_config"]["vocab_size"] == head.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"] == rows
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id == rows + 1


def test_same_logits_in_transformers(exported):
    """Its own model and processor, an image that isn't square: ids, pixels and logits are ours."""
    native, hf = exported
    loaded = load_pretrained_model(native, device="cpu")
    processor = AutoProcessor.from_pretrained(hf)
    model, info = LlavaForConditionalGeneration.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    glue = "" if get_template(loaded.model.config.conversation_template).image_first else "\n"
    content = [
        {"type": "image", "image": sample_image()},
        {"type": "text", "text": f"{glue}What does the picture show?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids, pixels = native_inputs(loaded, sample_image())
    image_id = model.config.image_token_id
    assert inputs["input_ids"].tolist() == ids.masked_fill(ids == IMAGE_TOKEN_INDEX, image_id).tolist()
    assert (inputs["pixel_values"] - pixels).abs().max() < 1e-5
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits
        ours = loaded.model(input_ids=ids, pixel_values=pixels).logits
    rows = ours.shape[-1]
    assert (theirs[..., :rows] - ours).abs().max() < 1e-5


def test_exported_folder_loads_here_too(exported):
    native, hf = exported
    first, second = load_pretrained_model(native, device="cpu"), load_pretrained_model(hf, device="cpu")
    logits = []
    for loaded in (first, second):
        ids, pixels = native_inputs(first, sample_image())
        with torch.no_grad():
            logits.append(loaded.model(input_ids=ids, pixel_values=pixels).logits)
    assert (logits[1][..., : logits[0].shape[-1]] - logits[0]).abs().max() < 1e-5


def test_card_and_words_about_a_linear_projector(exported):
    native, hf = exported
    card = (hf / "README.md").read_text()
    assert "research only" in card.lower()
    linear = read_json(native / "config.json")["mm_projector_type"] == "linear"
    assert ("vLLM" in card) == linear
    assert read_json(hf / "config.json")["projector_hidden_act"] == ("linear" if linear else "gelu")
    assert str(native.parent) not in card


@pytest.mark.parametrize("name", sorted(name for name in conv_templates if "/" not in name))
def test_jinja_renders_as_the_template(name, tmp_path):
    """Several turns, with an image in the first; the last one open."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = get_template(name)
    turns = [("What is it?", "A lung."), ("Why?", None)]
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        text = conversation.place_images(f"<image>{question}") if number == 0 else question
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], answer)
        if answer:
            messages.append({"role": "assistant", "content": answer})
    rendered, _ = render_jinja_template(
        [messages], chat_template=chat_template(get_template(name), "<image>"), add_generation_prompt=True
    )
    assert rendered[0] == conversation.get_prompt()


def test_jinja_keeps_a_system_text_of_several_parts():
    from transformers.utils.chat_template_utils import render_jinja_template

    parts = [{"type": "text", "text": text} for text in ("Be brief.", "Answer in French.")]
    asked = [
        [{"role": "system", "content": content}, {"role": "user", "content": "Why?"}]
        for content in (parts, "Be brief.\nAnswer in French.")
    ]
    rendered, _ = render_jinja_template(
        asked, chat_template=chat_template(get_template("vicuna_v1"), "<image>"), add_generation_prompt=True
    )
    assert rendered[0] == rendered[1] and "French" in rendered[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"image_aspect_ratio": "anyres"}, "anyres"), ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu")],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path, fields, words):
    native = make_llava(tmp_path, "llama", **fields)
    with pytest.raises(LlavaError, match=words):
        export_hf(native, tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_import_of_a_native_folder_is_refused(tmp_path):
    native = make_llava(tmp_path)
    with pytest.raises(LlavaError, match="needs no import"):
        import_hf(native, tmp_path / "back")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_settings_that_no_model_can_have_are_one_line(exported, tmp_path, part):
    folder = shutil.copytree(exported[1], tmp_path / "hf")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {part: config[part] | {"hidden_size": "wide"}})
    with pytest.raises(LlavaError, match=r"config\.json describes no"):
        import_hf(folder, tmp_path / "back")


@pytest.mark.parametrize("bits", [8, 4])
def test_this_layout_in_8_or_4_bits_is_sent_to_the_import(exported, tmp_path, bits):
    folder = shutil.copytree(exported[1], tmp_path / "hf")
    name = "language_model.model.layers.0.mlp.up_proj."
    tensors = load_file(folder / "model.safetensors")
    statistics = {8: {name + "SCB": torch.ones(64)}, 4: {name + "weight.absmax": torch.ones(32)}}[bits]
    save_file(
        tensors | {name + "weight": tensors[name + "weight"].to(torch.int8)} | statistics, folder / "model.safetensors"
    )
    with pytest.raises(LlavaError, match=r"in 8 or 4 bits aren't loaded .*llava-med import --model-path"):
        load_pretrained_model(folder, device="cpu")


def test_import_without_our_note(exported, tmp_path):
    """A folder made by others: what lies behind <image> is what was added."""
    native, hf = exported
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in hf.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = read_json(copy / "config.json")
    kept = ("mm_projector_type", "mm_vision_select_layer", "mm_image_token_scheme")
    for name in [name for name in config if name == "llava_export" or (name.startswith("mm_") and name not in kept)]:
        del config[name]
    write_json(copy / "config.json", config)
    back = import_hf(copy, tmp_path / "back")
    before, after = WeightFiles.of_folder(native), WeightFiles.of_folder(back)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)
    assert "<image>" not in load_pretrained_model(back, device="cpu").tokenizer.get_vocab()


def test_scaled_positions_have_the_older_name_too(tmp_path):
    """Engines built on transformers 4 know `rope_scaling` alone, and would place tokens without it."""
    native = make_llava(tmp_path)
    config = read_json(native / "config.json")
    scaled = {"rope_type": "linear", "factor": 4.0}
    write_json(native / "config.json", config | {"rope_parameters": scaled | {"rope_theta": 10000.0}})
    hf = export_hf(native, tmp_path / "hf")
    text = read_json(hf / "config.json")["text_config"]
    assert text["rope_scaling"] == scaled | {"type": "linear"} and text["rope_theta"] == 10000.0
    model = load_pretrained_model(hf, device="cpu").model
    assert model.config.rope_parameters["rope_type"] == "linear" and model.config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize(("own", "ends"), [(None, [0, 2]), ([0, 2], [0, 2]), (2, [2, 0])])
def test_other_engines_are_told_all_that_ends_an_answer(own, ends, tmp_path):
    """The template's mark is another token than the end of text: they don't know the template."""
    native = make_llava(tmp_path, "qwen2")
    path = native / "tokenizer_config.json"
    write_json(path, read_json(path) | {"eos_token": "<|endoftext|>"})
    write_json(native / "generation_config.json", {} if own is None else {"eos_token_id": own})
    hf = export_hf(native, tmp_path / "hf")
    assert read_json(hf / "generation_config.json")["eos_token_id"] == ends


def test_a_checkpoint_that_names_neither_template_nor_tower_has_its_familys(tmp_path):
    """Its tower is inside, and config.json holds the tower's form alone."""
    native = make_llava(tmp_path)
    left_out = ("mm_vision_tower", "conversation_template")
    config = {name: value for name, value in read_json(native / "config.json").items() if name not in left_out}
    write_json(native / "config.json", config)
    assert load_pretrained_model(native, device="cpu").model.config.conversation_template == "vicuna_v1"
    hf = export_hf(native, tmp_path / "hf")
    assert read_json(hf / "config.json")["conversation_template"] == "vicuna_v1"


def test_an_activation_that_no_projector_has_is_refused(exported, tmp_path):
    """Read as GELU the answers would be others, without a word."""
    hf = tmp_path / "hf"
    shutil.copytree(exported[1], hf)
    write_json(hf / "config.json", read_json(hf / "config.json") | {"projector_hidden_act": "relu"})
    for read in (lambda: load_pretrained_model(hf, device="cpu"), lambda: import_hf(hf, tmp_path / "back")):
        with pytest.raises(LlavaError, match="projector_hidden_act 'relu' is neither gelu nor linear"):
            read()


def test_import_loses_no_words(tmp_path):
    """<image> may be any token of the vocabulary; what comes after it isn't what was added with it."""
    hf = export_hf(make_llava(tmp_path), tmp_path / "hf")
    config = {name: value for name, value in read_json(hf / "config.json").items() if name != "llava_export"}
    write_json(hf / "config.json", config | {"image_token_index": 300})
    with pytest.raises(LlavaError, match=r"tokens come after <image> \(300\) in the vocabulary"):
        import_hf(hf, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_served_by_transformers(tmp_path):
    """`transformers serve` answers greedily as this project does, about an image that has to be padded."""
    for package in ("requests", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason="`transformers serve` needs it")
    kind, fields = VARIANTS["mistral_pad"]
    native = make_llava(tmp_path, kind, **fields)
    hf = export_hf(native, tmp_path / "hf")
    loaded = load_pretrained_model(native, device="cpu")
    ids, pixels = native_inputs(loaded, sample_image())
    with torch.no_grad():
        new = loaded.model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=12, do_sample=False)
    expected = loaded.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected
    with serving(hf, tmp_path / "serve.log") as url:
        answer = chat(url, hf, sample_image())
        square = chat(url, hf, sample_image().resize((40, 40)))
    assert answer == expected
    assert square != answer  # the image is looked at


@contextlib.contextmanager
def serving(folder: Path, log: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def chat(url: str, folder: Path, image: Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What does the picture show?"},
    ]
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
        "generation_config": json.dumps({"do_sample": False, "max_new_tokens": 12}),
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]
