"""The large image of the page, with its tools and a strip of all images. What is shown of which is in the chat.

Zoom, shift, keys and the attention map drawn over it are the browser's (assets/viewer.js).
"""

import html
import logging
from pathlib import Path
from typing import Any

import gradio as gr

from llava.serve.client import ServingClient
from llava.serve.protocol import ServeError
from llava.serve.web.chat_state import Chat, UploadedImage
from llava.serve.web.memory_budget import DrawnViews
from llava.serve.web.scans import Scan

logger = logging.getLogger(__name__)

_ASSETS = Path(__file__).parents[1] / "assets"
SCRIPT = "".join((_ASSETS / name).read_text("utf-8") for name in ("viewer.js", "attention.js"))
TOOLS = (
    ("previous", "‹", "Previous image (←)"),
    ("next", "›", "Next image (→)"),
    ("smaller", "−", "Smaller (−)"),
    ("larger", "+", "Larger (+)"),
    ("fit", "Fit", "Whole image (0)"),
)
EMPTY = (
    "Add images with the paper clip, or drop them on the question: photographs, DICOM files and series, NIfTI volumes."
)


class Viewer:
    """`view` is the component; it triggers `select` with what was clicked: a number of the strip, or a tool."""

    def __init__(self, client: ServingClient, drawn: DrawnViews):
        self.client, self.drawn = client, drawn
        self.view = gr.HTML(
            page_of([], "", "", False), elem_id="viewer", js_on_load=SCRIPT, apply_default_css=False, attention=""
        )

    async def html(self, chat: Chat, model: str | None) -> str:
        """What the component shows.

        Raises:
            LlavaError, ServeError: the current scan's view can't be opened.
        """
        images, scan = chat.images(), current_scan(chat)
        strip = _strip(chat, images)
        slices = ""
        if scan is not None:
            view = await self.drawn.draw(scan)
            words = f"{scan.title}: {_shown(view.facts)}"
            slices = scan.slices_url
            shown = [(f"{slices}{scan.place}", scan.title)]
        elif images:
            number = len(images) - 1 if chat.looked is None else chat.looked
            image = images[number]
            words = f"Image {number + 1} of {len(images)}" + (f": {_shown(image.said)}" if image.said else "")
            shown = [(image.large, f"Image {number + 1}")]
        else:
            return page_of([], "", "", False)
        if chat.is_compared:
            seen, more = await self._as_model_sees(scan or image, model)
            shown += [(url, more) for url in seen]
            words += f". {more}"
        return page_of(shown, words, strip, chat.is_compared, slices)

    def fault(self, chat: Chat, words: str) -> str:
        """What the component shows where an image can't be."""
        return page_of([], words, _strip(chat, chat.images()), chat.is_compared)

    async def _as_model_sees(self, image: UploadedImage | Scan, model: str | None) -> tuple[list[str], str]:
        """(images as data: URLs, what they are)."""
        if not model:
            return [], "No model is chosen"
        view = await self.drawn.image(image) if isinstance(image, Scan) else image
        message = {"role": "user", "content": [view.part(), {"type": "text", "text": "?"}]}
        try:
            return await self.client.seen_images(
                {"model": model, "messages": [message]}
            ), f"Beside it: what {model} sees"
        except ServeError as error:
            logger.info("what %s sees isn't known: %s", model, error)
            return [], f"What {model} sees isn't known: {error}"


def current_scan(chat: Chat) -> Scan | None:
    """The scan of which a view is shown large."""
    return chat.scans[chat.current] if chat.scans and chat.looked is None else None


def page_of(shown: list[tuple[str, str]], words: str, strip: str, is_compared: bool, slices: str = "") -> str:
    """HTML of the tools, the images (URL, what it is), a line on them and the strip. `slices` is the first image's URL
    without the number of its slice, by which the browser asks for the others."""
    figures = "".join(
        f'<figure><img class="large" draggable="false" alt="{html.escape(said)}" src="{html.escape(url)}"></figure>'
        for url, said in shown
    )
    buttons = "".join(_tool(*tool) for tool in TOOLS)
    pressed = "true" if is_compared else "false"
    buttons += (
        f'<button type="button" data-do="compare" aria-pressed="{pressed}" '
        'title="The image beside what the model gets of it (m)">As the model sees it</button>'
    )
    hint = "" if shown or strip else f'<p class="hint">{EMPTY}</p>'
    return (
        f'<div class="stage{"" if shown else " empty"}" data-slices="{html.escape(slices)}">'
        f'<div class="tools" role="group" aria-label="Image">{buttons}</div>'
        f'<div class="sheet">{figures}</div><div class="maps"></div>{hint}'
        f'<p class="looked" aria-live="polite"></p></div><p class="words">{html.escape(words)}</p>'
        f'<div class="strip" role="group" aria-label="Images">{strip}</div>'
    )


def _tool(name: str, sign: str, words: str) -> str:
    return f'<button type="button" data-do="{name}" aria-label="{words}" title="{words}">{sign}</button>'


def _strip(chat: Chat, images: list[UploadedImage]) -> str:
    """A button for each image, then for each scan. The view of a scan that was asked about is seen once: as the image
    that it is, or, while it is still the one that is chosen, as the scan."""
    scan = current_scan(chat)
    looked = len(images) - 1 if chat.looked is None else chat.looked
    items = [(image.thumbnail, f"Image {number}") for number, image in enumerate(images, 1)]
    items += [(each.icon, each.title) for each in chat.scans]
    place = len(images) + chat.current if scan is not None else looked
    asked = len(images) - len(chat.draft)
    chosen = [each.view_key for each in chat.scans]
    hidden = {number for number, image in enumerate(images[:asked]) if image.view in chosen} - {place}
    parts = []
    for number, (url, words) in enumerate(items):
        if number in hidden:
            continue
        words = html.escape(words)
        parts.append(
            f'<span class="item"><button type="button" data-image="{number}" title="{words}" '
            f'aria-pressed="{"true" if number == place else "false"}"><img alt="{words}" src="{url}"></button>'
        )
        if asked <= number:
            parts.append(
                f'<button type="button" class="remove" data-remove="{number}" aria-label="Remove {words}" '
                f'title="Remove {words}">×</button>'
            )
        parts.append("</span>")
    return "".join(parts)


def _shown(facts: dict[str, Any]) -> str:
    """How a scan is shown, in words."""
    return "; ".join(str(line) for line in facts.get("shown", ()))
