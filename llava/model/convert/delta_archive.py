"""A delta given as a `.zip`: only the wanted regular files come out, under their own names, into one folder."""

import json
import lzma
import shutil
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from llava.errors import LlavaError, library_errors
from llava.model.convert.other_files import SIDE_FILES, WEIGHT_FILES
from llava.records import atomic_path

_DIRECTORY_BITS = 0o170000
_REGULAR = 0o100000
_MOST_CONFIG = 1 << 20
"""Bytes of config.json, which is read before anything is unpacked."""


class DeltaArchive:
    """The files of the one model folder in a zip.

    Members that are links, lie outside that folder or have other names than a model's files are left where they
    are: no name from the archive is ever used as a path.

    Raises:
        LlavaError: no zip, no config.json in it, or two model folders.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder: Path | None = None
        if not path.is_file():
            raise LlavaError(f"delta not found: {path}")
        with library_errors(f"{path}: not a whole zip file; fetch it again"):
            self._zip = zipfile.ZipFile(path)
        configs = [info for info in self._zip.infolist() if PurePosixPath(info.filename).name == "config.json"]
        if len(configs) != 1:
            raise LlavaError(
                f"{path}: expected one model folder, but the zip has {len(configs)} files named config.json"
            )
        inside = PurePosixPath(configs[0].filename).parent
        self.members = {
            PurePosixPath(info.filename).name: info
            for info in self._zip.infolist()
            if PurePosixPath(info.filename).parent == inside and _is_wanted(info)
        }

    def __enter__(self) -> "DeltaArchive":
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def config(self) -> dict[str, Any]:
        with library_errors(f"{self.path}: config.json in it can't be read"):
            with self._zip.open(self.members["config.json"]) as file:
                content = file.read(_MOST_CONFIG + 1)
            if len(content) > _MOST_CONFIG:
                raise LlavaError(f"{self.path}: config.json in it has more than {_MOST_CONFIG:,} bytes")
            config = json.loads(content)
            if not isinstance(config, dict):
                raise LlavaError(f"{self.path}: config.json in it is no object of settings")
            return config

    def unpacked_bytes(self) -> int:
        return sum(info.file_size for info in self.members.values())

    def unpack(self, folder: Path) -> Path:
        """Write the wanted files to `folder`, those of an earlier attempt apart; the zip's checksums are compared.
        Nothing else stays there."""
        folder.mkdir(exist_ok=True)
        for left in folder.iterdir():
            if left.name not in self.members:
                left.unlink()
        for name, info in self.members.items():
            target = folder / name
            if _is_whole(target, info):
                continue
            try:
                with self._zip.open(info) as source, atomic_path(target) as temporary, temporary.open("wb") as file:
                    # Never more than the directory of the zip says: check_space has counted on it.
                    _copy(source, file, info.file_size)
            except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError) as error:
                # A RuntimeError is an encrypted member, or one of a compression that isn't known.
                raise LlavaError(
                    f"{self.path}: {info.filename} in it is damaged ({error}); fetch the file again"
                ) from error
        self.folder = folder
        return folder

    def remove(self) -> None:
        """Remove what `unpack` wrote."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


def _is_wanted(info: zipfile.ZipInfo) -> bool:
    name = PurePosixPath(info.filename).name
    kind = (info.external_attr >> 16) & _DIRECTORY_BITS
    if info.is_dir() or kind not in {0, _REGULAR} or "\\" in name or name.startswith("."):
        return False
    return any(fnmatch(name, pattern) for pattern in SIDE_FILES + WEIGHT_FILES)


def _is_whole(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether an earlier attempt has written this member, and not one of another zip's that is as long."""
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            checksum = zlib.crc32(data, checksum)
    return checksum == info.CRC


def _copy(source, file, size: int) -> None:
    left = size
    while left > 0:
        data = source.read(min(1 << 20, left))
        if not data:
            raise EOFError(f"{left} bytes are missing")
        file.write(data)
        left -= len(data)
    # The zip's checksum is compared when its end is read.
    if source.read(1):
        raise ValueError("it is longer than the zip says")
