"""Lines that are too long, in all that reads text: said in a line, within memory."""

import os
import resource
import subprocess
import sys

import pytest

LONG = 20 << 30
"""Bytes of a file of holes, which takes no place."""
READERS = {
    "records": "from llava.records import read_records; read_records(path)",
    "store": "from llava.train.data.record_store import open_records; open_records(path, folder)[1]",
    "table": "from llava.data.sources.tables import read_table; list(read_table(Path(path), []))",
    "lines": "from llava.data.sources.tables import read_lines; read_lines(Path(path))",
}
STARTS = {"table": "image,question\na,b\n", "lines": "a\n"}
SAID = {"store": "record 1: longer than 64 MiB", "lines": "21,474,836,480 bytes; at most", "records": "line 2: longer"}


@pytest.mark.parametrize("name", READERS)
def test_a_line_without_end(tmp_path, name):
    path = tmp_path / "a.jsonl"
    path.write_text(STARTS.get(name, '{"id": 1}\n'))
    os.truncate(path, LONG)
    done = run(f"path, folder = {str(path)!r}, {str(tmp_path)!r}\nfrom pathlib import Path\n{READERS[name]}")
    assert "LlavaError" in done.stderr and SAID.get(name, "longer than 64 MiB") in done.stderr, done.stderr[-2000:]


def test_a_record_without_end_in_a_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1},"' + "x" * (100 << 20))
    done = run(f"from llava.records import read_records; read_records({str(path)!r})")
    assert "record 1: not JSON (it is longer than 64 MiB)" in done.stderr, done.stderr[-2000:]


def run(script):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=limit)
