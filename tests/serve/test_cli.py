"""The terminal chat as a process: images, several turns, commands, and errors that don't end it."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from llava.constants import NO_IMAGE
from llava.serve.cli import build_parser
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    Image.new("RGB", (60, 40), "gray").save(folder / "a.png")
    return tiny.make_llava(folder / "model"), folder


def chat(model, lines, *words, env=None, image="a.png"):
    checkpoint, folder = model
    command = [sys.executable, "-m", "llava.serve.cli", "--model-path", str(checkpoint), "--device", "cpu"]
    command += ["--temperature", "0", "--max-new-tokens", "6", *words]
    command += ["--image-file", str(folder / image)] if image else []
    return subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, env=env)


def test_several_turns_and_images(model):
    _, folder = model
    saved = folder / "chat.json"
    lines = ["What is it?", f"/image {folder / 'a.png'}", "And this?", "/nonsense", "/image none.png"]
    done = chat(model, [*lines, f"/save {saved}", "/reset", "Hello", "/exit"])
    assert done.returncode == 0, done.stderr
    assert "research only" in done.stdout
    assert "unknown command /nonsense" in done.stdout
    assert "none.png" in done.stdout
    content = json.loads(saved.read_text())
    values = [turn["value"] for turn in content["conversations"]]
    assert [turn["from"] for turn in content["conversations"]] == ["human", "gpt"] * 2
    assert values[0] == "<image>\nWhat is it?"
    assert values[2] == "<image>\nAnd this?"
    assert len(content["images"]) == 2


def test_a_saved_file_grows_with_its_conversation_and_is_not_replaced_by_another(model, tmp_path):
    saved, other = tmp_path / "chat.json", tmp_path / "other.json"
    save = f"/save {saved}"
    done = chat(model, ["What is it?", save, "And else?", save, "/reset", "Hello", save, f"/save {other}", "/exit"])
    assert done.stdout.count(f"[saved to {saved}]") == 2, done.stdout
    assert f"error: {saved} is there and isn't of this conversation; give /save another name" in done.stdout
    kept, fresh = (json.loads(path.read_text())["conversations"] for path in (saved, other))
    assert [turn["value"] for turn in kept[::2]] == ["<image>\nWhat is it?", "And else?"]
    assert [turn["value"] for turn in fresh[::2]] == ["Hello"]


def test_that_there_is_no_image_is_said(model):
    assert "Ask about the image; /help" in chat(model, ["/exit"]).stdout
    assert "No image yet: /image PATH adds one. Ask; /help" in chat(model, ["/exit"], image=None).stdout


def test_answers_without_an_image_are_said_to_be(model):
    _, folder = model
    lines = [
        "Hello",
        f"/image {folder / 'a.png'}",
        "What is it?",
        "And else?",
        "/reset",
        "Is there a fracture?",
        "/exit",
    ]
    assert chat(model, lines, image=None).stdout.count(f"[{NO_IMAGE} /image PATH adds one.]\n") == 2
    assert NO_IMAGE not in chat(model, ["What is it?", "/exit"]).stdout


def test_paths_may_stand_in_quotes(model):
    _, folder = model
    folder = folder / "of a patient"
    folder.mkdir()
    Image.new("RGB", (60, 40), "gray").save(folder / "left eye.png")
    paths = [f'"{folder / "left eye.png"}"', f"'{folder / 'left eye.png'}'", str(folder / "left eye.png")]
    lines = [*(f"/image {path}" for path in paths), f'/save "{folder / "the chat.json"}"', '/image "']
    done = chat(model, [*lines, "/exit"])
    assert done.stdout.count("[left eye.png, 60 × 40; ask about it]") == 3, done.stdout
    assert json.loads((folder / "the chat.json").read_text())["images"][1:] == [str(folder / "left eye.png")] * 3


def test_a_hub_id_is_looked_for_once(model, tmp_path):
    folder, images = model
    cache = tiny.hub_cache(tmp_path / "cache", {"some/model": folder})
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = chat(("some/model", images), ["What is it?", "/exit"], env=os.environ | offline)
    assert done.returncode == 0 and done.stderr.count("some/model is taken from the cache") == 1, done.stderr


def test_that_answers_are_drawn_is_said_where_it_is_so():
    parser = build_parser()
    temperature = parser.parse_args(["--model-path", "m"]).temperature
    assert f"drawn at temperature {temperature}, as" in parser.format_help()


def test_a_image_that_is_not_there_is_one_line(model):
    checkpoint, _ = model
    command = [sys.executable, "-m", "llava.serve.cli", "--model-path", str(checkpoint), "--image-file", "no.png"]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    assert done.returncode == 2
    assert "no.png" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
