"""Data that is ready when a step wants it: workers by the cores, what they raise, drafts of large JPEGs."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.images import ImageProcessor, open_image
from llava.train import derived_flags
from llava.train.arguments import parse_arguments
from llava.train.setup_run import draft_size
from llava.train.train import train
from tests.train.helpers import flags, losses, make_records


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"), 12)


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "wanted"),
    [(16, 1, True, 8), (16, 4, True, 3), (2, 2, True, 0), (1, 4, True, 0), (2, 1, False, 0), (16, 1, False, 2)],
)
def test_workers_by_the_cores_that_a_process_has(monkeypatch, cores, processes, on_gpu, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert derived_flags.default_workers(on_gpu)[0] == wanted


def test_workers_stay_and_work_ahead_unless_the_flags_say_otherwise(tmp_path, base, data, monkeypatch):
    monkeypatch.setattr("llava.train.derived_flags.default_workers", lambda on_gpu: (3, "as the test says"))
    found = parse_arguments(flags(tmp_path, data, base)).training
    assert (found.dataloader_num_workers, found.dataloader_persistent_workers) == (3, True)
    assert found.dataloader_prefetch_factor == 4
    found = parse_arguments(flags(tmp_path, data, base, "--dataloader_num_workers", "0")).training
    assert (found.dataloader_num_workers, found.dataloader_persistent_workers) == (0, False)
    words = ("--dataloader_num_workers", "2", "--dataloader_persistent_workers", "False")
    found = parse_arguments(flags(tmp_path, data, base, *words)).training
    assert (found.dataloader_num_workers, found.dataloader_persistent_workers) == (2, False)


def test_with_workers_a_run_is_the_same_and_the_wait_is_said(tmp_path, base, data):
    more = ("--num_train_epochs", "2", "--eval_data_path", str(data), "--eval_strategy", "epoch")
    summary = train(flags(tmp_path / "none", data, base, *more, "--dataloader_num_workers", "0"))
    train(flags(tmp_path / "two", data, base, *more, "--dataloader_num_workers", "2"))
    assert losses(tmp_path / "two") == losses(tmp_path / "none")
    assert 0 < summary["data_wait"] < 1


def test_workers_are_forked_where_python_would_start_them_anew(tmp_path, base, data):
    """As Python 3.14 does by default: what a dataset holds can't be sent to a new process."""
    words = flags(tmp_path / "out", data, base, "--max_steps", "1", "--dataloader_num_workers", "1")
    words += ["--eval_data_path", str(data), "--eval_strategy", "steps", "--eval_steps", "1"]
    code = "import multiprocessing, sys; multiprocessing.set_start_method('forkserver'); "
    code += "from llava.train.train import train; train(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("where", ["training", "held-out"])
def test_what_a_worker_raises_is_one_line(tmp_path, base, data, where):
    broken = make_records(tmp_path, 4)
    (tmp_path / "images" / "blue.png").write_bytes(b"not an image")
    more = ("--max_steps", "2", "--dataloader_num_workers", "1")
    if where == "training":
        words = flags(tmp_path / "out", broken, base, *more)
    else:
        held = ("--eval_data_path", str(broken), "--eval_image_folder", str(tmp_path / "images"))
        words = flags(tmp_path / "out", data, base, *more, *held, "--eval_strategy", "steps", "--eval_steps", "1")
    with pytest.raises(LlavaError) as caught:
        train(words)
    assert str(caught.value).startswith(f'{broken} record 2 ("r2"): ') and "\n" not in str(caught.value)


def draw_large(path) -> None:
    x, y = np.meshgrid(np.linspace(0, 12, 1800), np.linspace(0, 9, 1500))
    waves = 127 + 60 * np.sin(x)[..., None] * np.cos(y)[..., None] + np.array([20.0, 0.0, -20.0])
    Image.fromarray(waves.astype(np.uint8)).save(path, quality=95)


def test_drafts_train_nearly_the_same(tmp_path, base):
    data = make_records(tmp_path, 2)
    data.write_text(data.read_text().replace("red.png", "large.jpg"))
    draw_large(tmp_path / "images" / "large.jpg")
    train(flags(tmp_path / "whole", data, base, "--max_steps", "1"))
    train(flags(tmp_path / "draft", data, base, "--max_steps", "1", "--jpeg_draft"))
    (whole,), (draft,) = losses(tmp_path / "whole"), losses(tmp_path / "draft")
    assert draft == pytest.approx(whole, abs=1e-2) and draft != whole
    with pytest.raises(LlavaError, match="--jpeg_draft: tiles"):
        train(flags(tmp_path / "tiles", data, base, "--jpeg_draft", "--image_aspect_ratio", "anyres"))


def test_a_draft_of_a_jpeg_is_near_the_whole_image(tmp_path):
    draw_large(tmp_path / "large.jpg")
    processor = ImageProcessor(size=224)
    whole, draft = open_image(tmp_path / "large.jpg"), open_image(tmp_path / "large.jpg", draft=draft_size(processor))
    assert whole.size == (1800, 1500) and draft.size == (900, 750)
    assert np.abs(processor(whole) - processor(draft)).max() < 0.05  # of a standard deviation; one grey value is 0.015
    Image.new("RGB", (300, 200)).save(tmp_path / "small.jpg")
    assert open_image(tmp_path / "small.jpg", draft=448).size == (300, 200)
