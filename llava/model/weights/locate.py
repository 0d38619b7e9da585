"""From what the user names (a folder or a hub id) to a folder on this machine."""

import functools
import http.client
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from llava.errors import LlavaError, library_errors
from llava.folders import expanded

log = logging.getLogger(__name__)

_PATIENCE = 1.5
"""Seconds for the hub to answer anything."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILE = re.compile(r"/models--[^/]+/blobs/[^/]+$")
"""A file in the hub's cache; the links of a snapshot, and of a folder that a model was downloaded to, lead there."""
_MOST_BYTES = 128 << 20
"""Of a file that libraries read whole; the largest tokenizers have 40 MB."""
_READ_WHOLE = re.compile(
    r".*config\.json|.*\.index\.json|(tokenizer|chat_template|vocab)\..*|.*\.jinja|merges\.txt"
    r"|(special_tokens_map|added_tokens)\.json"
)
_TAKEN_ALONG = re.compile(r".*\.(json|model|txt|jinja)|(LICENSE|NOTICE).*")
"""Read too, or copied as they are."""
_TEMPLATES = "additional_chat_templates"
"""The folder in a model's folder from which the library reads further templates, and writes them with a tokenizer."""
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def locate_model(
    name: str | Path, what: str = "model", relative_to: Path | None = None, *, cache_dir: str | Path | None = None
) -> Path:
    """The folder of a model given as a local folder or a hub id (downloaded into `cache_dir`, else the hub's cache,
    and taken from there as it is where the hub can't be reached, or HF_HUB_OFFLINE is set).

    A relative folder is looked for in the working directory, then in `relative_to` (a checkpoint that names it) and
    in the folder that holds `relative_to`.

    Raises:
        LlavaError: there is no such folder, and the hub has no such model or can't be reached; a file of the folder
            other than weights is too large, or a link to one elsewhere but in the hub's cache.
    """
    path = expanded(name)
    candidates = [path]
    if relative_to is not None and not path.is_absolute():
        candidates += [relative_to / path, relative_to.parent / path]
    for candidate in candidates:
        if candidate.is_dir():
            _check_files(candidate)
            return candidate
    if path.is_file():
        raise LlavaError(f"{what} {name}: expected a folder or a hub id, this is a file")
    if not _looks_like_hub_id(str(name)):
        raise LlavaError(f"{what} not found: no folder {name}")
    return _download(str(name), what, cache_dir)


def find_model(name: str, relative_to: Path, cache_dir: str | Path | None = None) -> Path | None:
    """`locate_model` of what is on this machine already, the hub's cache included; None if it isn't."""
    path = expanded(name)
    for candidate in (path, relative_to / path, relative_to.parent / path):
        if candidate.is_dir():
            _check_files(candidate)
            return candidate
    if not _looks_like_hub_id(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):
        return None


def _check_files(folder: Path) -> None:
    """Raises LlavaError: a file of settings is too large, or one that isn't weights is a link to one elsewhere.

    A link in a folder of others may name any file of this machine; its text would go into what is made of the model.

    Weights may be links, as only tensors are taken from them, and whatever links to a model in the hub's cache.
    """
    home = folder.resolve()
    for path in (*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")):
        if not _TAKEN_ALONG.fullmatch(path.name) or not path.is_file():
            continue
        size = path.stat().st_size
        if size > _MOST_BYTES and _READ_WHOLE.fullmatch(path.name):
            raise LlavaError(f"{path}: {size:,} bytes; at most {_MOST_BYTES:,} of a model's settings are read")
        target = path.resolve()
        if not target.is_relative_to(home) and not _HUB_FILE.search(target.as_posix()):
            raise LlavaError(f"{path}: a link to {target}, outside the model's folder; put a copy of the file there")


def _looks_like_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and os.sep != name[:1]


def _download(repo_id: str, what: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, list_repo_files, snapshot_download

    cache_dir = None if cache_dir is None else expanded(cache_dir)
    if constants.HF_HUB_OFFLINE:
        return _cached(repo_id, what, cache_dir, "HF_HUB_OFFLINE is set")
    if not _answers(constants.ENDPOINT):
        return _cached(repo_id, what, cache_dir, f"{constants.ENDPOINT} can't be reached")
    try:
        with library_errors(constants.ENDPOINT):
            files = list_repo_files(repo_id)
            # Both kinds of one model would be downloaded otherwise: twice the bytes.
            both = any(re.fullmatch(r"model.*\.safetensors", file) for file in files)
            ignored = ["pytorch_model*.bin"] if both else []
            return Path(
                snapshot_download(repo_id, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=ignored)
            )
    except LlavaError as error:
        return _cached(repo_id, what, cache_dir, str(error))


def _cached(repo_id: str, what: str, cache_dir: Path | None, why: str) -> Path:
    """The model as it lies in the cache; `why` the hub isn't asked, or what it said."""
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError) as error:
        place = cache_dir or constants.HF_HUB_CACHE
        raise LlavaError(
            f"{what} not found: there is no folder {repo_id}; if it is a hub id: it isn't in the cache ({place}) and "
            f"can't be had from the hub ({why}); fill the cache where there is a network: hf download {repo_id}"
        ) from error
    log.warning("%s %s is taken from the cache as it is (%s)", what, repo_id, why)
    return folder


@functools.cache
def _answers(address: str) -> bool:
    """Whether a server answers at all, through a proxy if one is set; known within `_PATIENCE` seconds."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
        except urllib.error.HTTPError:
            answered.append(True)
        except (OSError, http.client.HTTPException, ValueError):
            answered.append(False)
        else:
            answered.append(True)

    # In a thread: looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answered and answered[0])
