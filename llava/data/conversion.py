"""What every converter shares: records in LLaVA-Med's form, checked images, and a folder written whole or not at all.

A converter (llava/data/sources/) yields records and counts what it leaves out; `write_conversion` writes one file per
split, the candidate answers of the training split, and a manifest with sources, counts and checksums.
"""

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError, amount, one_line
from llava.folders import expanded, in_other_form, is_file, other_form_note, stage_files
from llava.manifests import sha256_of
from llava.record_content import as_text, image_key
from llava.records import Record, read_json, write_json, write_records

logger = logging.getLogger(__name__)

FORMATS = ("json", "jsonl", "parquet")
MISSING_CHOICES = ("error", "drop", "keep")
CANDIDATES_FILE = "candidates.json"
MANIFEST_FILE = "manifest.json"
YES_NO = {"yes", "no"}


@dataclass
class Conversion:
    """What a converter found: its splits, the files it read and, once the splits are read, what it left out."""

    name: str
    splits: dict[str, Iterable[Record]]
    sources: list[Path]
    image_folder: "ImageFolder | None"
    """What `convert` was given, so that missing images are counted and said; None if the images come from `sources`."""
    left_out: Counter = field(default_factory=Counter)
    corrected: Counter = field(default_factory=Counter)
    candidates: bool = True
    """Whether the open answers of the training split are worth a candidate file."""

    def accepts(self, image: str) -> bool:
        """Whether a record with this image is to be written (`ImageFolder.accept`)."""
        return self.image_folder is None or self.image_folder.accept(image)


class ImageFolder:
    """Which images a folder has. Missing ones are an error at the end, dropped and counted, or kept, as asked."""

    def __init__(self, folder: Path | None, missing: str = "error"):
        self.folder = folder
        self.policy = missing if folder is not None else "keep"
        self.missing: dict[str, int] = {}
        self._known: dict[str, bool] = {}

    def accept(self, name: str) -> bool:
        """Whether a record with this image is to be written; counts the records whose image isn't there."""
        if name not in self._known:
            if not is_inside(name):
                raise LlavaError(
                    f"image {name!r:.200} isn't read: it leads out of the image folder, or isn't spelt as Linux does; "
                    f"give a path below the folder, with / and without '..'"
                )
            self._known[name] = self.folder is None or is_file(self.folder / name)
        if self._known[name]:
            return True
        self.missing[name] = self.missing.get(name, 0) + 1
        return self.policy == "keep"

    def missing_paths(self) -> list[Path]:
        """Where the missing images would be."""
        return [] if self.folder is None else [self.folder / name for name in self.missing]

    def raise_if_missing(self, left_out: Mapping[str, int]) -> None:
        """Names the missing images, and counts the records that were left out for another reason too."""
        if self.missing and self.policy == "error":
            first, note = ", ".join(list(self.missing)[:3]), other_form_note(self.missing_paths())
            further = "".join(f"; left out besides: {line}" for line in counted(left_out))
            raise LlavaError(
                f"{amount(len(self.missing), 'image')} of {amount(sum(self.missing.values()), 'record')} not found "
                f"under {self.folder} (first: {first}){note}; get them, or pass --missing drop to leave these records "
                f"out{further}"
            )


def vqa_record(
    id: str, image: str | None, question: Any, answer: Any, answer_type: str | None = None, **fields: Any
) -> Record:
    """One question and answer as a conversation, `<image>` after the question; fields that are None are left out."""
    text = clean_text(question)
    record: Record = {"id": str(id)}
    if image is not None:
        record["image"] = image
        text = f"{text}\n{DEFAULT_IMAGE_TOKEN}"
    record["conversations"] = [{"from": "human", "value": text}, {"from": "gpt", "value": clean_text(answer)}]
    if answer_type is not None:
        record["answer_type"] = answer_type
    record.update({key: value for key, value in fields.items() if value is not None})
    return record


def fault_of_texts(question: Any, answer: Any) -> str | None:
    """Why a question and an answer make no record, in words for the manifest; None if they do."""
    for what, value in (("question", question), ("answer", answer)):
        if value is None or not clean_text(value):
            return f"empty {what}"
        if DEFAULT_IMAGE_TOKEN in str(value):
            return f"{what} holds {DEFAULT_IMAGE_TOKEN}"
    return None


