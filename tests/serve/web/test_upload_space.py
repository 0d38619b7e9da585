"""Who gives way when uploads reach their total, and that what has gone is counted no more."""

import contextlib
import time
from types import SimpleNamespace

import pytest

from llava.serve.web.uploads import BLOCK_BYTES, Refusal, Uploads, WrittenFiles

FULL = pytest.raises(Refusal, match="too many files just now")


def send(uploads: Uploads, visitor: str, size: int, key: str = "", files: int = 1) -> str:
    with uploads.arriving(visitor, key=key) as upload:
        uploads.grow(upload, size * files, files)
        for number in range(files):
            path = upload.folder / str(number)
            path.write_bytes(b"x" * size)
            upload.paths.append(str(path))
    return upload.paths[0]


def test_unused_ones_go_first_the_oldest_of_them(tmp_path):
    uploads = Uploads(tmp_path, 1 << 20, 50_000)
    paths = {name: send(uploads, name, 10_000) for name in "abcde"}
    assert uploads.use(paths["a"], "a") and not uploads.use(paths["b"], "a")
    send(uploads, "f", 10_000)
    assert [name for name, path in paths.items() if uploads.belongs(path, name)] == ["a", "c", "d", "e"]
    send(uploads, "f", 30_000)
    assert [name for name, path in paths.items() if uploads.belongs(path, name)] == ["a"]
    with FULL:
        send(uploads, "f", 10_000)
    assert uploads.belongs(paths["a"], "a"), "who holds most takes nothing from others"


def test_who_holds_most_gives_way(tmp_path):
    """By the key, where there are keys: however many visitors one makes of himself."""
    uploads = Uploads(tmp_path, 1 << 20, 100_000)
    many = {f"m{number}": send(uploads, f"m{number}", 10_000, "hoarder") for number in range(8)}
    own = send(uploads, "v", 20_000, "modest")
    for name, path in {**many, "v": own}.items():
        assert uploads.use(path, name)
    assert uploads.use(send(uploads, "w", 20_000, "modest"), "w")
    assert uploads.belongs(own, "v") and sum(uploads.belongs(path, name) for name, path in many.items()) == 6
    send(uploads, "n", 10_000, "hoarder")
    send(uploads, "x", 20_000, "third")
    assert uploads.belongs(own, "v"), "who shares a key gives way to the others with it"


def test_files_are_counted_and_given_back(tmp_path):
    uploads = Uploads(tmp_path, 1 << 20, 1 << 20, files_per_visitor=20, files_in_all=30)
    first = send(uploads, "a", 1, files=20)
    with pytest.raises(Refusal, match="more than 20 files"):
        send(uploads, "a", 1)
    assert uploads.belongs(first, "a")
    assert (uploads._sizes["a"], uploads._counts["a"]) == (20 * BLOCK_BYTES, 20)
    send(uploads, "b", 1, files=15)
    assert not uploads.belongs(first, "a") and "a" not in uploads._counts
    for name in "cdefg":
        with contextlib.suppress(ZeroDivisionError), uploads.arriving(name) as upload:
            uploads.grow(upload, 10, 10)
            raise ZeroDivisionError
    assert uploads._counts == {"b": 15} and len(list(tmp_path.iterdir())) == 1


def test_one_that_arrives_may_give_way_and_is_told(tmp_path):
    """However it goes on then."""
    uploads = Uploads(tmp_path, 1 << 20, 100_000)
    for ends in ("grow", "write", "nothing"):
        with FULL, uploads.arriving("slow") as upload:
            uploads.grow(upload, 90_000, 1)
            send(uploads, "quick", 20_000)
            if ends == "grow":
                uploads.grow(upload, 1)
            elif ends == "write":
                (upload.folder / "x").write_bytes(b"x")
        assert set(uploads._sizes) == {"quick"}
        uploads.sweep()
    assert not upload.folder.exists()


def test_what_the_page_has_written_goes_after_its_time(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.touch()
    names = {str(paths[0])}
    written = WrittenFiles([names, set()], keep_seconds=0.2)
    written.sweep()
    names.add(str(paths[1]))
    time.sleep(0.3)
    written.sweep()
    assert [path.exists() for path in paths] == [False, True, True], "the second is new, the third isn't named"
    assert names == {str(paths[1])}
    paths[1].unlink()
    time.sleep(0.3)
    written.sweep()
    assert names == set()


def test_looking_at_all_files_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    """Many small uploads of one visitor made every later one of anybody's wait for all of them."""
    uploads = Uploads(tmp_path, 1 << 30, 1 << 30)
    for number in range(100):
        send(uploads, f"v{number}", 1)
    clock, looked = [time.monotonic() + 60], []

    def look(path):
        looked.append(path)
        clock[0] += 0.01
        return 1

    monkeypatch.setattr("llava.serve.web.uploads._size", look)
    monkeypatch.setattr("llava.serve.web.uploads.time", SimpleNamespace(monotonic=lambda: clock[0]))
    for number in range(50):
        send(uploads, f"w{number}", 1)
    assert 100 <= len(looked) <= 150, "once, and each that came"
    clock[0] += 60
    uploads.sweep()
    assert len(looked) >= 250


def test_an_upload_is_found_by_its_visitor_and_name_while_it_is_there(tmp_path):
    uploads = Uploads(tmp_path, 1 << 20, 1 << 20)
    with contextlib.suppress(ZeroDivisionError), uploads.arriving("a", "name") as first:
        assert uploads.find("a", "name") is first
        assert uploads.find("b", "name") is None and uploads.find("a", "other") is None
        raise ZeroDivisionError
    assert uploads.find("a", "name") is None and not uploads._named
