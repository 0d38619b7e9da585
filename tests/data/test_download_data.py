"""download_data.sh against a real server: whole files only, resumed where they broke off, checksums believed alone."""

import hashlib
import os
import shutil
import socket
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "download_data.sh"
SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]


class Files(BaseHTTPRequestHandler):
    """Serves `contents` with ranges (unless `no_ranges`); `breaks` cuts the next answers after so many bytes."""

    contents: dict[str, bytes]
    asked: list[tuple[str, str | None]]
    breaks: list[int]
    no_ranges = False

    def do_HEAD(self):
        self.send_response(200 if self.path in self.contents else 404)
        self.end_headers()

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        content = self.contents.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not self.no_ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        limit = self.breaks.pop(0) if self.breaks else None
        self.wfile.write(content[start:][:limit])
        self.close_connection = True

    def log_message(self, *_):
        pass


def only(tool, folder):
    """A folder of programs, to fetch with `tool` alone."""
    tools = folder / "bin"
    tools.mkdir()
    for name in (tool, "sh", "cat", "cut", "wc", "tr", "dirname", "sha256sum", "mkdir", "rm", "mv"):
        (tools / name).symlink_to(shutil.which(name))
    return tools


@pytest.fixture
def server():
    handler = type("Handler", (Files,), {"contents": {}, "asked": [], "breaks": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    handler, url = server
    contents = {"a/one.json": os.urandom(200_000), "b/two.jsonl": os.urandom(5_000), "three.jsonl": b"x\n"}
    handler.contents.update({f"/{name}": content for name, content in contents.items()})
    lines = (f"{n} {len(c)} {hashlib.sha256(c).hexdigest()}\n" for n, c in contents.items())
    (tmp_path / "list.txt").write_text("".join(lines))

    def run(*words, shell="sh", **environment):
        program = [shell, "sh"] if shell == "busybox" else [shell]
        done = subprocess.run(
            [*program, str(SCRIPT), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "LLAVA_MED_DATA_URL": url, "LLAVA_MED_DATA_DIR": str(tmp_path / "data"),
                 "LLAVA_MED_DATA_LIST": str(tmp_path / "list.txt"), "no_proxy": "127.0.0.1",
                 **environment},
        )  # fmt: skip
        there = {
            str(path.relative_to(tmp_path / "data")): path.read_bytes()
            for path in (tmp_path / "data").rglob("*")
            if path.is_file()
        }
        return done, there

    run.contents = contents
    run.handler = handler
    return run


@pytest.mark.parametrize("shell", SHELLS)
def test_all_files_whole_and_a_second_call_fetches_nothing(fetch, shell):
    done, there = fetch(shell=shell)
    assert done.returncode == 0, done.stderr
    assert there == fetch.contents
    asked = len(fetch.handler.asked)
    done, there = fetch(shell=shell)
    assert done.returncode == 0 and there == fetch.contents and len(fetch.handler.asked) == asked


def test_only_the_files_asked_for(fetch):
    done, there = fetch("two", "three")
    assert done.returncode == 0 and there.keys() == {"b/two.jsonl", "three.jsonl"}
    done, _ = fetch("nonsense")
    assert done.returncode == 2 and "no file's name contains: nonsense" in done.stderr


def test_goes_on_where_it_broke_off(fetch, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    part = tmp_path / "data" / "a" / "one.json.part"
    part.write_bytes(fetch.contents["a/one.json"][:150_000])
    done, there = fetch()
    assert done.returncode == 0, done.stderr
    assert there == fetch.contents
    assert fetch.handler.asked[0] == ("/a/one.json", "bytes=150000-")


def test_a_line_that_breaks_is_kept_for_the_next_call(fetch):
    fetch.handler.breaks[:] = [90_000]
    done, there = fetch("one")
    if done.returncode:  # curl gives up here; wget goes on by itself
        assert "broke off after 90000 of 200000" in done.stderr
        assert set(there) == {"a/one.json.part"}
        done, there = fetch("one")
    assert done.returncode == 0 and there == {"a/one.json": fetch.contents["a/one.json"]}
    assert fetch.handler.asked[-1][1] == "bytes=90000-"


def test_a_damaged_start_is_thrown_away(fetch, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "one.json.part").write_bytes(bytes(150_000))
    (tmp_path / "data" / "three.jsonl").write_bytes(b"damaged")
    done, there = fetch()
    assert done.returncode == 0 and there == fetch.contents


def test_a_server_without_ranges(fetch, tmp_path):
    fetch.handler.no_ranges = True
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "one.json.part").write_bytes(fetch.contents["a/one.json"][:1000])
    done, there = fetch()
    assert done.returncode == 0, done.stderr
    assert there == fetch.contents


def test_wrong_content_and_dead_links_leave_nothing_and_say_so(fetch):
    fetch.handler.contents["/a/one.json"] = os.urandom(200_000)
    del fetch.handler.contents["/three.jsonl"]
    done, there = fetch()
    assert done.returncode == 1
    assert there == {"b/two.jsonl": fetch.contents["b/two.jsonl"]}
    assert "2 of 3 files are missing" in done.stderr
    assert "a/one.json: could not be had" in done.stderr


@pytest.mark.parametrize("tool", ["curl", "wget"])
@pytest.mark.parametrize("says_length", [False, True])
def test_a_body_without_end_is_given_up(fetch, tmp_path, tool, says_length):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    sent, many = [], 60 << 20

    def do_get(self):
        self.send_response(200)
        if says_length:
            self.send_header("Content-Length", str(many))
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            for _ in range(60):
                self.wfile.write(bytes(1 << 20))
                sent.append(1)

    fetch.handler.do_GET = do_get
    done, there = fetch("three", PATH=str(only(tool, tmp_path)))
    assert done.returncode == 1 and "three.jsonl: could not be had" in done.stderr
    assert there == {} and len(sent) < 40, "of two tries"


@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_without_a_network_it_says_so_at_once(tmp_path, tool):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        tools = str(only(tool, tmp_path))
        environment = {"PATH": tools, "LLAVA_MED_DATA_URL": address, "LLAVA_MED_DATA_DIR": str(tmp_path / "data")}
        command = ["sh", str(SCRIPT), "eval/"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count(f"host unreachable: {address}") == 1 and done.stdout == ""


@pytest.mark.skipif(not shutil.which("wget"), reason="no wget on this machine")
def test_wget_serves_where_there_is_no_curl(fetch, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "one.json.part").write_bytes(fetch.contents["a/one.json"][:150_000])
    done, there = fetch(PATH=str(only("wget", tmp_path)))
    assert done.returncode == 0, done.stderr
    assert there == fetch.contents
    assert fetch.handler.asked[0][1] == "bytes=150000-"
