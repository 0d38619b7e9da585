"""Turn a folder of DICOM series and NIfTI volumes into images and a records file that name no patient.

Which slices of a series are taken, and with which window, the flags say; what is left out is listed with its reason.

python -m llava.images.convert /data/hospital --output-dir data/scans --slices 'montage 3x3'
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.commandline import ArgumentParser, check_outputs, existing_dir, run, write_line
from llava.errors import ImageError, LlavaError, amount
from llava.folders import expanded
from llava.image_options import add_window_flag
from llava.images.limits import Limits
from llava.images.nifti import read_nifti_slices
from llava.images.opening import open_image
from llava.images.series import Series, Slice, survey, without_path
from llava.processes import process_pool
from llava.records import sound_text

_MONTAGE = re.compile(r"montage (\d{1,2})\s*[x×]\s*(\d{1,2})")
_EVERY = re.compile(r"every (\d{1,4})")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="DICOM files and NIfTI volumes, at any depth")
    parser.add_argument("--output-dir", required=True, help="gets images/, records.json and left_out.jsonl")
    parser.add_argument(
        "--slices", default="middle", help="of each series: middle, all, 'every N', or 'montage RxC' in one image"
    )
    add_window_flag(parser, "auto (CT by the part of the body, else the file's own), ", default="auto")
    parser.add_argument("--axis", type=int, default=2, choices=(0, 1, 2), help="of volumes: sagittal, coronal, axial")
    parser.add_argument("--question", help="give each record a conversation that begins with this question")
    parser.add_argument(
        "--sources",
        metavar="PATH",
        help="write which file each image was made of (CSV: image, file, frame), to join it with a table of yours; "
        "a file's name that a spreadsheet would take for a formula has an apostrophe before it; "
        "patients' names may stand in paths, so it is kept out of --output-dir and readable for you alone",
    )
    parser.add_argument(
        "--table",
        metavar="PATH",
        help="also write a row for each image (CSV: image, question, answer), to fill in and give to `convert csv`",
    )
    parser.add_bool(
        "--name-files", help="name files in left_out.jsonl by their paths, in which patients' names may stand"
    )
    parser.add_bool("--keep-burned-in", help="use images that say that text is burnt into their pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that open images")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.bars import tqdm
    from llava.folders import check_target, stage
    from llava.records import write_records, written_together

    check_outputs(args, [args.folder], "sources", "table")
    choose = parse_slices(args.slices)
    window = None if args.window == "auto" else args.window
    target = check_target(args.output_dir, args.overwrite)
    sources = args.sources and Sources(Path(args.sources), Path(args.folder), target, args.overwrite)
    table = args.table and Table(Path(args.table), target, args.overwrite, "is no part of")
    found = survey(existing_dir(args.folder, "folder of scans"), axis=args.axis, keep_burned_in=args.keep_burned_in)
    jobs = [Job(series, choose, window) for series in found.series]
    left_out = LeftOut(expanded(args.folder), args.name_files)
    for file, why in found.left_out:
        left_out.add(why, file)
    records: dict[str, dict[str, Any]] = {}
    with stage(target, overwrite=args.overwrite) as part:
        (part / "images").mkdir()
        results = tqdm(_drawn(jobs, args.workers), total=len(jobs), unit="series", desc="converting")
        for job, (drawn, refused) in zip(jobs, results, strict=True):
            for one, why in refused:
                left_out.add(why, one.path, one.frame)
            if not drawn:
                continue
            name = hashlib.sha256(b"".join(content for _, content in drawn)).hexdigest()[:16]
            if name in records:
                left_out.add("the same images as another series", job.series.slices[0].path)
                continue
            records[name] = _write(part / "images", name, drawn, args.question)
            if sources:
                sources.add(records[name]["images"], drawn, job.series)
            if table:
                table.rows += [(image, args.question or "", "") for image in records[name]["images"]]
        if not records:
            why = f" (left out: {'; '.join(left_out.reasons())})" if left_out.entries else ""
            raise LlavaError(f"{args.folder}: no series that can be used{why}")
        write_records(part / "records.json", [records[name] for name in sorted(records)])
        write_records(part / "left_out.jsonl", left_out.entries)
        with written_together():
            if sources:
                sources.write(("image", "file", "frame"), private=True)
            if table:
                table.write(("image", "question", "answer"))
    count = sum(len(record["images"]) for record in records.values())
    write_line(f"{len(records):,} series, {amount(count, 'image')}: {target / 'records.json'}")
    for reason in left_out.reasons():
        write_line(f"left out: {reason}")


class Table:
    """Rows that go into a CSV file of their own, outside the set, the image first."""

    def __init__(self, path: Path, target: Path, overwrite: bool, why: str):
        self.path, self.overwrite = expanded(path).absolute(), overwrite
        if self.path.resolve().is_relative_to(target.resolve()):
            raise LlavaError(f"{path}: {why} the set; give a path outside --output-dir")
        self.rows: list[tuple[str, str, int | str]] = []

    def write(self, header: tuple[str, ...], *, private: bool = False) -> None:
        from llava.records import atomic_path

        rows = sorted(self.rows, key=lambda row: row[:2])
        with (
            atomic_path(self.path, overwrite=self.overwrite, private=private) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            table = csv.writer(file)
            table.writerow(header)
            table.writerows(rows)


class Sources(Table):
    """The rows of --sources: one for each slice in an image."""

    def __init__(self, path: Path, folder: Path, target: Path, overwrite: bool):
        super().__init__(path, target, overwrite, "would name patients in")
        self.folder = expanded(folder)

    def add(self, images: list[str], drawn: "Drawn", series: Series) -> None:
        for image, (said, _) in zip(images, drawn, strict=True):
            for one in (series.slices[place] for place in said["slices"]):
                frame = "" if one.frame is None else one.frame
                file = sound_text(str(one.path.relative_to(self.folder)))  # a name need not be UTF-8
                self.rows.append((image, _plain_cell(file), frame))


def _plain_cell(text: str) -> str:
    """With an apostrophe before it, what a spreadsheet would take for a formula is text (as OWASP says)."""
    return f"'{text}" if text.startswith(_FORMULA) else text


class LeftOut:
    """Lines of left_out.jsonl. A file is told by what is in it, as `sha256sum` says it: a path may name a patient."""

    def __init__(self, folder: Path, with_paths: bool):
        self.folder, self.with_paths = folder, with_paths
        self.entries: list[dict[str, Any]] = []

    def add(self, why: str, path: Path, frame: int | None = None) -> None:
        entry: dict[str, Any] = {"number": len(self.entries) + 1, "why": why, "sha256": _digest(path)}
        if frame is not None:
            entry["frame"] = frame
        if self.with_paths:
            entry["file"] = str(path.relative_to(self.folder))
        self.entries.append(entry)

    def reasons(self) -> list[str]:
        """Why, and how often, the commonest first."""
        return [f"{number} × {why}" for why, number in Counter(entry["why"] for entry in self.entries).most_common()]


def _digest(path: Path) -> str | None:
    """The first 16 characters; None for a file that can't be read, and for what is none (a link, a device)."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return None


