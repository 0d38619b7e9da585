"""What a dry run is told: data that are there or not, names that stand for what isn't, processes that hold unlike parts."""

import json
import shlex

import pytest
import torch

from llava.errors import LlavaError
from llava.train.estimate.dry_run import ASSUMED_RECORDS, dry_run
from llava.train.estimate.names import present_model, told_records
from llava.train.estimate.uneven import unlike_ranks
from llava.train.estimate_memory import main
from llava.train.hardware import GPUS
from tests.tiny import make_clip, make_llm
from tests.train.helpers import make_records
from tests.train.test_dry_run import SHARDED, SMALL, base  # noqa: F401  base is a fixture

H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("/path/to/llama-med-vicuna-7b", "llama-7b"),
        ("./checkpoints/llava-7b-v0", "llama-7b"),
        ("/path/to/checkpoint_llava_med_instruct_60k_inline_mention", "llama-7b"),
        ("checkpoints/babydoctor-1-projector", "llama-7b"),
        ("meta-llama/Llama-2-13b-chat-hf", "llama-13b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b"),
        ("llama-13b", "llama-13b"),
        ("/models/llama-65b", "/models/llama-65b"),
        ("/models/qwen", "/models/qwen"),
    ],
)
def test_a_model_that_is_not_there_is_told_by_its_name(name, model):
    found, note = present_model(name)
    assert found == model
    assert (note is None) == (found == name)


@pytest.mark.parametrize(
    ("path", "records"),
    [
        ("/path/to/pubmed_600k.json", 600_000),
        ("llava_med_instruct_60k_inline_mention_post.jsonl", 60_000),
        ("/path/to/eval/vqa_rad/train.json", 1793),
        ("data/roco-train-1.json", 65_000),
        ("data/train.json", None),
        ("data/4kids.json", None),
    ],
)
def test_the_number_of_records_is_told_by_the_files_name(path, records):
    assert told_records(path) == records


def test_what_is_not_there_is_said(base, capsys):
    assert main([*base, *SMALL, "--data_path", "/nowhere/pubmed_600k.json", "--image_folder", "/nowhere"]) == 0
    out = capsys.readouterr().out
    assert "--data_path /nowhere/pubmed_600k.json isn't there" in out and "600,000 of them, by its name" in out
    unknown = dry_run([*base, *SMALL, "--data_path", "/nowhere/train.json"], H100, 1)
    known = dry_run([*base, *SMALL], H100, 1, records=ASSUMED_RECORDS)
    assert unknown.hours == known.hours and unknown.records is None
    assert main([*base, *SMALL]) == 0
    assert "for 100,000 records (give their number: --records)" in capsys.readouterr().out


def test_lengths_and_images_are_read_where_the_data_are_there(tmp_path, capsys):
    model = ("--model_name_or_path", str(make_llm(tmp_path / "llm")), "--vision_tower", str(make_clip(tmp_path / "clip")))
    data = make_records(tmp_path / "data", 24, text_only_every=2)
    images = ("--data_path", str(data), "--image_folder", str(data.parent / "images"), "--output_dir", str(tmp_path / "out"))
    read = dry_run([*model, *SMALL, *images], H100, 1)
    assert read.records == 24
    assert "24 of 24 records read" in read.notes[0] and "0.5 images" in read.notes[0]
    random = dry_run([*model, *SMALL], H100, 1, records=24)
    # The longest records are far shorter than --model_max_length.
    assert read.parts_gb["activations"] < random.parts_gb["activations"]
    packed = dry_run([*model, *SMALL, *images, "--packing", "True", "--max_tokens_per_batch", "256"], H100, 1)
    assert packed.samples_per_step > 2
    assert not (tmp_path / "out").exists() and sorted(path.name for path in data.parent.iterdir()) == ["images", data.name]
    rows = json.loads(data.read_text())
    rows[3]["conversations"] = "nothing"
    data.write_text(json.dumps(rows))
    with pytest.raises(LlavaError, match="record 3"):
        dry_run([*model, *SMALL, *images], H100, 1)


def test_without_a_tokenizer_characters_are_counted(base, tmp_path):
    data = make_records(tmp_path / "data", 6)
    prediction = dry_run([*base, *SMALL, "--data_path", str(data)], H100, 1)
    assert "4 characters taken for a token" in prediction.notes[0] and prediction.records == 6


def test_tiles_of_an_image_are_counted(base, tmp_path):
    argv = [*base, *SMALL, "--image_aspect_ratio", "anyres"]
    named = dry_run([*argv, "--data_path", str(make_records(tmp_path / "data", 6))], H100, 1)
    assert "5 tiles" in named.notes[0]  # a grid of two by two, and the whole
    plain, tiled = (dry_run([*base, *SMALL, *more], H100, 1) for more in ((), ("--image_aspect_ratio", "anyres")))
    assert tiled.operators_per_micro_batch == plain.operators_per_micro_batch
    assert tiled.samples_per_hour < plain.samples_per_hour


def test_processes_that_hold_less_than_the_first():
    rows = [torch.Size([2001, 8]), torch.Size([16])]
    assert unlike_ranks(rows, 4) == ((3,),)
    assert unlike_ranks([torch.Size([2000, 8])], 4) == ()
    assert unlike_ranks([torch.Size([9, 2])], 8) == ((4,), (5, 6, 7))  # two rows each, one, none
    assert unlike_ranks(rows, 1) == ()


def test_processes_are_listed_where_they_differ(base, tmp_path, capsys):
    path = tmp_path / "out.json"
    odd = [*base, *SMALL, *SHARDED, "--mm_use_im_start_end", "True"]
    assert main([*odd, "--gpus", "4", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    first, last = figures["ranks"]
    assert first["ranks"] == [0, 1, 2] and last["ranks"] == [3]
    assert figures["peak_gb"] == first["peak_gb"] > last["peak_gb"]
    assert first["parts_gb"]["moments"] > last["parts_gb"]["moments"]
    assert "processes 0 to 2" in capsys.readouterr().out
    assert main([*base, *SMALL, "--json", str(path)]) == 0
    assert "ranks" not in json.loads(path.read_text())
