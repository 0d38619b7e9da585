"""Whole models of the library (transformers), read from a folder that anybody may have written."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from llava.errors import LlavaError, first_line


def load_library_model(auto_class: Any, folder: str | Path, what: str) -> PreTrainedModel:
    """The model that `auto_class` (`AutoModel`, …) finds in a folder, ready to be asked.

    How it computes is the library's choice, never that of its config.json: a hub's repository that is named there
    would be fetched, and its code run.

    Args:
        what: it should be, for the message: "vision model".

    Raises:
        LlavaError: the folder holds no such model of the library.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._attn_implementation = None
        config._experts_implementation = None
        return auto_class.from_pretrained(folder, config=config, trust_remote_code=False).eval()
    except (ValueError, OSError) as error:
        raise LlavaError(f"{folder}: no {what} of the library ({first_line(error)})") from error
