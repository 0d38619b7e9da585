"""Uploads to the page have a total: of bytes and of files, for each visitor and for all; near it others' give way."""

from pathlib import Path

import httpx
import pytest

from tests.security.page_visitor import Visitor, assert_refused, file_data, question
from tests.serve.processes import Process, files_below

CONTROLLER = ("--controller", "http://127.0.0.1:1")
MEGABYTE = 1 << 20


@pytest.fixture
def server():
    """The page with a small total: 4 MiB for a visitor, 8 MiB for all."""
    words = (*CONTROLLER, "--visitor-upload-mb", "4", "--upload-mb", "8")
    with Process("llava.serve.gradio_web_server", *words) as process:
        yield process.wait(seconds=500)
        assert httpx.get(process.url + "/health").status_code == 200


def size(folder: Path) -> int:
    return sum(len(content) for content in files_below(folder).values())


def send(visitor: Visitor, count=1, length=3 * MEGABYTE) -> httpx.Response:
    files = [("files", (f"{number}.png", b"x" * length, "image/png")) for number in range(count)]
    return visitor.client.post("/gradio_api/upload", files=files)


def use(visitor: Visitor, path: str) -> None:
    """Name it in a call that leaves it there."""
    assert visitor.send(visitor.body([question(file_data(path)), None]))[0].status_code == 200


def test_a_visitor_and_all_have_a_total(server):
    """What was refused leaves nothing; what nobody has used gives way, the oldest first."""
    visitors = [Visitor(server.url) for _ in range(4)]
    paths = [send(visitors[0]).json()[0]]
    folder = next(parent for parent in Path(paths[0]).parents if parent.name.startswith("llava-web-"))
    reply = send(visitors[0])
    assert_refused(reply)
    assert reply.status_code == 413 and size(folder) < 4 * MEGABYTE
    for visitor in visitors[1:]:
        paths.append(send(visitor).json()[0])
        assert size(folder) < 8 * MEGABYTE
    assert [each.read(path).status_code for each, path in zip(visitors, paths, strict=True)] == [403, 403, 200, 200]
    Path(paths[3]).unlink()  # as the page does once it has read it
    paths.append(send(visitors[3]).json()[0])
    assert visitors[2].read(paths[2]).status_code == 200


def test_many_small_files_stop_nobody(server):
    """Eight requests of 512 files of a byte each stopped uploads of everybody for ten minutes."""
    other = Visitor(server.url)
    own = send(other, length=MEGABYTE).json()[0]
    use(other, own)
    for _ in range(20):
        assert send(Visitor(server.url), 512, 1).status_code == 200
    folder = next(parent for parent in Path(own).parents if parent.name.startswith("llava-web-"))
    assert len(files_below(folder)) <= 8 * MEGABYTE // 4096
    assert other.read(own).status_code == 200, "what was used stays while there is something that wasn't"
    assert send(other, length=MEGABYTE).status_code == 200
    hoarder = Visitor(server.url)
    assert [send(hoarder, 512, 1).status_code for _ in range(3)] == [200, 413, 413]


def test_of_what_is_used_who_holds_most_gives_way(server):
    """A visitor who asks about his files doesn't lose them to one who holds as many."""
    hoarder, modest, new = (Visitor(server.url) for _ in range(3))
    held = [send(hoarder, length=3 * MEGABYTE).json()[0], send(modest, length=2 * MEGABYTE).json()[0]]
    third = Visitor(server.url)
    held.append(send(third, length=2 * MEGABYTE).json()[0])
    for visitor, path in zip((hoarder, modest, third), held, strict=True):
        use(visitor, path)
    assert send(new, length=2 * MEGABYTE).status_code == 200
    use(new, send(new, length=MEGABYTE).json()[0])
    assert [each.read(path).status_code for each, path in zip((hoarder, modest, third), held, strict=True)] == [
        403,
        200,
        200,
    ]
    reply = send(new, length=MEGABYTE // 2)
    assert reply.status_code == 200


def test_one_key_takes_no_space_of_another(tmp_path):
    """However many visitors its holder makes of himself, and whatever he says to use."""
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("hoarder key-of-the-hoarder\nward key-of-the-ward\n")
    words = (*CONTROLLER, "--upload-mb", "8", "--api-key-file", str(keys))
    with Process("llava.serve.gradio_web_server", *words) as process:
        process.wait(seconds=500)
        nurse = Visitor(process.url, "key-of-the-ward")
        own = send(nurse, length=2 * MEGABYTE).json()[0]
        use(nurse, own)
        for _ in range(20):
            hoarder = Visitor(process.url, "key-of-the-hoarder")
            use(hoarder, send(hoarder, length=MEGABYTE).json()[0])
        assert nurse.read(own).status_code == 200
        assert send(nurse, length=MEGABYTE).status_code == 200


def test_the_same_page_without_protections_takes_all():
    with Process("tests.security.open_page", *CONTROLLER) as process:
        attacked = Visitor(process.wait(seconds=500).url)
        assert [send(attacked).status_code for _ in range(4)] == [200] * 4
