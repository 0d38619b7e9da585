"""Small runs for the tests of training: records with drawn images, a tiny model, the usual flags."""

import json
from pathlib import Path

from PIL import Image

from tests.tiny import make_clip, make_llm

COLOURS = ("red", "green", "blue", "yellow")


SMALL = ("--bf16", "True", "--per_device_train_batch_size", "2", "--model_max_length", "256")
SHARDED = ("--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")


def configs_alone(folder: Path) -> tuple[str, ...]:
    """Flags of a model for dry runs, of which there are configurations alone: 8 layers, 256 wide."""
    language_model = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 688,
                      "num_attention_heads": 4, "vocab_size": 2000, "max_position_embeddings": 512}  # fmt: skip
    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 56,
             "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    for name, config in (("llm", language_model), ("tower", tower)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return "--model_name_or_path", str(folder / "llm"), "--vision_tower", str(folder / "tower")


def make_records(folder: Path, count: int = 12, *, text_only_every: int = 0, name: str = "train.json") -> Path:
    """Records with a question about an image's colour; images lie in `folder/images`."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        record = {
            "id": f"r{number}",
            "image": f"{colour}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?" if number % 2 else "Which colour?\n<image>"},
                {"from": "gpt", "value": f"It is {colour}." * (1 + number % 3)},
            ],
        }
        if text_only_every and number % text_only_every == 0:
            record.pop("image")
            record["conversations"][0]["value"] = "Say something."
        Image.new("RGB", (32, 30), colour).save(images / f"{colour}.png")
        records.append(record)
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def make_bases(folder: Path, kind: str = "llama") -> tuple[Path, Path]:
    """(language model, tower) in `folder`."""
    return make_llm(folder / f"llm-{kind}", kind), make_clip(folder / "clip")


def flags(output_dir: Path, data: Path, model: Path, *more: str) -> list[str]:
    """A command line for a short run on the CPU."""
    return [
        *("--model_name_or_path", str(model)),
        *("--data_path", str(data)),
        *("--image_folder", str(data.parent / "images")),
        *("--output_dir", str(output_dir)),
        *("--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"),
        *("--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_strategy", "no"),
        *("--learning_rate", "1e-3", "--model_max_length", "256"),
        *more,
    ]


def losses(folder: Path) -> list[float]:
    """Of each logged step of the run that wrote `folder`."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
