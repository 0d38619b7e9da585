"""What a path that isn't there stands for, told by its name, so that published commands can be predicted as written."""

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from llava.errors import LlavaError
from llava.folders import expanded
from llava.train.estimate.inputs.known_models import KNOWN

SIZES = {"7b": "llama-7b", "13b": "llama-13b"}
LLAMAS = ("llama", "llava", "vicuna", "babydoctor")
"""Words of names of models that have LLaMA's layers; without a size they are those of 7B."""
RECORDS = {"vqa_rad": 1793, "slake": 4919, "pathvqa": 19755, "roco": 65000}
"""Training records of data sets whose names hold no number, as LLaVA-Med's paper and BabyDoctor's card count them."""


def present_model(name: str | None) -> tuple[str, str | None]:
    """(the model to predict for, what is to be said of it): a folder, a cached hub id or a known name is itself, of
    others a known model is told by the name. One that tells nothing is returned as it is.

    Raises:
        LlavaError: there is no name.
    """
    if not name:
        raise LlavaError("--model_name_or_path is needed")
    if name in KNOWN or expanded(name).is_dir() or _is_cached(name):
        return name, None
    told = _told_model(name.lower())
    if told is None:
        return name, None
    return told, f"--model_name_or_path {name} isn't there: predicted for {told}, by its name"


def told_records(path: str) -> int | None:
    """Records of a data set by its name (`instruct_60k.json`, `vqa_rad/train.json`); None if it tells nothing."""
    name = "/".join(Path(path).parts[-2:]).lower().replace("-", "_")
    number = re.search(r"(?<![a-z0-9])(\d+)k(?![a-z0-9])", name)
    if number:
        return 1000 * int(number[1])
    return next((count for word, count in RECORDS.items() if word in name), None)


def _told_model(name: str) -> str | None:
    sizes = re.findall(r"(?<![a-z0-9.])([\d.]+[bm])(?![a-z0-9])", name)
    if "mistral" in name:
        return "mistral-7b" if set(sizes) <= {"7b"} else None
    if not any(word in name for word in LLAMAS):
        return None
    return SIZES.get(sizes[-1]) if sizes else SIZES["7b"]


def _is_cached(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and isinstance(
        try_to_load_from_cache(name, "config.json"), str
    )