@dataclass(frozen=True)
class Choice:
    """Which slices of a series: the middle one, every n-th, or so many in one montage."""

    every: int = 0
    rows: int = 0
    columns: int = 0

    def of(self, count: int) -> list[int]:
        if self.every:
            return list(range(0, count, self.every))
        if self.rows:
            wanted = min(self.rows * self.columns, count)
            return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
        return [count // 2]


def parse_slices(text: str) -> Choice:
    """Raises a LlavaError for what is none of `--slices`'s forms."""
    if text == "middle":
        return Choice()
    if text == "all":
        return Choice(every=1)
    if (match := _EVERY.fullmatch(text)) and int(match[1]):
        return Choice(every=int(match[1]))
    if (match := _MONTAGE.fullmatch(text)) and int(match[1]) and int(match[2]):
        return Choice(rows=int(match[1]), columns=int(match[2]))
    raise LlavaError(f"--slices {text}: give middle, all, 'every 5' or 'montage 3x3'")


@dataclass(frozen=True)
class Job:
    """A series to draw."""

    series: Series
    choice: Choice
    window: str | tuple[float, float] | None


Drawn = list[tuple[dict[str, Any], bytes]]
"""(what is said of it, PNG) of each image of a series."""


def draw(job: Job) -> tuple[Drawn, list[tuple[Slice, str]]]:
    """The images of a series, and the slices that were left out, with the reason."""
    series, why = job.series, []
    window = job.window or series.preset
    images: list[tuple[int, Image.Image]] = []
    chosen = job.choice.of(len(series.slices))
    for place, image in zip(chosen, _opened(series, chosen, window), strict=True):
        if isinstance(image, Image.Image):
            images.append((place, image))
        else:
            why.append((series.slices[place], without_path(image, series.slices[place].path)))
    said: dict[str, Any] = {"window": list(window) if isinstance(window, tuple) else window}
    said |= {"modality": series.modality or None, "body_part": series.body_part or None, "of": len(series.slices)}
    if job.choice.rows and images:
        montage = _montage([image for _, image in images], job.choice)
        return [(said | {"slices": [place for place, _ in images]}, _png(montage))], why
    return [(said | {"slices": [place]}, _png(image)) for place, image in images], why


def _drawn(jobs: list[Job], workers: int) -> Iterator[tuple[Drawn, list[tuple[Slice, str]]]]:
    if workers < 2 or len(jobs) < 2:
        yield from map(draw, jobs)
        return
    with process_pool(workers) as pool:
        yield from pool.map(draw, jobs)


def _opened(
    series: Series, chosen: list[int], window: str | tuple[float, float] | None
) -> list[Image.Image | LlavaError]:
    """Each of these slices, or why it can't be opened."""
    if series.volume is not None:
        try:
            return list(read_nifti_slices(series.volume, Limits(), chosen, axis=series.axis, window=window))
        except ImageError as error:
            return [error] * len(chosen)
    opened: list[Image.Image | LlavaError] = []
    for one in (series.slices[place] for place in chosen):
        try:
            opened.append(open_image(one.path, frame=one.frame, window=window))
        except LlavaError as error:
            opened.append(error)
    return opened


def _montage(images: list[Image.Image], choice: Choice) -> Image.Image:
    width, height = images[0].size
    canvas = Image.new("RGB", (choice.columns * width, choice.rows * height))
    for place, image in enumerate(images):
        canvas.paste(image.resize((width, height)), (place % choice.columns * width, place // choice.columns * height))
    return canvas


def _write(folder: Path, name: str, drawn: Drawn, question: str | None) -> dict[str, Any]:
    """The images of a series under `folder`; its record."""
    paths = [f"{name}/{said['slices'][0]:04d}.png" for said, _ in drawn]
    (folder / name).mkdir()
    for path, (_, content) in zip(paths, drawn, strict=True):
        (folder / path).write_bytes(content)
    record: dict[str, Any] = {"id": name, "images": paths}
    if question:
        asked = "<image>\n" * len(paths) + question
        record["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": ""}]
    common = {key: value for key, value in drawn[0][0].items() if key != "slices"}
    return record | {"scan": common | {"slices": [said["slices"] for said, _ in drawn]}}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
