"""The map of where the model looked, asked for by the page's handler."""

import asyncio
import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava.serve.web.chat_state import Chat, Exchange, Reply, UploadedImage
from llava.serve.web.parts.attention_view import AttentionPart


class Client:
    """A worker's answer; `meanwhile` happens while it is waited for."""

    def __init__(self, meanwhile):
        self.meanwhile = meanwhile

    async def attention_map(self, body):
        self.meanwhile()
        weights = np.ones((2, 3, 3), "<f2").tobytes()
        view = {"number": 0, "side": 3, "weights": base64.b64encode(weights).decode(), "image": png_url()}
        return {"tokens": ["a", "lung"], "shares": [0.5, 0.5], "views": [view]}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def png_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def asked_once() -> Chat:
    reply = Reply("m", "a lung", is_whole=True, token_ids=[1, 2])
    return Chat([Exchange("What is it?", (UploadedImage.from_bytes(png()),), [reply, None])])


def test_the_map_is_of_the_last_answers_image():
    shown = asyncio.run(AttentionPart(Client(lambda: None), SimpleNamespace()).on_show(asked_once()))
    (view,) = json.loads(shown.props["attention"])["0"]["views"]
    assert view["place"] == 0 and view["side"] == 3


@pytest.mark.parametrize("go_on", [list.clear, lambda exchanges: exchanges.append(Exchange("And now?"))])
def test_who_clears_or_asks_on_meanwhile_gets_no_map(go_on):
    chat = asked_once()
    part = AttentionPart(Client(lambda: go_on(chat.exchanges)), SimpleNamespace())
    shown = asyncio.run(part.on_show(chat))
    assert isinstance(shown, dict) and shown["__type__"] == "update" and "attention" not in shown
