"""The downloader against archives that lie, and hold what no image is: nothing outside, nothing too large, all told."""

import gzip
import os
import sys
import tarfile
from pathlib import Path

import pytest

from llava.data.download_images import main
from llava.data.fetching.archive import _pax_records
from tests.data.archive_server import Reply, archive, archive_with_bomb, header
from tests.data.wanted import content_of


def hostile_archives(wanted, server):
    content = content_of(2)
    good = ("PMC/good.jpg", content)
    dangerous = [
        ("../outside.jpg", b"evil"),
        ("/tmp/llava_absolute_name.jpg", b"evil"),
        header("PMC/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        header("PMC/hard.jpg", tarfile.LNKTYPE, "../../outside.jpg"),
        header("PMC/device.jpg", tarfile.CHRTYPE),
        header("PMC/block.jpg", tarfile.BLKTYPE),
        header("PMC/pipe.jpg", tarfile.FIFOTYPE),
        header("PMC/folder.jpg", tarfile.DIRTYPE),
    ]
    server.pages["/hostile"] = Reply(archive(*dangerous, good, ("PMC/empty.jpg", b""), ("PMC/big.jpg", b"x" * 200_000)))
    wanted.add("good", "/hostile", "PMC/good.jpg", content)
    wanted.add("link", "/hostile", "PMC/link.jpg", reason="symbolic link")
    wanted.add("hard", "/hostile", "PMC/hard.jpg", reason="hard link")
    wanted.add("device", "/hostile", "PMC/device.jpg", reason="device")
    wanted.add("block", "/hostile", "PMC/block.jpg", reason="device")
    wanted.add("pipe", "/hostile", "PMC/pipe.jpg", reason="device")
    wanted.add("folder", "/hostile", "PMC/folder.jpg", reason="directory")
    wanted.add("empty", "/hostile", "PMC/empty.jpg", reason="empty")
    wanted.add("big", "/hostile", "PMC/big.jpg", reason="larger than the cap")
    wanted.add("absent", "/hostile", "PMC/absent.jpg", reason="not in the archive")
    wanted.add("up", "/hostile", "../outside.jpg", reason="leads out")
    wanted.add("root", "/hostile", "/tmp/llava_absolute_name.jpg", reason="leads out")
    wanted.add("../escaped", "/hostile", "PMC/good.jpg", reason="no safe file name")
    wanted.add("good2", "/twice", "PMC/good.jpg", content)
    server.pages["/twice"] = Reply(archive(header("PMC/good.jpg", tarfile.SYMTYPE, "/etc/passwd"), good))


def test_hostile_archives_touch_nothing_outside(wanted, server, tmp_path):
    hostile_archives(wanted, server)
    opened = []
    sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
    main([*wanted.flags(), "--max-image-mb", "0.1"])
    written = {
        str(args[0])
        for args in opened
        if isinstance(args[0], (str, os.PathLike)) and isinstance(args[2], int) and args[2] & os.O_CREAT
    }
    wanted.check()
    assert written and all(Path(path).resolve().is_relative_to(tmp_path) for path in written)
    assert not (tmp_path / "outside.jpg").exists()
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_claims_of_size_are_not_believed(wanted, server):
    """Extended headers and names that claim gigabytes, and a file shorter than it says."""

    def page(info, content=b""):
        return Reply(gzip.compress(info.tobuf(format=tarfile.GNU_FORMAT) + content))

    huge = 8 << 30
    server.pages["/name"] = page(header("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=huge), bytes(1 << 20))
    server.pages["/pax"] = page(header("pax", tarfile.XHDTYPE, size=huge), bytes(1 << 20))
    server.pages["/short"] = page(header("x.jpg", tarfile.REGTYPE, size=90_000), bytes(1000))
    wanted.add("name", "/name", "x.jpg", reason="extended header")
    wanted.add("pax", "/pax", "x.jpg", reason="extended header")
    wanted.add("short", "/short", "x.jpg", reason="cut short")
    main(wanted.flags())
    wanted.check()


class Counted(bytes):
    """Counts what is copied out of it."""

    copied = 0

    def __getitem__(self, place):
        part = super().__getitem__(place)
        Counted.copied += len(part)
        return Counted(part)


def test_an_extended_header_of_many_records_is_read_once():
    """17 seconds went by over one of 1 MiB, in which no other archive was read."""
    content = Counted(b"4 x\n" * 1000 + b"12 path=abc\n")
    assert _pax_records(content) == {"path": "abc"}
    assert Counted.copied < 10 * len(content)


def bombs(wanted, server, size):
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        server.pages[f"/bomb{kind}"] = Reply(archive_with_bomb("PMC/bomb.jpg", size, format=kind))
        wanted.add(f"bomb{kind}", f"/bomb{kind}", "PMC/bomb.jpg", reason="larger than the cap")
    server.pages["/behind"] = Reply(archive_with_bomb("PMC/movie.avi", size, ("PMC/good.jpg", content_of(3))))


def test_a_ten_gigabyte_image_is_refused_by_its_header(wanted, server):
    bombs(wanted, server, 10 << 30)
    main(wanted.flags())
    wanted.check()


def test_unpacking_stops_at_the_cap(wanted, server):
    bombs(wanted, server, 10 << 30)
    wanted.add("behind", "/behind", "PMC/good.jpg", reason="unpacks to more than the cap")
    main([*wanted.flags(), "--max-unpacked-mb", "50", "--timeout", "5"])
    wanted.check()


@pytest.mark.long
def test_a_image_behind_ten_gigabytes_is_still_found(wanted, server):
    bombs(wanted, server, 10 << 30)
    wanted.add("behind", "/behind", "PMC/good.jpg", content_of(3))
    main([*wanted.flags(), "--timeout", "30"])
    wanted.check()


def test_a_second_run_asks_for_nothing_again(wanted, server):
    hostile_archives(wanted, server)
    wanted.add("dead", "/dead.tar.gz", "x.jpg", reason="HTTP 404")
    flags = [*wanted.flags(), "--max-image-mb", "0.1"]
    main(flags)
    wanted.check()
    before = sum(server.requests.values())
    main(flags)
    wanted.check()
    assert sum(server.requests.values()) == before
    main([*flags, "--retry-failed"])
    wanted.check()
    assert server.requests["/dead.tar.gz"] == 2
