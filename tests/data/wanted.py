"""Images that the downloader is asked for, and what is expected of each."""

import json
import random
from pathlib import Path

from llava.data.download_images import FAILURES_FILE
from llava.records import read_records
from tests.data.archive_server import ArchiveServer

FAST = ["--requests-per-second", "0", "--backoff", "0.01", "--timeout", "1", "--min-free-gb", "0", "--retries", "2"]


class Wanted:
    """A list of images under construction, with what is expected of each."""

    def __init__(self, folder: Path, server: ArchiveServer):
        self.folder = folder
        self.server = server
        self.rows: list[dict] = []
        self.good: dict[str, bytes] = {}
        self.bad: dict[str, str] = {}

    def add(self, pair_id, path, member, content=None, reason=None):
        self.rows.append({"pair_id": pair_id, "pmc_tar_url": self.server.url(path), "image_file_path": member})
        if content is not None:
            self.good[pair_id] = content
        else:
            self.bad[pair_id] = reason

    def write(self) -> Path:
        path = self.folder / "urls.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return path

    def flags(self) -> list[str]:
        oa = self.server.url("/oa")
        return ["--input_path", str(self.write()), "--images_output_path", str(self.folder / "images"),
                "--oa-service", oa, *FAST]  # fmt: skip

    def check(self):
        images = self.folder / "images"
        saved = {path.stem: path.read_bytes() for path in images.glob("*.jpg")}
        assert saved.keys() == self.good.keys()
        assert saved == self.good, "an image isn't byte-equal"
        assert sorted(path.name for path in images.iterdir() if path.suffix != ".jpg") == [FAILURES_FILE]
        failures = read_records(images / FAILURES_FILE) if self.bad else []
        assert [row["pair_id"] for row in failures] == [
            row["pair_id"] for row in self.rows if row["pair_id"] in self.bad
        ]
        for failure in failures:
            assert self.bad[failure["pair_id"]] in failure["reason"], failure


def content_of(number, size=5000) -> bytes:
    return b"\xff\xd8\xff" + random.Random(number).randbytes(size)
