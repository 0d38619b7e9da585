"""What a dry run is told: data that are there or not, names that stand for what isn't, processes that are unlike."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from llava.errors import LlavaError
from llava.records import write_json
from llava.train.estimate.dry_run import ASSUMED_RECORDS, dry_run, without_deepspeed
from llava.train.estimate.inputs.names import present_model, told_records
from llava.train.estimate.uneven import unlike_ranks
from llava.train.estimate_memory import main
from llava.train.step.hardware import GPUS
from scripts.recipe_table import PACKED, calls_of, training_flags
from tests.tiny import make_clip, make_llm
from tests.train.helpers import SHARDED, SMALL, configs_alone, make_records

H100 = GPUS["h100"]
ROOT = Path(__file__).resolve().parents[2]
SEEDS = Path(os.environ.get("LLAVA_SHARED_DIR", ROOT.parent / "shared")) / "seeds"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return configs_alone(tmp_path_factory.mktemp("base"))


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
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("JackFram/llama-160m", "JackFram/llama-160m"),
        ("llava-v1.5-7b", "llama-7b"),
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
    assert "of 100,000 records (give their number: --records)" in capsys.readouterr().out


def test_lengths_and_images_are_read_where_the_data_are_there(tmp_path, capsys):
    model = (
        "--model_name_or_path",
        str(make_llm(tmp_path / "llm")),
        "--vision_tower",
        str(make_clip(tmp_path / "clip")),
    )
    data = make_records(tmp_path / "data", 24, text_only_every=2)
    images = (
        "--data_path",
        str(data),
        "--image_folder",
        str(data.parent / "images"),
        "--output_dir",
        str(tmp_path / "out"),
    )
    read = dry_run([*model, *SMALL, *images], H100, 1)
    assert read.records == 24
    assert "24 of 24 records read" in read.notes[0] and "0.5 images" in read.notes[0]
    random = dry_run([*model, *SMALL], H100, 1, records=24)
    # The longest records are far shorter than --model_max_length.
    assert read.parts_gb["activations"] < random.parts_gb["activations"]
    packed = dry_run([*model, *SMALL, *images, "--packing", "True", "--max_tokens_per_batch", "256"], H100, 1)
    assert packed.samples_per_step > 2
    full = ("--packing", "True", "--max_tokens_per_batch", "256", "--questions_per_image", "4")
    assert "variable-length kernel" in dry_run([*model, *SMALL, *images, *full], H100, 1).attention
    assert not (tmp_path / "out").exists() and sorted(path.name for path in data.parent.iterdir()) == [
        "images",
        data.name,
    ]
    rows = json.loads(data.read_text())
    rows[3]["conversations"] = "nothing"
    data.write_text(json.dumps(rows))
    with pytest.raises(LlavaError, match="record 3"):
        dry_run([*model, *SMALL, *images], H100, 1)


def test_an_optimizer_that_can_not_be_is_one_line(base):
    with pytest.raises(LlavaError, match="--optim adagrad: its sums are made before"):
        dry_run([*base, *SMALL, "--optim", "adagrad"], H100, 1)
    with pytest.raises(LlavaError, match=r"--optim schedule_free_adamw can't be used here \(You need to install"):
        dry_run([*base, *SMALL, "--optim", "schedule_free_adamw"], H100, 1)


def test_a_schedule_that_lacks_a_number_is_one_line(base):
    with pytest.raises(LlavaError, match=r"--lr_scheduler_type can't be used as it is given \(One of min_lr"):
        dry_run([*base, *SMALL, "--lr_scheduler_type", "cosine_with_min_lr"], H100, 1)


def test_images_that_do_not_fit_into_a_sample_are_said_to_be_left_out(base):
    prediction = dry_run([*base, *SMALL, "--model_max_length", "3"], H100, 1)
    assert prediction.notes[0].endswith("random records without images: none fits into --model_max_length 3")


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
    assert figures["checkpoint_gb"] > 0  # which the first process writes
    assert "processes 0 to 2" in capsys.readouterr().out
    assert main([*base, *SMALL, "--json", str(path), "--overwrite"]) == 0
    assert "ranks" not in json.loads(path.read_text())


def published_commands() -> list[list[str]]:
    """Flags of the three stages as LLaVA-Med's README has them."""
    found = []
    for path in sorted(SEEDS.glob("*.txt")):
        commands = re.findall(r"^torchrun(?:.*\\\n)+.*", path.read_text(encoding="utf-8"), re.MULTILINE)
        found = max(found, [shlex.split(text.replace("\\\n", " ")) for text in commands], key=len)
    return [flags for command in found if (flags := training_flags(command)) is not None]


