"""Captions → dialogues → records → checked → stage 2: the whole chain through its commands, on ROCO's captions."""

import subprocess
import sys

import pytest
from PIL import Image

from llava.records import read_records
from tests import tiny
from tests.openai_server import OpenAIServer

WANTED = 12


def command(module, *words):
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"{module}: {done.stderr}"
    return done.stdout


def test_roco_captions_become_a_trained_model(shared_dir, tmp_path):
    roco = shared_dir / "roco"
    if not (roco / "captions.txt").is_file():
        pytest.skip(f"no ROCO captions at {roco}")
    images = tmp_path / "images"
    images.mkdir()
    names = [line.split("\t")[0] for line in (roco / "captions.txt").open() if line.startswith("ROCO_")][:WANTED]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (number * 20, 90, 90)).save(images / f"{name}.jpg")

    command("llava.data.convert", "roco", "--folder", roco, "--image-folder", images, "--output-dir", tmp_path / "roco")
    captions = tmp_path / "roco" / "train.json"
    assert len(read_records(captions)) == WANTED

    generated, final = tmp_path / "generated.jsonl", tmp_path / "instruct.json"
    with OpenAIServer("--mode", "dialogue") as server:
        words = ["--input_path", captions, "--output_path", generated, "--api-base", server.url, "--api-model", "m"]
        command("llava.instruct.instruct_generate", *words)
    command("llava.instruct.instruct_postprocess", "--input_path", generated, "--output_path", final)
    checked = command("llava.data.validate", final, "--image-folder", images)
    assert str(WANTED) in checked

    model = tiny.make_llava(tmp_path / "model")
    words = ["--model_name_or_path", model, "--data_path", final, "--image_folder", images, "--version", "v1"]
    words += ["--output_dir", tmp_path / "trained", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    command("llava.train.train", *words, "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no")
    assert (tmp_path / "trained" / "training_summary.json").is_file()
