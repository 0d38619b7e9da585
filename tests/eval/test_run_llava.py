"""One question from the command line, with one image, several, or none."""

import subprocess
import sys

import pytest
from PIL import Image

from llava.assistant import with_images
from llava.constants import NO_IMAGE
from llava.errors import LlavaError
from tests import tiny


def ask(checkpoint, *words):
    command = [sys.executable, "-m", "llava.eval.run_llava", "--model-path", str(checkpoint), "--device", "cpu"]
    return subprocess.run([*command, "--max_new_tokens", "5", *words], capture_output=True, text=True)


def test_one_and_several_images(tmp_path):
    checkpoint = tiny.make_llava(tmp_path / "model")
    for name, colour in (("a", "gray"), ("b", "red")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    one = ask(checkpoint, "--image-file", str(tmp_path / "a.png"), "--query", "What is it?")
    assert one.returncode == 0, one.stderr
    assert one.stdout.strip()
    two = ask(checkpoint, "--image-file", f"{tmp_path / 'a.png'};{tmp_path / 'b.png'}", "--sep", ";", "--query", "Q?")
    assert two.returncode == 0, two.stderr
    assert NO_IMAGE not in one.stderr + two.stderr
    none = ask(checkpoint, "--query", "What is it?")
    assert none.returncode == 0 and none.stdout.strip() and NO_IMAGE in none.stderr
    template = ask(checkpoint, "--query", "Q?", "--conv-mode", "nothing")
    assert template.returncode == 2
    assert "nothing" in template.stderr


def test_placeholders_are_put_or_checked():
    assert with_images("Q?", 2) == "<image>\n<image>\nQ?"
    assert with_images("Q? <image>", 1) == "Q? <image>"
    with pytest.raises(LlavaError, match="2 images"):
        with_images("<image> Q?", 2)


def test_nothing_between_images_is_refused(tmp_path):
    from llava.eval.run_llava import main

    with pytest.raises(LlavaError, match="--sep is empty; give what stands between several images"):
        main(["--model-path", str(tmp_path), "--query", "Q?", "--image-file", "a.png", "--sep", ""])
