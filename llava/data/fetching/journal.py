"""Which images are there, and which failed and why: what lets a killed download go on where it was.

An image that is in the folder is done: it got its name only when whole. Failures are appended to
`<failures>.part` as they happen and end up in `<failures>`, in the order of the list.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from llava.data.fetching.articles import Image
from llava.errors import LlavaError
from llava.folders import PART, writing
from llava.records import Record, write_records
from llava.resumable import open_part, read_lines, write_whole

_FIELDS = {"pair_id", "pmc_tar_url", "image_file_path", "reason", "permanent"}


class Journal:
    """The state of a download: a folder of images and a file of failures."""

    def __init__(self, folder: Path, failures: Path):
        if failures.suffix != ".jsonl":
            raise LlavaError(f"{failures}: the list of failures is a .jsonl file; name it so")
        self.folder = folder
        self.failures = failures
        self._part = failures.with_name(failures.name + PART)
        folder.mkdir(parents=True, exist_ok=True)
        failures.parent.mkdir(parents=True, exist_ok=True)
        self._failed: dict[tuple[str, str, str], Record] = {}
        if failures.exists():
            with failures.open("rb") as file:
                self._read(file, failures)
        self._file = open_part(self._part)
        self.present = self._scan()
        self._file.truncate(self._read(read_lines(self._file), self._part))

    def path_of(self, image: Image) -> Path:
        return self.folder / f"{image.pair_id}.jpg"

    def is_there(self, image: Image) -> bool:
        return f"{image.pair_id}.jpg" in self.present

    def failure_of(self, image: Image, url: str) -> Record | None:
        """What went wrong when this image was last asked for; earlier runs count."""
        return self._failed.get((image.pair_id, url, image.member))

    def add_failure(self, image: Image, url: str, reason: str, permanent: bool) -> None:
        """`permanent`: asking again is no use."""
        record = {
            "pair_id": image.pair_id,
            "pmc_tar_url": url,
            "image_file_path": image.member,
            "reason": reason,
            "permanent": permanent,
        }
        self._remember(record)
        with writing(self._part, "what is done is kept"):
            write_whole(self._file, json.dumps(record).encode() + b"\n")

    def finish(self, failures: Iterable[Record]) -> None:
        """Write the final list of failures and drop the running one."""
        write_records(self.failures, failures)
        self._part.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _remember(self, record: Record) -> None:
        self._failed[record["pair_id"], record["pmc_tar_url"], record["image_file_path"]] = record

    def _scan(self) -> set[str]:
        """Names of the images that are there; what a killed run left unfinished is removed."""
        present = set()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(PART):
                    Path(entry.path).unlink(missing_ok=True)
                # An empty file is what a power cut leaves of an image that hadn't reached the disk.
                elif entry.name.endswith(".jpg") and entry.is_file() and entry.stat().st_size:
                    present.add(entry.name)
        return present

    def _read(self, lines: Iterable[bytes], path: Path) -> int:
        """Remember the failures; returns where the last whole line ends."""
        end = 0
        for line in lines:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                break  # the line that was being written when the run was killed
            if not isinstance(record, dict) or not _FIELDS.issubset(record):
                raise LlavaError(f"{path}: not a list of failures that this command wrote; give another --failures")
            self._remember(record)
            end += len(line)
        return end
