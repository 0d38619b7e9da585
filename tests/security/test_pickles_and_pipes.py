"""Pickles of nine bytes that would take gigabytes, and pipes in place of files, at which a reader waits."""

import os
import pickle
import subprocess
import sys

import pytest

from llava.data.caption_files import iter_captions
from llava.data.sources.plain_pickle import read_plain_pickle
from llava.data.sources.tables import read_lines, read_table
from llava.errors import LlavaError
from llava.eval.answers.checkpoint_facts import checkpoint_facts
from llava.images.headers.kinds import image_kind
from llava.images.opening import open_image

# Not ru_maxrss: that of the process which started this one is in it.
PEAK = "print(next(int(l.split()[1]) >> 10 for l in Path('/proc/self/status').open() if l.startswith('VmHWM:')))"
OURS = "from llava.data.sources.plain_pickle import read_plain_pickle as read"
PLAINLY = "import pickle; read = lambda path: pickle.loads(Path(path).read_bytes())"
FAR_NAME = b"\x80\x02]r\xff\xff\xff\x05."
"""A list that is named by the number 100,663,295."""
READERS = {
    "table": lambda path: list(read_table(path, [])),
    "lines": read_lines,
    "captions": lambda path: list(iter_captions(path)),
    "pickle": read_plain_pickle,
    "kind": image_kind,
    "image": open_image,
}


def peak_mb(reader: str, path) -> int:
    script = f"from pathlib import Path\n{reader}\nassert read({str(path)!r}) == []\n{PEAK}"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_a_far_name_in_a_pickle_takes_no_memory(tmp_path):
    (tmp_path / "a.pkl").write_bytes(FAR_NAME)
    assert peak_mb(OURS, tmp_path / "a.pkl") < 500


def test_it_takes_a_plain_readers(tmp_path):
    (tmp_path / "a.pkl").write_bytes(FAR_NAME)
    assert peak_mb(PLAINLY, tmp_path / "a.pkl") > 1000


def test_an_array_of_bytes_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(bytearray(b"x"), 5))
    with pytest.raises(LlavaError, match="not a pickle of plain values"):
        read_plain_pickle(tmp_path / "a.pkl")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_no_file(tmp_path, name):
    path = tmp_path / "a.json"
    os.mkfifo(path)
    with pytest.raises(LlavaError, match=r"a device or a pipe, not a file|image not found"):
        READERS[name](path)


@pytest.mark.timeout(60)
def test_a_pipe_among_the_weights_is_not_waited_for(tmp_path):
    before = checkpoint_facts(tmp_path)
    os.mkfifo(tmp_path / "more.bin")
    (tmp_path / "folder.safetensors").mkdir()
    assert checkpoint_facts(tmp_path) == before


@pytest.mark.parametrize("epochs", ['"many"', "[1]", "1" + "0" * 400, "-1", "NaN"])
def test_no_number_of_epochs_is_none(tmp_path, epochs):
    (tmp_path / "training_summary.json").write_text(f'{{"epochs": {epochs}}}')
    assert checkpoint_facts(tmp_path)["training_epochs"] is None
