"""Records of serving on disk: whole lines whoever dies or fills the disk, private files, deleted in time."""

import asyncio
import os
import random
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from llava.errors import LlavaError
from llava.records import iter_records, read_records
from llava.serve.daily_log import DailyLog, tidied

WRITER = """
import sys
from llava.serve.daily_log import DailyLog

log = DailyLog(sys.argv[1], 7)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    assert log.write({"writer": sys.argv[2], "number": number, "text": "é" * int(sys.argv[4])})
    print(number, flush=True)
"""


def start_writer(folder, name, records, length):
    command = [sys.executable, "-c", WRITER, str(folder), name, str(records), str(length)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    return writer


def name_of(days_ago):
    return f"{datetime.now(UTC) - timedelta(days=days_ago):%Y-%m-%d}.jsonl"


def records_in(folder):
    return [record for path in sorted(folder.glob("*.jsonl")) for record in iter_records(path)]


def test_files_are_private_and_deleted_in_time(tmp_path):
    folder = tmp_path / "log"
    DailyLog(folder, 7).write({"said": "é\ud800"})
    for days_ago in (6, 9):
        (folder / name_of(days_ago)).write_text("{}\n")
    (folder / "2026-13-77.jsonl").write_text("no date, so none of ours")
    assert DailyLog(folder, 7).write({"said": "more"})
    assert {path.name for path in folder.glob("*.jsonl")} == {name_of(0), name_of(6), "2026-13-77.jsonl"}
    assert [record["said"] for record in iter_records(folder / name_of(0))] == ["é\ufffd", "more"]
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.stat().st_mode & 0o777 for path in (folder / name_of(0), folder / ".lock")}
    assert modes == {0o600}


def test_a_running_log_deletes_old_files_too(tmp_path):
    log = DailyLog(tmp_path / "log", 7)
    old = log.folder / name_of(9)
    old.write_text("{}\n")

    async def tidy():
        async with tidied(log, seconds=0.01):
            while old.exists():
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(tidy(), 60))


def test_a_clock_that_was_set_deletes_nothing_at_once(tmp_path, monkeypatch, caplog):
    log = DailyLog(tmp_path / "log", 7)
    old, wall = log.folder / name_of(9), time.time
    old.write_text("{}\n")
    monkeypatch.setattr(time, "time", lambda: wall() + 5 * 3600)
    log.drop_old()
    assert old.exists() and "the clock was set" in caplog.text
    log.drop_old()
    assert not old.exists()


@pytest.mark.parametrize("days", [-1, float("nan")])
def test_days_that_are_none_are_refused(tmp_path, days):
    with pytest.raises(LlavaError, match="give 0 or more"):
        DailyLog(tmp_path / "log", days)
    assert not (tmp_path / "log").exists()


def test_a_folder_that_is_open_to_others_is_refused(tmp_path):
    tmp_path.chmod(0o750)
    with pytest.raises(LlavaError, match="chmod 700"):
        DailyLog(tmp_path, 7)


def test_writers_at_the_same_time_lose_and_mix_nothing(tmp_path):
    writers = [start_writer(tmp_path / "log", str(number), 40, 20_000) for number in range(4)]
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    found = [(record["writer"], record["number"]) for record in records_in(tmp_path / "log")]
    assert sorted(found) == sorted((str(writer), number) for writer in range(4) for number in range(40))


def test_killed_writers_leave_whole_lines(tmp_path):
    moments, said = random.Random(1), {}
    for name in "abcdefgh":
        writer = start_writer(tmp_path / "log", name, 1_000_000, 500_000)
        writer.stdin.write("\n")
        writer.stdin.flush()
        writer.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.1))
        writer.kill()
        said[name] = 1 + len(writer.stdout.read().splitlines())
    DailyLog(tmp_path / "log", 7)
    found = [(record["writer"], record["number"]) for record in records_in(tmp_path / "log")]
    assert len(found) == len(set(found))
    for name, count in said.items():
        assert {(name, number) for number in range(count)} <= set(found)


@pytest.mark.parametrize("content", [b"", b"{half"])
def test_a_file_without_a_whole_line_goes(tmp_path, content):
    log = DailyLog(tmp_path / "log", 7)
    (log.folder / name_of(0)).write_bytes(content)
    log.drop_old()
    assert not list(log.folder.glob("*.jsonl"))


@pytest.mark.parametrize("half", [b'{"said": "sec', b"x" * 200_000], ids=["short", "long"])
def test_half_a_line_is_removed_and_said(tmp_path, half, caplog):
    log = DailyLog(tmp_path / "log", 7)
    log.write({"said": "first"})
    path = log.folder / name_of(0)
    with path.open("ab") as file:
        file.write(half)
    with pytest.raises(LlavaError, match="not JSON"):
        read_records(path)
    log.write({"said": "second"})
    assert [record["said"] for record in read_records(path)] == ["first", "second"]
    assert f"{len(half)} bytes of a record that was cut short" in caplog.text


def test_a_full_disk_loses_records_whole_and_counts_them(disk, caplog):
    log = DailyLog(disk("-t", "tmpfs", "-o", "size=64k,mode=700"), 7)
    kept = 0
    while log.write({"text": "x" * 9000}):
        kept += 1
    assert kept > 3 and not log.write({"text": "y" * 9000})
    assert log.lost == 2 and "a record is lost, 2 since the start" in caplog.text
    assert len(records_in(log.folder)) == kept
    (log.folder / name_of(0)).unlink()
    (log.folder / "filler").write_bytes(bytes(60_000))
    assert not log.write({"text": "z" * 9000}) and not list(log.folder.glob("*.jsonl"))
    subprocess.run(["mount", "-o", "remount,size=640k", str(log.folder)], check=True)
    assert log.write({"text": "z"}) and len(records_in(log.folder)) == 1


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(disk):
    folder = disk("-t", "tmpfs", "-o", "ro,mode=700")
    command = [sys.executable, "-m", "llava.serve.openai_api_server", "--conversation-log", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LLAVA_SERVE_SECRET": "s3cret"})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {folder}"), done.stderr
