"""Parquet files whose few bytes name far more, in parts; sound ones as they are."""

import json
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from llava.errors import LlavaError
from llava.parquet import iter_parquet
from llava.records import iter_records
from llava.train.data.record_store import open_records

ROWS = 20_000
READ = """
import json, resource, sys
from pathlib import Path
from llava.records import iter_records
space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4_000_000_000
resource.setrlimit(resource.RLIMIT_AS, (space, space))
print(json.dumps([len(record["question"]) for record in iter_records(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    path = tmp_path_factory.mktemp("bomb") / "a.parquet"
    content = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * ROWS, "int32"), ["x" * (1 << 20)])
    parquet.write_table(pyarrow.table({"question": content}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20
    return path


def test_twenty_gigabytes_of_one_text_are_read_within_memory(bomb):
    done = subprocess.run([sys.executable, "-c", READ, str(bomb)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1 << 20] * ROWS


def test_a_reader_that_takes_a_batch_runs_out_of_memory(bomb):
    plain = "iter_records = lambda path: (r for b in ParquetFile(path).iter_batches() for r in b.to_pylist())\nspace ="
    script = "from pyarrow.parquet import ParquetFile" + READ.replace("space =", plain, 1)
    done = subprocess.run([sys.executable, "-c", script, str(bomb)], capture_output=True, text=True)
    assert done.returncode != 0 and "memory" in done.stderr.lower(), done.stderr


def test_a_row_beyond_what_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1100, "int32"), ["x" * (1 << 20)])
    rows = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1100], "int32"), text)
    parquet.write_table(pyarrow.table({"turns": rows}), path, compression="zstd", store_schema=False)
    with pytest.raises(LlavaError, match=r"a\.parquet: a row of 1,153,433,600 bytes isn't read; at most"):
        list(iter_parquet(path))


def test_all_kinds_of_columns_come_as_they_are(tmp_path):
    rows = [
        {
            "id": number,
            "name": f"row {number % 7}",
            "image": {"bytes": bytes([number % 256]) * 100, "path": None},
            "unlike": {"text": f"{number:06}" * 500},
            "conversations": [{"from": "human", "value": f"{number}"}, {"from": "gpt", "value": "yes"}],
            "scores": [0.5] * (number % 3),
            "is_closed": number % 2 == 0,
        }
        for number in range(3000)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2000)
    assert list(iter_records(tmp_path / "a.parquet")) == rows
    store = open_records(tmp_path / "a.parquet", tmp_path / "out")
    assert len(store) == len(rows) and store[2999] == rows[2999]
