"""Checkpoints that survive being killed: written aside, listed in a manifest, renamed when whole.

A folder `checkpoint-N` therefore is complete, or was damaged later; `last_good_checkpoint` checks the newest
against its manifest and falls back to the one before.
"""

import json
import logging
import re
import shutil
import zlib
from pathlib import Path

from llava.folders import part_of, publish_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK = 1 << 20
_SAMPLED_ABOVE = 1 << 30


def last_good_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest undamaged `checkpoint-N` of a run, or None; damaged ones are named in a warning."""
    for folder in reversed(list_checkpoints(output_dir)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        logger.warning("%s is damaged (%s); trying the checkpoint before it", folder, problem)
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-N` folders, oldest first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (folder / "trainer_state.json").is_file():
        return "trainer_state.json is missing"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        manifest = _read_manifest(folder)
    except (ValueError, KeyError) as error:
        return f"unreadable JSON: {error}"
    if manifest is None:
        return None  # written by another program; all we can tell is that it has a state
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes in place of {expected['bytes']}"
        if checksum(path) != expected["crc32"]:
            return f"{name} has another checksum"
    return None


def staging_of(final: Path, *, main_process: bool = True) -> Path:
    """A folder next to `final` to write into, which the main process makes anew, and finishes with `publish`."""
    staging = part_of(final)
    if main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    return staging


def publish(staging: Path, final: Path) -> None:
    """Write the manifest, make everything durable, and give the folder its name."""
    write_manifest(staging)
    publish_folder(staging, final)


def remove_old(output_dir: str | Path, limit: int | None, best: Path | None = None) -> None:
    """Keep the newest `limit` checkpoints; the newest undamaged one is never deleted, nor is the `best`."""
    if not limit or limit < 1:
        return
    folders = list_checkpoints(output_dir)
    if len(folders) <= limit:
        return
    # The newest was just written from memory and renamed when whole; the file system may still have failed.
    keep = set(folders[-limit:])
    if all(find_damage(folder) is not None for folder in keep):
        logger.warning("none of the newest %d checkpoints is whole; older ones are kept", limit)
        return
    for folder in folders:
        if folder not in keep and folder != best:
            shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """List size and checksum of every file below `folder`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "crc32": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _read_manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else None


def checksum(path: Path) -> int:
    """CRC-32 of a file; of 64 blocks spread over it where it is larger than 1 GB (reading all would take minutes)."""
    size = path.stat().st_size
    checksum = 0
    with path.open("rb") as file:
        if size <= _SAMPLED_ABOVE:
            while block := file.read(_BLOCK):
                checksum = zlib.crc32(block, checksum)
            return checksum
        for part in range(64):
            file.seek((size - _BLOCK) * part // 63)
            checksum = zlib.crc32(file.read(_BLOCK), checksum)
    return checksum
