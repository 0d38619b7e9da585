"""The demo's steps: set, base models, three trainings and the answers, once with images and once without."""

import os
from dataclasses import asdict
from pathlib import Path

from llava import __version__
from llava.data.phantoms import ABOUT, write_phantoms
from llava.demo.baselines import answer_by_nearest
from llava.demo.pipeline import Job, Pipeline
from llava.demo.settings import Settings, Stage
from llava.demo.tokenizer import make_tokenizer, texts_of
from llava.folders import PART
from llava.records import read_records, write_records

GREY = "grey.png"
RUNS = {"": "images", "blind_": "grey"}
"""Prefix of the folders of each run, and its folder of records."""

STAGES = (("stage_1", "alignment.json"), ("stage_2", "conversations.json"), ("vqa", "vqa_train.json"))
TITLES = {"stage_1": "stage 1: projector", "stage_2": "stage 2: instructions", "vqa": "VQA fine-tuning"}


def run_steps(output: Path, settings: Settings, seed: int) -> Pipeline:
    """Everything up to the answers. The final models lie in `output/vqa` and `output/blind_vqa`."""
    pipeline = Pipeline(output, [seed, __version__], count=6 + len(STAGES))
    data = output / "data"
    cores = min(2, os.cpu_count() or 1)
    pipeline.call(
        "data",
        "drawing the built-in set",
        lambda: make_data(data, settings, seed, cores),
        [asdict(settings.counts), settings.image_size, settings.alignment],
    )
    pipeline.call("tokenizer", "tokenizer", lambda: learn_tokenizer(data, output / "tokenizer"), None)
    pipeline.run("language model", [_language_model(output, settings, seed, cores)])
    pipeline.run("vision tower", [_tower(output, settings, seed, cores)])
    for stage, _ in STAGES:
        pipeline.run(TITLES[stage], [_training(output, settings, seed, stage, prefix) for prefix in RUNS])
    pipeline.run("answering the test questions", [_answers(output, settings, prefix) for prefix in RUNS])
    pipeline.call(
        "nearest_answers",
        "the nearest training image's answers",
        lambda: answer_by_nearest(
            data / "vqa_train.json", data / "vqa_test.json", data / "images", answers_of(output, "nearest_")
        ),
        None,
    )
    return pipeline


def make_data(data: Path, settings: Settings, seed: int, processes: int) -> None:
    """Draw the set, and the same records with a grey image in place of each."""
    from PIL import Image

    write_phantoms(data, seed, settings.counts, size=settings.image_size, processes=processes)
    # The tower learns from all captions, the projector from a part of them.
    write_records(data / "alignment.json", read_records(data / "captions.json")[: settings.alignment])
    (data / "grey").mkdir(exist_ok=True)
    size = (settings.image_size, settings.image_size)
    Image.new("RGB", size, (128, 128, 128)).save(data / "images" / GREY)
    for name in [name for _, name in STAGES] + ["vqa_test.json"]:
        records = read_records(data / name)
        write_records(data / "grey" / name, ({**record, "image": GREY} for record in records))


def learn_tokenizer(data: Path, folder: Path) -> None:
    """From the set's texts."""
    make_tokenizer(texts_of([data / "captions.json", data / "text.json"], limit=6000), folder)


def records_of(output: Path, prefix: str, name: str) -> Path:
    """The record file `name` of the run with images ("") or of the blind one ("blind_")."""
    data = output / "data"
    return data / "grey" / name if prefix else data / name


def answers_of(output: Path, prefix: str) -> Path:
    return output / f"{prefix}answers.jsonl"


def _tower(output: Path, settings: Settings, seed: int, processes: int) -> Job:
    folder = output / "vision_tower"
    return Job(
        "vision_tower",
        ["-m", "llava.demo.tower", "--data-path", f"{output}/data/captions.json"]
        + ["--image-folder", f"{output}/data/images", "--language-model", f"{output}/language_model"]
        + ["--output-dir", str(folder), "--steps", str(settings.tower_steps), "--seed", str(seed)]
        + ["--image-size", str(settings.image_size), "--patch-size", str(settings.patch_size)]
        + ["--layers", str(settings.tower_layers), "--hidden-size", str(settings.hidden_size)]
        + ["--processes", str(processes)],
        [folder],
    )


def _language_model(output: Path, settings: Settings, seed: int, processes: int) -> Job:
    folder = output / "language_model"
    return Job(
        "language_model",
        ["-m", "llava.demo.language_model", "--data-path", f"{output}/data/text.json"]
        + ["--tokenizer", f"{output}/tokenizer"]
        + ["--output-dir", str(folder), "--batch-tokens", str(settings.batch_tokens), "--seed", str(seed)]
        + ["--layers", str(settings.language_layers), "--hidden-size", str(settings.hidden_size)]
        + ["--template", settings.template, "--processes", str(processes)],
        [folder],
    )


def _training(output: Path, settings: Settings, seed: int, stage: str, prefix: str) -> Job:
    """The training command, as a user would give it."""
    how: Stage = getattr(settings, stage)
    folder = output / f"{prefix}{stage}"
    before = {
        "stage_1": output / "language_model",
        "stage_2": output / f"{prefix}stage_1",
        "vqa": output / f"{prefix}stage_2",
    }
    argv = ["-m", "llava.train.train", "--model_name_or_path", str(before[stage])]
    if stage == "stage_1":
        argv += ["--version", "plain", "--tune_mm_mlp_adapter", "True"]
        argv += ["--vision_tower", f"{output}/vision_tower", "--mm_projector_type", "linear"]
        argv += ["--mm_vision_select_layer", "-1", "--mm_vision_select_feature", "cls_patch"]
    else:
        argv += ["--version", settings.template]
    argv += ["--data_path", str(records_of(output, prefix, dict(STAGES)[stage]))]
    argv += ["--data_description", ABOUT]
    argv += ["--image_folder", f"{output}/data/images", "--output_dir", str(folder)]
    argv += ["--cache_vision_features", "True", "--vision_cache_dir", f"{output}/features"]
    argv += ["--max_steps", str(how.steps), "--learning_rate", str(how.learning_rate)]
    argv += ["--per_device_train_batch_size", str(how.batch_size), "--lr_scheduler_type", "cosine"]
    argv += ["--warmup_steps", str(max(1, how.steps // 20)), "--weight_decay", "0.01", "--adam_beta2", "0.98"]
    argv += ["--model_max_length", "512", "--save_strategy", "no", "--logging_steps", "1", "--report_to", "none"]
    argv += ["--dataloader_num_workers", "0", "--use_cpu", "True", "--seed", str(seed)]
    return Job(f"{prefix}{stage}", argv, [folder])


def _answers(output: Path, settings: Settings, prefix: str) -> Job:
    """The answering command, as a user would give it."""
    file = answers_of(output, prefix)
    argv = ["-m", "llava.eval.model_vqa_med", "--model-path", f"{output}/{prefix}vqa"]
    argv += ["--question-file", str(records_of(output, prefix, "vqa_test.json"))]
    argv += ["--image-folder", f"{output}/data/images", "--answers-file", str(file)]
    argv += ["--max_new_tokens", "16", "--batch-size", str(settings.evaluation_batch)]
    return Job(f"{prefix}answers", argv, [file, file.with_name(file.name + PART)])
