"""What made a file, noted beside it: so a run goes on where it was, and never over what another one made.

`FILE.manifest.json` lies next to a complete FILE, `FILE.part.json` next to one that is being written. Both hold the
settings that decide the content. `claim` is asked before anything is done that takes long or is paid for.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.folders import PART
from llava.records import read_json, write_json

_PACKAGES = ("llava-med", "torch", "transformers", "tokenizers", "numpy", "pillow")
_GIVEN_UP = "given_up"

Settings = Mapping[str, Any]


def manifest_path(file: str | Path) -> Path:
    """Where the manifest of a file stands."""
    return Path(f"{file}.manifest.json")


def read_manifest(file: str | Path) -> dict[str, Any] | None:
    """The manifest of a file, or None if it has none."""
    path = manifest_path(file)
    return read_json(path) if path.is_file() else None


def write_manifest(file: str | Path, **content: Any) -> dict[str, Any]:
    """Write the manifest of `file`, which must be complete: its checksum and the versions go in too."""
    manifest = content | {
        "file": Path(file).name,
        "sha256": sha256_of(Path(file)),
        "versions": versions(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(manifest_path(file), manifest)
    Path(f"{file}{PART}").unlink(missing_ok=True)
    claim_path(file).unlink(missing_ok=True)
    return manifest


def claim_path(file: str | Path) -> Path:
    """Where it is noted whose the unfinished `file` is."""
    return Path(f"{file}{PART}.json")


def fingerprint_of(settings: Settings) -> str:
    """A digest that tells settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def finished(file: Path, mark: str, value: Any) -> dict[str, Any] | None:
    """The manifest of a file that is complete, as it was written, and whose `mark` has this value."""
    manifest = read_manifest(file) if file.is_file() else None
    if manifest is None or manifest.get(mark) != value:
        return None
    return manifest if manifest.get("sha256") == sha256_of(file) else None


def claim(file: Path, settings: Settings, *, overwrite: bool = False) -> None:
    """Note that `file` and its unfinished part are to be of these settings; whatever was finished stays for now.

    Raises:
        LlavaError: one of them is of other settings (named), and `overwrite` isn't set.
    """
    part, fingerprint = Path(f"{file}{PART}"), fingerprint_of(settings)
    if overwrite:
        part.unlink(missing_ok=True)
    else:
        refuse_another(file, settings)
        if part.is_file() and part.stat().st_size:
            kept = _claimed(file)
            if kept.get("fingerprint") != fingerprint:
                raise LlavaError(
                    f"{part} holds what another run began (different: {_differing(settings, kept.get('settings'))}); "
                    f"finish that one, or start anew with --overwrite"
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(claim_path(file), {"fingerprint": fingerprint, "settings": settings})
    # A manifest never outlives its file.
    if file.is_file():
        manifest_path(file).unlink(missing_ok=True)


def to_be_made(file: Path, settings: Settings, *, overwrite: bool = False) -> bool:
    """Whether a file of these settings has still to be made; then it is claimed (errors: see `claim`)."""
    if not overwrite and finished(file, "fingerprint", fingerprint_of(settings)):
        return False
    claim(file, settings, overwrite=overwrite)
    return True


def refuse_another(file: Path, settings: Settings) -> None:
    """Fail if `file` is there, unless it was to be replaced already by a run of these settings (`claim`, `give_up`).

    Raises:
        LlavaError: what differs.
    """
    if not file.is_file():
        return
    kept = _claimed(file)
    if kept.get(_GIVEN_UP) or kept.get("fingerprint") == fingerprint_of(settings):
        return
    manifest = read_manifest(file)
    if manifest is not None and manifest.get("sha256") != sha256_of(file):
        what = "was changed after it was written"
    else:
        what = f"is complete and of another run (different: {_differing(settings, manifest)})"
    raise LlavaError(f"{file} {what}; give another name, or --overwrite to replace it")


def give_up(file: Path) -> None:
    """Note that a finished `file` may be replaced, whoever writes it."""
    if file.is_file():
        write_json(claim_path(file), {_GIVEN_UP: True})
        manifest_path(file).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Python's and the packages' that bear on a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _claimed(file: Path) -> dict[str, Any]:
    path = claim_path(file)
    return read_json(path) if path.is_file() else {}


def _differing(settings: Settings, kept: Settings | None) -> str:
    """The names of the settings that `kept` has otherwise."""
    if not kept:
        return "nothing says which settings it was made with"
    as_json = json.loads(json.dumps(settings, default=str))
    return ", ".join(sorted(key for key, value in as_json.items() if kept.get(key) != value)) or "flags not given now"
