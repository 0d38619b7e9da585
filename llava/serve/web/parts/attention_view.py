"""The page's view of where the model looked: attention on the large image, for the token that is pointed at.

The server asks the workers for the last answers' weights; assets/attention.js draws them.
"""

import base64
import binascii
import io
import json
import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from llava.serve.client import ServingClient
from llava.serve.protocol import ServeError
from llava.serve.web.chat_state import Chat, Reply
from llava.serve.web.parts.viewer import Viewer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """A worker's attention map, unpacked; `views` are (image's number, its data: URL, weights `[tokens, side, side]`
    of all tokens)."""

    tokens: list[str]
    shares: list[float]
    views: list[tuple[int, str, np.ndarray]]

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> "Shown":
        views = []
        for view in reply["views"]:
            weights = np.frombuffer(base64.b64decode(view["weights"]), "<f2").astype(np.float32)
            weights = weights.reshape(len(reply["tokens"]), view["side"], view["side"])
            Image.open(io.BytesIO(base64.b64decode(view["image"].partition(",")[2])))
            views.append((view["number"], view["image"], weights))
        return cls(reply["tokens"], reply["shares"], views)

    def packed(self) -> dict[str, Any]:
        """As the browser takes it: weights as bytes, of which 255 is the brightest patch of the token."""
        count = len(self.tokens)
        brightest = np.zeros(count)
        for _, _, weights in self.views:
            brightest = np.maximum(brightest, weights.reshape(count, -1).max(1))
        scale = (255 / np.where(brightest > 0, brightest, 1))[:, None, None]
        views = [
            {
                "number": number,
                "url": url,
                "side": weights.shape[1],
                "weights": base64.b64encode((weights * scale).round().astype(np.uint8).tobytes()).decode(),
            }
            for number, url, weights in self.views
        ]
        most = [round(float(each), 4) for each in brightest]
        return {"tokens": self.tokens, "shares": self.shares, "brightest": most, "views": views}


class AttentionPart:
    """Its button and handler; the viewer holds what was found."""

    def __init__(self, client: ServingClient, viewer: Viewer):
        self.client, self.viewer = client, viewer
        self.show = gr.Button("Attention", size="sm", elem_id="attention", min_width=0)

    def connect(self, chat: gr.State, quiet: dict[str, Any]) -> None:
        self.show.click(self.on_show, chat, self.viewer.view, **quiet)

    async def on_show(self, chat: Chat):
        exchange = chat.exchanges[-1] if chat.exchanges else None
        replies = exchange.replies if exchange and not chat.running else []
        images = chat.images()
        found = {}
        for side, reply in enumerate(replies):
            if reply is not None and reply.text:
                sent = chat.sent(side)
                found[str(side)] = packed = (await self._found(chat, side, reply)).packed()
                for view in packed["views"]:
                    view["place"] = next(n for n, image in enumerate(images) if image is sent[view["number"]])
        if not found:
            raise _error("There is no whole answer yet.")
        if not chat.exchanges or chat.exchanges[-1] is not exchange:  # cleared, or asked on meanwhile
            return gr.skip()
        return gr.HTML(attention=json.dumps(found))

    async def _found(self, chat: Chat, side: int, reply: Reply) -> Shown:
        if not any(each.images for each in chat.exchanges):
            raise _error("There is no image in this conversation.")
        if not reply.token_ids:
            raise _error(f"The server that runs {reply.model} doesn't tell where it looked.")
        body = {"model": reply.model, "messages": chat.messages(side), "token_ids": reply.token_ids}
        try:
            return Shown.from_reply(await self.client.attention_map(body))
        except ServeError as error:
            raise _error(str(error)) from error
        except (KeyError, ValueError, OSError, binascii.Error) as error:
            logger.warning("a worker's attention map can't be read: %r", error)
            raise _error("The worker's answer can't be read; it may be of another version.") from error


def _error(words: str) -> gr.Error:
    return gr.Error(words, title="Where the model looked", print_exception=False)
