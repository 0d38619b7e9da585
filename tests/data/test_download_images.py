"""The downloader against a real server with everything that goes wrong: nothing lost, nothing outside, all told."""

import asyncio
import gzip
import json
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from llava.data.download_images import FAILURES_FILE, _settings, build_parser, main
from llava.data.fetching.articles import read_plan
from llava.data.fetching.settings import Limits, Settings
from llava.data.fetching.transfer import Transfer, TransferError
from llava.data.fetching.writer import ImageWriter
from llava.errors import LlavaError
from llava.records import read_records
from tests.data.archive_server import ArchiveServer, Reply, archive
from tests.data.wanted import FAST, content_of
from tests.skipping_loop import run_skipping


def test_one_request_per_article_and_only_the_wanted_members(wanted, server):
    contents = [content_of(n) for n in range(3)]
    members = [(f"PMC1/{n}.jpg", content) for n, content in enumerate(contents)]
    server.pages["/PMC1.tar.gz"] = Reply(archive(("PMC1/text.nxml", b"x" * 9000), *members))
    wanted.add("a", "/PMC1.tar.gz", "PMC1/2.jpg", contents[2])
    wanted.add("b", "/PMC1.tar.gz", "PMC1/0.jpg", contents[0])
    wanted.add("same", "/PMC1.tar.gz", "PMC1/0.jpg", contents[0])
    assert main(wanted.flags()) == 0
    wanted.check()
    assert server.requests == {"/PMC1.tar.gz": 1}


def test_long_names_of_both_kinds(wanted, server):
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        name = f"PMC{number}/" + "long" * 40 + "é.jpg"
        server.pages[f"/{number}.tar.gz"] = Reply(archive(("a", b"x"), (name, content_of(number)), format=kind))
        wanted.add(f"p{number}", f"/{number}.tar.gz", name, content_of(number))
    main(wanted.flags())
    wanted.check()


