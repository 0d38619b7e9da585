"""From what the user names (a folder or a hub id) to a folder on this machine."""

import logging
import os
import re
from pathlib import Path

from llava.errors import LlavaError

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def locate_model(
    name: str | Path, what: str = "model", relative_to: Path | None = None, *, cache_dir: str | Path | None = None
) -> Path:
    """The folder of a model given as a local folder or a hub id (downloaded into `cache_dir`, else the hub's cache).

    A relative folder is looked for in the working directory, then in `relative_to` (a checkpoint that names it) and
    in the folder that holds `relative_to`.

    Raises:
        LlavaError: there is no such folder, and the hub has no such model or can't be reached.
    """
    path = Path(name).expanduser()
    candidates = [path]
    if relative_to is not None and not path.is_absolute():
        candidates += [relative_to / path, relative_to.parent / path]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    if path.is_file():
        raise LlavaError(f"{what} {name}: expected a folder or a hub id, this is a file")
    if not _looks_like_hub_id(str(name)):
        raise LlavaError(f"{what} not found: no folder {name}")
    return _download(str(name), what, cache_dir)


def _looks_like_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and os.sep != name[:1]


def _download(repo_id: str, what: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
    unreachable = (HfHubHTTPError, OfflineModeIsEnabled, OSError)
    ignored = []
    try:
        files = list_repo_files(repo_id)
    except HFValidationError as error:
        raise LlavaError(f"{what} not found: {repo_id} is neither a folder nor a hub id") from error
    except unreachable as error:
        log.info("hub not asked for %s (%s); using the local cache", repo_id, type(error).__name__)
    else:
        # Both kinds of one model would be downloaded otherwise: twice the bytes.
        if any(re.fullmatch(r"model.*\.safetensors", file) for file in files):
            ignored = ["pytorch_model*.bin"]
    try:
        return Path(snapshot_download(repo_id, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=ignored))
    except (*unreachable, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise LlavaError(
            f"{what} not found: {repo_id} is no folder here, and the hub has no such model or can't be "
            f"reached; download it and give the folder ({reason})"
        ) from error
