import json
import pickle

import pytest

from llava.errors import LlavaError
from llava.records import iter_records, write_records
from llava.train.data import record_store
from llava.train.data.record_store import describe, open_records

RECORDS = [{"id": f"r{number}", "text": "é" * (number % 7), "image": "a.png"} for number in range(50)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_records_in_any_order(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    write_records(path, RECORDS)
    store = open_records(path)
    assert len(store) == 50
    assert [store[index] for index in (49, 0, 17)] == [RECORDS[index] for index in (49, 0, 17)]


def test_arrow_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "data.arrow"
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert open_records(path)[17] == RECORDS[17]


def test_a_long_json_list_is_kept_as_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(record_store, "KEEP_PARSED", 10)
    path = tmp_path / "data.json"
    write_records(path, RECORDS)
    store = open_records(path)
    assert [store[index] for index in range(50)] == RECORDS


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 24])
def test_blank_lines_and_line_endings_do_not_shift_jsonl(tmp_path, monkeypatch, block):
    monkeypatch.setattr(record_store, "_SCAN_BYTES", block)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": 1}\r\n\r\n\n{"id": 2}\n\n\n{"id": 3}')
    store = open_records(path)
    assert [store[index]["id"] for index in range(len(store))] == [1, 2, 3]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 24])
@pytest.mark.parametrize("blank", [b"   \n", b"\t \r\n", b"\x0b\x0c\n", b"\n"])
def test_lines_of_blanks_are_no_records_wherever_they_stand(tmp_path, monkeypatch, block, blank):
    monkeypatch.setattr(record_store, "_SCAN_BYTES", block)
    path = tmp_path / "data.jsonl"
    path.write_bytes(2 * blank + b'{"id": 1}\n' + blank + b'  {"id": 2}\n' + blank + b'{"id": 3}\n' + blank + b"  ")
    store = open_records(path)
    assert [store[index]["id"] for index in range(len(store))] == [1, 2, 3]
    assert [record["id"] for record in iter_records(path)] == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_half_of_a_character_pair_is_replaced_and_said(tmp_path, caplog, suffix):
    path = tmp_path / f"data.{suffix}"
    text = '{"id": "a", "text": "fine \\ud83d"}'
    path.write_text(f"[{text}]" if suffix == "json" else text)
    assert open_records(path)[0] == {"id": "a", "text": "fine \ufffd"}
    assert "replaced by U+FFFD" in caplog.text


def test_a_store_travels_to_worker_processes(tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, RECORDS)
    store = open_records(path)
    store[3]
    assert pickle.loads(pickle.dumps(store))[3] == RECORDS[3]


@pytest.mark.parametrize("content", [b"", b"  \n", b"[]"])
def test_files_without_records_are_refused(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(LlavaError, match=r"data\.json"):
        open_records(path)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(LlavaError, match="record 1: not JSON"):
        open_records(path)[1]


def test_records_are_described_by_file_number_and_id(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    store = open_records(path)
    assert describe(store, 3, store[3]) == f'{path} record 3 ("r3")'


def test_a_long_id_is_named_in_short(tmp_path):
    write_records(tmp_path / "data.json", [{"id": 5000 * "n"}])
    store = open_records(tmp_path / "data.json")
    assert '("nnn' in describe(store, 0, store[0]) and len(describe(store, 0, store[0])) < len(str(tmp_path)) + 200


@pytest.mark.parametrize("content", ['{"id": "a"}\n', '[{"id": "a"}]'])
def test_blanks_before_the_first_record_are_passed_over(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text("\n" * 70 + content)
    assert open_records(path)[0] == {"id": "a"}
    path.write_text("\n" * 70)
    with pytest.raises(LlavaError, match="the file is empty"):
        open_records(path)
