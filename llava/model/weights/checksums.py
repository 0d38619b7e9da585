"""Checksums of tensors that weight files record: in the header of our own shards, in the zip of a `.bin`."""

import json
import struct
import zipfile
from pathlib import Path

from llava.model.weights.files import WeightFiles

CHECKSUMS = "crc32"
"""Key of a shard's metadata: the CRC-32 of each tensor's bytes, 8 hex digits each, in the order of the file."""


def recorded_checksums(weights: WeightFiles) -> dict[str, int]:
    """CRC-32 of each tensor's bytes as its file records it: this module's shards, and `.bin` (zip) files."""
    found: dict[str, int] = {}
    for path in weights.files:
        names = [name for name in weights if weights.file_of(name) == path]
        found |= (
            _checksums_in_header(path) if path.suffix == ".safetensors" else _checksums_in_zip(path, names, weights)
        )
    return found


def _checksums_in_header(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    text = header.pop("__metadata__", {}).get(CHECKSUMS)
    if text is None:
        return {}
    names = sorted(header, key=lambda name: (header[name]["data_offsets"], name))
    return {name: int(value, 16) for name, value in zip(names, text.split())}


def _checksums_in_zip(path: Path, names: list[str], weights: WeightFiles) -> dict[str, int]:
    """By order: torch maps the file, so its storages lie in memory as the records do in the archive."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        records = sorted(
            (info for info in archive.infolist() if "/data/" in info.filename and info.file_size),
            key=lambda info: info.header_offset,
        )
    tensors = {name: weights.read(name) for name in names}
    storages = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors.values()})
    storages = [(pointer, size) for pointer, size in storages if size]
    if [size for _, size in storages] != [record.file_size for record in records]:
        return {}
    checksums = {pointer: record.CRC for (pointer, _), record in zip(storages, records)}
    return {
        name: checksums[tensor.data_ptr()]
        for name, tensor in tensors.items()
        if tensor.nbytes and tensor.nbytes == tensor.untyped_storage().nbytes() and tensor.is_contiguous()
    }