@pytest.mark.long
@pytest.mark.skipif(not SEEDS.is_dir(), reason=f"no published commands at {SEEDS}; set LLAVA_SHARED_DIR")
def test_the_published_commands_end_with_hours_and_gigabytes_as_written(capsys):
    commands = published_commands()
    assert len(commands) == 3
    for flags in commands:
        assert main([*flags, "--gpu", "a100-40g", "--gpus", "8"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"the whole recipe +[\d.]+ hours, \d+ epochs?\n", out) and re.search(
            r"fits: it takes [\d.]+ GB", out
        )
        assert "predicted for llama-7b, by its name" in out and "by its name" in out.split("--data_path")[1]


@pytest.mark.long
@pytest.mark.parametrize("step", [0, 1, 2])
def test_babydoctors_steps_end_with_hours_and_gigabytes(tmp_path, monkeypatch, step):
    monkeypatch.chdir(ROOT)
    calls = [training_flags(call) for call in calls_of(ROOT / "scripts/babydoctor.sh", tmp_path)]
    prediction = dry_run([flags for flags in calls if flags][step], GPUS["a10"], 1)
    assert prediction.records == (558_000, 80_000, 65_000)[step] and prediction.hours > 1
    assert 5 < prediction.peak_gb < 40


@pytest.mark.long
def test_a_whole_7b_on_one_h200():
    flags = ["--model_name_or_path", "llama-7b", "--bf16", "True", "--gradient_accumulation_steps", "4"]
    prediction = dry_run([*flags, *PACKED.format(4096).split()], GPUS["h200"], 1)
    assert prediction.mfu >= 0.50 and prediction.peak_gb <= 138 and prediction.reduce_dtype == "float32"


@pytest.mark.parametrize("joined", [True, False])
def test_deepspeed_is_predicted_as_fsdp_however_it_is_given(tmp_path, joined):
    path = tmp_path / "zero3.json"
    write_json(path, {"zero_optimization": {"stage": 3}})
    given = [f"--deepspeed={path}"] if joined else ["--deepspeed", str(path)]
    flags, notes = without_deepspeed(["--bf16", "True", *given, "--seed", "1"], 8)
    assert flags == ["--bf16", "True", "--seed", "1", "--fsdp", "full_shard auto_wrap"] and len(notes) == 1


@pytest.mark.parametrize("device", ["cpu", "none"])
def test_what_deepspeed_offloads_is_said(tmp_path, base, device):
    path = tmp_path / "zero3.json"
    write_json(path, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": device}}})
    offloaded, plain = (
        dry_run([*base, *SMALL, *more], H100, 2) for more in (["--deepspeed", str(path)], ["--fsdp", "full_shard"])
    )
    assert offloaded.peak_gb == plain.peak_gb
    assert any("isn't predicted" in note for note in offloaded.notes) == (device == "cpu")


def test_what_fsdp_offloads_is_said(base):
    prediction = dry_run([*base, *SMALL, "--fsdp", "full_shard auto_wrap offload"], H100, 1)
    assert prediction.notes[0].startswith("--fsdp: offloading to the host's memory isn't predicted")


@pytest.mark.parametrize("content", [[], {"zero_optimization": None}, {"zero_optimization": {"stage": "three"}}])
def test_a_deepspeed_file_that_is_none_is_one_line(tmp_path, content):
    write_json(tmp_path / "zero.json", content)
    with pytest.raises(LlavaError, match=r"zero\.json: no DeepSpeed configuration"):
        without_deepspeed(["--deepspeed", str(tmp_path / "zero.json")], 8)


def test_a_record_without_turns_is_named(tmp_path, base):
    write_json(tmp_path / "data.json", [{"id": "a", "image": "a.png"}])
    with pytest.raises(LlavaError, match=r"data\.json record 0.*conversations"):
        dry_run([*base, *SMALL, "--data_path", str(tmp_path / "data.json")], H100, 1)
