"""A conversation as a file, and files that pretend to be one: what is opened, what is refused, in how long."""

import asyncio
import base64
import json
import threading
import time

import gradio as gr
import pytest

from llava.errors import LlavaError
from llava.images import open_uploaded_image
from llava.serve.request_models import MAX_IMAGES
from llava.serve.web.chat_state import MOST_TEXT, Chat, Exchange, Reply, UploadedImage, text_length
from llava.serve.web.exports import MAX_JSON_BYTES, as_json, as_page, is_export, read_export
from llava.serve.web.parts.examples import draw_example
from llava.serve.web.parts.saving import FORMS, SavingPart

ODD = '<pre>&amp;</pre> &lt; "x" \'y\' src="data:image/png;base64,AAAA" <img src="data:image/x"> é 𝄞 \u2028 </script>'


def conversation() -> Chat:
    images = tuple(UploadedImage.from_bytes(draw_example(name)) for name in ("chest", "tissue"))
    return Chat(
        [
            Exchange(ODD, images, [Reply("m", ODD, is_whole=True), Reply("n", "N", error=ODD)], "now", {"a": ODD}),
            Exchange("more", (), [Reply("m", "M", is_whole=True), None]),
        ]
    )


def opened(content: bytes):
    assert is_export(content)
    return read_export(content, open_uploaded_image)


def test_what_was_exported_is_opened_again():
    chat = conversation()
    expected = chat.record()["turns"]
    page = as_page(chat).encode()
    saved_anew = page.replace(b"<!doctype", b"<!DOCTYPE").replace(b"&#34;", b"&quot;")
    for content, missing in ((page, 0), (saved_anew, 0), (as_json(chat).encode(), 2), (b"\n " + page, 0)):
        exchanges, left_out = opened(content)
        assert left_out == missing and len(exchanges[0].images) == 2 - missing
        turns = Chat(exchanges).record()["turns"]
        for before, after in zip(expected, turns, strict=True):
            assert {**after, "images": [], "image_options": 0} == {**before, "images": [], "image_options": 0}
    again = Chat(opened(page)[0])
    assert [image.sha256 for image in again.images()] == [image.sha256 for image in chat.images()]
    assert opened(as_page(again).encode())[1] == 0


def turn(text="q", **more) -> dict:
    return {"question": text, "answers": [{"model": "m", "text": text}], **more}


def as_file(*turns) -> bytes:
    return json.dumps({"turns": turns}).encode()


MEGABYTES = 28 << 20
BAD = {
    "many tags": b"<!doctype html><pre>" + b"a<b>" * (MEGABYTES // 4),
    "many parts": b"<!doctype html>" + b"<pre>" * (MEGABYTES // 5),
    "many ends": b"<!doctype html><pre>" + b"</pre>" * (MEGABYTES // 6),
    "many images": b"<!doctype html>" + b' src="data:image/' * (MEGABYTES // 17) + b"<pre>{}</pre>",
    "many entities": b"<!doctype html><pre>" + b"&amp;" * (MAX_JSON_BYTES // 5) + b"</pre>",
    "a bad declaration": b"<!doctype html><![a<![a",
    "nothing": b"<!doctype html>",
    "another page": b"<!doctype html><pre>words</pre>",
    "not UTF-8": b'<!doctype html><pre>{"turns": "\xff"}</pre>',
    "long JSON": b"{" * MEGABYTES,
    "deep JSON": b'{"turns": ' + b"[" * 1_000_000,
    "deep sampling": b'{"turns": [{"question": "q", "sampling": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}]}",
    "wide sampling": as_file(turn(sampling={"a": "x" * 10_000})),
    "wide options": as_file(turn(images=["sha256:" + "0" * 64], image_options=[{"a": ["x"] * 10_000}])),
    "no turns": as_file(),
    "many turns": as_file(*[turn()] * 600),
    "half a pair": b'{"turns": [{"question": "\\ud800"}]}',
    "one long text": as_file({"question": "q" * (MOST_TEXT + 1)}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_export_is_refused_soon(name):
    began = time.process_time()
    with pytest.raises(LlavaError, match="isn't an export of this page"):
        opened(BAD[name])
    assert time.process_time() - began < 20


def test_texts_have_a_total():
    half = MOST_TEXT // 4
    exchanges, _ = opened(as_file(turn("&" * half), turn("é" * half)))
    assert text_length(exchanges) == MOST_TEXT
    with pytest.raises(LlavaError, match="at most 262,144 characters"):
        opened(as_file(turn("&" * half), turn("é" * half), {"question": "q"}))


def test_images_are_as_many_as_are_named():
    png = b' src="data:image/png;base64,' + base64.b64encode(draw_example("chest")) + b'"'
    digest = "sha256:" + "0" * 64

    def page(named: int, held: int) -> bytes:
        data = as_file(
            turn(images=[digest] * min(named, MAX_IMAGES)), turn(images=[digest] * max(0, named - MAX_IMAGES))
        )
        return b"<!doctype html>" + png * held + b"<pre>" + data + b"</pre>"

    assert len(opened(page(2, 2))[0][0].images) == 2
    for named, held in ((1, 2), (2, 1), (MAX_IMAGES, MAX_IMAGES + 5), (MAX_IMAGES + 1, MAX_IMAGES + 1)):
        with pytest.raises(LlavaError, match=f"at most {MAX_IMAGES} are taken"):
            opened(page(named, held))
    broken = b'<!doctype html><img src="data:image/png;base64,****"><pre>' + as_file(turn(images=[digest])) + b"</pre>"
    with pytest.raises(LlavaError, match="an image of it can't be read"):
        opened(broken)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_written_beside_the_event_loop(form):
    """With many images it takes seconds, in which nobody else would be answered."""
    threads = []

    class Watched(Chat):
        def record(self):
            threads.append(threading.current_thread())
            return super().record()

    async def export():
        with gr.Blocks():
            part = SavingPart()
        content = await part._handler(form)(Watched([Exchange("Is it?", (), [Reply("m", "Yes."), None])]))
        return json.loads(content), threading.current_thread()

    exported, loop = asyncio.run(export())
    assert "Is it?" in exported["content"] and threads and loop not in threads
