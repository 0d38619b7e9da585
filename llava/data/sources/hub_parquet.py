"""Copies of VQA sets on the hub: Parquet files named by split, with columns image (bytes), question, answer.

The images are taken out into a folder, each distinct one once, byte for byte, named by its checksum.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from llava.commandline import existing_dir
from llava.data.conversion import Conversion, fault_of_texts, field_of, value_of, vqa_record, yes_no_type
from llava.errors import LlavaError
from llava.records import Record, atomic_path, iter_records

_SPLIT = re.compile(r"^(train|validation|val|test)\b")
_SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def find_splits(folder: str | Path) -> dict[str, list[Path]]:
    """The Parquet files below a folder by split, as the hub names them: `data/train-00000-of-00003-….parquet`."""
    folder = existing_dir(folder, "--parquet")
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        if match := _SPLIT.match(path.name.replace("_", "-")):
            name = {"validation": "validate", "val": "validate"}.get(match[1], match[1])
            splits.setdefault(name, []).append(path)
    if not splits:
        raise LlavaError(f"{folder}: no Parquet file whose name begins with train, validation or test")
    return splits


def parquet_conversion(name: str, folder: str | Path, output_dir: str | Path) -> Conversion:
    """Records of the hub's copy of a set; the images go to `output_dir/images`, yes/no answers are CLOSED."""
    splits = find_splits(folder)
    conversion = Conversion(name, {}, [path for paths in splits.values() for path in paths], image_folder=None)
    image_dir = Path(output_dir) / "images"
    conversion.splits = {split: _records(split, paths, image_dir, conversion) for split, paths in splits.items()}
    return conversion


def _records(split: str, paths: list[Path], image_dir: Path, conversion: Conversion) -> Iterator[Record]:
    number = 0
    for path in paths:
        for index, row in enumerate(iter_records(path)):
            where = f"{path} row {index}"
            question, answer = value_of(row, "question", where), value_of(row, "answer", where)
            if fault := fault_of_texts(question, answer):
                conversion.left_out[fault] += 1
                continue
            image = _save(field_of(row, "image", where), image_dir, where)
            yield vqa_record(f"{split}_{number:05d}", image, question, answer, yes_no_type(answer))
            number += 1


def _save(image, image_dir: Path, where: str) -> str:
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise LlavaError(f"{where}: the image column holds no bytes")
    suffix = next((suffix for magic, suffix in _SIGNATURES.items() if content.startswith(magic)), ".img")
    path = image_dir / (hashlib.sha256(content).hexdigest()[:20] + suffix)
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path.name
