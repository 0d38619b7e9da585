"""Record files: read by content, written whole or not at all, resumed without a lost or doubled line."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from llava.data.sources.tables import read_table
from llava.errors import LlavaError
from llava.folders import open_to_others
from llava.records import (
    MOST_JSON,
    atomic_path,
    iter_jsonl,
    iter_records,
    read_json,
    read_records,
    write_json,
    write_records,
    written_together,
)
from llava.resumable import ResumableJsonl
from llava.train.data.record_store import open_records

RECORDS = [{"id": "a", "text": "Fraktur – links"}, {"id": "b", "n": 3}]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_round_trip(tmp_path, name):
    assert write_records(tmp_path / name, iter(RECORDS)) == 2
    assert read_records(tmp_path / name) == RECORDS


def test_parquet_round_trip(tmp_path):
    rows = [{"id": "a", "conversations": [{"from": "human", "value": "q"}]}]
    write_records(tmp_path / "x.parquet", rows)
    assert read_records(tmp_path / "x.parquet") == rows


def test_kind_is_read_from_content_not_from_the_name(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    assert read_records(path) == RECORDS
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORDS).encode())
    assert read_records(path) == RECORDS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ('{"a": 1}\n{"a": ', "line 2"),
        ('{"a": 1}\n[1]\n', "line 2"),
        ("[1]", "record 0"),
        ("[{}, ", "not JSON"),
        ("hello", "line 1"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(LlavaError) as error:
        read_records(path)
    assert words in str(error.value)
    assert "bad.json" in str(error.value)


SURROGATES = '{"a": "x \\ud83d", "b": ["\\ude00", "\\ud83d\\ude00"], "\\udbff": 1}'
MENDED = {"a": "x \ufffd", "b": ["\ufffd", "\U0001f600"], "\ufffd": 1}


@pytest.mark.parametrize(("form", "place"), [("[{0}]", "record 0"), ("{0}", "line 1"), ('{{"b": 1}}\n{0}\n', "line 2")])
def test_half_of_a_character_pair_is_replaced_and_counted(tmp_path, caplog, form, place):
    path = tmp_path / "x.json"
    path.write_text(form.format(SURROGATES))
    assert read_records(path)[-1] == MENDED
    assert f"3 texts held half of a character pair (first: {place})" in caplog.text
    path.write_text(SURROGATES)
    assert read_json(path) == MENDED


def test_a_raw_surrogate_is_replaced_as_an_escaped_one_is(tmp_path):
    for form in ("[{}]", "{}"):
        content = form.format('{"a": "\ud83d"}')
        (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        assert read_records(tmp_path / "x.json") == [{"a": "\ufffd"}]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet"])
def test_no_file_is_written_with_half_of_a_pair(tmp_path, caplog, name):
    write_records(tmp_path / name, [{"id": "a", "text": "cut \ud83d"}, {"id": "b", "text": "\ud83d\ude00"}])
    assert [row["text"] for row in read_records(tmp_path / name)] == ["cut \ufffd", "\U0001f600"]
    assert "U+FFFD" in caplog.text
    with ResumableJsonl(tmp_path / "r.jsonl", key="id") as output:
        output.add({"id": "a", "text": "\ud83d"})
        output.finish()
    assert read_records(tmp_path / "r.jsonl") == [{"id": "a", "text": "\ufffd"}]


def test_missing_file(tmp_path):
    with pytest.raises(LlavaError, match="no such file"):
        list(iter_records(tmp_path / "none.json"))
    with pytest.raises(LlavaError, match="a folder, not a file"):
        list(iter_records(tmp_path))


def test_unknown_suffix_writes_nothing(tmp_path):
    with pytest.raises(LlavaError, match="unknown kind"):
        write_records(tmp_path / "x.csv", RECORDS)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})

    def broken():
        yield RECORDS[0]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_of_files_that_are_written_together_none_is_where_one_cannot_be(tmp_path):
    old = tmp_path / "old.json"
    write_json(old, {"old": True})
    with pytest.raises(LlavaError, match="folder: is a folder; give the name of a file"), written_together():
        write_json(old, {"new": True})
        (tmp_path / "folder").mkdir()
        write_json(tmp_path / "folder", {"new": True})
    assert json.loads(old.read_text()) == {"old": True}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "old.json"]


def test_atomic_path_keeps_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_files_of_several_threads_have_the_umasks_mode(tmp_path):
    """Each one's look at the umask was a moment in which the others' files could be written by anyone."""

    def modes(thread):
        path = tmp_path / str(thread)
        path.touch()
        for _ in range(2000):
            open_to_others(path)
            yield path.stat().st_mode & 0o777

    interval, umask = sys.getswitchinterval(), os.umask(0o027)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = set().union(*pool.map(lambda thread: set(modes(thread)), range(4)))
    finally:
        sys.setswitchinterval(interval)
        assert os.umask(umask) == 0o027
    assert found == {0o640}


def test_resumable_drops_a_torn_line_and_keeps_order(tmp_path):
    path = tmp_path / "answers.jsonl"
    with ResumableJsonl(path) as log:
        log.add({"question_id": 2, "text": "b"})
    with (tmp_path / "answers.jsonl.part").open("ab") as file:
        file.write(b'{"question_id": 3, "te')
    with ResumableJsonl(path) as log:
        assert set(log.done) == {2}
        log.add({"question_id": 1, "text": "a"})
        with pytest.raises(LlavaError, match="twice"):
            log.add({"question_id": 1, "text": "a"})
        with pytest.raises(LlavaError, match="missing"):
            log.finish([1, 2, 3])
        log.finish([1, 2])
    assert [row["question_id"] for row in read_records(path)] == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers.jsonl"]


def test_what_follows_a_damaged_line_is_not_dropped(tmp_path):
    """It was, with all that had been paid for after it."""
    part = tmp_path / "answers.jsonl.part"
    content = b'{"question_id": 1}\n\0\0\0\n{"question_id": 2}\n{"question_id": 3, "te'
    part.write_bytes(content)
    with pytest.raises(LlavaError, match=r"part line 2: not JSON, and more follows; remove that line"):
        ResumableJsonl(tmp_path / "answers.jsonl")
    assert part.read_bytes() == content
    part.write_bytes(content.replace(b"\0\0\0\n", b""))
    with ResumableJsonl(tmp_path / "answers.jsonl") as log:
        assert set(log.done) == {1, 2}


def test_a_part_of_another_command_is_no_part(tmp_path):
    """It may be keyed by another field."""
    for line in ('{"id": 1}', "[1]"):
        (tmp_path / "x.jsonl.part").write_text(f"{line}\n")
        with pytest.raises(LlavaError, match=r"x.jsonl.part line 1: no 'question_id', so another command began it"):
            ResumableJsonl(tmp_path / "x.jsonl")
        assert (tmp_path / "x.jsonl.part").read_text() == f"{line}\n"


def test_a_file_in_work_is_of_one_process(tmp_path):
    """Two of the same command at once asked a paid server for all twice."""
    path = tmp_path / "answers.jsonl"
    script = (
        "import sys\n"
        "from llava.resumable import ResumableJsonl\n"
        "with ResumableJsonl(sys.argv[1]) as log:\n"
        "    log.add({'question_id': 2})\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(LlavaError, match=r"answers\.jsonl\.part: another process is writing it"):
            ResumableJsonl(path)
        other.kill()
    with ResumableJsonl(path) as log:
        assert set(log.done) == {2}
        second = subprocess.run(command, input=b"\n", capture_output=True)
        assert b"another process is writing it" in second.stderr
        log.finish()
        third = subprocess.run(command, input=b"\n", capture_output=True)
    assert third.returncode == 0, third.stderr
    assert read_records(path) == [{"question_id": 2}]


def test_resumable_survives_sigkill(tmp_path):
    path = tmp_path / "answers.jsonl"
    script = (
        "import sys, time\n"
        "from llava.resumable import ResumableJsonl\n"
        "with ResumableJsonl(sys.argv[1]) as log:\n"
        "    for i in range(len(log.done), 200):\n"
        "        log.add({'question_id': i, 'text': 'x' * 500})\n"
        "        time.sleep(0.002)\n"
        "    log.finish(range(200))\n"
    )
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        time.sleep(0.25)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            break
    if not path.exists():
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert [row["question_id"] for row in read_records(path)] == list(range(200))


@pytest.mark.parametrize("window", [16, 64, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_through_a_window(tmp_path, monkeypatch, window, indent):
    monkeypatch.setattr("llava.records._WINDOW", window)
    records = [{"n": 1.5, "text": 'é"\\ \n' * (7 * number), "list": [{}, [number]]} for number in range(40)]
    path = tmp_path / "x.json"
    whole = json.dumps(records, indent=indent, ensure_ascii=False)
    path.write_text(whole + "\n")
    assert list(iter_records(path)) == records
    for length in range(1, len(whole) - 1, 97):
        path.write_text(whole[:length])
        with pytest.raises(LlavaError, match="not JSON"):
            list(iter_records(path))


def test_a_fault_in_a_json_list_names_the_record(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1},\n{"a": 2}, {"a": nonsense}, {"a": 4}]')
    with pytest.raises(LlavaError, match=r"x\.json record 2: not JSON"):
        list(iter_records(path))
    path.write_text('[{"a": 1} {"a": 2}]')
    with pytest.raises(LlavaError, match=r"record 1: not JSON \(expected a comma"):
        list(iter_records(path))
    path.write_text('[{"a": 1}] {"a": 2}')
    with pytest.raises(LlavaError, match="something after the list"):
        list(iter_records(path))


def test_parquet_keeps_what_the_first_record_lacks(tmp_path):
    pytest.importorskip("pyarrow")
    records = [{"id": 1}, {"id": 2, "image": "a.png"}]
    write_records(tmp_path / "a.parquet", records)
    assert list(iter_records(tmp_path / "a.parquet")) == records
    with pytest.raises(LlavaError, match="'answer' can't be a column"):
        write_records(tmp_path / "b.parquet", [{"answer": 1}, {"answer": "one"}])
    assert not (tmp_path / "b.parquet").exists()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["bare", "marked"])
@pytest.mark.parametrize("blanks", [b"\n" * 100, b" \r\n" * 700_000], ids=["some", "many"])
@pytest.mark.parametrize("form", ["[{}]", "{}\n"])
def test_blanks_may_stand_before_the_first_record(tmp_path, mark, blanks, form):
    """Training read such a list, and validate took it for lines."""
    path = tmp_path / "a.json"
    path.write_bytes(mark + blanks + form.replace("{}", '{"id": "1"}').encode())
    assert read_records(path) == [{"id": "1"}]
    if form == "[{}]":
        assert open_records(path, tmp_path)[0] == {"id": "1"}
    path.write_bytes(mark + blanks)
    with pytest.raises(LlavaError, match=r"a\.json: the file is empty"):
        read_records(path)


NAN = '{"id": "1", "image": NaN, "depth": -Infinity, "conversations": [{"value": NaN}]}'


@pytest.mark.parametrize("form", ["[{}]", "{}\n"])
def test_what_pandas_writes_for_an_empty_cell_is_null(tmp_path, form):
    """It was an image of the type float, and the answer "nan"."""
    path = tmp_path / "a.json"
    path.write_text(form.replace("{}", NAN))
    wanted = {"id": "1", "image": None, "depth": float("-inf"), "conversations": [{"value": None}]}
    assert read_records(path) == [wanted]
    assert open_records(path, tmp_path)[0] == wanted


def test_nan_in_a_column_of_parquet_is_null(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(path, [{"id": "1", "answer": 4.0}, {"id": "2", "answer": float("nan")}])
    assert read_records(path) == [{"id": "1", "answer": 4.0}, {"id": "2"}]
    assert open_records(path, tmp_path)[1] == {"id": "2"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "gb18030"])
@pytest.mark.parametrize("read", [read_json, read_records])
@pytest.mark.parametrize("form", ["[{}]", "{}"])
def test_another_encoding_is_said(tmp_path, encoding, read, form):
    """PowerShell writes UTF-16."""
    path = tmp_path / "a.json"
    path.write_text(form.replace("{}", '{"question": "肝脏大吗"}'), encoding=encoding)
    with pytest.raises(LlavaError, match=r"not UTF-8 .*; save the file as UTF-8"):
        read(path)


@pytest.mark.parametrize("read", [read_json, read_records, lambda path: list(read_table(path, ["a"]))])
def test_what_is_packed_is_to_be_unpacked(tmp_path, read):
    """It was to be saved as UTF-8, a spreadsheet too."""
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"id": "1"}'))
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<Types/>" * 100)
    for name in ("a.json.gz", "a.xlsx"):
        with pytest.raises(LlavaError, match=f"{name}.*: not UTF-8 .*; unpack it, or save a spreadsheet as CSV"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("a.json", b"\xff\xd8", "JSON can't hold it"),
        ("a.jsonl", datetime(2026, 1, 1), "go into .parquet"),
        ("a.parquet", {}, "write .jsonl instead"),
        ("a.parquet", 1 << 70, "write .jsonl instead"),
    ],
)
def test_what_a_form_cannot_hold_is_one_line(tmp_path, name, value, words):
    """The bytes of an image out of Parquet, most often."""
    with pytest.raises(LlavaError, match=words):
        write_records(tmp_path / name, [{"id": "1", "what": value}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [read_json, read_records])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_nesting_with_half_of_a_pair_is_bad_input(tmp_path, read, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text('{"s": "\\ud83d", "deep": ' + "[" * 800 + "]" * 800 + "}")
    with pytest.raises(LlavaError, match="not JSON"):
        read(path)


@pytest.mark.parametrize("read", [read_json, read_records])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_absurd_nesting_is_bad_input(tmp_path, read, suffix):
    path = tmp_path / f"deep{suffix}"
    path.write_text(("" if suffix == ".jsonl" else "[") + '{"a":' * 100_000)
    with pytest.raises(LlavaError, match="not JSON"):
        read(path)


@pytest.mark.parametrize("read", [read_json, read_records, lambda path: list(iter_jsonl(path))])
def test_neither_devices_nor_pipes_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for name in ("pipe", "link.json"):
        with pytest.raises(LlavaError, match=f"{name}: a device or a pipe"):
            read(tmp_path / name)


def test_json_that_is_read_whole_has_an_end(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(MOST_JSON + 1)  # of holes: it takes no room
    with pytest.raises(LlavaError, match="bytes; at most"):
        read_json(tmp_path / "large.json")