def clean_text(value: Any) -> str:
    """Text without blanks around it; numbers become text (4, and 4.0 too, is "4")."""
    return as_text(value).strip()


def read_answer_type(value: Any, where: str) -> str:
    """OPEN or CLOSED (or CHOICE, of questions with options), whatever its case and the blanks around it."""
    kind = clean_text(value).upper()
    if kind not in ("OPEN", "CLOSED", "CHOICE"):
        raise LlavaError(f"{where}: answer_type is {value!r}; expected OPEN, CLOSED or CHOICE")
    return kind


def yes_no_type(answer: Any) -> str:
    """The answer type of sets that have none: yes and no are CLOSED, everything else OPEN."""
    return "CLOSED" if clean_text(answer).lower().rstrip(".") in YES_NO else "OPEN"


def field_of(row: Record, key: str, where: str) -> Any:
    """`row[key]`, or an error that says where it is missing and what there is."""
    if not isinstance(row, dict) or key not in row:
        have = one_line(", ".join(map(str, row)), 300) if isinstance(row, dict) else type(row).__name__
        raise LlavaError(f'{where}: no "{key}" (there is: {have})')
    return row[key]


def value_of(row: Record, key: str, where: str, *, optional: bool = False) -> str | int | float | None:
    """The text or number under `key`; None if it is null, or isn't there and need not be.

    Raises:
        LlavaError: it isn't there, or is a list, an object or anything else that isn't said in words.
    """
    value = row.get(key) if optional else field_of(row, key, where)
    if value is not None and not isinstance(value, (str, int, float)):
        raise LlavaError(f'{where}: "{key}" has to be text or a number, not {type(value).__name__}')
    return value


def text_of(row: Record, key: str, where: str, *, optional: bool = False) -> str:
    """What `value_of` gives as text without blanks around it; only an optional one may be empty.

    Raises:
        LlavaError: what `value_of` refuses, or nothing is there.
    """
    value = value_of(row, key, where, optional=optional)
    text = "" if value is None else clean_text(value)
    if not text and not optional:
        raise LlavaError(f'{where}: "{key}" is empty')
    return text