def bad_connections(wanted, server):
    """Articles behind lines that fail, each with what has to come of it."""
    content = content_of(1, 300_000)
    whole = archive(("PMC/x.jpg", content))
    pages = {
        "/dead": (Reply(b"", 404), None, "HTTP 404"),
        "/forbidden": (Reply(b"", 403), None, "HTTP 403"),
        "/broken": (Reply(b"", 500), None, "HTTP 500"),
        "/cut": (Reply(whole, cut_after=len(whole) // 2), None, "the connection was cut"),
        "/silent": (Reply(whole, stall_after=len(whole) // 2), None, "too slow"),
        "/drips": (Reply(whole, drip=0.2), None, "too slow"),
        "/drips-headers": (Reply(whole, drip_headers=0.2), None, "too slow"),
        "/too-short-a-length": (Reply(whole, length=len(whole) // 2), None, "cut"),  # the line, or the archive
        "/too-long-a-length": (Reply(whole, length=len(whole) * 2), content, None),
        "/no-length": (Reply([whole]), content, None),
        "/not-gzip": (Reply(b"<html>Please log in</html>" * 50), None, "not gzip"),
        "/not-tar": (Reply(gzip.compress(b"no tar" * 500)), None, "not a tar header"),
        "/empty": (Reply(b""), None, "the archive is empty"),
        "/recovers": ([Reply(b"", 503, headers={"Retry-After": "0"}), Reply(whole, cut_after=99), Reply(whole)],
                      content, None),
        "/redirects": (Reply(b"", 302, headers={"Location": "/recovers-elsewhere"}), content, None),
        "/redirects-for-ever": (Reply(b"", 302, headers={"Location": "/redirects-for-ever"}), None, "redirects"),
        "/slow-but-steady": (Reply(archive(("PMC/x.jpg", content[:900])), drip=0.01), content[:900], None),
    }  # fmt: skip
    server.pages["/recovers-elsewhere"] = Reply(whole)
    for path, (reply, expected, reason) in pages.items():
        server.pages[path] = reply
        wanted.add(path[1:].replace("-", "_"), path, "PMC/x.jpg", expected, reason)


def test_bad_connections(wanted, server):
    bad_connections(wanted, server)
    main([*wanted.flags(), "--article-timeout", "1.5", "--connections", "16"])
    wanted.check()
    assert server.requests["/dead"] == 1, "a dead link was asked again"
    assert server.requests["/broken"] == 3
    assert server.requests["/recovers"] == 3


def test_second_source_of_a_dead_article(wanted, server):
    content = content_of(5)
    server.pages["/oa?id=PMC77"] = Reply(
        b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><OA><records><record id="PMC77">'
        b'<link format="tgz" updated="2020" href="' + server.url("/new/PMC77.tar.gz").encode() + b'" /></record>'
        b"</records></OA>"
    )
    server.pages["/oa?id=PMC78"] = Reply(b'<OA><error code="idIsNotOpenAccess">no</error></OA>')
    server.pages["/new/PMC77.tar.gz"] = Reply(archive(("PMC77/x.jpg", content)))
    wanted.add("moved", "/old/PMC77.tar.gz", "PMC77/x.jpg", content)
    wanted.add("closed", "/old/PMC78.tar.gz", "PMC78/x.jpg", reason="HTTP 404")
    main(wanted.flags())
    wanted.check()


@pytest.mark.parametrize("by", ["redirect", "second source"])
def test_a_server_elsewhere_does_not_send_into_ones_own_network(wanted, server, monkeypatch, by):
    """A list may name this machine. Here the test's server is also the proxy, by which names elsewhere are reached."""
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    content, inside = content_of(1), server.url("/inside")
    server.pages["/inside"] = server.pages[inside] = Reply(archive(("x.jpg", content)))
    away = {"Location": inside}
    link = Reply(f'<link format="tgz" href="{inside}" />'.encode())
    server.pages["http://pmc.invalid/PMC1.tgz"] = Reply(b"", 302, headers=away) if by == "redirect" else Reply(b"", 404)
    server.pages["http://oa.invalid/?id=PMC1"] = link if by == "second source" else Reply(b"", 404)
    reason = "sent on into" if by == "redirect" else "HTTP 404"
    wanted.add("x", "", "x.jpg", reason=reason)
    wanted.rows[-1]["pmc_tar_url"] = "http://pmc.invalid/PMC1.tgz"
    main([*wanted.flags(), "--oa-service", "http://oa.invalid/"])
    wanted.check()
    assert server.requests == {"http://pmc.invalid/PMC1.tgz": 1, "http://oa.invalid/?id=PMC1": 1}


def test_kept_archives_are_whole_and_used_again(wanted, server, tmp_path):
    body = archive(("PMC1/x.jpg", content_of(1)), ("PMC1/text", b"t" * 500_000))
    server.pages["/PMC1.tar.gz"] = Reply(body)
    wanted.add("x", "/PMC1.tar.gz", "PMC1/x.jpg", content_of(1))
    keep = ["--keep-archives", "--pmc_output_path", str(tmp_path / "tars")]
    main([*wanted.flags(), *keep])
    assert {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()} == {"PMC1.tar.gz": body}
    (tmp_path / "images" / "x.jpg").unlink()
    main([*wanted.flags(), *keep])
    wanted.check()
    assert server.requests["/PMC1.tar.gz"] == 1
    main([*wanted.flags()])
    assert len(list((tmp_path / "tars").iterdir())) == 1


@pytest.mark.timeout(100)
def test_a_long_reply_of_the_service_is_read_in_a_moment(wanted, server):
    """Searching it took half an hour, in which nothing else was fetched."""
    server.pages["/oa?id=PMC77"] = Reply(b"<link " * 170_000)
    server.pages["/oa?id=PMC78"] = Reply(b"<link " + b'format="tgz" ' * 80_000)
    for name in ("PMC77", "PMC78"):
        wanted.add(name, f"/{name}.tar.gz", "x.jpg", reason="HTTP 404")
    main(wanted.flags())
    wanted.check()
    assert server.requests["/oa?id=PMC77"] == server.requests["/oa?id=PMC78"] == 1


@pytest.mark.parametrize("content", ["cut", "damaged", "empty"])
def test_an_archive_that_cannot_be_read_is_not_kept(wanted, server, tmp_path, content):
    """It was, and each later run read it in place of asking again."""
    body = archive(("PMC1/w.jpg", content_of(2)), ("PMC1/x.jpg", content_of(1)))
    bad = {"cut": [body[:6000]], "damaged": b"<html>busy</html>", "empty": b""}[content]
    server.pages["/PMC1.tar.gz"] = Reply(bad)
    wanted.add("x", "/PMC1.tar.gz", "PMC1/x.jpg", content_of(1))
    tars = tmp_path / "tars"
    keep = ["--keep-archives", "--pmc_output_path", str(tars)]
    main([*wanted.flags(), *keep])
    assert list(tars.iterdir()) == []
    server.pages["/PMC1.tar.gz"] = Reply(body)
    (tars / "PMC1.tar.gz").write_bytes(bad[0] if content == "cut" else bad)  # as a power cut leaves it
    main([*wanted.flags(), *keep])
    wanted.check()
    assert (tars / "PMC1.tar.gz").read_bytes() == body


def test_archives_of_one_name_are_kept_apart(wanted, server, tmp_path):
    """The second article's archive was read for the first one's image."""
    for number in (1, 2):
        server.pages[f"/{number}/figures.tar.gz"] = Reply(archive(("f/1.jpg", content_of(number))))
        wanted.add(f"p{number}", f"/{number}/figures.tar.gz", "f/1.jpg", content_of(number))
    keep = ["--keep-archives", "--pmc_output_path", str(tmp_path / "tars")]
    for requests in (2, 2):
        main([*wanted.flags(), *keep])
        wanted.check()
        assert server.requests.total() == requests
        for path in (tmp_path / "images").glob("*.jpg"):
            path.unlink()


def test_too_many_failures_set_the_exit_code(wanted, server):
    wanted.add("a", "/gone", "x.jpg", reason="HTTP 404")
    wanted.add("b", "/gone", "y.jpg", reason="HTTP 404")
    assert main(wanted.flags()) == 0
    assert main([*wanted.flags(), "--max-failures", "1"]) == 1
    assert main([*wanted.flags(), "--max-failures", "2"]) == 0


def many_articles(wanted, server, count=150):
    """One in five is dead; the others answer after a while, so that a kill hits them at work."""
    for number in range(count):
        content = content_of(number, 40_000)
        path = f"/PMC{number}.tar.gz"
        if number % 5 == 0:
            wanted.add(f"p{number}", path, "x.jpg", reason="HTTP 404")
        else:
            server.pages[path] = Reply(archive(("x.jpg", content), ("y.jpg", content[::-1])), delay=0.05)
            wanted.add(f"p{number}", path, "x.jpg", content)
            wanted.add(f"q{number}", path, "y.jpg", content[::-1])


def test_killed_five_times_the_final_state_is_the_same(wanted, server):
    many_articles(wanted, server)
    command = [sys.executable, "-m", "llava.data.download_images", *wanted.flags(), "--connections", "2"]
    killed = 0
    for _ in range(5):
        before = sum(server.requests.values())
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while sum(server.requests.values()) < before + 15 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert killed == 5, "a run ended before it was killed"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted.check()
    # What was done wasn't done again: at most the articles under way at a kill.
    assert sum(server.requests.values()) <= 150 + 30 + 5 * 4


def test_no_more_connections_than_asked_for(wanted, server):
    many_articles(wanted, server, 60)
    main([*wanted.flags(), "--connections", "4"])
    wanted.check()
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize(("per_second", "times"), [(10.0, [0, 0.1, 0.2, 0.3]), (0, [0, 0, 0, 0])])
def test_rate_limit_spaces_requests(per_second, times):
    asked = []

    async def get(url):
        asked.append(asyncio.get_running_loop().time())
        raise TransferError("not asked")

    async def ask():
        async with Transfer(Limits(requests_per_second=per_second)) as transfer:
            transfer._get = get
            for _ in range(4):
                with pytest.raises(TransferError):
                    async with transfer.open("http://somewhere"):
                        pass

    run_skipping(ask())
    assert asked == pytest.approx(times)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pair_id": "a"}\n', "line 1: expected text in pair_id, pmc_tar_url, image_file_path"),
        ('{"pair_id": "a", "pmc_tar_url": 3, "image_file_path": "b"}\n', "line 1: expected text"),
        ("\n\n", "the list is empty"),
        ("nonsense\n", "line 1: not JSON"),
    ],
)
def test_a_bad_list_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "urls.jsonl").write_text(text)
    with pytest.raises(LlavaError, match=message):
        read_plan(tmp_path / "urls.jsonl")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "http://", "http://[bad", "javascript:1"])
def test_other_addresses_are_refused(tmp_path, url):
    row = {"pair_id": "a", "pmc_tar_url": url, "image_file_path": "b"}
    (tmp_path / "urls.jsonl").write_text(json.dumps(row) + "\n")
    plan = read_plan(tmp_path / "urls.jsonl")
    assert not plan.articles and plan.refused[0][2] == "pmc_tar_url is no http(s) address"


def test_one_pair_id_for_two_images_is_reported(wanted, server):
    server.pages["/a"] = Reply(archive(("x.jpg", content_of(1)), ("y.jpg", content_of(2))))
    wanted.add("same", "/a", "x.jpg", content_of(1))
    wanted.add("same", "/a", "y.jpg", reason="listed before with another image")
    wanted.add("same", "/a", "x.jpg", content_of(1))
    main(wanted.flags())
    failures = read_records(wanted.folder / "images" / FAILURES_FILE)
    assert [row["image_file_path"] for row in failures] == ["y.jpg"]
    assert (wanted.folder / "images" / "same.jpg").read_bytes() == content_of(1)


def test_a_dead_network_stops_the_run_and_keeps_the_state(tmp_path):
    with ArchiveServer() as gone:
        url = gone.url("")
    rows = [{"pair_id": f"p{n}", "pmc_tar_url": f"{url}/{n}", "image_file_path": "x"} for n in range(300)]
    (tmp_path / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input_path", str(tmp_path / "urls.jsonl"), "--images_output_path", str(tmp_path / "i"), *FAST]
    with pytest.raises(LlavaError, match="is the network up"):
        main([*flags, "--retries", "0"])


def test_large_images_are_whole_or_gone(wanted, server):
    """Larger than the pieces that they are written in; the second breaks off when some are on the disk already."""
    large = content_of(3, 5_000_000)
    server.pages["/large"] = Reply(archive(("x.jpg", large), format=tarfile.GNU_FORMAT))
    server.pages["/cut"] = Reply(archive(("x.jpg", large)), cut_after=4_000_000)
    wanted.add("large", "/large", "x.jpg", large)
    wanted.add("again", "/large", "x.jpg", large)
    wanted.add("cut", "/cut", "x.jpg", reason="the connection was cut")
    main(wanted.flags())
    wanted.check()


def test_a_disk_that_takes_no_more_stops_the_run(wanted, server):
    """A file may have 20 kB here: Linux refuses the rest as it does on a full disk."""
    server.pages["/small"] = Reply(archive(("x.jpg", content_of(1))))
    server.pages["/large"] = Reply(archive(("x.jpg", content_of(2, 3_000_000))))
    wanted.add("small", "/small", "x.jpg")
    wanted.add("large", "/large", "x.jpg")
    for number in range(50):
        wanted.add(f"late{number}", "/large", "x.jpg")
    command = [sys.executable, "-m", "llava.data.download_images", *wanted.flags(), "--connections", "1"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2, run.stderr
    assert "can't be written to (File too large)" in run.stderr
    assert server.requests["/large"] < 50, "it went on fetching what can't be kept"
    images = wanted.folder / "images"
    assert [path.name for path in images.iterdir() if path.name != f"{FAILURES_FILE}.part"] == ["small.jpg"]


def test_a_disk_that_takes_no_more_failures_stops_the_run(wanted, server):
    """What it refused was tried again while the list was closed: a traceback."""
    for number in range(200):
        wanted.add(f"gone{number}", "/gone", f"{number}.jpg")
    command = [sys.executable, "-m", "llava.data.download_images", *wanted.flags(), "--oa-service", ""]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ") and "(File too large); what is done is kept" in run.stderr
    kept = (wanted.folder / "images" / f"{FAILURES_FILE}.part").read_bytes()
    assert 15_000 < len(kept) <= 20_000


def test_of_an_archive_that_is_not_whole_nothing_is_left(wanted, server):
    server.pages["/PMC1.tar.gz"] = Reply(
        archive(("x.jpg", content_of(1)), ("text", b"t" * 9), ("y", content_of(2, 300_000)))
    )
    wanted.add("x", "/PMC1.tar.gz", "x.jpg")
    tars = wanted.folder / "tars"
    tars.mkdir()
    (tars / ".PMC2.tar.gz.7.part").write_bytes(b"of a run that was killed")
    command = [sys.executable, "-m", "llava.data.download_images", *wanted.flags(), "--keep-archives"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = subprocess.run([*command, "--pmc_output_path", str(tars)], capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2 and "File too large" in run.stderr, run.stderr
    assert list(tars.iterdir()) == []


def test_a_folder_is_filled_by_one_process(wanted, server):
    """A second one removed what the first was writing."""
    server.pages["/x"] = Reply(archive(("x.jpg", content_of(1))), delay=2)
    wanted.add("x", "/x", "x.jpg", content_of(1))
    command = [sys.executable, "-m", "llava.data.download_images", *wanted.flags(), "--timeout", "9"]
    first = subprocess.Popen(command)
    while not server.requests["/x"]:
        time.sleep(0.01)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2 and "another process is writing it" in second.stderr
    assert first.wait() == 0
    wanted.check()


def test_a_folder_that_is_gone_stops_the_writer(tmp_path):
    """Nothing can be removed there either: the error is told all the same, to every later image and at the end."""

    async def chunks(content):
        yield content

    async def write_on():
        async with ImageWriter() as writer:
            for number in range(100):
                await writer.write(tmp_path / "file" / f"{number}.jpg", chunks(bytes(1 << 20)))
                await asyncio.sleep(0.001)

    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        asyncio.run(asyncio.wait_for(write_on(), 20))
    assert (tmp_path / "file").read_text() == "no folder"


def test_little_disk_space_stops_the_run(wanted, server):
    wanted.add("a", "/gone", "x.jpg", reason="HTTP 404")
    with pytest.raises(LlavaError, match="GB free"):
        main([*wanted.flags(), "--min-free-gb", "1e9"])
    assert not server.requests


def test_large_archives_are_given_up_and_the_failures_go_where_they_are_wanted(wanted, server, tmp_path):
    server.pages["/large"] = Reply(archive(("PMC/x.jpg", content_of(1, 300_000))))
    server.pages["/small"] = Reply(archive(("PMC/y.jpg", content_of(2))))
    wanted.add("x", "/large", "PMC/x.jpg", reason="larger than")
    wanted.add("y", "/small", "PMC/y.jpg", content_of(2))
    list_of_them = tmp_path / "elsewhere.jsonl"
    main([*wanted.flags(), "--max-article-mb", "0.1", "--failures", str(list_of_them)])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["y.jpg"]
    (failure,) = read_records(list_of_them)
    assert failure["pair_id"] == "x" and "larger than the cap" in failure["reason"]
    main([*wanted.flags(), "--failures", str(list_of_them), "--retry-failed"])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["x.jpg", "y.jpg"]


def test_a_list_of_something_else_is_not_replaced_by_the_failures(wanted, server):
    server.pages["/x"] = Reply(archive(("PMC/x.jpg", content_of(1))))
    wanted.add("x", "/x", "PMC/x.jpg", content_of(1))
    flags = wanted.flags()
    listed = flags[flags.index("--input_path") + 1]
    before = Path(listed).read_bytes()
    with pytest.raises(LlavaError, match="not a list of failures"):
        main([*flags, "--failures", listed])
    assert Path(listed).read_bytes() == before
    with pytest.raises(LlavaError, match="--limit -1: give 0 or more"):
        main([*flags, "--limit", "-1"])


def test_flags_and_settings_have_the_same_defaults(tmp_path):
    flags = ["--input_path", str(tmp_path), "--images_output_path", str(tmp_path)]
    assert _settings(build_parser().parse_args(flags)) == Settings()
