"""`llava.load`: the lines of README.md and docs/python.md run, and give what the engine gives."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import llava
from llava.errors import LlavaError
from llava.generation import Engine, Request, SamplingParams
from tests import tiny
from tests.documented_commands import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llava(tmp_path_factory.mktemp("assistant"))


@pytest.fixture(scope="module")
def model(folder):
    return llava.load(folder, device="cpu")


@pytest.fixture
def here(tmp_path, monkeypatch, folder):
    """A working directory with the files that the documents name."""
    pytest.importorskip("pydicom", reason="pydicom isn't installed (extra medical)")
    from pydicom.data import get_testdata_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "vqa").symlink_to(folder)
    (tmp_path / "scan.dcm").symlink_to(get_testdata_file("CT_small.dcm"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    images = tmp_path / "runs" / "demo" / "data" / "images"
    images.mkdir(parents=True)
    for path in (tmp_path / "scan.png", images / "test_00000.png", images / "test_00001.png"):
        Image.fromarray(pixels).save(path)
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_documents_lines(here, name, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks
    names = {}
    exec("\n".join(blocks), names)  # as one program: later blocks use what earlier ones made
    assert capsys.readouterr().out.strip()
    if "answers" in names:
        assert [bool(answer.logprobs) for answer in names["answers"]] == [True] * 3


def test_answers_are_the_engines(model, here):
    request = Request(_asked(model, "<image>\nIs there a nodule?"), ["scan.png"], SamplingParams(max_new_tokens=12))
    (expected,) = Engine(llava.load_pretrained_model("runs/demo/vqa", device="cpu")).generate([request])
    assert model.answer("Is there a nodule?", images=["scan.png"], max_new_tokens=12) == expected.text
    assert model.answer("Is there a nodule?", "scan.png", max_new_tokens=12) == expected.text
    assert model.answer("<image>\nIs there a nodule?", ["scan.png"], max_new_tokens=12) == expected.text
    assert "".join(model.stream("Is there a nodule?", ["scan.png"], max_new_tokens=12)) == expected.text
    (answer,) = model.answer_all([("Is there a nodule?", ["scan.png"])], max_new_tokens=12, logprobs=2)
    assert answer.token_ids == expected.token_ids and len(answer.logprobs[0].top) == 2


def test_arrays_and_bytes_are_images(model, here):
    image = Image.open("scan.png")
    expected = model.answer("Which?", [image], max_new_tokens=8)
    for source in (np.asarray(image), (here / "scan.png").read_bytes(), here / "scan.png"):
        assert model.answer("Which?", [source], max_new_tokens=8) == expected
    ct = np.linspace(-1000, 1000, 30 * 40).reshape(30, 40)
    eight_bit = np.repeat(np.round((ct + 1000) / 2000 * 255).astype(np.uint8)[..., None], 3, 2)
    assert model.answer("Which?", ct, max_new_tokens=8) == model.answer("Which?", [eight_bit], max_new_tokens=8)
    with pytest.raises(LlavaError, match=r"an array has to be .* not float64 \[2, 30, 40\]; of a volume give a slice"):
        model.answer("Which?", np.zeros((2, 30, 40)))


def test_a_model_that_is_not_there_is_said_before_seconds_of_imports(tmp_path):
    program = """
import sys
import llava
try:
    llava.load("no/such/folder")
except llava.LlavaError as error:
    print(error)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["model not found: no folder no/such/folder", "[]"], done.stderr


def test_mistakes_are_said(model):
    with pytest.raises(LlavaError, match="image not found"):
        model.answer("Which?", ["nowhere.png"])
    with pytest.raises(LlavaError, match="has 2 <image> for 0"):
        model.answer("<image> <image> Which?")
    with pytest.raises(LlavaError, match="temperature"):
        model.answer("Which?", temperature=-1)


def test_a_system_text_of_ones_own(folder):
    other = llava.load(folder, device="cpu", system="Answer in one word.")
    assert other.conversation().get_prompt().startswith("Answer in one word.")


def _asked(model, question):
    conversation = model.conversation()
    conversation.append_message(conversation.roles[0], question)
    return conversation
