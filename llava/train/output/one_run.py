"""One folder holds one run: its flags and data are noted there, and a run of others is refused."""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.commandline import parse_bool
from llava.errors import LlavaError
from llava.folders import expanded, remove_parts
from llava.records import read_json, write_json
from llava.train.output.checkpoints import checksum, find_damage, last_good_checkpoint, list_checkpoints
from llava.train.output.summary import CURVE, PAGE, SUMMARY
from llava.train.validation.flags import ANSWERS

if TYPE_CHECKING:
    from llava.train.arguments import Arguments

logger = logging.getLogger(__name__)

FLAGS = "training_flags.json"
_MODEL = ("config.json", "adapter_config.json", "mm_projector.bin")
_STATE = ("trainer_state.json", FLAGS, SUMMARY, PAGE, CURVE)
_DATA = ("data_path", "eval_data_path")
_MAY_DIFFER = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "report_to", "disable_tqdm"),
    *("logging_", "log_", "save_", "hub_", "push_to_hub", "dataloader_", "ddp_", "torch_compile", "local_rank"),
    *("use_cpu", "tf32", "fsdp", "deepspeed", "gradient_checkpointing", "activation_", "use_liger_kernel"),
    *("keep_half_weights", "attn_implementation", "lazy_preprocess", "cache_", "vision_cache_dir", "peak_tflops"),
)
"""Flags, and beginnings of flags, that change where, how fast or how often, and not what is learned."""


def claim(arguments: "Arguments") -> Path | None:
    """Make the output folder this run's; the checkpoint to go on from, if any.

    Raises:
        LlavaError: it can't be made, holds a run of other flags or data, or the checkpoint asked for is unusable.
    """
    training = arguments.training
    folder = Path(training.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlavaError(f"--output_dir {folder}: can't be made ({error.strerror})") from error
    with training.main_process_first(local=False):
        if training.should_save:
            remove_parts(folder)
            if training.overwrite_output_dir:
                _clear(folder)
        flags = _described(arguments)
        asked = _wanted(training.resume_from_checkpoint)
        if asked is False:
            _refuse_another(folder, flags, arguments.defaults)
        if training.should_save:
            write_json(folder / FLAGS, flags)
    return _asked_for(asked) if isinstance(asked, Path) else last_good_checkpoint(folder)


def _wanted(text: str | None) -> bool | Path:
    """What --resume_from_checkpoint says: a folder, or whether to go on whatever has changed."""
    try:
        return parse_bool(text or "False")
    except argparse.ArgumentTypeError:
        return expanded(text or "")


def _described(arguments: "Arguments") -> dict[str, Any]:
    """The flags that were given and count, as JSON has them; of data files their size and checksum."""
    given = {name: value for name, value in arguments.given.items() if not name.startswith(_MAY_DIFFER)}
    for name in _DATA:
        if given.get(name):
            path = expanded(given[name])
            given[name] = f"{path.name}, {path.stat().st_size:,} bytes, checksum {checksum(path)}"
    flags: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return flags


def _refuse_another(folder: Path, flags: dict[str, Any], defaults: dict[str, Any]) -> None:
    if not list_checkpoints(folder) and not any((folder / name).exists() for name in _MODEL):
        return  # nothing would be lost
    if not (folder / FLAGS).is_file():
        logger.warning("%s holds a model, and doesn't say with which flags it was trained", folder)
        return
    before = read_json(folder / FLAGS)
    known = json.loads(json.dumps(defaults, default=str))
    pairs = {name: (before.get(name, known.get(name)), flags.get(name, known.get(name))) for name in before | flags}
    differing = [f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]
    if differing:
        raise LlavaError(
            f"--output_dir {folder} holds another run: {'; '.join(differing)}. Choose another folder, or give "
            "--resume_from_checkpoint True to go on with the new flags, or --overwrite_output_dir True to start anew"
        )


def _asked_for(checkpoint: Path) -> Path:
    problem = find_damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is not None:
        raise LlavaError(f"--resume_from_checkpoint {checkpoint}: {problem}; give True or a folder checkpoint-N")
    return checkpoint


def _clear(folder: Path) -> None:
    """Remove what the run before left, but for its model, which the new one replaces when it is whole."""
    for path in (*list_checkpoints(folder), folder / ANSWERS):
        shutil.rmtree(path, ignore_errors=True)
    for name in _STATE:
        (folder / name).unlink(missing_ok=True)
