"""The page's view of where the model looked: for a chosen token of an answer, attention drawn on the images."""

import base64
import binascii
import html
import io
import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from llava.images import png_data_url
from llava.serve.protocol import ServeError
from llava.serve.web.chat_state import Chat

logger = logging.getLogger(__name__)

EXPLAINED = """Which parts of its images the model read when it made a token of its last answer: attention's weights,
averaged over all heads and layers, on the image as the vision tower sees it. The more a token's colour, the more of
its attention went to images. Attention shows what was read, not why something was said."""
SHOWN_SIZE = 360  # pixels of a view's side
OPACITY = 0.75


@dataclass(frozen=True)
class Shown:
    """A worker's attention map, unpacked; `views` are (image's number, image, weights of all tokens)."""

    tokens: list[str]
    shares: list[float]
    views: list[tuple[int, Image.Image, np.ndarray]]

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> "Shown":
        views = []
        for view in reply["views"]:
            weights = np.frombuffer(base64.b64decode(view["weights"]), "<f2").astype(np.float32)
            weights = weights.reshape(len(reply["tokens"]), view["side"], view["side"])
            image = Image.open(io.BytesIO(base64.b64decode(view["image"].partition(",")[2])))
            views.append((view["number"], image.convert("RGB"), weights))
        return cls(reply["tokens"], reply["shares"], views)

    def highlighted(self) -> list[tuple[str, float]]:
        """Tokens with the share of their attention that images got, the highest of all as 1."""
        most = max(self.shares) or 1.0
        return [(token or "␣", share / most) for token, share in zip(self.tokens, self.shares, strict=True)]

    def drawn(self, token: int) -> str:
        """HTML of all views for one token, with what the colours mean in figures."""
        if not self.views:
            return "<p>The model was given no image here.</p>"
        brightest = max(float(weights[token].max()) for _, _, weights in self.views)
        images = "".join(
            f'<img class="attention" alt="Image {number + 1}{words}" src="{png_data_url(drawn)}">'
            for number, image, weights in self.views
            for words, drawn in (
                (" as the model saw it", _shown_size(image)),
                (", where the model looked", overlay(image, weights[token] / (brightest or 1.0))),
            )
        )
        said = html.escape(self.tokens[token].strip()) or "a blank"
        return (
            f"<p>Token {token + 1} of {len(self.tokens)}, <b>{said}</b>: {self.shares[token]:.1%} of its attention "
            f'went to images; the brightest patch got {brightest:.2%}.</p><span class="attentions">{images}</span>'
        )


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """`heat` `[side, side]` from 0 to 1 in colour over an image; dark where little was read."""
    from matplotlib import colormaps

    strength = np.asarray(_shown_size(Image.fromarray(heat.astype(np.float32)))).clip(0, 1)[..., None]
    base = np.asarray(_shown_size(image), np.float32)
    colour = colormaps["inferno"](strength[..., 0])[..., :3] * 255
    mixed = base * (1 - OPACITY * strength) + colour * OPACITY * strength
    return Image.fromarray(mixed.round().astype(np.uint8))


def _shown_size(image: Image.Image) -> Image.Image:
    return image.resize((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.BICUBIC)


class AttentionPart:
    """Its components and handlers; what was found belongs to one visitor, in `found`."""

    def __init__(self, client):
        self.client = client
        self.found = gr.State(None, time_to_live=3600)
        with gr.Accordion("Where the model looked", open=False, elem_id="attention-part"):
            gr.Markdown(EXPLAINED)
            self.side = gr.Radio([("First", 0), ("Second", 1)], value=0, label="Whose answer", visible=False)
            self.show = gr.Button("Show for the last answer", elem_id="attention")
            with gr.Column(visible=False) as self.shown:
                self.tokens = gr.HighlightedText(
                    label="Choose a token", combine_adjacent=False, show_legend=False, elem_id="attention-tokens"
                )
                self.number = gr.Slider(1, 2, 1, step=1, label="Token", elem_id="attention-number")
                self.views = gr.HTML(elem_id="attention-views")

    def connect(self, chat: gr.State, quiet: dict[str, Any]) -> None:
        view = [self.found, self.shown, self.tokens, self.number, self.views]
        self.show.click(self.on_show, [chat, self.side], view, **quiet)
        self.tokens.select(self.on_select, None, self.number, **quiet)
        self.number.change(self.on_number, [self.found, self.number], self.views, **quiet)

    async def on_show(self, chat: Chat, side: int):
        exchange = chat.exchanges[-1] if chat.exchanges else None
        reply = exchange.replies[side] if exchange else None
        if chat.running or reply is None or not reply.text:
            raise _error("There is no whole answer yet.")
        if not any(each.images for each in chat.exchanges):
            raise _error("There is no image in this conversation.")
        if not reply.token_ids:
            raise _error("The server that runs this model doesn't tell where it looked.")
        body = {"model": reply.model, "messages": chat.messages(side), "token_ids": reply.token_ids}
        try:
            found = Shown.from_reply(await self.client.attention_map(body))
        except ServeError as error:
            raise _error(str(error)) from error
        except (KeyError, ValueError, binascii.Error) as error:
            logger.warning("a worker's look can't be read: %r", error)
            raise _error("The worker's answer can't be read; it may be of another version.") from error
        first = int(np.argmax(found.shares))
        return (
            found,
            gr.Column(visible=True),
            found.highlighted(),
            gr.Slider(maximum=max(2, len(found.tokens)), value=first + 1),
            found.drawn(first),
        )

    async def on_select(self, event: gr.SelectData):
        return (event.index[0] if isinstance(event.index, (list, tuple)) else event.index) + 1

    async def on_number(self, found: Shown | None, number: float):
        if found is None:
            return gr.skip()
        return found.drawn(min(int(number), len(found.tokens)) - 1)


def _error(words: str) -> gr.Error:
    return gr.Error(words, title="Where the model looked", print_exception=False)