def is_inside(name: str) -> bool:
    """Whether an image's name stays in its folder: relative, no '..', no backslash, no NUL."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def write_conversion(
    conversion: Conversion, output_dir: str | Path, file_format: str = "json", *, overwrite: bool = True
) -> dict[str, Any]:
    """Write `<split>.<format>` per split, `candidates.json` and `manifest.json`; returns the manifest.

    Nothing appears in `output_dir` before everything is written; the manifest comes last. Where the folder's splits
    are made anew, those that aren't made any more go.

    Raises:
        LlavaError: an id occurs twice in a split, a split is empty, images are missing and may not be, or
            `output_dir` holds other records that may not be replaced.
    """
    stale = _splits_not_made(conversion.splits, expanded(output_dir))
    if stale and not overwrite:
        raise LlavaError(
            f"{output_dir} holds {', '.join(stale)}, which this conversion doesn't make; give another folder, or "
            f"--overwrite to remove it"
        )
    manifest: dict[str, Any] = {
        "data_set": conversion.name,
        "written_by": {"llava-med": version("llava-med")},
        "sources": [_describe(path, path.name) for path in conversion.sources],
        "splits": {},
    }
    patterns = map(glob.escape, stale)
    with stage_files(output_dir, last=MANIFEST_FILE, stale=patterns, overwrite=overwrite) as temporary:
        tallies: list[Tally] = []
        for split, records in conversion.splits.items():
            path = temporary / f"{split}.{file_format}"
            tally = Tally(f"{conversion.name} {split}")
            write_records(path, tally.watch(records))
            manifest["splits"][split] = {**_describe(path, path.name), **tally.summary()}
            tallies.append(tally)
            if split == "train" and conversion.candidates:
                write_json(temporary / CANDIDATES_FILE, {"0": sorted(tally.open_answers)}, indent=0)
                manifest["candidates"] = {
                    **_describe(temporary / CANDIDATES_FILE, CANDIDATES_FILE),
                    "answers": len(tally.open_answers),
                }
        folder = conversion.image_folder
        if folder is not None:
            folder.raise_if_missing(conversion.left_out)
        for tally in tallies:
            tally.raise_if_empty(conversion.left_out)
        if folder is not None:
            manifest["missing_images"] = {
                "policy": folder.policy,
                "images": len(folder.missing),
                "records": sum(folder.missing.values()),
                "first": list(folder.missing)[:20],
                "in_another_unicode_form": sum(map(in_other_form, folder.missing_paths())),
            }
        manifest["left_out"] = dict(conversion.left_out)
        manifest["corrected"] = dict(conversion.corrected)
        write_json(temporary / MANIFEST_FILE, manifest)
    for name in stale:
        logger.warning("%s: %s of an earlier conversion is removed; this one doesn't make it", output_dir, name)
    return manifest


def _splits_not_made(splits: Iterable[str], folder: Path) -> list[str]:
    """Files of splits that an earlier conversion wrote along with some of `splits`: the images of a test.json that
    stayed might be in the new train.json."""
    content = read_json(folder / MANIFEST_FILE) if is_file(folder / MANIFEST_FILE) else None
    earlier = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(earlier, dict) or earlier.keys().isdisjoint(splits):
        return []
    others = [f"{split}.{form}" for split in earlier.keys() - set(splits) for form in FORMATS]
    return sorted(name for name in others if is_inside(name) and is_file(folder / name))


def counted(left_out: Mapping[str, int]) -> Iterator[str]:
    """How many records were left out, by reason."""
    return (f"{count} with {why}" for why, count in left_out.items())


class Tally:
    """Counts records on their way into a file, and refuses an id that comes twice."""

    def __init__(self, where: str):
        self.where = where
        self.records = 0
        self.images: set[str] = set()
        self.answer_types: Counter = Counter()
        self.open_answers: set[str] = set()
        self._ids: set[str] = set()

    def watch(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if record["id"] in self._ids:
                raise LlavaError(f'{self.where}: the id "{record["id"]}" occurs twice; answers are joined by id')
            self._ids.add(record["id"])
            self.records += 1
            if "image" in record:
                self.images.add(image_key(record["image"]))
            if "answer_type" in record:
                self.answer_types[record["answer_type"]] += 1
                if record["answer_type"] == "OPEN":
                    self.open_answers.add(record["conversations"][-1]["value"].lower())
            yield record

    def raise_if_empty(self, left_out: Mapping[str, int]) -> None:
        if not self.records:
            why = "; ".join(counted(left_out))
            question = "is this the right file, and are the images there?"
            raise LlavaError(f"{self.where}: no records; {f'left out: {why}' if why else question}")

    def summary(self) -> dict[str, Any]:
        return {"records": self.records, "images": len(self.images), "answer_types": dict(self.answer_types)}


def summary_lines(manifest: dict[str, Any]) -> list[str]:
    """What a command prints about a manifest: one line per split, then what was left out."""
    lines = []
    for split in manifest["splits"].values():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(split["answer_types"].items(), reverse=True))
        lines.append(
            f"{split['file']}: {amount(split['records'], 'record')}, {amount(split['images'], 'image')}"
            + (f" ({kinds})" if kinds else "")
        )
    if "candidates" in manifest:
        open_answers = amount(manifest["candidates"]["answers"], "open answer")
        lines.append(f"{manifest['candidates']['file']}: {open_answers} of train")
    missing = manifest.get("missing_images", {})
    if missing.get("records"):
        done = "left out" if missing["policy"] == "drop" else "kept"
        gone = amount(missing["images"], "image doesn't exist", "images don't exist")
        lines.append(f"{amount(missing['records'], 'record')} {done}: {gone}")
        if other := missing.get("in_another_unicode_form"):
            lines.append(f"  there under a name in another Unicode form (NFC, NFD): {other:,}")
    left_out = manifest["left_out"].items()
    lines += [f"{amount(count, 'record')} left out: {one_line(reason, 200)}" for reason, count in left_out]
    lines += [f"{count:,} corrected: {what}" for what, count in manifest["corrected"].items()]
    return lines


def _describe(path: Path, name: str) -> dict[str, Any]:
    if path.is_dir():
        return {"file": name, "folder": True}
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
